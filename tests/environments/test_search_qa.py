from dataclasses import FrozenInstanceError
from typing import Any, Literal

import pytest

from services.environments.search_qa import HINT, Episode, SearchQA, parse_action
from treegrpo.question import Message, Question

PROMPT = "Answer between the tags, for example <answer> Beijing </answer>. Which capital does Ghazni's country have?"
SEARCH = "<think>the country</think><search> Ghazni </search>"
ANSWER = "<think>so</think><answer> Kabul </answer>"


class Shelf:
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


def make(shelf: Shelf | None = None, **options: Any) -> SearchQA:
    settings: dict[str, Any] = {"topk": 2, "max_observation_tokens": 100, "count_tokens": count_words}
    return SearchQA(shelf or Shelf("Ghazni\nA city.", "Kabul\nA capital."), **settings | options)


async def play(env: SearchQA, *actions: str, asked: Question | None = None) -> Episode:
    """Perform the actions; the last one is the last turn."""
    state = await env.start(asked or question())
    for place, action in enumerate(actions, start=1):
        state = (await env.step(state, action, last=place == len(actions))).state
    return state


async def test_a_search_is_answered_with_information() -> None:
    shelf = Shelf("Ghazni\nA city.", "Kabul\nA capital.", "Herat\nNot asked for.")
    env = make(shelf)
    outcome = await env.step(await env.start(question()), SEARCH, last=False)
    assert shelf.queries == ["Ghazni"]
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
    shelf = Shelf()
    env = make(shelf)
    outcome = await env.step(await env.start(question()), "<think>hm</think> Kabul", last=False)
    assert outcome.observation == HINT
    assert not outcome.valid
    assert shelf.queries == []
    assert len(outcome.state.actions) == 1


async def test_the_answer_quoted_in_the_prompt_is_no_answer() -> None:  # trap 1
    env = make()
    for actions in ([SEARCH, SEARCH], ["I do not know"], [SEARCH, "<think>"]):
        state = await play(env, *actions, asked=question("Beijing"))
        assert env.score(state) == {"em": 0.0, "format": -0.2}
        assert env.metrics(state)["f1"] == 0.0


async def test_an_answer_tag_in_a_document_is_no_answer() -> None:  # trap 1
    env = make(Shelf("Trick\n<answer> Kabul </answer>"))
    assert env.metrics(await play(env, SEARCH, SEARCH))["em"] == 0.0


@pytest.mark.parametrize("limit", range(6, 40))
async def test_a_long_observation_loses_text_but_never_its_tag(limit: int) -> None:  # trap 5
    def count(text: str) -> int:
        return len(text) // 4

    env = make(Shelf("One\n" + "many words " * 20, "Two\nmore"), max_observation_tokens=4 * limit, count_tokens=count)
    observation = (await env.step(await env.start(question()), SEARCH, last=False)).observation
    assert observation is not None
    assert observation.startswith("\n\n<information>")
    assert observation.endswith("</information>\n\n")
    whole = "\n\n<information>Doc 1(Title: One) " + "many words " * 20 + "\nDoc 2(Title: Two) more\n</information>\n\n"
    assert count(observation) in {4 * limit, min(4 * limit, count(whole))}


async def test_the_last_turn_uses_no_tool_and_is_a_leaf() -> None:  # trap 13
    shelf = Shelf("Ghazni\nA city.")
    env = make(shelf)
    first = await env.step(await env.start(question()), SEARCH, last=False)
    last = await env.step(first.state, SEARCH, last=True)
    assert last.observation is None
    assert last.tool_calls == ()
    assert shelf.queries == ["Ghazni"]
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


def test_an_action_is_what_comes_first() -> None:
    assert parse_action("<think>a</think><search>x</search><answer>y</answer>").kind == "search"
    assert not parse_action("<think>a</think><search>x</search><answer>y</answer>").well_formed
