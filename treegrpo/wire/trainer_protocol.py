"""Trainer protocol: requests and responses between trainer and intake over the run's local socket.

    trainer                            intake
    Take(position, count)          ──► waits until that many groups are ready, a few seconds at most
                                   ◄── Taken(groups, state)
    Publish(version, path, position) ► serves and announces the weights; groups before `position` are trained
                                   ◄── Done; Taken and Evaluation say later if its files are found damaged
    Covered(position)              ──► a checkpoint covers the groups before `position`: they need not be kept
                                   ◄── Done
    Evaluate(version)              ──► rolls out the held-out questions once per version, however often it is asked
                                   ◄── Evaluation(done, ...)
    Report(values)                 ──► appends a line to the run's progress file, unless it has it
                                   ◄── Done
                                   ◄── Refused(reason), to any of these that cannot be right

The trainer asks, the intake answers, one request at a time. Each may be asked again, by a trainer that never got the
answer, and is then not done twice; so either side may start again at any moment. A message is a msgpack map behind its
length in 4 little-endian bytes. A position counts the training groups closed since the run began: like a consumer's
offset in the journal, it is kept by the trainer, in its checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast

import msgpack
from google.protobuf.message import DecodeError

from treegrpo.core.step import Subtree
from treegrpo.core.tree import Group
from treegrpo.errors import ContractError, UnavailableError, describe
from treegrpo.storage.parse_dataclass import parse_dataclass
from treegrpo.v1 import rollout_pb2, tree_pb2
from treegrpo.wire.codec import question_from_pb, question_to_pb, subtree_from_pb, subtree_to_bytes

MAX_FRAME_BYTES = 1 << 30
KEEP_VERSIONS = 3
"""Newest policy versions that the trainer keeps on disk and the intake serves."""
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Take:
    position: int
    count: int


@dataclass(frozen=True, slots=True)
class Taken:
    groups: list[bytes]
    """`pack_group` of each, oldest first: `count` of them or none."""
    state: str
    """The run state: running, paused or draining. A draining run has no more groups to wait for."""
    damaged: str = ""
    """The version to be published again, because its files are not what they were; else empty."""


@dataclass(frozen=True, slots=True)
class Publish:
    version: str
    path: str
    position: int


@dataclass(frozen=True, slots=True)
class Covered:
    position: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    version: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    done: bool
    questions: int = 0
    em: float = 0.0
    """Share of held-out questions answered with an exact match, of those that could be rolled out."""
    reward: float = 0.0
    failed: int = 0
    state: str = "running"
    damaged: str = ""
    """As in `Taken`."""


@dataclass(frozen=True, slots=True)
class StepReport:
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    """The record of a step; `step`, `version` and `position` say which."""


@dataclass(frozen=True, slots=True)
class Done:
    pass


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str
    """One sentence. Asking again would not help."""


Message = Take | Taken | Publish | Covered | Evaluate | Evaluation | StepReport | Done | Refused
_TYPES: dict[str, type[Message]] = {
    **{kind.__name__: kind for kind in (Take, Taken, Publish, Covered, Evaluate, Evaluation, Done, Refused)},
    "Report": StepReport,
}
"""By what the socket calls them."""
_NAMES = {kind: name for name, kind in _TYPES.items()}
Answer = TypeVar("Answer", Taken, Evaluation, Done)


def pack_group(group: Group, subtrees: list[Subtree]) -> bytes:
    """Encode a closed group: its question and its subtrees in the order they were accepted."""
    return pack_encoded_group(group, [subtree_to_bytes(subtree) for subtree in subtrees])


def pack_encoded_group(group: Group, subtrees: list[bytes]) -> bytes:
    """`pack_group` for subtrees that are encoded already."""
    question = question_to_pb(group.question).SerializeToString()
    return cast("bytes", msgpack.packb({"id": group.id, "question": question, "subtrees": subtrees}))


def unpack_group(data: bytes) -> Group:
    """The inverse of `pack_group`.

    Raises:
        ContractError: the bytes are no group; or a TreeError: one of its subtrees is refused.
    """
    name = "of unknown id"
    try:
        row = msgpack.unpackb(data)
        name = row["id"]
        group = Group(name, question_from_pb(rollout_pb2.Question.FromString(row["question"])))
        subtrees = [tree_pb2.Subtree.FromString(subtree) for subtree in row["subtrees"]]
    except (ValueError, TypeError, KeyError, msgpack.UnpackException, DecodeError) as error:
        raise ContractError(f"Group {name}: its bytes cannot be read ({type(error).__name__}: {describe(error)}).") from error
    for subtree in subtrees:
        group.append_subtree(subtree_from_pb(subtree, group.id))
    return group


def check_step_report(values: dict[str, Any]) -> None:
    """Check that a step's record can be written as a line of JSON. Raises ContractError."""
    wrong = [key for key in ("kind", "step", "version", "position") if not isinstance(values.get(key), int | str | None)]
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        raise ContractError(f"The record of a step is not JSON ({describe(error)[:100]}).") from error
    if wrong:
        raise ContractError(f"The record of a step has a {wrong[0]} that names nothing.")


def encode_message(message: Message) -> bytes:
    """The frame of a message."""
    body = cast("bytes", msgpack.packb({"type": _NAMES[type(message)], **asdict(message)}))
    return _LENGTH.pack(len(body)) + body


def decode_message(body: bytes) -> Message:
    """The message in a frame's body. Raises ContractError."""
    try:
        row = cast("dict[str, Any]", msgpack.unpackb(body))
        return parse_dataclass(_TYPES[row.pop("type")], row)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        said = describe(error)[:100]
        raise ContractError(
            f"The local socket carried an invalid message ({said}); trainer and intake must be of one version."
        ) from error


async def receive_message(reader: asyncio.StreamReader) -> Message | None:
    """The next message of a stream; None at its end."""
    try:
        head = await reader.readexactly(_LENGTH.size)
        (length,) = _LENGTH.unpack(head)
        if length > MAX_FRAME_BYTES:
            raise ContractError(f"The local socket carried a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}.")
        return decode_message(await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        return None


class IntakeConnection:
    """The trainer's side: blocking, one request at a time."""

    def __init__(self, path: str, deadline: float = 60.0) -> None:
        """Connect. Raises UnavailableError when no process listens at ``path`` (a Unix socket)."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(deadline)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise UnavailableError(f"The intake does not answer at {path}; start `treegrpo learner`, which runs both.") from error

    def ask(self, request: Message, answer: type[Answer]) -> Answer:
        """Send ``request`` and wait for its answer.

        Raises:
            UnavailableError: the intake is gone or does not answer; this client is of no use any more.
            ContractError: the intake refuses the request, or is of another version.
        """
        try:
            self._socket.sendall(encode_message(request))
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            reply = decode_message(self._read(length))
        except OSError as error:
            raise UnavailableError("The intake disconnected or did not answer in time; see its log.") from error
        if isinstance(reply, Refused):
            raise ContractError(reply.reason)
        if not isinstance(reply, answer):
            raise ContractError(f"The intake answered {type(request).__name__} with {type(reply).__name__}.")
        return reply

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            chunk = self._socket.recv(min(length - len(data), 1 << 20))
            if not chunk:
                raise ConnectionResetError
            data += chunk
        return bytes(data)

    def close(self) -> None:
        self._socket.close()
