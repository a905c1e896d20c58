import re
import time
from dataclasses import FrozenInstanceError
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.environments.search_qa import HINT, Action, Episode, SearchQA, parse_action
from services.environments.truncation import fitting_length
from treegrpo.core.question import Message, Question
from treegrpo.net.limits import QUERY_LENGTH
from treegrpo.wire.size_limits import TEXT_LENGTH

pytestmark = pytest.mark.pure

PROMPT = "Answer between the tags, for example <answer> Beijing </answer>. Which capital does Ghazni's country have?"
SEARCH = "<think>the country</think><search> Ghazni </search>"
ANSWER = "<think>so</think><answer> Kabul </answer>"


class FakeRetriever:
    """A retriever of fixed documents, which remembers what it was asked."""

    def __init__(self, *documents: str) -> None:
        self.documents = list(documents)
        self.queries: list[str] = []

    async def search(self, query: str, topk: int) -> list[str]:
        self.queries.append(query)
        return self.documents[:topk]


def question(target: str = "Kabul", prompt: str = PROMPT) -> Question:
    return Question("geohop/test/0", "geohop", (Message("user", prompt),), (target,))


def count_words(text: str) -> int:
    return len(text.split())


def make(retriever: FakeRetriever | None = None, **options: Any) -> SearchQA:
    settings: dict[str, Any] = {"topk": 2, "max_observation_tokens": 100, "count_tokens": count_words}
    return SearchQA(retriever or FakeRetriever("Ghazni\nA city.", "Kabul\nA capital."), **settings | options)


async def play(env: SearchQA, *actions: str, asked: Question | None = None) -> Episode:
    """Perform the actions; the last one is the last turn."""
    state = await env.start(asked or question())
    for place, action in enumerate(actions, start=1):
        state = (await env.step(state, action, last=place == len(actions))).state
    return state


async def test_a_search_is_answered_with_information() -> None:
    retriever = FakeRetriever("Ghazni\nA city.", "Kabul\nA capital.", "Herat\nNot asked for.")
    env = make(retriever)
    outcome = await env.step(await env.start(question()), SEARCH, last=False)
    assert retriever.queries == ["Ghazni"]
    assert outcome.observation == (
        "\n\n<information>Doc 1(Title: Ghazni) A city.\nDoc 2(Title: Kabul) A capital.\n</information>\n\n"
    )
    assert [(call.name, call.arguments) for call in outcome.tool_calls] == [("search", "Ghazni")]
    assert outcome.valid


async def test_an_answer_ends_the_episode() -> None:
    env = make()
    outcome = await env.step(await env.start(question()), ANSWER, last=False)
    assert outcome.observation is None
    assert outcome.tool_calls == ()
    assert env.score(outcome.state) == {"em": 1.0, "format": 0.0}


async def test_anything_else_spends_the_turn_and_gets_a_hint() -> None:
    retriever = FakeRetriever()
    env = make(retriever)
    outcome = await env.step(await env.start(question()), "<think>hm</think> Kabul", last=False)
    assert outcome.observation == HINT
    assert not outcome.valid
    assert retriever.queries == []
    assert len(outcome.state.actions) == 1


async def test_the_answer_quoted_in_the_prompt_is_no_answer() -> None:  # trap 1
    env = make()
    for actions in ([SEARCH, SEARCH], ["I do not know"], [SEARCH, "<think>"]):
        state = await play(env, *actions, asked=question("Beijing"))
        assert env.score(state) == {"em": 0.0, "format": -0.2}
        assert env.metrics(state)["f1"] == 0.0


async def test_an_answer_tag_in_a_document_is_no_answer() -> None:  # trap 1
    env = make(FakeRetriever("Trick\n<answer> Kabul </answer>"))
    assert env.metrics(await play(env, SEARCH, SEARCH))["em"] == 0.0


