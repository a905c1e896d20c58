"""Parses a sampler's message; refuses one that would take too much memory before parsing it.

An empty submessage has two bytes on the wire and a hundred when it is parsed: 32 MiB of them would be gigabytes.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from treegrpo.errors import ContractError
from treegrpo.net.limits import NAME_BYTES, SENTENCE_CHARACTERS
from treegrpo.v1 import rollout_pb2 as pb

MAX_FIELDS = 1 << 14
"""Fields of a message with those of its submessages. A branch of 32 turns has a thousand."""
MAX_HELLO_LEASES = 4096
"""Of a Hello; more than one sampler can hold."""
FIXED_SIZE_BYTES = {1: 8, 5: 4}
"""Bytes of a value by wire type; 0 is a varint, 2 is behind its length."""


def read_request(data: bytes) -> pb.RolloutRequest:
    """Parse a request. Raises ContractError: it is invalid, has more than MAX_FIELDS fields or too long a lease id."""
    if len(data) > 2 * MAX_FIELDS:  # a field has two bytes at least
        _count_fields(memoryview(data), pb.RolloutRequest.DESCRIPTOR, MAX_FIELDS)
    try:
        request = pb.RolloutRequest.FromString(data)
    except DecodeError as error:
        raise ContractError("A sampler sent an invalid request; it must have this version.") from error
    if len(data) > 2 * MAX_FIELDS:
        request.DiscardUnknownFields()  # they would pass the limits into the journal
    match request.WhichOneof("kind"):
        case "hello":
            if len(request.hello.leases) > MAX_HELLO_LEASES:
                raise ContractError(f"Hello names {len(request.hello.leases)} leases; {MAX_HELLO_LEASES} are the most.")
            names = list(request.hello.leases)
        case "subtree":
            names = [request.subtree.lease]
        case "lease_end":
            names = [request.lease_end.lease]
            request.lease_end.error = request.lease_end.error[:SENTENCE_CHARACTERS]
        case "heartbeat":
            request.heartbeat.waits_for = request.heartbeat.waits_for[:SENTENCE_CHARACTERS]
            names = []
        case _:
            names = []
    if (longest := max(map(len, names), default=0)) > NAME_BYTES:
        raise ContractError(f"The id of a lease has {longest} characters; the limit is {NAME_BYTES}.")
    return request


def _count_fields(data: memoryview, kind: Any, left: int) -> int:
    """Count the fields of a message of type ``kind`` and its submessages: what remains of ``left``. Raises ContractError."""
    position, end = 0, len(data)
    while position < end:
        left -= 1
        if left < 0:
            raise ContractError(f"A sampler sent a message of more than {MAX_FIELDS} parts.")
        tag, position = _read_varint(data, position)
        wire = tag & 7
        if wire not in (0, 2) and wire not in FIXED_SIZE_BYTES:
            raise ContractError("A sampler sent an invalid request; it must have this version.")  # a group, or nothing
        value, position = (0, position + FIXED_SIZE_BYTES[wire]) if wire in FIXED_SIZE_BYTES else _read_varint(data, position)
        if wire == 2:
            field = kind.fields_by_number.get(tag >> 3)
            if field is not None and field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
                left = _count_fields(data[position : position + value], field.message_type, left)
            position += value
    return left


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """A varint and the position behind it; a truncated one ends with the data, and the parser refuses it."""
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return value, position
