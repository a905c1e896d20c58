"""The control plane: who is there, what the run shall do, which weights are newest. Over MQTT, retained, QoS 1.

    treegrpo/RUN/state                running | paused | draining, as plain text
    treegrpo/RUN/weights              newest policy version, as plain text
    treegrpo/RUN/owner                the id of the run that owns the name RUN (treegrpo/wire/run_name_owner.py), as plain text
    treegrpo/RUN/members/ROLE/CLIENT  msgpack map of a `Member`; alive=false is the last will

A broker with users lets each do what its role needs: the learner all of it, the operator the state, and a sampler its own
presence alone: ROLE is its user, CLIENT its MQTT client id. Samplers read state, weights, owner and their own presence. The
learner removes the presence of who left, and what nobody should have retained.

Everything is a level, not an event: a late-comer finds the present state, and hearing it twice changes nothing. State
and version are plain text so that a person can set the state with any MQTT client:

    mosquitto_pub -r -q 1 -t treegrpo/RUN/state -m paused
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import aiomqtt
import msgpack

from treegrpo.config.security import Role
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ConfigError, UnavailableError, describe
from treegrpo.net.address import reachable_address, split_address
from treegrpo.net.limits import CONTROL_BYTES, PEERS
from treegrpo.observability.rate_limited_log import RateLimitedLog
from treegrpo.security.credentials import OPEN, Credentials
from treegrpo.storage.parse_dataclass import parse_dataclass
from treegrpo.timing.backoff import Backoff
from treegrpo.timing.notifier import Notifier
from treegrpo.wire.run_name_owner import KEEPALIVE_SECONDS, WILL_SECONDS, Claim, Member

log = logging.getLogger(__name__)
CONNECT_SECONDS = 10.0
GOODBYE_SECONDS = 1.0
"""To say that we leave; a broker that does not hear it says so for us."""
AGAIN_SECONDS = 0.1
NAME_LETTERS = 256
"""The longest name, address or topic of a member that is believed, and what the log repeats of a stranger's words."""
ROLES = {role.value for role in Role}
"""A sampler is not called like one of them."""
HELD = ("state", "weights")
"""Topics of which a candidate does not know yet whose they are."""


@dataclass(frozen=True, slots=True)
class ControlLimits:
    """Back-off, time limits and room of a control plane."""

    backoff: Backoff = Backoff((0.5, 1.0, 2.0, 5.0))
    """Before a lost broker is connected to again."""
    stable_seconds: float = 5.0
    """After a connection that lasted this long the delays begin again."""
    will_seconds: float = WILL_SECONDS
    """How long a candidate for run.name waits for the last will of a learner that may have crashed."""
    members: int = PEERS
    """Members that are known at once."""


LIMITS = ControlLimits()


class RunState(Enum):
    RUNNING = "running"
    PAUSED = "paused"
    """Nothing new is begun; what runs is finished."""
    DRAINING = "draining"
    """The run ends: open groups close with the leaves they have, then a checkpoint."""


INCARNATIONS = 8
"""Of one name that are known at once: a process that is started again is a new one before the old one's will has come."""


class _FullError(ValueError):
    """There is no room for another member, which may be a good one."""


