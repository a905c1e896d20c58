"""The proxy does to connections what it says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from tests.chaos.fault_proxy import FaultProxy, LinkFault

SECONDS = 5.0
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ProxiedPair:
    """A proxy before a server that hands its connections to the test; closes all of them in the end."""

    def __init__(self, proxy: FaultProxy, accepted: asyncio.Queue[Ends]) -> None:
        self.proxy = proxy
        self.accepted = accepted
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> tuple[Ends, Ends]:
        """Both ends of a new connection, the client's first."""
        return await self.client(), await self.server()

    async def client(self) -> Ends:
        host, _, port = self.proxy.address.rpartition(":")
        ends = await asyncio.open_connection(host, int(port))
        self.writers.append(ends[1])
        return ends

    async def server(self) -> Ends:
        return await asyncio.wait_for(self.accepted.get(), SECONDS)

    @contextlib.asynccontextmanager
    async def failing(self, mode: LinkFault) -> AsyncGenerator[None]:
        """In ``mode`` for the time of the block."""
        failing = asyncio.create_task(self.proxy.fail(mode, SECONDS))
        await asyncio.sleep(0)  # it has begun
        yield
        failing.cancel()
        await asyncio.gather(failing, return_exceptions=True)


@pytest.fixture
async def wire() -> AsyncGenerator[ProxiedPair]:
    accepted: asyncio.Queue[Ends] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        accepted.put_nowait((reader, writer))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with FaultProxy(f"{host}:{port}", seed=0).serving() as proxy:
            wire = ProxiedPair(proxy, accepted)
            yield wire
        for writer in (*wire.writers, *writers):
            writer.close()
            with contextlib.suppress(OSError):  # of a connection that was reset
                await writer.wait_closed()


async def passes(source: Ends, target: Ends, data: bytes = b"something") -> None:
    source[1].write(data)
    assert await asyncio.wait_for(target[0].readexactly(len(data)), SECONDS) == data


async def test_bytes_and_ends_pass_in_both_directions(wire: ProxiedPair) -> None:
    client, server = await wire.connect()
    await passes(client, server)
    await passes(server, client)
    client[1].write_eof()
    assert await asyncio.wait_for(server[0].read(), SECONDS) == b""
    await passes(server, client)
    server[1].close()
    assert await asyncio.wait_for(client[0].read(), SECONDS) == b""


async def test_what_is_dropped_arrives_when_it_is_over(wire: ProxiedPair) -> None:
    client, server = await wire.connect()
    async with wire.failing(LinkFault.DROP):
        client[1].write(b"late")
        reading = asyncio.create_task(server[0].readexactly(4))
        late = await wire.client()
        done, _ = await asyncio.wait({reading}, timeout=0.1)
        assert not done
        assert wire.accepted.empty()
    assert await asyncio.wait_for(reading, SECONDS) == b"late"
    await passes(late, await wire.server())


async def test_a_halved_connection_stays_halved(wire: ProxiedPair) -> None:
    client, server = await wire.connect()
    async with wire.failing(LinkFault.HALVE):
        reads = {asyncio.create_task(end[0].read(1)): end for end in (client, server)}
        (closed,), (pending,) = await asyncio.wait(reads, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
        assert closed.result() == b""
    deaf, hearing = reads[closed], reads[pending]
    deaf[1].write(b"x")
    assert await asyncio.wait_for(pending, SECONDS) == b"x"
    hearing[1].write(b"y")
    assert await deaf[0].read() == b""


async def test_a_message_is_cut_in_the_middle(wire: ProxiedPair) -> None:
    client, server = await wire.connect()
    async with wire.failing(LinkFault.CUT):
        client[1].write(b"x" * 1000)
        assert len(await asyncio.wait_for(server[0].read(), SECONDS)) < 1000
        assert await asyncio.wait_for(client[0].read(), SECONDS) == b""


async def test_a_reset_reaches_both_ends_and_who_comes_meanwhile(wire: ProxiedPair) -> None:
    client, server = await wire.connect()
    async with wire.failing(LinkFault.RESET):
        for end in (client, server, *await wire.connect()):
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(end[0].read(), SECONDS)
    await passes(*await wire.connect())


async def test_a_target_that_is_not_there_ends_the_connection() -> None:
    async with FaultProxy("127.0.0.1:1", seed=0).serving() as proxy:
        reader, writer = await ProxiedPair(proxy, asyncio.Queue()).client()
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""
        writer.close()
        await writer.wait_closed()


async def test_a_connection_that_still_waits_is_closed_with_the_proxy() -> None:
    """One that is held back was never joined to the target: nobody else closes it."""
    async with FaultProxy("127.0.0.1:1", seed=0).serving() as proxy:
        failing = asyncio.create_task(proxy.fail(LinkFault.DROP, SECONDS))
        others = len(asyncio.all_tasks())
        reader, writer = await ProxiedPair(proxy, asyncio.Queue()).client()
        while len(asyncio.all_tasks()) == others:  # noqa: ASYNC110  # until it is taken in, of which nothing tells
            await asyncio.sleep(0)
    assert await asyncio.wait_for(reader.read(), SECONDS) == b""
    failing.cancel()
    writer.close()
