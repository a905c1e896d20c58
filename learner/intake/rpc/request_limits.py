"""A sampler's message: bytes in, a request out. What costs too much to look at is refused before it is parsed.

An empty submessage has two bytes on the wire and a hundred when it is parsed: 32 MiB of them would be gigabytes.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from treegrpo.errors import ContractError
from treegrpo.net.limits import NAME_BYTES, SENTENCE_LETTERS
from treegrpo.v1 import rollout_pb2 as pb

PARTS = 1 << 14
"""Fields of a message, those of its parts included. A branch of 32 turns has a thousand."""
LEASES = 4096
"""Of a Hello; more than one sampler can hold."""
FIXED = {1: 8, 5: 4}
"""Bytes of a value by wire type; 0 is a varint, 2 is behind its length."""


def read_request(data: bytes) -> pb.RolloutRequest:
    """Raises ContractError: it is no request, has more than PARTS parts, or a name that is too long."""
    if len(data) > 2 * PARTS:  # a field has two bytes at least
        _count(memoryview(data), pb.RolloutRequest.DESCRIPTOR, PARTS)
    try:
        request = pb.RolloutRequest.FromString(data)
    except DecodeError as error:
        raise ContractError("A sampler sent what is no request; it must be of this version.") from error
    if len(data) > 2 * PARTS:
        request.DiscardUnknownFields()  # no way past the limits into the journal
    match request.WhichOneof("kind"):
        case "hello":
            if len(request.hello.leases) > LEASES:
                raise ContractError(f"Hello names {len(request.hello.leases)} leases; {LEASES} are the most.")
            names = list(request.hello.leases)
        case "subtree":
            names = [request.subtree.lease]
        case "lease_end":
            names = [request.lease_end.lease]
            request.lease_end.error = request.lease_end.error[:SENTENCE_LETTERS]
        case "heartbeat":
            request.heartbeat.waits_for = request.heartbeat.waits_for[:SENTENCE_LETTERS]
            names = []
        case _:
            names = []
    if (longest := max(map(len, names), default=0)) > NAME_BYTES:
        raise ContractError(f"The id of a lease has {longest} letters; ours have {NAME_BYTES} at most.")
    return request


def _count(data: memoryview, kind: Any, left: int) -> int:
    """How many of ``left`` fields there may be still; submessages of ``kind`` are looked into. Raises ContractError."""
    place, end = 0, len(data)
    while place < end:
        left -= 1
        if left < 0:
            raise ContractError(f"A sampler sent a message of more than {PARTS} parts.")
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire not in (0, 2) and wire not in FIXED:
            raise ContractError("A sampler sent what is no request; it must be of this version.")  # a group, or nothing
        value, place = (0, place + FIXED[wire]) if wire in FIXED else _varint(data, place)
        if wire == 2:
            field = kind.fields_by_number.get(tag >> 3)
            if field is not None and field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
                left = _count(data[place : place + value], field.message_type, left)
            place += value
    return left


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number and the place behind it; what is cut off ends with the data, and the parser refuses it."""
    value = shift = 0
    while place < len(data) and shift < 70:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return value, place
