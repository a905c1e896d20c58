"""The broker with TLS, users and topics: the embedded one, and Mosquitto with the configuration in deploy/mosquitto."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import re
import ssl
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import SecretStr

from services.broker.acl import may_publish
from services.broker.limits import RETAINED_BYTES, BrokerLimits
from services.broker.server import embedded_broker, read_passwords
from services.certs.authority import CertificateWithKey
from services.certs.issue import make_certificates
from services.cli.processes.readiness import probe_broker, wait_until_ready
from tests.control.broker_processes import mosquitto_binary
from tests.ports import free_address
from tests.security.credential_builders import access, authority, impostor, save
from treegrpo.config.security import Role, SecurityConfig
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ConfigError, UnavailableError
from treegrpo.net.address import join_address, split_address
from treegrpo.net.limits import CONTROL_BYTES
from treegrpo.security.credentials import OPEN, Credentials
from treegrpo.wire.control import ControlPlane, Member, RunState, open_client, publish_state

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see `refused`
DEPLOY = Path(__file__).parents[2] / "deploy" / "mosquitto"
SECONDS = 30.0
VERSION = PolicyVersion(1, 7)
S7 = Member("s7", "sampler", 7)
LEARNER = Member("learner", "learner", 1)


def shipped(folder: Path, certificates: Path, address: str, run: str = "+") -> Path:
    """The configuration that is shipped, with this machine's paths and port, for the runs of all tests or for one."""
    host, _, port = address.rpartition(":")
    for path in DEPLOY.iterdir():
        text = path.read_text().replace("/mosquitto/config", str(folder)).replace("/mosquitto/certs", str(certificates))
        text = text.replace("RUN_NAME", run)
        (folder / path.name).write_text(re.sub(r"listener \d+", f"listener {port} {host}", text))
    with (folder / "mosquitto.conf").open("a") as config:
        config.write(f"user {Path(certificates).owner()}\n")  # started by root it would not be able to read the key
    return folder / "mosquitto.conf"


def command(kind: str, folder: Path, certificates: Path, address: str) -> list[str]:
    if kind == "embedded":
        flags = ["--broker.address", address, "--security.dir", str(certificates)]
        return [sys.executable, "-m", "services.broker.server", *flags]
    if (binary := mosquitto_binary()) is None:
        if os.environ.get("REQUIRE_MOSQUITTO"):
            pytest.fail("REQUIRE_MOSQUITTO is set, but there is no mosquitto binary on the PATH")
        pytest.skip("no mosquitto binary on the PATH; .ci/run installs one")
    return [binary, "-c", str(shipped(folder, certificates, address))]


