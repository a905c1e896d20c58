from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import cast

import msgpack
import pytest

from tests.intake.builders import chain, question
from treegrpo.core.tree import Group
from treegrpo.errors import ContractError, UnavailableError
from treegrpo.net.local_socket import socket_path
from treegrpo.timing.notifier import Notifier
from treegrpo.wire.trainer_protocol import (
    Covered,
    Done,
    Evaluate,
    Evaluation,
    IntakeConnection,
    Message,
    Publish,
    Refused,
    StepReport,
    Take,
    Taken,
    decode_message,
    encode_message,
    pack_group,
    receive_message,
    unpack_group,
)

MESSAGES: list[Message] = [
    Take(3, 2),
    Taken([b"group"], "running"),
    Publish("1.2", "weights/1.2", 4),
    Covered(4),
    Evaluate("1.2"),
    Evaluation(True, 3, 0.5, 0.25, 1),
    StepReport({"loss": 0.1}),
    Refused("Position 3 is gone."),
    Done(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_crosses_the_socket(message: Message) -> None:
    assert decode_message(encode_message(message)[4:]) == message


def test_a_message_has_one_name_on_the_socket_whatever_its_class_is_called() -> None:
    names = ["Take", "Taken", "Publish", "Covered", "Evaluate", "Evaluation", "Report", "Refused", "Done"]
    assert {msgpack.unpackb(encode_message(message)[4:])["type"] for message in MESSAGES} == set(names)


async def test_a_stream_ends_between_messages_and_inside_one() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(encode_message(Done()) + encode_message(Done())[:3])
    reader.feed_eof()
    assert await receive_message(reader) == Done()
    assert await receive_message(reader) is None


async def test_a_frame_beyond_the_limit_is_refused_before_it_is_read() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(b"\xff\xff\xff\xff")
    with pytest.raises(ContractError, match="the limit is"):
        await receive_message(reader)


def test_a_group_crosses_with_its_question_and_subtrees() -> None:
    group = Group("0000007", question(7))
    subtrees = [chain("a"), chain("a", index=1, parent=1, reward=0.0)]
    for subtree in subtrees:
        group.append_subtree(subtree)
    got = unpack_group(pack_group(group, subtrees))
    assert (got.id, got.question) == (group.id, group.question)
    assert [(leaf.node, leaf.reward) for _, leaf in got.leaves()] == [(2, 1.0), (12, 0.0)]


def pieces(**changes: object) -> bytes:
    row = msgpack.unpackb(pack_group(Group("q-17", question(7)), [chain("a")]))
    return cast("bytes", msgpack.packb({**row, **changes}))


@pytest.mark.parametrize(
    "torn",
    [
        pieces()[:-9],
        pieces() + b"\x00",
        b"",
        b"\xc1",
        b"\x01",
        msgpack.packb({"id": "q-17"}),
        pieces(question=b"\xff"),
        pieces(subtrees=[b"\xff"]),
        pieces(subtrees=7),
    ],
)
def test_torn_bytes_of_a_group_are_refused_in_a_sentence(torn: bytes) -> None:
    with pytest.raises(ContractError, match=r"^Group (q-17|of unknown id): its bytes cannot be read \("):
        unpack_group(torn)


def test_nobody_at_the_socket_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        IntakeConnection(str(tmp_path / "nobody.sock"))


def test_a_long_run_directory_gets_a_short_socket(tmp_path: Path) -> None:
    assert socket_path(Path("runs/a")).endswith("runs/a/intake.sock")
    long = socket_path(tmp_path / ("x" * 120))
    assert long.startswith(tempfile.gettempdir())
    assert len(long) <= 100


async def test_a_change_wakes_who_waits_and_not_who_comes_later() -> None:
    change = Notifier()
    waiting = asyncio.create_task(change.wait())
    await asyncio.sleep(0)
    change.notify()
    assert await waiting
    assert not await change.wait(deadline=0.0)
