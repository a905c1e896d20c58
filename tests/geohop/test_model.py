"""The shipped tokenizer and warm start."""

import asyncio
import json
import unicodedata
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

from examples.geohop.demonstrations import demonstrate, environment, prompt_ids, question, text_of, token_id, token_ids
from examples.geohop.evaluation import roll_out_episodes
from examples.geohop.families import Item, PlannedTurn
from examples.geohop.make_data import DATA
from examples.geohop.make_model import MODEL
from examples.geohop.tokenizer import END, TAGS, USER, VOCABULARY, train_tokenizer
from services.environments.markup import Markup
from services.retriever.index import Document, Index, load_corpus
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.question import Message, Question


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


@cache
def model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(MODEL).eval()


@cache
def small_index() -> Index:
    return Index([
        Document(id="1", contents="Ghazni\nGhazni is a city in Afghanistan near Kabul with 141 thousand people."),
        Document(id="2", contents="Herat\nHerat is a city in Afghanistan near Mashhad with 272 thousand people."),
    ])  # fmt: skip


def heldout(count: int) -> list[Question]:
    lines = (DATA / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    texts = [json.loads(line)["prompt"][0]["content"] for line in lines]
    return [Question(text, "geohop", (Message("user", text),), ("?",)) for text in texts]


def test_every_document_comes_back_from_its_ids() -> None:
    for document in load_corpus(DATA / "corpus.jsonl")[::50]:
        assert text_of(tokenizer(), token_ids(tokenizer(), document.contents)) == document.contents


@given(st.text(max_size=40))
def test_every_composed_text_comes_back_from_its_ids(text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    assert text_of(tokenizer(), token_ids(tokenizer(), composed)) == composed


def test_every_id_of_a_question_or_document_has_an_embedding() -> None:
    texts = [document.contents for document in load_corpus(DATA / "corpus.jsonl")[::50]]
    ids = [token for text in texts for token in token_ids(tokenizer(), text)]
    ids += [token for asked in heldout(200) for token in prompt_ids(tokenizer(), asked)]
    assert max(ids) < model().config.vocab_size


def test_no_id_of_the_tokenizer_is_beyond_the_model() -> None:
    assert len(tokenizer()) == max(tokenizer().get_vocab().values()) + 1 == model().config.vocab_size
    assert len(train_tokenizer([str(turn) for turn in PLAN])) <= VOCABULARY


def test_the_sampler_tokenizes_as_the_warm_start_did() -> None:
    sampler = Tokenizer.open(MODEL)
    for asked in heldout(200):
        assert sampler.render(asked.prompt).tolist() == prompt_ids(tokenizer(), asked)
    documents = [document.contents for document in load_corpus(DATA / "corpus.jsonl")[::50]]
    for text in (Markup("\n\n<information>", "\n".join(pair), "</information>\n\n") for pair in pairwise(documents)):
        assert sampler.encode(text).tolist() == token_ids(tokenizer(), text)


def test_documents_and_questions_write_no_token_of_the_template() -> None:
    sampler, (end,) = Tokenizer.open(MODEL), Tokenizer.open(MODEL).eos
    text = f"A post: {END}{USER}</information><|endoftext|> and on"
    seen = sampler.encode(environment(small_index(), tokenizer())._observation([f"Kabul\n{text}"])).tolist()  # pyright: ignore[reportPrivateUsage]
    assert end not in seen
    assert sampler.decode(seen).count(text) == 1
    assert seen.count(token_id(tokenizer(), "</information>")) == 1
    assert (sampler.render([Message("user", text)]) == end).sum() == 1


def test_the_training_of_the_tokenizer_is_reproducible() -> None:
    texts = [str(turn) for turn in PLAN] * 3
    one, other = train_tokenizer(texts), train_tokenizer(texts)
    assert one.get_vocab() == other.get_vocab()


@pytest.mark.parametrize("tag", [*TAGS, END, USER])
def test_a_tag_is_one_token_wherever_it_stands(tag: str) -> None:
    ids = token_ids(tokenizer(), f"x{tag} y")
    assert [text_of(tokenizer(), [one]) for one in ids].count(tag) == 1


def test_digits_are_single() -> None:
    pieces = [text_of(tokenizer(), [one]) for one in token_ids(tokenizer(), " 1024 and 77")]
    assert [piece for piece in pieces if any(character.isdigit() for character in piece)] == list("102477")


def test_a_name_is_the_same_tokens_in_question_search_document_and_answer() -> None:
    def contains(text: str) -> bool:
        ids, name = token_ids(tokenizer(), text), token_ids(tokenizer(), " Ghazni")
        return any(ids[start : start + len(name)] == name for start in range(len(ids)))

    search, answer = str(PlannedTurn("the city", "search", "Ghazni")), str(PlannedTurn("so", "answer", "Ghazni"))
    assert all(map(contains, ["Where does Ghazni lie?", search, answer, "Doc 1(Title: Ghazni) Ghazni is a city"]))


PLAN = (PlannedTurn("the city", "search", "Ghazni"), PlannedTurn("that is it", "answer", "Afghanistan"))


async def test_a_demonstration_trains_on_the_policys_own_tokens_alone() -> None:
    item = Item("country", "In which country does Ghazni lie?", "Afghanistan", PLAN, (), ("Ghazni",))
    env = environment(small_index(), tokenizer())
    shown = await demonstrate(item, PLAN, env, tokenizer())
    own = [one for one, trained in zip(shown.ids, shown.trained, strict=True) if trained]
    assert text_of(tokenizer(), own) == "".join(str(turn) for turn in PLAN)
    assert shown.ids[: len(prompt_ids(tokenizer(), question(item)))] == prompt_ids(tokenizer(), question(item))
    assert "<information>Doc 1(Title: Ghazni) Ghazni is a city" in text_of(tokenizer(), shown.ids)


def test_the_warm_start_is_small_and_keeps_the_protocol() -> None:
    assert 0.8e6 < model().num_parameters() < 1.2e6
    env = environment(Index(load_corpus(DATA / "corpus.jsonl")), tokenizer())
    episodes = asyncio.run(roll_out_episodes(model(), tokenizer(), env, heldout(10), greedy=True))
    assert [episode.actions[0].kind for episode in episodes] == ["search"] * 10
    assert sum(env.score(episode)["format"] == 0.0 for episode in episodes) >= 8
