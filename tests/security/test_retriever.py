"""The retriever: TLS, a token, and no patience with slow, large or deaf clients."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from services.certs.issue import make_certificates, write_certificate_file
from services.cli.processes.readiness import probe_retriever
from services.environments.retrieval import HttpRetriever
from services.retriever.http_limits import MAX_PIECES, RetrieverLimits
from services.retriever.service import serve_retriever
from tests.security.credential_builders import access, impostor
from tests.security.http_harness import SECONDS, client, metrics, retriever, said_to
from treegrpo.config.schema import Config, RetrieverConfig
from treegrpo.config.security import Role
from treegrpo.errors import ConfigError, ToolError, UnavailableError
from treegrpo.net.limits import HEADER_BYTES, REQUEST_BYTES
from treegrpo.security.credentials import OPEN, bearer_header
from treegrpo.wire.size_limits import TEXT_LENGTH


def at(url: str) -> Config:
    return Config(retriever=RetrieverConfig(url=url))


async def test_the_retriever_answers_samplers_over_tls_that_show_its_token(tmp_path: Path, made: Path) -> None:
    sampler = access(made, Role.SAMPLER)
    async with retriever(tmp_path, access(made, Role.RETRIEVER)) as address:
        url, shown = f"https://{address}", bearer_header(sampler.retriever_token)
        async with HttpRetriever(url, SECONDS, verify=sampler.web_context(Role.RETRIEVER), headers=shown) as search:
            assert await search.search("Kabul", topk=1) == ["Kabul\nKabul is large."]
        async with HttpRetriever(url, SECONDS, verify=sampler.web_context(Role.RETRIEVER)) as search:
            with pytest.raises(ToolError, match=r"status 401.*Show the token"):
                await search.search("Kabul", topk=1)
        await probe_retriever(at(url), access(made, Role.OPERATOR))


async def test_who_does_not_know_the_authority_does_not_talk_to_it(tmp_path: Path, made: Path) -> None:
    async with retriever(tmp_path, access(made, Role.RETRIEVER)) as address:
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            await probe_retriever(at(f"https://{address}"), OPEN)
        with pytest.raises(UnavailableError, match="No retriever answers"):
            await probe_retriever(at(f"http://{address}"), OPEN)


async def test_a_retriever_of_another_authority_is_not_searched(tmp_path: Path, made: Path) -> None:
    other = impostor(tmp_path, made, "stranger", Role.RETRIEVER)
    async with retriever(tmp_path, other) as address:
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            await probe_retriever(at(f"https://{address}"), access(made, Role.SAMPLER))


async def test_a_learner_is_no_retriever_whatever_address_it_has(tmp_path: Path, made: Path) -> None:
    async with retriever(tmp_path, access(made, Role.LEARNER)) as address:
        with pytest.raises(UnavailableError, match="its certificate has the role learner; a retriever has to show its own"):
            await probe_retriever(at(f"https://{address}"), access(made, Role.SAMPLER))


async def test_health_is_for_everybody_and_metrics_are_not(tmp_path: Path, made: Path) -> None:
    who = access(made, Role.RETRIEVER)
    async with retriever(tmp_path, who) as address, client(who) as web:
        assert (await web.get(f"https://{address}/health")).json() == {"status": "ok", "documents": 1}
        assert (await web.get(f"https://{address}/metrics")).status_code == 401
        page = await web.get(f"https://{address}/metrics", headers=bearer_header(who.metrics_token))
        assert 'treegrpo_retriever_refused_total{reason="token"} 1.0' in page.text


async def test_a_large_body_is_refused_with_a_sentence_and_counted(tmp_path: Path) -> None:
    async with retriever(tmp_path, OPEN) as address, client(OPEN) as web:
        answer = await web.post(f"http://{address}/retrieve", content=b"x" * (REQUEST_BYTES + 1))
        assert answer.status_code == 413
        assert answer.json()["error"] == f"The body has more than {REQUEST_BYTES} bytes; send fewer queries at once."
        assert 'treegrpo_retriever_refused_total{reason="large"} 1.0' in (await web.get(f"http://{address}/metrics")).text


async def test_a_body_in_very_many_pieces_is_refused(tmp_path: Path) -> None:
    head = b"POST /retrieve HTTP/1.1\r\nHost: retriever\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with retriever(tmp_path, OPEN) as address, client(OPEN) as web:
        assert (await said_to(address, head + b"1\r\n \r\n" * (MAX_PIECES + 1))).startswith(b"HTTP/1.1 400 ")
        assert 'retriever_refused_total{reason="http"} 1.0' in (await web.get(f"http://{address}/metrics")).text
        body = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in b'{"queries": ["Kabul"]}')
        assert b"Kabul is large." in await said_to(address, head + body + b"0\r\n\r\n")


async def test_a_long_head_is_refused(tmp_path: Path) -> None:
    async with retriever(tmp_path, OPEN) as address:
        answer = await said_to(address, b"GET /health HTTP/1.1\r\nX: " + b"x" * (2 * HEADER_BYTES))
        assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"POST /retr",
        b"POST /retrieve HTTP/1.1\r\nHost: a\r\n",
        b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{",
    ],
)
async def test_a_slow_request_is_hung_up_on(tmp_path: Path, said: bytes) -> None:
    async with retriever(tmp_path, OPEN, limits=RetrieverLimits(request_seconds=0.2)) as address:
        assert b"200" not in await said_to(address, said)


async def test_a_trickle_is_no_way_to_stay(tmp_path: Path) -> None:
    async with retriever(tmp_path, OPEN, limits=RetrieverLimits(request_seconds=0.3)) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(SECONDS):
            with suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"x")
                    await writer.drain()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(1), 0.05)
        writer.close()


async def test_a_second_request_on_a_connection_has_its_own_time(tmp_path: Path) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    async with retriever(tmp_path, OPEN, limits=RetrieverLimits(request_seconds=0.2)) as address:
        answer = await said_to(address, request + request + b"GET /hea")
        assert answer.count(b"HTTP/1.1 200") == 2


async def test_a_slow_handshake_with_the_retriever_is_hung_up_on(tmp_path: Path, made: Path) -> None:
    async with retriever(tmp_path, access(made, Role.RETRIEVER), limits=RetrieverLimits(request_seconds=0.2)) as address:
        assert await said_to(address, b"\x16\x03\x01") == b""


@pytest.mark.parametrize("seconds", [(0.3, 60.0), (10.0, 0.3)], ids=["reads nothing", "takes too long"])
async def test_who_does_not_read_a_large_answer_is_hung_up_on(tmp_path: Path, seconds: tuple[float, float]) -> None:
    body = json.dumps({"queries": ["kabul"] * 1024, "topk": 100}).encode()
    limits = RetrieverLimits(request_seconds=seconds[0], response_seconds=seconds[1])
    async with retriever(tmp_path, OPEN, "Kabul\n" + "large " * 4000, limits) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            head = f"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
            await asyncio.get_running_loop().sock_sendall(deaf, head.encode() + body)
            async with client(OPEN) as web, asyncio.timeout(SECONDS):
                while 'refused_total{reason="slow"} 1.0' not in (await web.get(f"http://{address}/metrics")).text:
                    pass


async def test_one_connection_too_many_is_hung_up_on(tmp_path: Path) -> None:
    async with retriever(tmp_path, OPEN, limits=RetrieverLimits(connections=1)) as address:
        host, _, port = address.rpartition(":")
        _, waiting = await asyncio.open_connection(host, int(port))
        waiting.write(b"GET /hea")
        await waiting.drain()
        assert await said_to(address, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n") == b""
        waiting.close()


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"queries": "x"}',
        b'{"queries": []}',
        b'{"queries": ["x"], "topk": 101}',
        b'{"queries": ["x"], "topk": 1e999}',
        b'{"queries": ["\\ud800"]}',
        b'{"queries": ["' + b"x" * (TEXT_LENGTH + 1) + b'"]}',
        b'{"queries": [' + b'"x",' * 1024 + b'"x"]}',
    ],
)
async def test_a_body_that_is_none_is_refused_with_a_sentence_and_counted(tmp_path: Path, body: bytes) -> None:
    async with retriever(tmp_path, OPEN) as address, client(OPEN) as web:
        answer = await web.post(f"http://{address}/retrieve", content=body)
        assert (answer.status_code, "send {" in answer.json()["error"]) == (400, True)
        assert 'refused_total{reason="request"} 1.0' in (await web.get(f"http://{address}/metrics")).text


async def test_what_is_refused_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with retriever(tmp_path, OPEN) as address, client(OPEN) as web:
        for _ in range(5):
            await web.post(f"http://{address}/retrieve", content=b"{")
            assert (await said_to(address, b"what\r\n\r\n")).startswith(b"HTTP/1.1 400")
        page = (await web.get(f"http://{address}/metrics")).text
    assert 'refused_total{reason="request"} 5.0' in page
    assert 'refused_total{reason="http"} 5.0' in page
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("services.retriever")]
    assert len(ours) == 2


async def test_nobody_changes_to_another_protocol(tmp_path: Path) -> None:
    upgrade = b"GET /retrieve HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
    more = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    async with retriever(tmp_path, OPEN) as address:
        assert (await said_to(address, upgrade + more)).startswith(b"HTTP/1.1 405")


async def test_a_renewed_certificate_serves_without_a_restart(tmp_path: Path, made: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "certs")
    scraped = metrics(access(folder, Role.SAMPLER))
    sni = {"sni_hostname": "sampler.treegrpo.internal"}
    async with retriever(tmp_path, access(folder, Role.RETRIEVER)) as address:
        token = bearer_header(access(folder, Role.RETRIEVER).metrics_token)
        for renewed in (False, True):
            if renewed:
                for path in [*folder.glob("*.pem"), *folder.glob("*.key")]:
                    path.unlink()
                make_certificates(folder, [], [])  # of another authority: the old files could not serve
            async with client(access(folder, Role.OPERATOR), token) as web:
                assert (await web.get(f"https://{address}/health")).status_code == 200
            async with client(access(folder, Role.OPERATOR), token, Role.SAMPLER) as web:
                assert (await web.get(f"https://{scraped}/metrics", extensions=sni)).status_code == 200
        write_certificate_file(folder / "retriever.pem", b"half a fi", secret=False)
        async with client(access(folder, Role.OPERATOR)) as web:
            assert (await web.get(f"https://{address}/health")).status_code == 200


async def test_beyond_this_machine_the_retriever_wants_tls_and_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"retriever\.listen = 0\.0\.0\.0:0 .*in plain text"):
        await serve_retriever(RetrieverConfig(corpus=tmp_path / "none", listen="0.0.0.0:0"), OPEN)
