"""The learner's gRPC door: real servers and channels on loopback, right peers and wrong ones."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from learner.intake import doors, rollout
from learner.intake.desk import Desk
from learner.intake.doors import Admission, Watch, open_server
from learner.intake.peers import Peer
from learner.intake.rollout import RolloutServer
from learner.intake.weights import WeightsServer
from services.cli.authority import issue
from services.cli.certs import certs, write
from services.cli.ready import learner_ready
from services.sampler import channel as channel_module
from services.sampler.channel import connect, open_channel
from tests.control.brokers import free_address
from tests.security.people import access, authority, impostor, save
from treegrpo import limits
from treegrpo.access import OPEN, Access, Keys
from treegrpo.errors import ConfigError, UnavailableError
from treegrpo.security import Role
from treegrpo.telemetry import IntakeMetrics
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc, weights_pb2, weights_pb2_grpc

SECONDS = 10.0
HELLO = pb.Hello(sampler="s7", incarnation=1, engine="fake")


@dataclass
class Reception:
    """Takes samplers in and says welcome: the desk's part in this."""

    peers: dict[str, Peer] = field(default_factory=dict[str, Peer])
    behind: bool = False

    def join(self, hello: pb.Hello) -> Peer:
        peer = self.peers[hello.sampler] = Peer(hello.sampler, hello.incarnation, hello.engine, hello.capacity, room=16)
        peer.send(pb.RolloutResponse(welcome=pb.Welcome(run="test")))
        return peer

    def leave(self, peer: Peer) -> None:
        self.peers.pop(peer.id, None)


@dataclass
class Door:
    address: str
    metrics: IntakeMetrics
    reception: Reception

    def refused(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("treegrpo_peers_refused_total", {"reason": reason}) or 0.0

    @property
    def handshakes(self) -> float:
        return self.metrics.registry.get_sample_value("treegrpo_tls_handshakes_total") or 0.0


@asynccontextmanager
async def serving(learner: Access) -> AsyncGenerator[Door]:
    metrics, reception, address = IntakeMetrics(), Reception(), free_address()
    watch = Watch(metrics)
    server = open_server(address, learner, watch)
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutServer(cast("Desk", reception), Admission(watch)), server)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(WeightsServer(metrics), server)
    healthy = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await server.start()
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    try:
        yield Door(address, metrics, reception)
    finally:
        await server.stop(None)


async def describe(door: Door, who: Access) -> grpc.StatusCode:
    """What somebody gets who asks for weights; NOT of a version: none is published."""
    async with open_channel(door.address, who) as channel:
        try:
            await cast("Any", weights_pb2_grpc.WeightsServiceStub(channel)).DescribeWeights(
                weights_pb2.DescribeWeightsRequest(), timeout=SECONDS
            )
        except grpc.aio.AioRpcError as error:
            return error.code() if "No policy version" not in (error.details() or "") else grpc.StatusCode.OK
    raise AssertionError("weights out of nowhere")


async def stream(door: Door, who: Access, *requests: pb.RolloutRequest) -> tuple[grpc.StatusCode, str]:
    """What a rollout stream that begins so comes to: OK when it is welcomed."""
    async with open_channel(door.address, who) as channel:
        call = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)).Rollout()
        try:
            async with asyncio.timeout(SECONDS):
                for request in requests:
                    await call.write(request)
                first = await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return await call.code(), await call.details()
        if isinstance(first, pb.RolloutResponse) and first.WhichOneof("kind") == "welcome":
            call.cancel()
            return grpc.StatusCode.OK, ""
        return await call.code(), await call.details()


def hello(**changes: Any) -> pb.RolloutRequest:
    changed = pb.Hello()
    changed.CopyFrom(HELLO)
    for name, value in changes.items():
        setattr(changed, name, value)
    return pb.RolloutRequest(hello=changed)


