from __future__ import annotations

import socket
from contextlib import closing

import pytest

from treegrpo.errors import AddressInUseError, ConfigError
from treegrpo.net.address import address_family, check_free, is_local, join_address, reachable_address, split_address


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:1883", "127.0.0.1", 1883),
        ("[::1]:1883", "::1", 1883),
        ("[fe80::1%eth0]:0", "fe80::1%eth0", 0),
        ("broker.example.org:65535", "broker.example.org", 65535),
    ],
)
def test_an_address_is_split_and_joined_again(address: str, host: str, port: int) -> None:
    assert split_address(address, "broker.address") == (host, port)
    assert join_address(host, port) == address


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("::1:1883", r"write \[HOST\]:PORT"),
        ("2001:db8::7", r"write \[HOST\]:PORT"),
        ("[::1]", "is not an address"),
        ("[::1:1883", "is not an address"),
        ("[localhost]:1883", "is not an address"),
        ("localhost", "is not an address"),
        (":1883", "is not an address"),
        ("localhost:65536", "is not an address"),
        ("localhost:١", "is not an address"),
        ("mqtt://localhost:1883", "is not an address"),
    ],
)
def test_what_is_no_address_is_refused_by_its_key(address: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"^broker\.address = .*{sentence}"):
        split_address(address, "broker.address")


@pytest.mark.parametrize(
    ("listened", "reached", "local"),
    [
        ("0.0.0.0:1", "127.0.0.1:1", False),
        ("[::]:1", "[::1]:1", False),
        ("[0::0]:1", "[::1]:1", False),
        ("[::1]:1", "[::1]:1", True),
        ("localhost:1", "localhost:1", True),
        ("10.0.0.7:1", "10.0.0.7:1", False),
    ],
)
def test_a_listener_on_all_interfaces_is_reached_at_loopback(listened: str, reached: str, *, local: bool) -> None:
    assert reachable_address(listened) == reached
    assert is_local(listened) is local


def test_a_taken_address_and_a_name_that_is_none_are_told_apart() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = join_address(*taken.getsockname()[:2])
        with pytest.raises(AddressInUseError, match="is taken by another process"):
            check_free(address, "learner.listen")
    check_free(address, "learner.listen")
    with pytest.raises(AddressInUseError, match="cannot be used"):
        check_free("no.such.name.invalid:1", "learner.listen")
    assert address_family("::1") is socket.AF_INET6
