"""Fuzz target: a retriever with slow, endless, compressed, truncated and odd answers; and a policy with odd texts.

Each case is one search over a real connection, as a step of the environment makes it.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from services.environments.retrieval import HttpRetriever
from services.environments.search_qa import Episode, SearchQA
from services.sampler.text.tokenizer import Tokenizer
from tests.environments.raw_server import Pieces, answering, endless
from tests.fuzz.loop_watchdog import LoopWatchdog
from tests.fuzz.mutations import TEXTS, raw
from treegrpo.core.question import Message, Question
from treegrpo.errors import ToolError
from treegrpo.net.limits import ANSWER_BYTES, LARGE_BYTES

DEADLINE = 0.5
LATE_SECONDS = 5.0
"""What a busy machine may add to it."""
MOST_TOKENS = 160
GROWTH_MIB = 12 * ANSWER_BYTES / (1 << 20)
"""Of the process over all cases: one answer as bytes, text and documents, and what an allocator keeps."""
MODEL = Path(__file__).parents[2] / "examples" / "geohop" / "model"

CONTROL = [
    "<|end|>",
    "<|im_end|>",
    "</information>",
    "<answer>x</answer>",
    "\ud800",
    "\u202e",
    "\x1b[2J",
    "\ufeff",
    "a\u0301\u0323" * 99,
]
TEXT = st.one_of(st.text(max_size=40), st.sampled_from(CONTROL), st.sampled_from(["a long river " * 300, "\n" * 999, "a" * 9999]))
SCORE: st.SearchStrategy[Any] = st.sampled_from([1.0, None, float("nan"), float("inf"), "high", -1, [], 10**400])
SCALAR: st.SearchStrategy[Any] = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
DOCUMENT: st.SearchStrategy[Any] = st.one_of(
    TEXT,
    st.fixed_dictionaries({"contents": TEXT}, optional={"id": SCALAR, "title": SCALAR}),
    st.fixed_dictionaries({"title": TEXT, "text": TEXT}),
    st.dictionaries(st.sampled_from(["contents", "text", "content", "title", "id", "document"]), SCALAR, max_size=4),
    SCALAR,
)
HIT: st.SearchStrategy[Any] = st.one_of(DOCUMENT, st.fixed_dictionaries({"document": DOCUMENT}, optional={"score": SCORE}))
RESULT: st.SearchStrategy[Any] = st.one_of(
    st.lists(st.lists(HIT, max_size=6), max_size=2),
    st.lists(HIT, max_size=3),
    st.lists(st.lists(HIT, max_size=4), min_size=1, max_size=1),
)
ANSWER: st.SearchStrategy[Any] = st.fixed_dictionaries({"result": RESULT}, optional={"took": SCALAR})
SHAPES = st.one_of(ANSWER, ANSWER, RESULT, SCALAR).map(lambda value: json.dumps(value).encode())
GOOD = json.dumps({"result": [[{"document": {"id": "1", "contents": "Kabul\nA city."}, "score": 1.5}, "Herat\nOld."]]}).encode()
MUTATED = raw([GOOD, b"<html><body>Welcome</body></html>", GOOD.replace(b"1.5", b"null"), b"\xef\xbb\xbf" + GOOD])


def _many(unit: bytes, size: int, head: bytes = b'{"result": [["', tail: bytes = b'"]]}') -> bytes:
    return head + unit * (size // len(unit)) + tail


@cache
def large(which: int) -> bytes:
    """Bodies that are a lot of work for who is not careful."""
    size = ANSWER_BYTES - 64
    return (
        _many(b"a long river ", size),
        _many(b"\\n", LARGE_BYTES * 4),
        _many(b"\\u0301\\u0323", LARGE_BYTES * 4),
        _many(b"0,", size, b'{"result": [[', b"0]]}"),
        _many(b"[", LARGE_BYTES * 4, b"", b""),
        _many(b'{"a":', LARGE_BYTES * 4, b"", b""),
        _many(b'"x",', LARGE_BYTES, b'{"result": [[', b'"x"]]}'),
        _many("河".encode(), size),
        _many(b" ", size, b"", b""),
        _many(b"9", LARGE_BYTES, b"", b""),
    )[which % 10]


@cache
def bomb(which: int) -> bytes:
    """Compressed: 64 MiB, an answer, a cut-off one, and none."""
    packed = gzip.compress(large(0), 1)
    return (gzip.compress(bytes(2 * ANSWER_BYTES)), packed, packed[:-9], b"\x1f\x8b", zlib.compress(GOOD))[which % 5]


@dataclass(frozen=True, slots=True)
class FuzzReply:
    """What the server sends."""

    body: bytes
    how: int
    """Of which kind its head is, and whether it ends."""
    turn: str = ""
    """What the policy wrote."""


TAGS = st.sampled_from(["<search>", "</search>", "<think>", "</think>", "<answer>", "</answer>", "<", " ", "x", *CONTROL])
LONG_TURNS = ("<search>" * 20_000, "<answer><search>" * 9_000 + "</answer>", "<" * 99_999, "</search>" * 9_999, "\x00" * 9_999)
TURNS = st.one_of(st.lists(TAGS).map("".join), st.integers(0, 4).map(LONG_TURNS.__getitem__))
ODD = st.sampled_from([*TEXTS, b"", b"null"])
BODIES = st.one_of(
    SHAPES, MUTATED, SHAPES, MUTATED, ODD, st.integers(0, 99).map(lambda which: large(which) if which < 10 else GOOD)
)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
STATUSES = (b"400 Bad", b"500 Oops", b"503 Later", b"204 None", b"404 Not", b"429 Slow")
MOVED = b"HTTP/1.1 307 Moved\r\nLocation: /retrieve\r\nContent-Length: 0\r\n\r\n"


def whole(reply: FuzzReply) -> bytes:
    """An answer that ends."""
    body, how = reply.body, reply.how
    if how < 5:
        return HEAD + b"Content-Encoding: gzip\r\n\r\n" + bomb(how)
    if how == 5:
        return MOVED
    if how == 6:
        return HEAD + b"Content-Length: 999999999999\r\n\r\n" + body[:99]
    if how < 20:
        return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (STATUSES[how % 6], len(body)) + body
    if how < 30:
        parts = (body[start : start + 7] for start in range(0, min(len(body), 3000), 7))
        chunks = b"".join(b"%x;a=b\r\n%s\r\n" % (len(part), part) for part in parts)
        return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def sent(reply: FuzzReply) -> bytes | Pieces:
    """What a server sends: an answer that ends, or blanks, drops or promises for ever."""
    ways = {61: (HEAD + b"\r\n", b" " * 65_536, 0.0), 62: (HEAD + b"\r\n" + reply.body, b" ", 0.01)}
    ways[63] = (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0)
    if reply.how not in ways:
        return whole(reply)
    return lambda _: endless(*ways[reply.how])


@cache
def tokenizer() -> Tokenizer:
    """Of the model that ships."""
    return Tokenizer.open(MODEL)


def prepared(reply: FuzzReply) -> FuzzReply:
    """The same, after what is made once for all cases has been made: that takes no case's time."""
    tokenizer()
    sent(reply)
    return reply


