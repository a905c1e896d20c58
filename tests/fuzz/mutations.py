"""Mutates valid messages: a few changes of their parts, a few of their bytes.

A mutation is a few bytes that hypothesis draws: what, where, and how much of it. So a case that breaks something shrinks to few
and small changes, and drawing it costs little.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgpack
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

Mutation = tuple[int, int, int]
"""Operation, position, amount."""
_CHANGE = struct.Struct("<BHH")
DRAWN = st.binary(min_size=1, max_size=1 + 5 * _CHANGE.size)
"""Which sample, and up to five changes."""


def parse_mutations(drawn: bytes) -> tuple[int, list[Mutation], list[Mutation]]:
    """Which sample, what to change of its parts, and of its bytes: a quarter of them."""
    every = list(_CHANGE.iter_unpack(drawn[1 : 1 + (len(drawn) - 1) // _CHANGE.size * _CHANGE.size]))
    return drawn[0], [one for one in every if one[0] < 192], [one for one in every if one[0] >= 192]


INTEGERS = (0, 1, 2, 127, 128, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
TEXTS = (
    b"",
    b"\xff\xfe",
    b"\x00",
    b"\xed\xa0\x80",
    b"a" * 65,
    b"x" * 2_000,
    b"\n\r%s{}",
    "\u202e\U0001f600".encode(),
    b"\x01" * 7,
)
DEEP = 300

# ---- bytes


def bytewise(data: bytes, changes: Sequence[Mutation]) -> bytes:
    """Flip, cut off, repeat, leave out, put in, and lengths that promise too much."""
    for what, where, much in changes:
        place = where % (len(data) + 1)
        if what % 8 == 0 and data:
            place %= len(data)
            data = data[:place] + bytes([data[place] ^ (1 << much % 8)]) + data[place + 1 :]
        elif what % 8 == 1:
            data = data[:place]
        elif what % 8 == 2:
            data = data[:place] + data[place : place + much % 64] * 2 + data[place + much % 64 :]
        elif what % 8 == 3:
            data = data[:place] + data[place + much % 64 :]
        elif what % 8 == 4:
            data = data[:place] + TEXTS[much % len(TEXTS)] + data[place:]
        elif what % 8 == 5:
            data = data[:place] + b"\xff" * (1 + much % 9) + data[place:]
        elif what % 8 == 6:
            data = data[:place] + INTEGERS[much % len(INTEGERS)].to_bytes(8, "little") + data[place + 8 :]
    return data


# ---- protobuf

Field = list[Any]
"""[number, wire type, value]; a value is a number, bytes, or the fields of a submessage."""


def parse(data: bytes, kind: Any) -> list[Field]:
    """The fields of a valid message."""
    fields, place = list[Field](), 0
    while place < len(data):
        tag, place = _number(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _number(data, place)
        else:
            size, place = (8, place) if wire == 1 else (4, place) if wire == 5 else _number(data, place)
            value, place = data[place : place + size], place + size
            field = kind.fields_by_number.get(number)
            if field is not None and field.type == FieldDescriptor.TYPE_MESSAGE:
                value = parse(value, field.message_type)
        fields.append([number, wire, value])
    return fields


def build(fields: Sequence[Field]) -> bytes:
    data = b""
    for number, wire, value in fields:
        data += varint(number << 3 | wire)
        if isinstance(value, int):
            data += varint(value) if wire == 0 else value.to_bytes(8, "little")[: 4 if wire == 5 else 8]
        else:
            inner = build(cast("list[Field]", value)) if isinstance(value, list) else cast("bytes", value)
            data += inner if wire in (1, 5) else varint(len(inner)) + inner
    return data


def protobuf(fields: list[Field], changes: Sequence[Mutation]) -> bytes:
    """The message after changes of its fields: doubled, left out, exchanged, of another number, type or value, nested deeply."""
    fields = _copied(fields)
    for what, where, much in changes:
        places = list(_places(fields))
        if not places:
            break
        among, at = places[where % len(places)]
        if what % 9 == 8:
            _exchange(among, at, *places[much % len(places)])
        else:
            among[at : at + 1] = _instead(among[at], what % 9, much)
    return build(fields)


def _instead(field: Field, what: int, much: int) -> list[Field]:  # noqa: PLR0911 - a table
    """What stands in a field's place."""
    number, wire, value = field
    match what:
        case 0:
            return [field, _copied([field])[0]]
        case 1:
            return []
        case 2:
            return [[much % (1 << 29) or 1, wire, value]]
        case 3:
            return [[number, 0, INTEGERS[much % len(INTEGERS)]]]
        case 4:
            return [[number, 2, TEXTS[much % len(TEXTS)]]]
        case 5:
            return [[number, 2, bytes(much % 4096)]]
        case 6:
            return [field] * (much % 300)
        case _:
            inner = build([field])
            for _ in range(much % DEEP):
                inner = varint(number << 3 | 2) + varint(len(inner)) + inner
            return [[number, 2, inner]]


