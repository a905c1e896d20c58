"""Reading a part's /metrics page, whatever answers there."""

from collections.abc import AsyncGenerator

import pytest

from services.cli.reports.metrics_client import open_metrics_client
from tests.environments.raw_server import Pieces, answering, endless, response
from treegrpo.security.credentials import OPEN

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def dripping(_: bytes) -> AsyncGenerator[bytes]:
    return endless(HEAD, b"a 1\n", 0.005)


def flooding(_: bytes) -> AsyncGenerator[bytes]:
    return endless(HEAD, b"a 1\n" * 10_000)


@pytest.mark.parametrize(
    ("answer", "samples"),
    [
        (response("200 OK", b'a{b="c",a="d"} 1\n'), {"a/d/c": 1.0}),
        (response("200 OK", b"<html>"), {}),
        (response("200 OK", b'a{b="c'), {}),
        (response("500 Oops", b"a 1\n"), {}),
        (b"", {}),
        (dripping, {}),
        (flooding, {}),
    ],
    ids=["page", "html", "half", "error", "nothing", "drip", "flood"],
)
async def test_a_page_is_read_or_there_is_none(answer: bytes | Pieces, samples: dict[str, float]) -> None:
    timeout = 0.2 if answer is dripping else 10.0
    async with answering(answer) as url, open_metrics_client(OPEN, timeout) as read:
        assert await read(url.removeprefix("http://")) == samples