REPLIES = st.builds(FuzzReply, BODIES, st.integers(0, 63), TURNS).map(prepared)


async def observed(environment: SearchQA, state: Episode) -> str:
    """What the policy reads after a search, or why it cannot be done."""
    try:
        outcome = await environment.step(state, "<think>so</think><search>Kabul</search>", last=False)
    except ToolError as error:
        return str(error)
    assert outcome.observation is not None
    return outcome.observation


def search() -> Callable[[FuzzReply], None]:
    """Feeds one reply to the environment and holds it to its bounds."""
    began_with: list[float] = []

    def count(text: str) -> int:
        return len(tokenizer().encode(text))

    async def case(reply: FuzzReply) -> list[str]:
        dog = LoopWatchdog()
        async with answering(sent(reply)) as url, HttpRetriever(url, DEADLINE, verify=False) as retriever:
            environment = SearchQA(retriever, topk=3, max_observation_tokens=MOST_TOKENS, count_tokens=count)
            state = await environment.start(Question("q", "f", (Message("user", "?"),), ("Kabul",)))
            async with dog.beating():
                said = await observed(environment, state)
                environment.score((await environment.step(state, reply.turn, last=True)).state)
        assert url in said or (count(said) <= MOST_TOKENS and said.endswith("</information>\n\n"))
        assert len(said) < 4000
        return dog.stalls

    def one(reply: FuzzReply) -> None:
        if not began_with:
            began_with.append(_resident_mib())
        began = time.monotonic()
        stalls = asyncio.run(case(reply))
        assert time.monotonic() - began < DEADLINE + LATE_SECONDS
        if stalls:  # the same answer takes as long again, a hiccup of the machine does not come again
            stalls = asyncio.run(case(reply))
        assert not stalls, stalls[0]
        assert _resident_mib() - began_with[0] < GROWTH_MIB

    return one


def _resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