async def test_a_sampler_streams_and_fetches_weights(made: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as door:
        sampler = access(made, Role.SAMPLER)
        assert await stream(door, sampler, hello()) == (grpc.StatusCode.OK, "")
        assert await describe(door, sampler) is grpc.StatusCode.OK
        async with await connect(door.address, sampler):
            pass


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.SAMPLER])
async def test_another_role_may_ask_for_health_and_nothing_else(made: Path, role: Role, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(access(made, Role.LEARNER)) as door:
        other = access(made, role)
        await learner_ready(door.address, other)
        code, sentence = await stream(door, other, hello())
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert sentence == f"The role {role.value} may not call /treegrpo.v1.RolloutService/Rollout; that is for sampler."
        assert await describe(door, other) is grpc.StatusCode.PERMISSION_DENIED
        assert await describe(door, other) is grpc.StatusCode.PERMISSION_DENIED
        assert door.refused("role") == 3
    assert sum("may not call" in record.getMessage() for record in caplog.records) == 2, "each is logged once"


async def test_a_certificate_without_a_role_may_not_even_ask_for_health(made: Path, tmp_path: Path) -> None:
    ours = authority(made)
    pair = issue(ours, Role.SAMPLER)
    keys = save(tmp_path, pair, ours.pem)
    async with serving(access(made, Role.LEARNER)) as door:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(doors, "roles_in", lambda _uris: None)  # as of an authority that also serves others  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
            assert await describe(door, Access(Role.SAMPLER, keys)) is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("who", ["expired", "stranger"])
async def test_a_bad_certificate_ends_in_the_handshake(made: Path, tmp_path: Path, who: str) -> None:
    async with serving(access(made, Role.LEARNER)) as door:
        code, _ = await stream(door, impostor(tmp_path, made, who), hello())
        assert code is grpc.StatusCode.UNAVAILABLE
        assert door.reception.peers == {}
        assert door.handshakes >= 1


async def test_nobody_comes_in_without_a_certificate(made: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as door:
        credentials = grpc.ssl_channel_credentials((made / "ca.pem").read_bytes())
        options = [("grpc.ssl_target_name_override", "learner.treegrpo.internal")]
        async with grpc.aio.secure_channel(door.address, credentials, options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await cast("Any", health_pb2_grpc).HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_sampler_with_a_name_cannot_be_another(made: Path, tmp_path: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as door:
        named = impostor(tmp_path, made, "named")
        assert (await stream(door, named, hello()))[0] is grpc.StatusCode.OK
        code, sentence = await stream(door, named, hello(sampler="s8"))
        assert (code, door.refused("forged")) == (grpc.StatusCode.PERMISSION_DENIED, 1)
        assert sentence == "Sampler 's8' shows the certificate of sampler 's7'; set sampler.id = s7."


async def test_there_is_no_call_that_publishes_weights(made: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as door, open_channel(door.address, access(made, Role.SAMPLER)) as channel:
        for method in ("PublishWeights", "Publish", "SetWeights"):
            call: Any = channel.unary_unary(f"/treegrpo.v1.WeightsService/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", timeout=SECONDS)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ---- why it does not work


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "CONNECT_SECONDS", 0.3)


async def no_connection(door: Door, who: Access) -> str:
    with pytest.raises(UnavailableError) as error:
        await connect(door.address, who)
    return str(error.value)


@pytest.mark.usefixtures("impatient")
async def test_a_plaintext_sampler_is_told_that_the_learner_speaks_tls(made: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as door:
        assert "likely because it speaks TLS and we plain text: set security.dir" in await no_connection(door, OPEN)


@pytest.mark.usefixtures("impatient")
async def test_a_sampler_with_tls_is_told_that_the_learner_speaks_plain_text(made: Path) -> None:
    async with serving(OPEN) as door:
        assert "it speaks plain text and we TLS" in await no_connection(door, access(made, Role.SAMPLER))


@pytest.mark.usefixtures("impatient")
async def test_a_sampler_trusts_no_learner_of_another_authority(made: Path, tmp_path: Path) -> None:
    certs(tmp_path, [], [], new_ca=False, drop_old_ca=False)
    async with serving(access(tmp_path, Role.LEARNER)) as door:
        assert "its certificate is not from an authority in our ca.pem" in await no_connection(door, access(made, Role.SAMPLER))


@pytest.mark.usefixtures("impatient")
async def test_a_sampler_trusts_nobody_but_a_learner(made: Path) -> None:
    stolen = Keys(made / "ca.pem", made / "broker.pem", made / "broker.key")
    async with serving(Access(Role.LEARNER, stolen)) as door:
        assert "its certificate is not a learner's" in await no_connection(door, access(made, Role.SAMPLER))


@pytest.mark.usefixtures("impatient")
async def test_a_sampler_that_is_not_trusted_is_told_so(made: Path, tmp_path: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as door:
        sentence = await no_connection(door, impostor(tmp_path, made, "stranger"))
        assert "likely because it does not trust" in sentence
        assert "own.pem" in sentence


async def test_beyond_this_machine_nothing_begins_without_certificates() -> None:
    with pytest.raises(ConfigError, match=r"learner\.listen = 0\.0\.0\.0:0 .*in plain text"):
        open_server("0.0.0.0:0", OPEN, Watch(IntakeMetrics()))
    with pytest.raises(ConfigError, match=r"sampler\.learner = 10\.0\.0\.7:1 is on another machine"):
        await connect("10.0.0.7:1", OPEN)


async def test_a_renewed_certificate_serves_without_a_restart(tmp_path: Path, made: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "certs")
    async with serving(access(folder, Role.LEARNER)) as door:
        assert await describe(door, access(folder, Role.SAMPLER)) is grpc.StatusCode.OK
        shutil.rmtree(folder)
        certs(folder, [], [], new_ca=False, drop_old_ca=False)  # of another authority: the old files could not serve them
        assert await describe(door, access(folder, Role.SAMPLER)) is grpc.StatusCode.OK
        write(folder / "learner.pem", b"half a fi", secret=False)
        assert await describe(door, access(folder, Role.SAMPLER)) is grpc.StatusCode.OK


# ---- limits


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (pb.RolloutRequest(heartbeat=pb.Heartbeat()), "begins with Hello"),
        (pb.RolloutRequest(), "begins with Hello"),
        (hello(sampler=""), "Hello.sampler is ''"),
        (hello(sampler="x" * 65), "1 to 64 letters"),
        (hello(sampler="a/b"), "Hello.sampler is 'a/b'"),
        (hello(engine="\n"), "Hello.engine is"),
    ],
)
async def test_a_stream_that_begins_otherwise_is_refused_and_counted(first: pb.RolloutRequest, says: str) -> None:
    async with serving(OPEN) as door:
        code, sentence = await stream(door, OPEN, first)
        assert (code, door.refused("hello")) == (grpc.StatusCode.INVALID_ARGUMENT, 1)
        assert says in sentence


async def test_one_sampler_too_many_is_refused_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEERS", 1)
    async with serving(OPEN) as door:
        door.reception.join(pb.Hello(sampler="first"))
        code, sentence = await stream(door, OPEN, hello())
        assert (code, door.refused("peers")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1)
        assert sentence == "1 samplers are connected, the most one learner takes; stop some."


async def test_a_stream_without_hello_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "HANDSHAKE_SECONDS", 0.2)
    async with serving(OPEN) as door:
        code, sentence = await stream(door, OPEN)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "send Hello" in sentence


async def test_a_message_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [(key, 4096 if key == "grpc.max_receive_message_length" else value) for key, value in doors.OPTIONS]
    monkeypatch.setattr(doors, "OPTIONS", small)
    async with serving(OPEN) as door, open_channel(door.address, OPEN) as channel:
        call = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)).Rollout()
        await call.write(hello())
        await call.read()
        await call.write(hello(sampler="x" * 5000))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in await call.details()


def test_both_ends_have_the_same_limit() -> None:
    for name in ("grpc.max_receive_message_length", "grpc.max_send_message_length"):
        assert dict(doors.OPTIONS)[name] == dict(channel_module.OPTIONS)[name] == limits.MESSAGE_BYTES == 32 << 20


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n", b"\x16\x03\x01"])
async def test_who_connects_and_says_nothing_more_is_hung_up_on(
    made: Path, monkeypatch: pytest.MonkeyPatch, said: bytes, *, tls: bool
) -> None:
    quick = [(key, 300 if key == "grpc.server_handshake_timeout_ms" else value) for key, value in doors.OPTIONS]
    monkeypatch.setattr(doors, "OPTIONS", quick)
    async with serving(access(made, Role.LEARNER) if tls else OPEN) as door:
        host, _, port = door.address.rpartition(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(slow, said)
            async with asyncio.timeout(SECONDS):
                while await loop.sock_recv(slow, 1024):
                    pass


async def test_calls_at_once_on_one_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [(key, 2 if key == "grpc.max_concurrent_streams" else value) for key, value in doors.OPTIONS]
    monkeypatch.setattr(doors, "OPTIONS", few)
    async with serving(OPEN) as door, open_channel(door.address, OPEN) as channel:
        stub, calls = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)), list[Any]()
        for number in range(2):
            calls.append(stub.Rollout())
            await calls[-1].write(hello(sampler=f"s{number}"))
            await calls[-1].read()
        calls.append(stub.Rollout())
        third = asyncio.ensure_future(calls[2].write(hello(sampler="s2")))
        welcome = asyncio.ensure_future(calls[2].read())
        await calls[0].write(pb.RolloutRequest(heartbeat=pb.Heartbeat()))
        await asyncio.wait({welcome}, timeout=0.2)
        assert not welcome.done()
        calls[0].cancel()
        await asyncio.gather(third, welcome)
        for call in calls:
            call.cancel()


def test_the_log_forgets_who_was_refused_long_ago(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(IntakeMetrics())
    with caplog.at_level(logging.WARNING):
        for number in range(3 * doors.REMEMBERED):
            watch.refused(f"ipv4:10.0.0.1:{number}", "hello", f"sentence {number // 2}")
    assert len(caplog.records) == 1.5 * doors.REMEMBERED
