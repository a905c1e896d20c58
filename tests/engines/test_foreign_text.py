"""Text that is not our own never writes a control token, and ordinary text has the ids that the library gives it."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from services.environments.markup import Markup
from services.sampler.engines.embedded import EmbeddedEngine
from services.sampler.text.tokenizer import Tokenizer
from tests.engines import builders
from tests.engines.tokenizer_kinds import CALL, END, KINDS, MASK, ROOM, SPECIAL, USER, make
from treegrpo.core.question import Message
from treegrpo.errors import ModelError

CONTROL = (*SPECIAL, USER, CALL, MASK)
PARTS = (
    *CONTROL,
    ROOM,
    "Quillmere",
    " ",
    "\n",
    "<",
    "|",
    ">",
    "end|>",
    "<|",
    "[MA",
    "SK]",
    "the river",
    "'s",
    "é",
    "e\u0301",
    "7",
    "☃",
)
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=8).map("".join)


@cache
def plain(kind: str) -> PreTrainedTokenizerFast:
    return make(kind)


@cache
def ours(kind: str) -> Tokenizer:
    return Tokenizer(plain(kind), frozenset())


def with_template(kind: str, template: str) -> Tokenizer:
    tokenizer = make(kind)
    tokenizer.chat_template = template
    return Tokenizer(tokenizer, frozenset())


def control_ids(kind: str) -> set[int]:
    return {plain(kind).get_vocab()[text] for text in CONTROL}


def is_ordinary(text: str) -> bool:
    return not any(part.lower() in text.lower() for part in CONTROL)


def library_ids(kind: str, chat: list[Message]) -> list[int]:
    messages = [{"role": message.role, "content": message.content} for message in chat]
    text = plain(kind).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return plain(kind).encode(str(text), add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS.filter(is_ordinary))
def test_ordinary_text_has_the_ids_of_the_library(kind: str, text: str) -> None:
    assert ours(kind).encode(text).tolist() == plain(kind).encode(text, add_special_tokens=False)
    chat = [Message("system", "the river"), Message("user", text)]
    assert ours(kind).render(chat).tolist() == library_ids(kind, chat)


@pytest.mark.parametrize("kind", KINDS)
def test_markup_has_the_ids_of_the_library_around_ordinary_text(kind: str) -> None:
    text = Markup(f"\n{USER}the ", "river's end", f"{END} {MASK}\n")
    assert ours(kind).encode(text).tolist() == plain(kind).encode(str(text), add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_foreign_text_never_writes_a_control_token(kind: str, text: str) -> None:
    known = control_ids(kind) - {plain(kind).get_vocab()["<unk>"]}
    assert known.isdisjoint(ours(kind).encode(text).tolist())
    assert ours(kind).encode(Markup(END, text, CALL)).tolist().count(plain(kind).get_vocab()[END]) == 1
    frame = ours(kind).render([Message("user", "river"), Message("user", "river")]).tolist()
    seen = ours(kind).render([Message("user", text), Message("user", "river")]).tolist()
    assert [token for token in seen if token in known] == [token for token in frame if token in known]


@pytest.mark.parametrize("kind", ["byte-level"])
@given(text=TEXTS)
def test_no_letter_of_foreign_text_is_lost(kind: str, text: str) -> None:
    assert ours(kind).decode(ours(kind).encode(text)) == plain(kind).backend_tokenizer.normalizer.normalize_str(text)


@pytest.mark.parametrize(
    ("template", "content", "written"),
    [
        ("<{{ messages[0].content }}>", "|end|", "<|end|>"),
        ("<|{{ messages[0].content | trim }}", "\n end|>", "<|end|>"),
        ("{{ messages[0].content | lower }}", "<|END|>", "<|end|>"),
        ("{{ messages[0].content | upper }}", "[mask]", "[MASK]"),
        ("{{ messages[0].content | tojson }}{{ messages[0].content }}", END, f'"{END}"{END}'),
        ("{{ messages[0].content.split('</s>')[-1] }}", "a</s>b", "a</s>b"),
    ],
)
def test_what_a_template_does_to_a_message_makes_no_token(template: str, content: str, written: str) -> None:
    tokenizer = with_template("byte-level", template)
    ids = tokenizer.render([Message("user", content)])
    assert control_ids("byte-level").isdisjoint(ids.tolist())
    assert tokenizer.decode(ids).lower() == written.lower()


def test_a_template_that_cuts_a_control_string_is_refused() -> None:
    tokenizer = with_template("byte-level", "{{ messages[0].content[:5] }}")
    assert tokenizer.decode(tokenizer.render([Message("user", "the river")])) == "the r"
    with pytest.raises(ModelError, match="cuts a message in the middle of a control string"):
        tokenizer.render([Message("user", f"a{END}")])


def test_a_template_that_fails_is_a_sentence_with_the_roles() -> None:
    tokenizer = with_template("byte-level", "{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(ModelError, match=r"roles user, user \(Roles must alternate\); fix it or the data"):
        tokenizer.render([Message("user", "a"), Message("user", "b")])


def test_a_control_token_of_one_letter_is_plain_in_messages() -> None:
    tokenizer = make("byte-level")
    tokenizer.add_special_tokens({"eos_token": "$"})
    end = tokenizer.convert_tokens_to_ids("$")
    tokenizer.chat_template = "{{ messages[0].content }}$"
    for content in ("$$ 5 $", "the river$"):
        ids = Tokenizer(tokenizer, frozenset()).render([Message("user", content)]).tolist()
        assert ids.count(end) == 1


def test_a_surrogate_without_a_partner_is_the_replacement_character() -> None:
    tokenizer = ours("byte-level")
    assert tokenizer.decode(tokenizer.encode("a\ud800b \ud83d\ude00")) == "a\ufffdb \U0001f600"
    assert "a\ufffdb" in tokenizer.decode(tokenizer.render([Message("user", "a\ud800b")]))


def test_what_is_made_of_markup_is_plain_again() -> None:
    text = Markup(END, "river", END)
    end = plain("byte-level").get_vocab()[END]
    assert [(ours("byte-level").encode(one) == end).sum() for one in (text, text[:], text + "", text.strip())] == [2, 0, 0, 0]
    assert [(ours("byte-level").encode(one) == end).sum() for one in (copy.copy(text), copy.deepcopy(text))] == [2, 2]


def test_a_tokenizer_that_is_not_fast_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("byte-level").save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ModelError, match="no fast version"):
        Tokenizer.open(tmp_path)


def test_an_id_beyond_the_models_vocabulary_is_refused(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "qwen2")
    model = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.open(tmp_path)
    tokenizer.check_fits(len(tokenizer), tmp_path)
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    own.add_tokens("[PAD]")
    own.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=rf"the id {len(tokenizer)} \('\[PAD\]'\), and the model's {model['vocab_size']} ids end at"
    ):
        Tokenizer.open(tmp_path).check_fits(model["vocab_size"], tmp_path)


async def test_the_embedded_engine_refuses_a_tokenizer_beyond_its_model(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "qwen2")
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    own.add_tokens("[PAD]")
    own.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="resize its embeddings"):
        await EmbeddedEngine.from_directory(tmp_path, max_running=1, max_context=64, cache_tokens=64, seed=0)
