"""Fuzz targets that read foreign text: rows, documents, questions and messages."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from examples.geohop.make_model import MODEL
from learner.intake.leases.question_file import load_questions
from services.environments.search_qa import Action, Episode, SearchQA, parse_action
from services.retriever.index import load_corpus
from services.sampler.text.encoding import encode_text, render_prompt
from services.sampler.text.tokenizer import Tokenizer
from tests.engines.tokenizer_kinds import CALL, END, MASK, USER, make
from tests.fuzz.mutations import Mutation, bytewise, parse_mutations, tree
from treegrpo.core.question import Message, Question
from treegrpo.errors import DataError
from treegrpo.observability.log_setup import JsonFormatter, TextFormatter
from treegrpo.observability.printable_text import UNPRINTABLE, printable
from treegrpo.v1 import rollout_pb2
from treegrpo.wire.codec import question_from_pb, question_to_pb

CONTROL = (END, USER, CALL, MASK, "</s>", "<unk>", "<|endoftext|>", "<|im_end|>", "<|im_start|>user\n", "[INST]", "<|eot_id|>")
MARKUP = (
    "</information>",
    "<information>",
    "<answer>a</answer>",
    "<search>",
    "</search>",
    "<think>",
    "[bold red]",
    "[/]",
    ":smile:",
    "$x^2$",
)
ESCAPES = (
    "\x1b[31m",
    "\x1b]0;t\x07",
    "\r\n",
    "\nerror: x",
    "\x00",
    "\u2028",
    "\u202e",
    "\u200b",
    "%s",
    "{}",
    "{{ 7 }}",
    "\\",
    '"',
)
ODD = ("\ud800", "\udfff", "\ud83d\ude00", "\ufeff", "\ufffe", "e\u0301", "\u0301\u0327", "’", "—", "İ", "ß", "１", " ", "\u00a0")
TEXTS = st.tuples(
    st.lists(st.sampled_from((*CONTROL, *MARKUP, *ESCAPES, *ODD)) | st.text(max_size=3), max_size=6).map("".join),
    st.sampled_from((1, 1, 1, 1, 1, 1, 9, 999)),
).map(lambda drawn: drawn[0] * drawn[1])
LIMIT = 64
"""Tokens of an observation."""


@cache
def tokenizers() -> list[Tokenizer]:
    return [Tokenizer.open(MODEL), *(Tokenizer(make(kind), frozenset()) for kind in ("byte-level", "metaspace-first", "unigram"))]


@cache
def frames() -> list[list[int]]:
    """What the template writes around a question without a letter of a control string."""
    return [_controls(text, text.render([Message("user", "river")])) for text in tokenizers()]


def _controls(text: Tokenizer, ids: Any) -> list[int]:
    """The control tokens among ids, but for what an unknown letter is."""
    known = _known(text)
    return [token for token in ids.tolist() if token in known]


@cache
def _known(text: Tokenizer) -> set[int]:
    own = text._tokenizer  # pyright: ignore[reportPrivateUsage]
    return {number for number, token in own.added_tokens_decoder.items() if token.content not in ("<unk>", "    ", "Quillmere")}


def prompt(text: str) -> None:
    """Whatever a question says, its prompt has the control tokens of the template and no others."""
    which = len(text) % len(tokenizers())
    tokenizer, frame = tokenizers()[which], frames()[which]
    ids = asyncio.run(render_prompt(tokenizer, [Message("user", f"river{text}")]))
    assert _controls(tokenizer, ids) == frame
    tokenizer.decode(ids)


def observation(text: str) -> None:
    """Whatever documents say, an observation has the environment's tags, keeps its limit, and is no answer."""
    tokenizer = tokenizers()[0]
    env = SearchQA(None, topk=3, max_observation_tokens=LIMIT, count_tokens=lambda one: len(tokenizer.encode(one)))  # type: ignore[arg-type]
    seen = env._observation([text, f"Title\n{text}"])  # pyright: ignore[reportPrivateUsage]
    ids = asyncio.run(encode_text(tokenizer, seen))
    assert len(ids) <= LIMIT
    assert len(_controls(tokenizer, ids)) == 2
    action = parse_action(text)
    state = Episode(
        Question("q", "", (Message("user", text),), ("right", text or "?")), (Action("search", text, well_formed=True), action)
    )
    assert np.isfinite([*env.score(state).values(), *env.metrics(state).values()]).all()


ROW: dict[str, Any] = {
    "data_source": "made",
    "prompt": [{"role": "user", "content": "Where?"}],
    "reward_model": {"style": "rule", "ground_truth": {"target": ["there", 7, 1987.0]}},
    "extra_info": {"split": "train", "index": 0, "family": "easy"},
}
DOCUMENT: dict[str, Any] = {"id": "7", "contents": "Kabul\nKabul is large.", "title": "Kabul"}
MARKS = (b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"[", b"\x1f\x8b", b"PAR1")
ROWS = st.tuples(st.binary(min_size=1, max_size=16), TEXTS, st.sampled_from(MARKS))
Case = tuple[bytes, str, bytes]


def _file(sample: dict[str, Any], case: Case) -> bytes:
    """A file of two rows: one as it should be, one with ``text`` in it, its parts or its bytes changed."""
    drawn, text, mark = case
    which, parts, rest = parse_mutations(drawn)
    values = (text, [text], {"text": text}, float("nan"), None, True, 7, 1e400, [None], "")
    changed = tree(sample, [(0, where, much) if what % 2 else (what, where, much) for what, where, much in parts], values)
    lines = [json.dumps(row, ensure_ascii=bool(which % 2)) for row in (changed, {**sample, "note": text})]
    return mark + bytewise("\n".join(lines).encode("utf-8", "surrogatepass"), _few(rest))


def _few(changes: list[Mutation]) -> list[Mutation]:
    return changes[:2]


def rows(read: Callable[[Path], None], sample: dict[str, Any]) -> Callable[[Case], None]:
    """A reader of files, fed with files."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-rows-"))

    def feed(case: Case) -> None:
        path = folder / "rows.jsonl"
        path.write_bytes(_file(sample, case))
        with suppress(DataError):
            read(path)

    return feed


def questions(path: Path) -> None:
    """What is read can be sent, written down and asked."""
    for question in load_questions(path):
        assert question_from_pb(rollout_pb2.Question.FromString(question_to_pb(question).SerializeToString())) == question
        assert any(text.strip() for text in question.targets)
        assert any(message.content.strip() for message in question.prompt)


def documents(path: Path) -> None:
    for document in load_corpus(path):
        json.dumps(document.contents, ensure_ascii=False).encode()


def lines(text: str) -> None:
    """Whatever a peer says is one line of bounded length in the log, and moves no cursor."""
    shown = printable(text)
    assert not UNPRINTABLE.search(shown)
    record = logging.LogRecord("fuzz", logging.WARNING, __file__, 1, "it said %s", (text,), None)
    for form in (TextFormatter(), JsonFormatter()):
        line = form.format(record)
        assert not UNPRINTABLE.search(line)
        assert len(line) < 10 * 8192
        line.encode()