class ControlPlane:
    """One process's view of the control plane, kept up to date by a background task; see `connect`."""

    def __init__(
        self, address: str, run: str, member: Member, access: Credentials = OPEN, limits: ControlLimits = LIMITS
    ) -> None:
        self._address = address
        self._limits = limits
        self._access = access
        self._run = run
        self._prefix = f"treegrpo/{run}"
        self._member = member
        self._claim = Claim(member, limits.will_seconds) if member.run else None
        self._client: aiomqtt.Client | None = None
        self._changed = Notifier()
        self._refusals = RateLimitedLog(log)
        self._repeat = False
        """Our presence has to be said again."""
        self._rubbish: set[str] = set()
        """Topics whose retained message has to go, as soon as we own the name."""
        self._held: dict[str, bytes] = {}
        self._ours: dict[str, bytes] = {}
        self._settled = asyncio.Event()
        self.state = RunState.RUNNING
        self.announced_state: RunState | None = None
        """What the broker said the state is; None while it has said nothing."""
        self.version: PolicyVersion | None = None
        self.members: dict[str, Member] = {}
        """By MQTT client id: a process that is started again is another member."""
        self.lost: tuple[str, float] | None = (address, time.monotonic())
        """The broker's address and since when (time.monotonic) there is no connection to it; None while there is one."""

    async def set_state(self, state: RunState) -> None:
        """Tell everybody, now and later, what the run shall do; we do it at once, whether the broker hears us or not."""
        self.state = state
        self._changed.notify()
        await self._publish("state", state.value.encode())

    async def announce(self, version: PolicyVersion) -> None:
        """Tell everybody, now and later, which weights are newest."""
        await self._publish("weights", str(version).encode())

    async def wait_retained_state(self, seconds: float = CONNECT_SECONDS) -> None:
        """Return when what the broker had retained is known, or after ``seconds``.

        A broker sends that at the subscription, and our own record, which we publish after it, later.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._settled.wait()

    async def wait_change(self) -> None:
        """Return after the next change of state, version or members."""
        await self._changed.wait()

    async def _publish(self, topic: str, payload: bytes) -> None:
        self._ours[topic] = payload
        if self._client is not None:
            with contextlib.suppress(aiomqtt.MqttError):  # lost while publishing: `_session` publishes `_ours` again
                await self._client.publish(f"{self._prefix}/{topic}", payload, qos=1, retain=True)

    @property
    def _presence(self) -> bytes:
        return (self._claim.member if self._claim else self._member).payload()

    def _topics(self) -> list[str]:
        """What we listen to; a sampler has no business with the presence of others."""
        own = ("state", "weights", "owner", self._member.topic)
        return [f"{self._prefix}/{topic}" for topic in (own if self._member.role == Role.SAMPLER.value else ("#",))]

    async def _session(self, connected: asyncio.Event) -> None:
        """One connection: say who we are, own the run's name or be refused, repeat what we own, follow the rest."""
        mine = f"{self._prefix}/{self._member.topic}"
        farewell = replace(self._member, alive=False).payload()
        will = aiomqtt.Will(mine, farewell, qos=1, retain=True)
        self._settled.clear()
        self._held.clear()
        if self._claim is not None:
            self._claim.begin()
        async with open_client(self._address, self._access, identifier=self._member.client, will=will) as client:
            await client.subscribe([(topic, 1) for topic in self._topics()])
            await client.publish(mine, self._presence, qos=1, retain=True)
            listening = asyncio.create_task(self._listen(client, mine), name="control-plane-listening")
            try:
                if self._claim is not None and await _before(listening, self._own(client, mine, self._claim)):
                    return
                for topic, payload in self._ours.items():
                    await client.publish(f"{self._prefix}/{topic}", payload, qos=1, retain=True)
                self._client, self.lost = client, None
                connected.set()
                await listening
            finally:
                if self._client is not None:
                    self._client, self.lost = None, (self._address, time.monotonic())
                await _ended(listening)
                with contextlib.suppress(aiomqtt.MqttError):  # a clean goodbye; a lost connection sends the will instead
                    await client.publish(mine, farewell, qos=1, retain=True, timeout=GOODBYE_SECONDS)

    async def _listen(self, client: aiomqtt.Client, mine: str) -> None:
        async for message in client.messages:
            self._hear(message.topic.value.removeprefix(f"{self._prefix}/"), message.payload, retained=message.retain)
            if self._repeat:  # somebody asks, or it was the will of a connection of ours that the broker had not yet given up
                self._repeat = False
                await client.publish(mine, self._presence, qos=1, retain=True)
            while self._rubbish and self._claim is not None and self._claim.owned:
                await client.publish(f"{self._prefix}/{self._rubbish.pop()}", b"", qos=0, retain=True)

    async def _own(self, client: aiomqtt.Client, mine: str, claim: Claim) -> None:
        """Own the run's name, once nobody else does.

        Raises:
            ConfigError: the broker does not pass on what we say about this name.
            RunError: another learner owns it.
        """
        await self.wait_retained_state()
        if not self._settled.is_set():
            raise ConfigError(
                f"The MQTT broker at broker.address = {self._address} does not pass on what the learner says about run.name = "
                f"{self._run}; let its access list name that run (deploy/mosquitto)."
            )
        claim.settle()
        if claim.contested:
            log.info("another learner may own run.name = %s; waiting until it answers or is gone", self._run)
        while await self._changed.wait(claim.deadline()):
            claim.check(self._run, self._address)
        claim.check(self._run, self._address)
        claim.own()
        held, self._held = self._held, {}
        await client.publish(mine, self._presence, qos=1, retain=True)
        if claim.stale:
            log.info("state and weights that the broker has retained are of the run %s; they are removed", claim.before)
            for topic in held:
                await client.publish(f"{self._prefix}/{topic}", b"", qos=1, retain=True)
        else:
            for topic, payload in held.items():
                self._hear(topic, payload, retained=True)
        self._ours["owner"] = claim.member.run.encode()

    def _hear(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        if self._claim is not None and not self._claim.owned and topic in HELD:
            self._held[topic] = payload
            return
        try:
            _check_size(payload)
            if topic == "state" and payload:
                self.state = self.announced_state = RunState(payload.decode())
            elif topic == "weights":
                self.version = PolicyVersion.parse(payload.decode()) if payload else None
            elif topic == "owner" and self._claim is not None:
                self._claim.before = payload.decode() or None
            elif topic.startswith("members/"):
                self._meet(topic, payload, retained=retained)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            self._refusals.log_refusal(
                f"{self._prefix}/{topic}"[:NAME_LETTERS], "contract", f"a message: {describe(error)[:NAME_LETTERS]}"
            )
            wrong = topic.startswith("members/") and not isinstance(error, _FullError)  # a good one would say it again at once
            if wrong and self._claim is not None:
                self._rubbish.add(topic)
            return
        if topic == self._member.topic and payload == self._presence:
            self._settled.set()
        if topic in self._ours and payload:  # somebody else has set it since: what is repeated after a reconnect is the newest
            self._ours[topic] = payload
        self._changed.notify()

    def _meet(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """Note a member. Raises ValueError unless it is the one its topic is for, and _FullError if there is no room."""
        ours = topic == self._member.topic
        if not payload:
            if self._claim is not None:
                self._claim.forget(topic)
            if (gone := self.members.get(client := topic.rpartition("/")[2])) is not None and gone.alive:
                del self.members[client]
            self._repeat = self._repeat or ours
            return
        member = parse_dataclass(Member, msgpack.unpackb(payload))
        if not 0 <= member.incarnation < 1 << 64 or max(map(len, (member.id, member.metrics, member.run))) > NAME_LETTERS:
            raise ValueError("its incarnation, name, run or address is none")
        if member.topic != topic or (member.id in ROLES and member.id != member.role):
            raise ValueError(f"{member.role} {member.id!r} speaks for another")
        if member.client not in self.members:
            self._make_room(member)
        self.members[member.client] = member
        if self._claim is not None:
            answer = self._claim.meet(member, live=not retained)
            self._repeat = self._repeat or answer
            if not ours:
                (self._rubbish.discard if member.alive else self._rubbish.add)(topic)
        self._repeat = self._repeat or (ours and not member.alive)

    def _make_room(self, member: Member) -> None:
        """Forget a member if there is no room for another: of a name with INCARNATIONS its oldest, else who left first.

        Raises _FullError if nobody has left.
        """
        of_name = [client for client, one in self.members.items() if (one.role, one.id) == (member.role, member.id)]
        gone = of_name[0] if len(of_name) >= INCARNATIONS else None
        if gone is None and len(self.members) >= self._limits.members:
            gone = next((client for client, one in self.members.items() if not one.alive), None)
            if gone is None:
                raise _FullError(f"{self._limits.members} members are the most")
        if gone is not None:
            del self.members[gone]

    async def _follow(self, connected: asyncio.Event) -> None:
        attempt = 0
        while True:
            began = time.monotonic()
            try:
                await self._session(connected)
            except (aiomqtt.MqttError, OSError, ConfigError) as error:  # the last two: certificates while they are renewed
                if not connected.is_set():
                    if not isinstance(error, aiomqtt.MqttError):
                        raise
                    remedy = "start one, or set broker.embedded = true and use `treegrpo up`."
                    raise broker_unavailable_error(self._address, self._access, error, remedy) from error
                attempt = 0 if time.monotonic() - began > self._limits.stable_seconds else attempt + 1
                wait = self._limits.backoff.delay(attempt)
                log.warning("lost the MQTT broker at %s (%s); trying again in %.1f s", self._address, describe(error), wait)
                await asyncio.sleep(wait)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, address: str, run: str, member: Member, access: Credentials = OPEN, limits: ControlLimits = LIMITS
    ) -> AsyncGenerator[ControlPlane]:
        """Join the control plane for the time of the block; reconnects by itself.

        Raises:
            ConfigError: ``address`` is on another machine, and there is no TLS.
            RunError: another run owns the name ``run`` there; also later, when we come back to a broker that we lost.
            UnavailableError: no broker answers at ``address`` now, or it and we do not trust each other.
        """
        plane = cls(address, run, member, access, limits)
        connected = asyncio.Event()
        task = asyncio.create_task(plane._follow(connected), name="control-plane")
        block = asyncio.current_task()
        assert block is not None  # noqa: S101 - a coroutine runs in a task
        ready = asyncio.create_task(connected.wait(), name="control-plane-connected")
        try:
            await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            task.add_done_callback(lambda ended: ended.cancelled() or block.cancel("the control plane broke"))
            yield plane
        finally:
            broken = task.exception() if task.done() and not task.cancelled() else None
            await _ended(ready)
            await _ended(task, 2 * GOODBYE_SECONDS)
            if broken is not None:  # what nobody foresaw ends the process: deaf to a pause it must not go on
                raise broken


async def _before(first: asyncio.Task[None], second: Coroutine[Any, Any, None]) -> bool:
    """Await ``second`` unless ``first`` ends before it; returns whether that was so. Raises what either raises."""
    task = asyncio.create_task(second, name="control-plane-claim")
    try:
        await asyncio.wait({first, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return False
        first.result()
        return True
    finally:
        await _ended(task)


async def _ended(task: asyncio.Task[Any], again: float = AGAIN_SECONDS) -> None:
    """End a task that talks to the broker; tell it ``again``, for Python 3.11's wait_for, under aiomqtt, may lose it."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=again)
    await asyncio.gather(task, return_exceptions=True)


async def publish_state(address: str, run: str, state: RunState, access: Credentials = OPEN) -> None:
    """Set the run state from outside, without joining.

    Raises:
        ConfigError: ``address`` is on another machine, and there is no TLS.
        UnavailableError: no broker answers at ``address``, or it and we do not trust each other.
    """
    try:
        async with open_client(address, access) as client:
            await client.publish(f"treegrpo/{run}/state", state.value.encode(), qos=1, retain=True)
    except aiomqtt.MqttError as error:
        raise broker_unavailable_error(address, access, error, "is the run up?") from error


class _Client(aiomqtt.Client):
    """aiomqtt's client, of which a cancelled connection may end: 2.5.1 logs a traceback then."""

    def _on_disconnect(self, *args: Any, **more: Any) -> None:
        if not self._connected.cancelled():
            super()._on_disconnect(*args, **more)


def open_client(address: str, access: Credentials, timeout: float = CONNECT_SECONDS, **more: Any) -> aiomqtt.Client:
    """A client for the broker at ``address`` with what ``access`` has to show; ``more`` is aiomqtt's. Raises ConfigError."""
    access.check_reach("broker.address", address)
    host, port = split_address(reachable_address(address), "broker.address")
    return _Client(
        host,
        port,
        username=access.broker_user or None,
        password=access.broker_password.get_secret_value() or None,
        tls_context=access.client_context(),
        keepalive=KEEPALIVE_SECONDS,
        timeout=timeout,
        **more,
    )


def broker_unavailable_error(address: str, access: Credentials, error: aiomqtt.MqttError, remedy: str) -> UnavailableError:
    """The sentence for a broker that does not let us in, with the likely reason."""
    said, likely = f"{error} {error.__cause__ or ''}".strip(), ""
    if "CERTIFICATE_VERIFY_FAILED" in said:
        likely = ", likely because its certificate is for another name, out of date, or not of an authority in our ca.pem"
    elif "WRONG_VERSION_NUMBER" in said or "EOF occurred" in said:
        likely = ", likely because it speaks plain text and we TLS"
    elif access.keys is None and "refused" not in said.lower():
        likely = ", if it wants TLS or a password set [security]"
    elif access.keys is not None and "timed out" in said:
        likely = f", likely because it does not trust {access.keys.certificate}"
    elif "code:135" in said or "code:134" in said or "uthori" in said:
        likely = f", likely because user {access.broker_user!r} or the password is wrong"
    return UnavailableError(f"No MQTT broker answers at broker.address = {address} ({said}{likely}); {remedy}")


def _check_size(payload: bytes) -> None:
    if len(payload) > CONTROL_BYTES:
        raise ValueError(f"{len(payload)} bytes, and {CONTROL_BYTES} are the most")
