import asyncio
import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import AsyncGenerator

import pytest

from tests.environments.raw_server import answering, endless, response
from treegrpo.errors import ConfigError, ContractError, DeadlineError, UnavailableError
from treegrpo.net.http_client import HttpClient, HttpResponse, public_url, read_json
from treegrpo.net.limits import JSON_PARTS, LARGE_ANSWERS, LARGE_BYTES, LOOP_BYTES

OK = b"HTTP/1.1 200 OK\r\n"
UNTIL_CLOSED = OK + b"\r\n"
SIZE = 4 << 20


async def asked(raw: bytes, path: str = "/", seconds: float = 10.0) -> HttpResponse:
    async with answering(raw) as url, HttpClient() as client:
        return await client.request("GET", url + path, lambda answer: answer, seconds=seconds, size=SIZE)


async def test_an_answer_comes_with_status_type_and_body() -> None:
    answer = await asked(response("404 Not Found", b"no\nsuch <page>", "Content-Type: text/html; charset=utf-8"))
    assert (answer.status, answer.ok, answer.text) == (404, False, "no\nsuch <page>")
    assert answer.summary == "text/html: no such <page>"


@pytest.mark.parametrize("head", [UNTIL_CLOSED, OK + b"Content-Length: 999\r\n\r\n", OK, b"H"])
async def test_the_deadline_is_for_the_whole_answer_not_for_each_byte(head: bytes) -> None:
    drip = b"X-A: b\r\n" if head in {OK, b"H"} else b"x"
    async with answering(lambda _: endless(head, drip, 0.005)) as url, HttpClient() as client:
        with pytest.raises(DeadlineError, match=f"The server at {url}/ did not answer within 0.2 s"):
            async with asyncio.timeout(5.0):
                await client.request("GET", f"{url}/", lambda answer: answer, seconds=0.2)


async def test_informational_answers_do_not_count_as_one() -> None:
    async with answering(lambda _: endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n")) as url, HttpClient() as client:
        with pytest.raises(DeadlineError):
            await client.request("GET", url, lambda answer: answer, seconds=0.2)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
async def test_many_small_pieces_do_not_hold_the_event_loop(head: bytes, piece: bytes) -> None:
    longest, before = 0.0, time.thread_time()

    async def watch() -> None:
        nonlocal longest, before
        while True:
            longest, before = max(longest, time.thread_time() - before), time.thread_time()
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    async with answering(lambda _: endless(head, piece * 10_000, 0.001)) as url, HttpClient() as client:
        with pytest.raises(DeadlineError):
            await client.request("GET", url, lambda answer: answer, seconds=1.0)
    watching.cancel()
    assert longest < 0.25


async def test_a_timeout_of_the_callers_own_stays_its_own() -> None:
    def late(_: HttpResponse) -> None:
        raise TimeoutError

    async with answering(response("200 OK", b"")) as url, HttpClient() as client:
        with pytest.raises(TimeoutError) as caught:
            await client.request("GET", url, late, seconds=5.0)
    assert not isinstance(caught.value, DeadlineError)


async def test_an_endless_body_costs_no_more_than_its_limit() -> None:
    tracemalloc.start()
    try:
        async with answering(lambda _: endless(UNTIL_CLOSED, bytes(1 << 16))) as url, HttpClient() as client:
            with pytest.raises(ContractError, match=f"answers with more than {SIZE} bytes"):
                await client.request("GET", url, lambda answer: answer, seconds=10.0, size=SIZE)
        assert tracemalloc.get_traced_memory()[1] < 3 * SIZE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [str(SIZE + 1), "9" * 20])
async def test_a_length_beyond_the_limit_is_refused_unread(length: str) -> None:
    with pytest.raises(ContractError, match="more than"):
        await asked(OK + f"Content-Length: {length}\r\n\r\n".encode())


