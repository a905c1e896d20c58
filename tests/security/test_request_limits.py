"""A sampler's message before it is parsed: what would cost too much is refused, what is too long is cut off."""

from __future__ import annotations

import pytest

from learner.intake.rpc.request_limits import MAX_FIELDS, MAX_HELLO_LEASES, read_request
from tests.intake.builders import chain, complete
from treegrpo.errors import ContractError
from treegrpo.net.limits import SENTENCE_CHARACTERS
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.codec import lease_end_to_pb, subtree_to_pb

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("field", [b"\x2a\x00", b"\x32\x00"])
def test_many_small_parts_are_refused_before_they_are_parsed(field: bytes) -> None:
    """Empty steps and leaves: 2 bytes here, 70 and more when they are parsed."""
    body = field * (MAX_FIELDS + 1)
    with pytest.raises(ContractError, match="more than 16384 parts"):
        read_request(b"\x1a" + varint(len(body)) + body)
    inner = b"\x32\x00" * (MAX_FIELDS + 1)
    step = b"\x2a" + varint(len(inner)) + inner
    with pytest.raises(ContractError, match="more than 16384 parts"):
        read_request(b"\x1a" + varint(len(step)) + step)


def test_a_group_of_the_old_wire_format_is_no_way_around_it() -> None:
    body = b"\x2a\x00" * (MAX_FIELDS + 1)
    with pytest.raises(ContractError, match="invalid request"):
        read_request(b"\x9b\x06\x9c\x06\x1a" + varint(len(body)) + body)


def test_what_no_contract_knows_is_not_kept() -> None:
    sent = subtree_to_pb(chain("lease"))
    junk = b"\x9a\x06" + varint(1 << 20) + b"x" * (1 << 20)
    body = sent.SerializeToString() + junk
    assert read_request(b"\x1a" + varint(len(body)) + body).subtree == sent


def test_what_a_sampler_says_in_its_own_words_is_cut_off() -> None:
    end = lease_end_to_pb(complete("lease"))
    end.error = "x" * 9999
    assert len(read_request(pb.RolloutRequest(lease_end=end).SerializeToString()).lease_end.error) == SENTENCE_CHARACTERS


def test_a_hello_that_names_many_leases_is_refused() -> None:
    hello = pb.Hello(sampler="s1", leases=["x"] * (MAX_HELLO_LEASES + 1))
    with pytest.raises(ContractError, match="names 4097 leases"):
        read_request(pb.RolloutRequest(hello=hello).SerializeToString())


def varint(number: int) -> bytes:
    digits = b""
    while number > 127:
        digits, number = digits + bytes([number & 127 | 128]), number >> 7
    return digits + bytes([number])