@pytest.fixture(scope="module", params=["embedded", "mosquitto"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, made: Path) -> Generator[str]:
    """Where a broker with everything on runs."""
    where = free_address()

    async def start() -> asyncio.subprocess.Process:
        started = await asyncio.create_subprocess_exec(
            *command(request.param, tmp_path_factory.mktemp("broker"), made, where),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await wait_until_ready("broker", lambda: probe_broker(where, access(made, Role.OPERATOR)), SECONDS)
        return started

    with asyncio.Runner() as runner:
        process = runner.run(start())
        try:
            yield where
        finally:
            process.kill()
            runner.run(process.wait())


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return "".join(character if character.isalnum() else "-" for character in request.node.name)


async def until(plane: ControlPlane, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await plane.wait_change()


async def refused(address: str, who: Credentials) -> str:
    """What somebody is told who is not let in."""
    with pytest.raises(UnavailableError) as error:
        await probe_broker(address, who)
    sentence = str(error.value)
    del error
    gc.collect()  # the MQTT client leaves the socket of a handshake that failed to the collector
    return sentence


def join(address: str, run: str, made: Path, role: Role, name: str) -> Any:
    return ControlPlane.connect(address, run, Member(name, role.value, 1), access(made, role))


async def test_learner_samplers_and_operator_work_together(address: str, run: str, made: Path) -> None:
    async with (
        join(address, run, made, Role.LEARNER, "learner") as learner,
        join(address, run, made, Role.SAMPLER, "s7") as sampler,
    ):
        await learner.announce_version(VERSION)
        await learner.set_state(RunState.RUNNING)
        await publish_state(address, run, RunState.PAUSED, access(made, Role.OPERATOR))
        for plane in (learner, sampler):
            await until(plane, lambda plane=plane: plane.state is RunState.PAUSED and plane.version == VERSION)


@pytest.mark.parametrize(
    "topic",
    ["state", "weights", "owner", "members/learner/learner", "members/learner/s7", "members/sampler/s8", "members/s7", "more"],
)
async def test_a_sampler_publishes_its_own_presence_and_nothing_else(address: str, run: str, made: Path, topic: str) -> None:
    """The state is set before and after: what comes in between would have been heard in between."""
    async with join(address, run, made, Role.LEARNER, "learner") as learner:
        await learner.announce_version(VERSION)
        await learner.set_state(RunState.RUNNING)
        payload = {"state": b"draining", "weights": b"9.9"}.get(topic, Member("learner", "learner", 66, alive=False).payload())
        async with open_client(address, access(made, Role.OPERATOR)) as listener:
            await listener.subscribe(f"treegrpo/{run}/#", qos=1)
            async with open_client(address, access(made, Role.SAMPLER), identifier=S7.client) as sampler:
                await sampler.publish(f"treegrpo/{run}/{topic}", payload, qos=1, retain=True)
                await sampler.publish(f"treegrpo/{run}/{S7.topic}", S7.payload(), qos=1)
            seen: list[tuple[str, Any]] = []
            async with asyncio.timeout(SECONDS):
                async for message in listener.messages:
                    seen.append((message.topic.value.removeprefix(f"treegrpo/{run}/"), message.payload))
                    if seen[-1][0] == S7.topic:
                        break
        assert (topic, payload) not in seen
        assert learner.members["learner@0000000000000001"].alive


@pytest.mark.parametrize(
    ("role", "topic"), [(Role.SAMPLER, "state"), (Role.SAMPLER, "members/learner/learner"), (Role.OPERATOR, "weights")]
)
async def test_a_last_will_is_no_way_around_it(address: str, run: str, made: Path, role: Role, topic: str) -> None:
    """Left behind by a connection that is cut; the embedded broker refuses it, Mosquitto does not publish it."""
    will = aiomqtt.Will(f"treegrpo/{run}/{topic}", b"draining", qos=1, retain=True)
    async with join(address, run, made, Role.LEARNER, "learner") as learner:
        client = open_client(address, access(made, role), identifier=S7.client, will=will)
        try:
            async with client, asyncio.timeout(SECONDS):
                inner: Any = client._client  # pyright: ignore[reportPrivateUsage]
                inner.socket().shutdown(2)
                await client._disconnected  # pyright: ignore[reportPrivateUsage]
        except (aiomqtt.MqttError, OSError):
            pass
        async with join(address, run, made, Role.SAMPLER, "marker"):
            await until(learner, lambda: "marker@0000000000000001" in learner.members)
        assert learner.state is RunState.RUNNING
        assert learner.version is None
        assert learner.members["learner@0000000000000001"].alive


async def test_the_operator_sets_the_state_and_announces_no_weights(address: str, run: str, made: Path) -> None:
    async with join(address, run, made, Role.LEARNER, "learner") as learner:
        async with open_client(address, access(made, Role.OPERATOR)) as operator:
            await operator.publish(f"treegrpo/{run}/weights", b"9.9", qos=1, retain=True)
            await operator.publish(f"treegrpo/{run}/state", b"paused", qos=1, retain=True)
        await until(learner, lambda: learner.state is RunState.PAUSED)
        assert learner.version is None


@pytest.mark.parametrize(("user", "password"), [("sampler", "wrong"), ("sampler", ""), ("nobody", "wrong"), ("", "")])
async def test_without_the_password_nobody_comes_in(address: str, made: Path, user: str, password: str) -> None:
    outsider = replace(access(made, Role.SAMPLER), broker_user=user, broker_password=SecretStr(password))
    sentence = await refused(address, outsider)
    assert "user" in sentence or "uthori" in sentence


async def test_a_plaintext_client_is_told_to_set_security(address: str, made: Path) -> None:
    assert "if it wants TLS or a password set [security]" in await refused(address, OPEN)


async def test_who_trusts_another_authority_does_not_say_its_password(address: str, tmp_path: Path) -> None:
    make_certificates(tmp_path, [], [])
    assert "not of an authority in our ca.pem" in await refused(address, access(tmp_path, Role.SAMPLER))


async def test_a_sampler_that_calls_itself_learner_throws_nobody_out(address: str, run: str, made: Path) -> None:
    async with join(address, run, made, Role.LEARNER, "learner") as learner:
        for name in ("learner", "learner@0000000000000001@", "sampler"):
            async with open_client(address, access(made, Role.SAMPLER), identifier=name) as sampler:
                false = Member(name, "sampler", 1)
                await sampler.publish(f"treegrpo/{run}/members/sampler/{name}", false.payload(), qos=1, retain=True)
        async with join(address, run, made, Role.SAMPLER, "marker"):
            await until(learner, lambda: "marker@0000000000000001" in learner.members)
        assert learner.lost is None
        assert {member.id for member in learner.members.values()} == {"learner", "marker"}


async def test_a_sampler_reads_the_presence_of_nobody_else(address: str, run: str, made: Path) -> None:
    """It knows no other client id, so it can throw nobody out; nor an incarnation, so it can bury nobody."""
    async with (
        join(address, run, made, Role.LEARNER, "learner") as learner,
        open_client(address, access(made, Role.SAMPLER), identifier=S7.client) as sampler,
    ):
        await learner.set_state(RunState.PAUSED)
        heard = set[str]()
        async with asyncio.timeout(SECONDS):
            for topic in (f"treegrpo/{run}/#", "treegrpo/+/members/+/+", f"treegrpo/{run}/state"):
                await sampler.subscribe(topic, qos=1)
            await learner.set_state(RunState.DRAINING)
            async for message in sampler.messages:
                heard.add(message.topic.value)
                if message.payload == b"draining":
                    break
        assert heard == {f"treegrpo/{run}/state"}


async def test_without_a_certificate_nobody_gets_as_far_as_a_password(address: str, made: Path) -> None:
    context = ssl.create_default_context(cafile=str(made / "ca.pem"))
    who = access(made, Role.SAMPLER)
    host, port = split_address(address, "broker.address")
    word = who.broker_password.get_secret_value()
    client = aiomqtt.Client(host, port, username="sampler", password=word, tls_context=context, timeout=1.0)
    with pytest.raises(aiomqtt.MqttError):
        await client.__aenter__()
    del client
    gc.collect()


async def test_nobody_reads_what_is_not_the_runs(address: str, made: Path) -> None:
    async with open_client(address, access(made, Role.SAMPLER)) as sampler:
        codes: Any = await sampler.subscribe("other/#", qos=1)
        await sampler.publish("other/x", b"x", qos=1, retain=True)
    assert codes[0] in (1, 128) or codes[0].is_failure


async def test_a_message_that_is_too_large_is_not_passed_on(address: str, run: str, made: Path) -> None:
    async with join(address, run, made, Role.LEARNER, "learner") as learner:
        client = open_client(address, access(made, Role.OPERATOR), timeout=2.0)
        with suppress(aiomqtt.MqttError):  # hung up on
            async with client as operator:
                await operator.publish(f"treegrpo/{run}/state", b"x" * (2 * CONTROL_BYTES + 1), qos=1)
                pytest.fail("it took the message")
        await publish_state(address, run, RunState.DRAINING, access(made, Role.OPERATOR))
        await until(learner, lambda: learner.state is RunState.DRAINING)


# ---- the embedded broker alone


@pytest.mark.parametrize("who", ["expired", "stranger", "retriever"])
async def test_the_embedded_broker_wants_a_good_certificate_beside_the_password(made: Path, tmp_path: Path, who: str) -> None:
    address = free_address()
    broker = embedded_broker(address, access(made, Role.BROKER), {"sampler": "word"})
    await broker.start()
    try:
        other = access(made, Role.RETRIEVER) if who == "retriever" else impostor(tmp_path, made, who)
        bad = replace(other, broker_user="sampler", broker_password=SecretStr("word"))
        good = replace(bad, keys=access(made, Role.SAMPLER).keys)
        await probe_broker(address, good)
        assert ("user 'sampler'" if who == "retriever" else "likely because it does not trust") in await refused(address, bad)
    finally:
        await broker.shutdown()


@pytest.mark.parametrize("said", [b"", b"\x10\x20\x00\x04MQTT"])
async def test_who_connects_and_does_not_say_who_it_is_is_hung_up_on(said: bytes) -> None:
    address = free_address()
    broker = embedded_broker(address, limits=BrokerLimits(handshake_seconds=0.2))
    await broker.start()
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(said)
    async with asyncio.timeout(SECONDS):
        assert await reader.read() == b""
    writer.close()
    await broker.shutdown()


@pytest.mark.parametrize("role", [Role.RETRIEVER, Role.LEARNER, None])
async def test_no_other_certificate_is_good_as_the_brokers(made: Path, tmp_path: Path, role: Role | None) -> None:
    """Of the same authority, for the same address: it would collect passwords."""
    if role is None:
        keys = save(tmp_path, _roleless(authority(made)), (made / "ca.pem").read_bytes())
        posing, says = replace(access(made, Role.BROKER), keys=keys), "no role"
    else:
        posing, says = access(made, role), f"the role {role.value}"
    async with eavesdropper(posing) as (address, received):
        sentence = await refused(address, access(made, Role.SAMPLER))
    assert f"its certificate has {says}; a broker has to show its own" in sentence
    assert received == b"", "not a byte of CONNECT, in which the password is"


async def test_tls_of_the_broker_is_checked_by_name(made: Path, tmp_path: Path) -> None:
    """A sampler's certificate has no address in it: its holder cannot pose as the broker."""
    address, sampler = free_address(), access(made, Role.SAMPLER)
    broker = embedded_broker(
        address, Credentials(Role.BROKER, sampler.keys), {"sampler": sampler.broker_password.get_secret_value()}
    )
    await broker.start()
    try:
        assert "likely because its certificate is for another name" in await refused(address, sampler)
    finally:
        await broker.shutdown()


async def test_the_embedded_broker_listens_on_ipv6_as_the_other_parts_do(made: Path) -> None:
    address = free_address().replace("127.0.0.1", "[::1]")
    broker = embedded_broker(address, access(made, Role.BROKER), {"sampler": "word"})
    try:
        await broker.start()
        who = replace(access(made, Role.SAMPLER), broker_user="sampler", broker_password=SecretStr("word"))
        async with ControlPlane.connect(address, "r", S7, who) as plane:
            await until(plane, lambda: S7.client in plane.members)
    finally:
        await broker.shutdown()


@asynccontextmanager
async def eavesdropper(who: Credentials) -> AsyncGenerator[tuple[str, bytearray]]:
    """Somebody who listens with the certificate of ``who``, where, and what it was told."""
    received = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                received.extend(data)
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=who.server_context(ask=True))
    async with server:
        yield join_address(*server.sockets[0].getsockname()[:2]), received


def _roleless(issuer: CertificateWithKey) -> CertificateWithKey:
    """A certificate of ours for this machine, made elsewhere, that says no role."""
    key = ec.generate_private_key(ec.SECP256R1())
    now, name = datetime.now(UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anything")])
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    subject = issuer.certificate.subject
    builder = x509.CertificateBuilder(subject, name, key.public_key(), 7, now - timedelta(hours=1), now + timedelta(days=1))
    made = builder.add_extension(hosts, critical=False)
    return CertificateWithKey(made.sign(issuer.key, hashes.SHA256()), key)


def test_the_embedded_broker_needs_the_directory_of_the_passwords() -> None:
    with pytest.raises(ConfigError, match=r"takes its users from security\.dir"):
        read_passwords(None)


async def test_beyond_this_machine_no_broker_is_spoken_to_in_plain_text() -> None:
    with pytest.raises(ConfigError, match=r"broker\.address = 10\.0\.0\.7:1883 is on another machine"):
        open_client("10.0.0.7:1883", OPEN)
    open_client("10.0.0.7:1883", Credentials.from_config(SecurityConfig(insecure_network=True), Role.SAMPLER))


@pytest.mark.parametrize(
    ("user", "topic", "may"),
    [
        ("learner", "treegrpo/r/weights", True),
        ("learner", "treegrpo/r/state", True),
        ("operator", "treegrpo/r/weights", False),
        ("operator", "treegrpo/r/state", True),
        ("sampler", "treegrpo/r/members/sampler/me", True),
        ("sampler", "treegrpo/r/members/sampler/you", False),
        ("sampler", "treegrpo/r/members/learner/me", False),
        ("learner", "treegrpo/r/members/learner/me", True),
        ("learner", "treegrpo/r/members/sampler/you", True),
        ("learner", "treegrpo/r/owner", True),
        ("operator", "treegrpo/r/owner", False),
        ("learner", "treegrpo/r/more", False),
        ("sampler", "treegrpo/members/sampler/me", False),
        ("sampler", "treegrpo/r/s/members/sampler/me", False),
        ("sampler", "other/r/members/sampler/me", False),
        ("", "treegrpo/r/members//me", False),
    ],
)
def test_the_rules(user: str, topic: str, *, may: bool) -> None:
    assert may_publish(user, "me", topic) is may


async def test_mosquittos_access_list_is_good_for_one_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlPlane.wait_retained_state, "__defaults__", (1.0,))
    where = free_address()
    if (binary := mosquitto_binary()) is None:
        pytest.skip("no mosquitto binary on the PATH; .ci/run installs one")
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(binary, "-c", str(shipped(tmp_path, made, where, "ours")), stderr=quiet)
    try:
        await wait_until_ready("broker", lambda: probe_broker(where, access(made, Role.OPERATOR)), SECONDS)
        async with ControlPlane.connect(where, "ours", replace(LEARNER, run="r"), access(made, Role.LEARNER)) as plane:
            await publish_state(where, "theirs", RunState.DRAINING, access(made, Role.OPERATOR))
            assert plane.lost is None
        with pytest.raises(ConfigError, match=r"run\.name = theirs; let its access list name that run"):
            await ControlPlane.connect(where, "theirs", replace(LEARNER, run="r"), access(made, Role.LEARNER)).__aenter__()
    finally:
        process.kill()
        await process.wait()


def test_mosquittos_rules_name_the_same_users(tmp_path: Path, made: Path) -> None:
    acl = (DEPLOY / "acl").read_text()
    assert re.findall(r"^user (\w+)$", acl, re.MULTILINE) == ["learner", "operator", "sampler"]
    assert f"message_size_limit {RETAINED_BYTES}" in (DEPLOY / "mosquitto.conf").read_text()
    users = [line.partition(":")[0] for line in (made / "mosquitto.passwd").read_text().splitlines()]
    assert sorted(users) == ["learner", "operator", "sampler"]