def _exchange(among: list[Field], at: int, other: list[Field], there: int) -> None:
    """Two fields, unless one is a part of the other."""
    if not _within(among[at], other) and not _within(other[there], among):
        among[at], other[there] = other[there], among[at]


def _copied(fields: list[Field]) -> list[Field]:
    return [[number, wire, _copied(value) if isinstance(value, list) else value] for number, wire, value in fields]


def _places(fields: list[Field]) -> Any:
    for at, field in enumerate(fields):
        yield fields, at
        if isinstance(field[2], list):
            yield from _places(cast("list[Field]", field[2]))


def _within(field: Field, fields: list[Field]) -> bool:
    inner = field[2]
    return isinstance(inner, list) and (inner is fields or any(_within(one, fields) for one in cast("list[Field]", inner)))


def varint(number: int) -> bytes:
    digits = b""
    while number > 127:
        digits, number = digits + bytes([number & 127 | 128]), number >> 7
    return digits + bytes([number])


def _number(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[place] & 127) << shift
        shift, place = shift + 7, place + 1
        if data[place - 1] < 128:
            return value, place


# ---- msgpack and JSON


def _deep() -> Any:
    value: Any = None
    for _ in range(DEEP):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1 << 63, (1 << 64) - 1, 0.5, float("nan"), float("inf"), 1e308),
    *("", "x" * 2_000, "\u202e", "1.2", [], {}, [[]], {"a": {}}, _deep(), "running", "draining"),
)
"""What JSON knows too."""
BINARY: tuple[Any, ...] = (b"", b"\xff" * 9, {1: 2}, {b"a": 1}, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 1))


def tree(value: Any, changes: Sequence[Mutation], values: Sequence[Any] = VALUES + BINARY) -> Any:
    """The data after changes of its parts: another value, left out, renamed, doubled, nested."""
    root = [copy.deepcopy(value)]
    for what, where, much in changes:
        places = list(_parts(root))
        among, at = places[where % len(places)]
        if what % 5 == 0:
            among[at] = copy.deepcopy(values[much % len(values)])
        elif what % 5 == 1 and among is not root:
            del among[at]
        elif what % 5 == 2 and isinstance(among, dict):
            among[f"{at}{much % 3}"] = among.pop(at)
        elif what % 5 == 3:
            among[at] = [among[at]] * (much % 9)
        else:
            among[at] = {"a": among[at]}
    return root[0]


def _parts(value: Any) -> Any:
    keys = list(cast("dict[Any, Any]", value)) if isinstance(value, dict) else range(len(value))
    for at in keys:
        yield value, at
        if isinstance(value[at], dict | list):
            yield from _parts(value[at])


# ---- strategies


def protobufs(sample_messages: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """Mutations of valid messages."""
    parsed = [parse(sample.SerializeToString(), sample.DESCRIPTOR) for sample in sample_messages]

    def made(drawn: bytes) -> bytes:
        which, parts, rest = parse_mutations(drawn)
        return bytewise(protobuf(parsed[which % len(parsed)], parts), rest)

    return DRAWN.map(made)


def packed(sample_messages: Sequence[Any], pack: Callable[[Any], bytes] | None = None) -> st.SearchStrategy[bytes]:
    """Mutations of valid data, in msgpack."""
    write = pack or cast("Callable[[Any], bytes]", msgpack.packb)

    def made(drawn: bytes) -> bytes:
        which, parts, rest = parse_mutations(drawn)
        return bytewise(write(tree(sample_messages[which % len(sample_messages)], parts)), rest)

    return DRAWN.map(made)


def raw(sample_messages: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Mutations of valid bytes."""

    def made(drawn: bytes) -> bytes:
        which, parts, rest = parse_mutations(drawn)
        return bytewise(sample_messages[which % len(sample_messages)], [*parts, *rest])

    return DRAWN.map(made)