async def test_a_head_without_end_is_refused() -> None:
    async with answering(lambda _: endless(OK, b"X-A: " + b"b" * 4096 + b"\r\n")) as url, HttpClient() as client:
        with pytest.raises(UnavailableError, match=r"RemoteProtocolError|[Tt]oo"):
            await client.request("GET", url, lambda answer: answer, seconds=10.0)


@pytest.mark.parametrize("body", [gzip.compress(b"[1]", mtime=0), zlib.compress(b"[1]")])
async def test_what_is_compressed_unasked_is_read_all_the_same(body: bytes) -> None:
    kind = "gzip" if body.startswith(b"\x1f\x8b") else "deflate"
    assert (await asked(response("200 OK", body, f"Content-Encoding: {kind}"))).body == b"[1]"


async def test_a_compressed_answer_is_bounded_by_what_it_becomes() -> None:
    bomb = gzip.compress(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ContractError, match=f"more than {SIZE} bytes"):
            await asked(response("200 OK", bomb, "Content-Encoding: gzip"))
        assert tracemalloc.get_traced_memory()[1] < 4 * SIZE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [("br", b"\x00", "compresses its answer with 'br'"), ("gzip", b"[1]", "is no gzip data"),
     ("gzip", gzip.compress(b"[1]", mtime=0)[:-4], "cut off"), ("gzip, gzip", b"", "compresses its answer with 'gzip, gzip'")],
)  # fmt: skip
async def test_a_compression_that_cannot_be_read_is_refused(kind: str, body: bytes, said: str) -> None:
    with pytest.raises(ContractError, match=said):
        await asked(response("200 OK", body, f"Content-Encoding: {kind}"))


async def test_a_redirect_within_the_server_is_followed_with_the_body() -> None:
    async def pieces(head: bytes) -> AsyncGenerator[bytes]:
        moved = not head.startswith(b"POST /there/ ")
        yield response("307 Moved", b"", "Location: /there/") if moved else response("200 OK", head)

    async with answering(pieces) as url, HttpClient(headers={"X-Token": "t"}, connections=1) as client:
        head = await client.request("POST", f"{url}/there", lambda answer: answer.text, seconds=5.0, body={"a": 1})
    assert head.startswith("POST /there/ HTTP/1.1")
    assert ("X-Token: t" in head, head.endswith('\r\n\r\n{"a": 1}')) == (True, True)


@pytest.mark.parametrize(
    ("status", "there", "said"),
    [("307", "http://user:word@127.0.0.2:1/x?token=1", "redirects to http://127.0.0.2:1/x, which is not followed; set that URL"),
     ("308", "/again", "more than 3 times"), ("302", "/again", "redirects to http://127.0.0.1:[0-9]+/again, which is not")],
)  # fmt: skip
async def test_other_redirects_are_refused_with_where_they_lead(status: str, there: str, said: str) -> None:
    async with answering(response(f"{status} Moved", b"", f"Location: {there}")) as url, HttpClient() as client:
        with pytest.raises(ContractError, match=said):
            await client.request("POST", url, lambda answer: answer, seconds=5.0, body={})


async def test_neither_proxies_nor_cookies_of_others_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    heads: list[bytes] = []

    async def pieces(head: bytes) -> AsyncGenerator[bytes]:
        heads.append(head)
        yield response("200 OK", b"", "Set-Cookie: a=b", "Connection: close")

    async with answering(pieces) as url, HttpClient() as client:
        for _ in range(2):
            await client.request("GET", url, lambda answer: answer, seconds=5.0)
    assert len(heads) == 2
    assert b"cookie" not in heads[1].lower()
    assert b"accept-encoding: identity" in heads[0].lower()


@pytest.mark.parametrize("url", ["ftp://127.0.0.1:1/", "http://", "http://a b/"])
async def test_a_url_that_cannot_be_asked_is_a_matter_of_configuration(url: str) -> None:
    async with HttpClient() as client:
        with pytest.raises((ConfigError, UnavailableError)) as caught:
            await client.request("GET", url, lambda answer: answer, seconds=5.0)
    assert not str(caught.value).endswith("()")