@pytest.mark.parametrize("limit", range(6, 40))
async def test_a_long_observation_loses_text_but_never_its_tag(limit: int) -> None:  # trap 5
    def count(text: str) -> int:
        return len(text) // 4

    env = make(FakeRetriever("One\n" + "many words " * 20, "Two\nmore"), max_observation_tokens=4 * limit, count_tokens=count)
    observation = (await env.step(await env.start(question()), SEARCH, last=False)).observation
    assert observation is not None
    assert observation.startswith("\n\n<information>")
    assert observation.endswith("</information>\n\n")
    whole = "\n\n<information>Doc 1(Title: One) " + "many words " * 20 + "\nDoc 2(Title: Two) more\n</information>\n\n"
    assert count(observation) in {4 * limit, min(4 * limit, count(whole))}


@pytest.mark.parametrize("letters", [1, 10_000, 4_000_000])
async def test_large_documents_are_cut_with_few_tokenisations(letters: int) -> None:
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(len(text))
        return len(text) // 5

    env = make(FakeRetriever(*["Title\n" + "a" * letters] * 3), topk=3, max_observation_tokens=512, count_tokens=count)
    observation = (await env.step(await env.start(question()), SEARCH, last=False)).observation
    assert observation is not None
    assert observation.endswith("</information>\n\n")
    assert count(observation) == min(512, len(observation) // 5)
    assert len(observation) > min(2500, 3 * letters)
    assert len(counted) < 9
    assert max(counted) < 3 * 512 * 8


@given(st.text("ab \n", max_size=400), st.integers(1, 60), st.sampled_from([1, 3, 7, 40]), st.integers(0, 9))
def test_what_fits_fits_and_no_more_would(text: str, most: int, letters: int, frame: int) -> None:
    def count(beginning: str) -> int:
        return (frame + len(beginning)) // letters

    kept = fitting_length(text, most, count)
    assert count(text[:kept]) <= most or kept == 0
    assert kept == len(text) or count(text[:kept]) >= min(most, count(text[: kept + 1]) - 1)


async def test_a_query_is_no_longer_than_a_step_may_record() -> None:
    retriever = FakeRetriever("Ghazni\nA city.")
    outcome = await make(retriever).step(await make().start(question()), f"<search>{'x' * 100_000}</search>", last=False)
    assert retriever.queries == ["x" * QUERY_LENGTH]
    assert sum(len(call.name) + len(call.arguments) for call in outcome.tool_calls) <= TEXT_LENGTH


async def test_the_reward_can_have_the_shape_of_the_reference() -> None:
    env = make(reward_shape="tree_grpo")
    totals = [sum(env.score(await play(env, SEARCH, action)).values()) for action in
              (ANSWER, "<answer>Kabul</answer>", ANSWER.replace("Kabul", "Herat"), "<answer>Herat</answer>", "hm")]  # fmt: skip
    assert totals == pytest.approx([1.0, 0.8, 0.2, 0.1, 0.0])


async def test_the_last_turn_uses_no_tool_and_is_a_leaf() -> None:  # trap 13
    retriever = FakeRetriever("Ghazni\nA city.")
    env = make(retriever)
    first = await env.step(await env.start(question()), SEARCH, last=False)
    last = await env.step(first.state, SEARCH, last=True)
    assert last.observation is None
    assert last.tool_calls == ()
    assert retriever.queries == ["Ghazni"]
    assert env.metrics(last.state)["searches"] == 1.0


@pytest.mark.parametrize("end", ["", "\n", "<|im_end|>", "<|eot_id|>\n", "</s>", " <|end|> "])
async def test_the_format_knows_no_chat_template(end: str) -> None:  # trap 15
    env = make()
    state = await play(env, "\n<think>\nthe country\n</think>\n\n<search> Ghazni </search>" + end, " " + ANSWER + end)
    assert env.score(state) == {"em": 1.0, "format": 0.0}


@pytest.mark.parametrize(
    "action",
    [
        "<answer> Kabul </answer>",
        "so <think>so</think><answer> Kabul </answer>",
        "<think>so</think> then <answer> Kabul </answer>",
        "<think>so<answer> Kabul </answer>",
        "<think>so</think><information>x</information><answer> Kabul </answer>",
        "<think>a</think><think>b</think><answer> Kabul </answer>",
    ],
)
async def test_a_right_answer_in_broken_format_costs_the_format_component_alone(action: str) -> None:
    env = make(format_penalty=0.3)
    assert env.score(await play(env, SEARCH, action)) == {"em": 1.0, "format": -0.3}


async def test_a_broken_turn_costs_once_however_many_there_are() -> None:
    env = make()
    state = await play(env, "hm", "<search> Ghazni </search>", ANSWER)
    assert env.score(state) == {"em": 1.0, "format": -0.2}
    assert env.metrics(state) == {"em": 1.0, "f1": 1.0, "invalid_actions": 1.0, "searches": 1.0}


async def test_f1_can_be_the_reward_and_em_stays_a_metric() -> None:
    reward: Literal["f1"] = "f1"
    env = make(reward=reward)
    state = await play(env, "<think>so</think><answer> Kabul city </answer>")
    assert env.score(state) == {"f1": pytest.approx(2 / 3), "format": 0.0}
    assert env.metrics(state)["em"] == 0.0


async def test_branches_continue_from_one_state_without_touching_it() -> None:
    env = make()
    trunk = (await env.step(await env.start(question()), SEARCH, last=False)).state
    wrong = (await env.step(trunk, "<think>so</think><answer> Herat </answer>", last=True)).state
    right = (await env.step(await env.fork(trunk), ANSWER, last=True)).state
    assert (env.score(wrong)["em"], env.score(right)["em"]) == (0.0, 1.0)
    assert len(trunk.actions) == 1
    with pytest.raises(FrozenInstanceError):
        trunk.actions = ()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "thought",
    ["3 < 4 and 5 > 4", "a<b", "</b> <br/> <thinking>", "<|end|> is a token", "< think >", "a\x00\u2028<", "x" * 10_000],
)
def test_what_is_no_tag_of_the_protocol_may_stand_in_a_thought(thought: str) -> None:
    action = parse_action(f"<think>{thought}</think><search>{thought}</search>")
    assert action == Action("search", thought.strip(), well_formed=True)


