"""The control plane: membership, run state and newest policy version, as retained MQTT messages with QoS 1.

    treegrpo/RUN/state                running | paused | draining, as plain text
    treegrpo/RUN/weights              newest policy version, as plain text
    treegrpo/RUN/owner                the id of the run that owns the name RUN (treegrpo/wire/run_name_owner.py), as plain text
    treegrpo/RUN/members/ROLE/CLIENT  msgpack map of a `Member`; alive=false is the last will

A broker with users lets each do what its role needs: the learner all of it, the operator the state, and a sampler its own
presence alone: ROLE is its user, CLIENT its MQTT client id. Samplers read state, weights, owner and their own presence. The
learner removes the presence of members that have left, and retained messages that do not belong there.

Every message is a state, not an event: a late subscriber gets the present one, and a duplicate changes nothing. State
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
from treegrpo.wire.run_name_owner import KEEPALIVE_SECONDS, WILL_SECONDS, Member, RunNameClaim

log = logging.getLogger(__name__)
CONNECT_SECONDS = 10.0
LEAVE_SECONDS = 1.0
"""To publish that we leave; otherwise the broker publishes our last will."""
CANCEL_AGAIN_SECONDS = 0.1
NAME_CHARACTERS = 256
"""The longest accepted name, address or topic of a member, and the longest quote of a message in the log."""
ROLES = {role.value for role in Role}
"""A sampler is not called like one of them."""
UNCLAIMED_TOPICS = ("state", "weights")
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


class _TooManyMembersError(ValueError):
    """A presence was refused since the number of members is at its limit."""


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
        self._claim = RunNameClaim(member, limits.will_seconds) if member.run else None
        self._client: aiomqtt.Client | None = None
        self._changed = Notifier()
        self._refusals = RateLimitedLog(log)
        self._republish_presence = False
        """Our presence has to be published again."""
        self._topics_to_clear: set[str] = set()
        """Topics whose retained message has to go, as soon as we own the name."""
        self._unclaimed_messages: dict[str, bytes] = {}
        self._retained_by_us: dict[str, bytes] = {}
        self._retained_known = asyncio.Event()
        self.state = RunState.RUNNING
        self.announced_state: RunState | None = None
        """The run state as the broker has it; None while there is no message."""
        self.version: PolicyVersion | None = None
        self.members: dict[str, Member] = {}
        """By MQTT client id: a process that is started again is another member."""
        self.lost: tuple[str, float] | None = (address, time.monotonic())
        """The broker's address and since when (time.monotonic) there is no connection to it; None while there is one."""

    async def set_state(self, state: RunState) -> None:
        """Publish the run state, retained. It takes effect in this process at once, connected or not."""
        self.state = state
        self._changed.notify()
        await self._publish("state", state.value.encode())

    async def announce_version(self, version: PolicyVersion) -> None:
        """Publish the newest policy version, retained."""
        await self._publish("weights", str(version).encode())

    async def wait_retained_state(self, seconds: float = CONNECT_SECONDS) -> None:
        """Wait until the broker's retained messages have arrived, or for ``seconds``.

        A broker sends that at the subscription, and our own record, which we publish after it, later.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._retained_known.wait()

    async def wait_change(self) -> None:
        """Return after the next change of state, version or members."""
        await self._changed.wait()

    async def _publish(self, topic: str, payload: bytes) -> None:
        self._retained_by_us[topic] = payload
        if self._client is not None:
            with contextlib.suppress(aiomqtt.MqttError):  # lost while publishing: `_session` publishes `_retained_by_us` again
                await self._client.publish(f"{self._prefix}/{topic}", payload, qos=1, retain=True)

    @property
    def _presence(self) -> bytes:
        return (self._claim.member if self._claim else self._member).payload()

    def _topics(self) -> list[str]:
        """The topics to subscribe to; a sampler does not read the presence of other members."""
        own = ("state", "weights", "owner", self._member.topic)
        return [f"{self._prefix}/{topic}" for topic in (own if self._member.role == Role.SAMPLER.value else ("#",))]

    async def _session(self, connected: asyncio.Event) -> None:
        """One connection: publish our presence, claim the run's name, publish our retained messages again, then listen."""
        presence_topic = f"{self._prefix}/{self._member.topic}"
        leave_payload = replace(self._member, alive=False).payload()
        will = aiomqtt.Will(presence_topic, leave_payload, qos=1, retain=True)
        self._retained_known.clear()
        self._unclaimed_messages.clear()
        if self._claim is not None:
            self._claim.begin_candidacy()
        async with open_client(self._address, self._access, identifier=self._member.client, will=will) as client:
            await client.subscribe([(topic, 1) for topic in self._topics()])
            await client.publish(presence_topic, self._presence, qos=1, retain=True)
            listening = asyncio.create_task(self._listen(client, presence_topic), name="control-plane-listening")
            try:
                if self._claim is not None:
                    claiming = self._claim_run_name(client, presence_topic, self._claim)
                    if await _ends_before(listening, claiming):
                        return
                for topic, payload in self._retained_by_us.items():
                    await client.publish(f"{self._prefix}/{topic}", payload, qos=1, retain=True)
                self._client, self.lost = client, None
                connected.set()
                await listening
            finally:
                if self._client is not None:
                    self._client, self.lost = None, (self._address, time.monotonic())
                await _end_task(listening)
                with contextlib.suppress(aiomqtt.MqttError):  # a clean goodbye; a lost connection sends the will instead
                    await client.publish(presence_topic, leave_payload, qos=1, retain=True, timeout=LEAVE_SECONDS)

    async def _listen(self, client: aiomqtt.Client, presence_topic: str) -> None:
        async for message in client.messages:
            self._handle_message(message.topic.value.removeprefix(f"{self._prefix}/"), message.payload, retained=message.retain)
            if self._republish_presence:  # a candidate asks, or the will of an earlier connection of ours came late
                self._republish_presence = False
                await client.publish(presence_topic, self._presence, qos=1, retain=True)
            while self._topics_to_clear and self._claim is not None and self._claim.is_owner:
                await client.publish(f"{self._prefix}/{self._topics_to_clear.pop()}", b"", qos=0, retain=True)

    async def _claim_run_name(self, client: aiomqtt.Client, presence_topic: str, claim: RunNameClaim) -> None:
        """Become the owner of the run's name, once no other learner is.

        Raises:
            ConfigError: the broker does not pass on what we say about this name.
            RunError: another learner owns it.
        """
        await self.wait_retained_state()
        if not self._retained_known.is_set():
            raise ConfigError(
                f"The MQTT broker at broker.address = {self._address} does not pass on what the learner says about run.name = "
                f"{self._run}; let its access list name that run (deploy/mosquitto)."
            )
        claim.start_waiting()
        if claim.has_rivals:
            log.info("another learner may own run.name = %s; waiting until it answers or is gone", self._run)
        while await self._changed.wait(claim.wait_until()):
            claim.raise_if_refused(self._run, self._address)
        claim.raise_if_refused(self._run, self._address)
        claim.take_ownership()
        held, self._unclaimed_messages = self._unclaimed_messages, {}
        await client.publish(presence_topic, self._presence, qos=1, retain=True)
        if claim.retained_is_stale:
            log.info("state and weights that the broker has retained are of the run %s; they are removed", claim.previous_owner)
            for topic in held:
                await client.publish(f"{self._prefix}/{topic}", b"", qos=1, retain=True)
        else:
            for topic, payload in held.items():
                self._handle_message(topic, payload, retained=True)
        self._retained_by_us["owner"] = claim.member.run.encode()

    def _handle_message(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        if self._claim is not None and not self._claim.is_owner and topic in UNCLAIMED_TOPICS:
            self._unclaimed_messages[topic] = payload
            return
        try:
            _check_size(payload)
            if topic == "state" and payload:
                self.state = self.announced_state = RunState(payload.decode())
            elif topic == "weights":
                self.version = PolicyVersion.parse(payload.decode()) if payload else None
            elif topic == "owner" and self._claim is not None:
                self._claim.previous_owner = payload.decode() or None
            elif topic.startswith("members/"):
                self._update_member(topic, payload, retained=retained)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            self._refusals.log_refusal(
                f"{self._prefix}/{topic}"[:NAME_CHARACTERS], "contract", f"a message: {describe(error)[:NAME_CHARACTERS]}"
            )
            full = isinstance(error, _TooManyMembersError)  # a good member would publish its presence again at once
            if topic.startswith("members/") and not full and self._claim is not None:
                self._topics_to_clear.add(topic)
            return
        if topic == self._member.topic and payload == self._presence:
            self._retained_known.set()
        if topic in self._retained_by_us and payload:  # set by another since: a reconnect publishes the newest again
            self._retained_by_us[topic] = payload
        self._changed.notify()

    def _update_member(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """Add or update a member. Raises ValueError unless the topic is its own, and _TooManyMembersError at the limit."""
        ours = topic == self._member.topic
        if not payload:
            if self._claim is not None:
                self._claim.remove_rival(topic)
            if (gone := self.members.get(client := topic.rpartition("/")[2])) is not None and gone.alive:
                del self.members[client]
            self._republish_presence = self._republish_presence or ours
            return
        member = parse_dataclass(Member, msgpack.unpackb(payload))
        if not 0 <= member.incarnation < 1 << 64 or max(map(len, (member.id, member.metrics, member.run))) > NAME_CHARACTERS:
            raise ValueError("its incarnation, name, run or address is invalid")
        if member.topic != topic or (member.id in ROLES and member.id != member.role):
            raise ValueError(f"{member.role} {member.id!r} speaks for another")
        if member.client not in self.members:
            self._evict_member(member)
        self.members[member.client] = member
        if self._claim is not None:
            answer = self._claim.note_member(member, live=not retained)
            self._republish_presence = self._republish_presence or answer
            if not ours:
                (self._topics_to_clear.discard if member.alive else self._topics_to_clear.add)(topic)
        self._republish_presence = self._republish_presence or (ours and not member.alive)

    def _evict_member(self, member: Member) -> None:
        """Remove a member so that another can be added: the oldest of a name with INCARNATIONS, else the first that has left.

        Raises _TooManyMembersError if none has left.
        """
        of_name = [client for client, one in self.members.items() if (one.role, one.id) == (member.role, member.id)]
        gone = of_name[0] if len(of_name) >= INCARNATIONS else None
        if gone is None and len(self.members) >= self._limits.members:
            gone = next((client for client, one in self.members.items() if not one.alive), None)
            if gone is None:
                raise _TooManyMembersError(f"{self._limits.members} members are the most")
        if gone is not None:
            del self.members[gone]

    async def _reconnect_forever(self, connected: asyncio.Event) -> None:
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
        task = asyncio.create_task(plane._reconnect_forever(connected), name="control-plane")
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
            await _end_task(ready)
            await _end_task(task, 2 * LEAVE_SECONDS)
            if broken is not None:  # an unexpected error ends the process, which could not be paused without the control plane
                raise broken


async def _ends_before(first: asyncio.Task[None], second: Coroutine[Any, Any, None]) -> bool:
    """Await ``second`` unless ``first`` ends before it; returns whether it did. Raises the exception of either."""
    task = asyncio.create_task(second, name="control-plane-claim")
    try:
        await asyncio.wait({first, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return False
        first.result()
        return True
    finally:
        await _end_task(task)


async def _end_task(task: asyncio.Task[Any], again: float = CANCEL_AGAIN_SECONDS) -> None:
    """Cancel a task that talks to the broker, ``again`` and again: wait_for of Python 3.11 may lose a cancellation."""
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
    """aiomqtt's client without the traceback that 2.5.1 logs when a connection is cancelled."""

    def _on_disconnect(self, *args: Any, **more: Any) -> None:
        if not self._connected.cancelled():
            super()._on_disconnect(*args, **more)


def open_client(address: str, access: Credentials, timeout: float = CONNECT_SECONDS, **more: Any) -> aiomqtt.Client:
    """An MQTT client for the broker at ``address`` with the credentials ``access``; ``more``: for aiomqtt. Raises ConfigError."""
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
    """The error for a failed connection to the broker, with the likely reason."""
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