async def test_a_server_that_is_gone_is_said_with_a_reason() -> None:
    async with answering(b"") as url, HttpClient(name="retriever") as client:
        with pytest.raises(UnavailableError, match=rf"The retriever at {url}/ does not answer \(.+\)"):
            await client.request("GET", f"{url}/", lambda answer: answer, seconds=5.0)


async def test_large_answers_are_read_a_few_at_a_time() -> None:
    reading, most, everybody = 0, 0, asyncio.Event()

    async def pieces(_: bytes) -> AsyncGenerator[bytes]:
        yield OK + f"Content-Length: {2 * LARGE_BYTES}\r\n\r\n".encode() + bytes(LARGE_BYTES)
        await everybody.wait()
        yield bytes(LARGE_BYTES)

    def read(answer: HttpResponse) -> int:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        reading -= 1
        return len(answer.body)

    async with answering(pieces) as url, HttpClient() as client:
        asking = [asyncio.create_task(client.request("GET", url, read, seconds=10.0)) for _ in range(3 * LARGE_ANSWERS)]
        await asyncio.sleep(0)
        everybody.set()
        assert await asyncio.gather(*asking) == [2 * LARGE_BYTES] * (3 * LARGE_ANSWERS)
    assert 1 <= most <= LARGE_ANSWERS


async def test_a_large_answer_is_read_off_the_event_loop() -> None:
    def on_loop(_: HttpResponse) -> bool:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return False
        return True

    for size, here in ((LOOP_BYTES, True), (LOOP_BYTES + 1, False)):
        async with answering(response("200 OK", bytes(size))) as url, HttpClient() as client:
            assert await client.request("GET", url, on_loop, seconds=5.0) is here


async def test_lines_come_whole_and_are_bounded_each() -> None:
    body = b"data: a\xe2\x80\xa8b\n\n" + b"x" * 70_000 + b"\nend"
    async with answering(response("200 OK", body)) as url, HttpClient() as client:
        async with client.stream("GET", url, seconds=5.0) as reply:
            assert [len(line) async for line in reply.iter_lines()] == [11, 0, 70_000, 3]
        async with client.stream("GET", url, seconds=5.0, size=50_000) as reply:
            with pytest.raises(ContractError, match="more than 50000 bytes"):
                _ = [line async for line in reply.iter_lines()]


@pytest.mark.parametrize("value", [{"a": [1, "x,[{", None], "b\\": 'say "\\, [" '}, [[]], "a,b", 1])
def test_json_is_read_as_it_is(value: object) -> None:
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("many", [b"[" + b"0," * JSON_PARTS + b"0]", b"[" * JSON_PARTS * 2, b'{"a":{},' * JSON_PARTS])
def test_json_of_too_many_values_is_refused_before_it_is_built(many: bytes) -> None:
    with pytest.raises(ValueError, match="more than"):
        read_json(many)


@pytest.mark.parametrize("text", [b',[{\\"' * JSON_PARTS, b"\\\\," * JSON_PARTS])
def test_what_stands_in_a_string_is_no_value(text: bytes) -> None:
    assert len(read_json(b'["' + text + b'"]')[0]) == len(text) - text.count(b"\\") + text.count(b"\\\\")


@pytest.mark.parametrize("text", [b"", b"[" * 10_000, b"\xff", b"<html>", b"1" * 5000])
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_json(text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [("http://h:1", "http://h:1"), ("https://user:word@h:1/a/?key=s#f", "https://h:1/a/"), ("http://[::1]:1/x", "http://[::1]:1/x"),
     ("h:1/x", "h:1/x")],
)  # fmt: skip
def test_a_url_is_shown_without_secrets(url: str, shown: str) -> None:
    assert public_url(url) == shown