@pytest.mark.parametrize(
    "tag", [f"<{mark}{name}>" for name in ("think", "search", "answer", "information") for mark in ("", "/")]
)
def test_a_tag_of_the_protocol_in_a_thought_breaks_the_format(tag: str) -> None:
    assert not parse_action(f"<think>so {tag} it is</think><answer> Kabul </answer>").well_formed
    assert not parse_action(f"<think>so</think><answer> Kabul {tag}</answer>").well_formed


@pytest.mark.parametrize(
    "text",
    ["<search>" * 65_536, "<answer><search>" * 32_768 + "</answer>", "</search><search>" * 32_768, "<" * 500_000, "<|" * 250_000,
     "<think>a</think><search>b</search>" + " " * 500_000 + "x", "<think>" + "<" * 500_000, "</answer>" * 50_000 + "<answer>"],
    ids=range(8),
)  # fmt: skip
def test_a_turn_is_parsed_in_linear_time(text: str) -> None:
    began = time.process_time()
    parse_action(text)
    assert time.process_time() - began < 1.0


@given(
    st.lists(st.sampled_from([f"<{mark}{name}>" for name in ("search", "answer", "think") for mark in ("", "/")] + ["x", "<"]))
)
def test_an_action_is_what_the_reference_expression_finds(parts: list[str]) -> None:
    text = "".join(parts)
    found = re.search(r"<(search|answer)>(.*?)</\1>", text, re.DOTALL)
    action = parse_action(text)
    assert (action.kind, action.text) == ((found[1], found[2].strip()) if found else ("invalid", ""))


def test_an_action_is_what_comes_first() -> None:
    assert parse_action("<think>a</think><search>x</search><answer>y</answer>").kind == "search"
    assert not parse_action("<think>a</think><search>x</search><answer>y</answer>").well_formed
