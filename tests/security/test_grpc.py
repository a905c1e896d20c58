"""The learner's gRPC server: real servers and channels on loopback, right peers and wrong ones."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from learner.intake.rpc import auth_interceptor
from learner.intake.rpc.server import RefusedCalls, create_server
from services.certs.authority import issue_certificate
from services.certs.issue import make_certificates, write_certificate_file
from services.cli.processes.readiness import probe_learner
from services.sampler.learner_link.channel import connect_learner, open_channel
from tests.security.credential_builders import access, authority, impostor, save
from tests.security.grpc_server_harness import SECONDS, GrpcServerFixture, describe_weights, hello, serving, stream
from treegrpo.config.security import Role
from treegrpo.errors import ConfigError, UnavailableError
from treegrpo.net.limits import MESSAGE_BYTES
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.security.credentials import OPEN, CertificateFiles, Credentials
from treegrpo.v1 import rollout_pb2_grpc


async def test_a_sampler_streams_and_fetches_weights(made: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as fixture:
        sampler = access(made, Role.SAMPLER)
        assert await stream(fixture, sampler, hello()) == (grpc.StatusCode.OK, "")
        assert await describe_weights(fixture, sampler) is grpc.StatusCode.OK
        await (await connect_learner(fixture.address, sampler)).close()


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.SAMPLER])
async def test_another_role_may_ask_for_health_and_nothing_else(made: Path, role: Role, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(access(made, Role.LEARNER)) as fixture:
        other = access(made, role)
        await probe_learner(fixture.address, other)
        code, sentence = await stream(fixture, other)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert sentence == f"The role {role.value} may not call /treegrpo.v1.RolloutService/Rollout; it is allowed for sampler."
        assert await describe_weights(fixture, other) is grpc.StatusCode.PERMISSION_DENIED
        assert await describe_weights(fixture, other) is grpc.StatusCode.PERMISSION_DENIED
        assert fixture.refused("role") == 3
    assert sum("may not call" in record.getMessage() for record in caplog.records) == 1, "a peer and reason are logged once"


async def test_a_certificate_without_a_role_may_not_even_ask_for_health(made: Path, tmp_path: Path) -> None:
    ours = authority(made)
    pair = issue_certificate(ours, Role.SAMPLER)
    keys = save(tmp_path, pair, ours.pem)
    async with serving(access(made, Role.LEARNER)) as fixture:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(auth_interceptor, "role_of_uris", lambda _uris: None)  # as of an authority that also serves others  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
            assert await describe_weights(fixture, Credentials(Role.SAMPLER, keys)) is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("who", ["expired", "stranger"])
async def test_a_bad_certificate_ends_in_the_handshake(made: Path, tmp_path: Path, who: str) -> None:
    async with serving(access(made, Role.LEARNER)) as fixture:
        code, _ = await stream(fixture, impostor(tmp_path, made, who), hello())
        assert code is grpc.StatusCode.UNAVAILABLE
        assert fixture.reception.open_sessions == {}
        assert (fixture.handshakes >= 1, fixture.connections) == (True, 0)
        assert await describe_weights(fixture, access(made, Role.SAMPLER)) is grpc.StatusCode.OK
        assert fixture.connections == 1


async def test_handshakes_that_lead_nowhere_are_told_of_now_and_then(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    """gRPC says nothing of those that fail: they are those that no call follows."""
    async with serving(access(made, Role.LEARNER)) as fixture:
        host, _, port = fixture.address.rpartition(":")
        for _ in range(20):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert await asyncio.wait_for(reader.read(), SECONDS) == b""
            writer.close()
        assert (fixture.handshakes, fixture.connections) == (20, 0)
    said = [record.getMessage().split()[0] for record in caplog.records if "led to no call" in record.getMessage()]
    assert said == ["8", "16"]


def test_failed_handshakes_write_nothing_else() -> None:
    """gRPC would write a line for each, and any stranger could fill the disk."""
    program = "import learner.intake, os; print(os.environ['GRPC_VERBOSITY'])"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRPC_")}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout == "NONE\n"


async def test_nobody_comes_in_without_a_certificate(made: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as fixture:
        credentials = grpc.ssl_channel_credentials((made / "ca.pem").read_bytes())
        options = [("grpc.ssl_target_name_override", "learner.treegrpo.internal")]
        async with grpc.aio.secure_channel(fixture.address, credentials, options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await cast("Any", health_pb2_grpc).HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_sampler_with_a_name_cannot_be_another(made: Path, tmp_path: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as fixture:
        named = impostor(tmp_path, made, "named")
        assert (await stream(fixture, named, hello()))[0] is grpc.StatusCode.OK
        code, sentence = await stream(fixture, named, hello(sampler="s8"))
        assert (code, fixture.refused("forged")) == (grpc.StatusCode.PERMISSION_DENIED, 1)
        assert sentence == "Sampler 's8' shows the certificate of sampler 's7'; set sampler.id = s7."


async def test_there_is_no_call_that_publishes_weights(made: Path) -> None:
    async with (
        serving(access(made, Role.LEARNER)) as fixture,
        open_channel(fixture.address, access(made, Role.SAMPLER)) as channel,
    ):
        for method in ("PublishWeights", "Publish", "SetWeights"):
            call: Any = channel.unary_unary(f"/treegrpo.v1.WeightsService/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", timeout=SECONDS)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ---- why it does not work


async def no_connection(fixture: GrpcServerFixture, who: Credentials) -> str:
    with pytest.raises(UnavailableError) as error:
        await connect_learner(fixture.address, who, 0.3)
    return str(error.value)


async def test_a_plaintext_sampler_is_told_that_the_learner_speaks_tls(made: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as fixture:
        assert "likely because it speaks TLS and we plain text: set security.dir" in await no_connection(fixture, OPEN)


async def test_a_sampler_with_tls_is_told_that_the_learner_speaks_plain_text(made: Path) -> None:
    async with serving(OPEN) as fixture:
        assert "it speaks plain text and we TLS" in await no_connection(fixture, access(made, Role.SAMPLER))


async def test_a_sampler_trusts_no_learner_of_another_authority(made: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path, [], [])
    async with serving(access(tmp_path, Role.LEARNER)) as fixture:
        assert "its certificate is not from an authority in our ca.pem" in await no_connection(
            fixture, access(made, Role.SAMPLER)
        )


async def test_a_sampler_trusts_nobody_but_a_learner(made: Path) -> None:
    stolen = CertificateFiles(made / "ca.pem", made / "broker.pem", made / "broker.key")
    async with serving(Credentials(Role.LEARNER, stolen)) as fixture:
        assert "its certificate is not a learner's" in await no_connection(fixture, access(made, Role.SAMPLER))


async def test_a_sampler_that_is_not_trusted_is_told_so(made: Path, tmp_path: Path) -> None:
    async with serving(access(made, Role.LEARNER)) as fixture:
        sentence = await no_connection(fixture, impostor(tmp_path, made, "stranger"))
        assert "likely because it does not trust" in sentence
        assert "own.pem" in sentence


async def test_beyond_this_machine_nothing_begins_without_certificates() -> None:
    with pytest.raises(ConfigError, match=r"learner\.listen = 0\.0\.0\.0:0 .*in plain text"):
        create_server("0.0.0.0:0", OPEN, RefusedCalls(IntakeMetrics()), MESSAGE_BYTES)
    with pytest.raises(ConfigError, match=r"sampler\.learner = 10\.0\.0\.7:1 is on another machine"):
        await connect_learner("10.0.0.7:1", OPEN)


async def test_a_renewed_certificate_serves_without_a_restart(tmp_path: Path, made: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "certs")
    async with serving(access(folder, Role.LEARNER)) as fixture:
        assert await describe_weights(fixture, access(folder, Role.SAMPLER)) is grpc.StatusCode.OK
        shutil.rmtree(folder)
        make_certificates(folder, [], [])  # of another authority: the old files could not serve them
        assert await describe_weights(fixture, access(folder, Role.SAMPLER)) is grpc.StatusCode.OK
        write_certificate_file(folder / "learner.pem", b"half a fi", secret=False)
        assert await describe_weights(fixture, access(folder, Role.SAMPLER)) is grpc.StatusCode.OK


async def test_a_sampler_shows_a_renewed_certificate_without_a_restart(tmp_path: Path, made: Path) -> None:
    """The learner trusts another authority from now on; what began before goes on, what begins is let in."""
    folder = shutil.copytree(made, tmp_path / "certs")
    async with serving(access(folder, Role.LEARNER)) as fixture:
        channel = await connect_learner(fixture.address, access(folder, Role.SAMPLER))
        stub = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel))
        before = stub.Rollout()
        await before.write(hello())
        assert await before.read() != grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
        for path in [*folder.glob("*.pem"), *folder.glob("*.key")]:
            path.unlink()
        make_certificates(folder, [], [])
        after = stub.Rollout()
        await after.write(hello(sampler="s8"))
        assert await after.read() != grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
        assert set(fixture.reception.open_sessions) == {"s7", "s8"}
        write_certificate_file(folder / "sampler.pem", b"half a fi", secret=False)
        again = stub.Rollout()
        await again.write(hello(sampler="s9"))
        assert await again.read() != grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
        await channel.close()
