"""The control plane: who is there, what the run shall do, which weights are newest. Over MQTT, retained, QoS 1.

    treegrpo/RUN/state            running | paused | draining, as plain text
    treegrpo/RUN/weights          newest policy version, as plain text
    treegrpo/RUN/members/ROLE/ID  msgpack map {role, alive, incarnation, metrics}; alive=false is the last will

A broker with users lets each do what its role needs: the learner announces weights and state, the operator sets the state,
and a member its own presence alone: ROLE is its user, ID its MQTT client id.

Everything is a level, not an event: a late-comer finds the present state, and hearing it twice changes nothing. State
and version are plain text so that a person can set the state with any MQTT client:

    mosquitto_pub -r -q 1 -t treegrpo/RUN/state -m paused
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, cast

import aiomqtt
import msgpack

from treegrpo.access import OPEN, Access
from treegrpo.address import split_address, within_reach
from treegrpo.backoff import pause
from treegrpo.change import Change
from treegrpo.errors import ConfigError, UnavailableError, describe
from treegrpo.limits import CONTROL_BYTES, PEERS
from treegrpo.refusals import Refusals
from treegrpo.security import Role
from treegrpo.step import PolicyVersion
from treegrpo.typed import typed

log = logging.getLogger(__name__)
CONNECT_SECONDS = 10.0
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
KEEPALIVE_SECONDS = 10
GOODBYE_SECONDS = 1.0
"""To say that we leave; a broker that does not hear it says so for us."""
NAME_LETTERS = 256
"""The longest name, address or topic of a member that is believed, and what the log repeats of a stranger's words."""
ROLES = {role.value for role in Role}
"""A sampler is not called like one of them: `members` goes by name."""


class RunState(Enum):
    RUNNING = "running"
    PAUSED = "paused"
    """Nothing new is begun; what runs is finished."""
    DRAINING = "draining"
    """The run ends: open groups close with the leaves they have, then a checkpoint."""


@dataclass(frozen=True, slots=True)
class Member:
    """A process of the run."""

    id: str
    role: str
    """sampler or learner."""
    incarnation: int
    metrics: str = ""
    """HOST:PORT of its /metrics."""
    alive: bool = True

    @property
    def topic(self) -> str:
        """Where its presence is, below treegrpo/RUN/."""
        return f"members/{self.role}/{self.id}"

    def payload(self) -> bytes:
        return cast("bytes", msgpack.packb(asdict(self)))


class ControlPlane:
    """One process's view of the control plane, kept up to date by a background task; see `connect`."""

    def __init__(self, address: str, run: str, member: Member, access: Access = OPEN) -> None:
        self._address = address
        self._access = access
        self._prefix = f"treegrpo/{run}"
        self._member = member
        self._client: aiomqtt.Client | None = None
        self._changed = Change()
        self._refusals = Refusals(log)
        self._buried = False
        self._ours: dict[str, bytes] = {}
        self._settled = asyncio.Event()
        self.state = RunState.RUNNING
        self.told: RunState | None = None
        """What the broker said the state is; None while it has said nothing."""
        self.version: PolicyVersion | None = None
        self.members: dict[str, Member] = {}
        self.lost: tuple[str, float] | None = (address, time.monotonic())
        """The broker's address and since when (time.monotonic) there is no connection to it; None while there is one."""

    async def set_state(self, state: RunState) -> None:
        """Tell everybody, now and later, what the run shall do; we do it at once, whether the broker hears us or not."""
        self.state = state
        self._changed.tell()
        await self._publish("state", state.value.encode())

    async def announce(self, version: PolicyVersion) -> None:
        """Tell everybody, now and later, which weights are newest."""
        await self._publish("weights", str(version).encode())

    async def settled(self, seconds: float = CONNECT_SECONDS) -> None:
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

    async def _session(self, connected: asyncio.Event) -> None:
        """One connection: say who we are, repeat what we own, follow the rest."""
        mine = f"{self._prefix}/{self._member.topic}"
        will = aiomqtt.Will(mine, replace(self._member, alive=False).payload(), qos=1, retain=True)
        async with open_client(self._address, self._access, identifier=self._member.id, will=will) as client:
            await client.subscribe(f"{self._prefix}/#", qos=1)
            await client.publish(mine, self._member.payload(), qos=1, retain=True)
            for topic, payload in self._ours.items():
                await client.publish(f"{self._prefix}/{topic}", payload, qos=1, retain=True)
            self._client, self.lost = client, None
            connected.set()
            try:
                async for message in client.messages:
                    self._hear(message.topic.value.removeprefix(f"{self._prefix}/"), message.payload)
                    if self._buried:  # the will of a connection of ours that the broker had not yet given up
                        self._buried = False
                        await client.publish(mine, self._member.payload(), qos=1, retain=True)
            finally:
                self._client, self.lost = None, (self._address, time.monotonic())
                with contextlib.suppress(aiomqtt.MqttError):  # a clean goodbye; a lost connection sends the will instead
                    await client.publish(
                        mine, replace(self._member, alive=False).payload(), qos=1, retain=True, timeout=GOODBYE_SECONDS
                    )

    def _hear(self, topic: str, payload: bytes) -> None:
        try:
            _check_size(payload)
            if topic == "state":
                self.state = self.told = RunState(payload.decode())
            elif topic == "weights":
                self.version = PolicyVersion.parse(payload.decode())
            elif topic.startswith("members/"):
                self._meet(topic, typed(Member, msgpack.unpackb(payload)))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            self._refusals.count(
                f"{self._prefix}/{topic}"[:NAME_LETTERS], "contract", f"a message: {describe(error)[:NAME_LETTERS]}"
            )
            return
        if topic == self._member.topic and payload == self._member.payload():
            self._settled.set()
        if topic in self._ours:  # somebody else has set it since: what is repeated after a reconnect is the newest word
            self._ours[topic] = payload
        self._changed.tell()

    def _meet(self, topic: str, member: Member) -> None:
        """Note a member. Raises ValueError unless it is the one its topic is for, and there is room.

        Room is made for who is there by forgetting who left first.
        """
        if member.topic != topic or (member.id in ROLES and member.id != member.role):
            raise ValueError(f"{member.role} {member.id!r} speaks for another")
        if not 0 <= member.incarnation < 1 << 64 or len(member.id) > NAME_LETTERS or len(member.metrics) > NAME_LETTERS:
            raise ValueError("its incarnation, name or address is none")
        if member.id not in self.members and len(self.members) >= PEERS:
            gone = next((name for name, one in self.members.items() if not one.alive), None)
            if gone is None:
                raise ValueError(f"{PEERS} members are the most")
            del self.members[gone]
        self.members[member.id] = member
        self._buried = self._buried or (topic == self._member.topic and not member.alive)

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
                    raise unavailable(self._address, self._access, error, remedy) from error
                attempt = 0 if time.monotonic() - began > RETRY_SECONDS[-1] else attempt + 1
                wait = pause(RETRY_SECONDS, attempt)
                log.warning("lost the MQTT broker at %s (%s); trying again in %.1f s", self._address, describe(error), wait)
                await asyncio.sleep(wait)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, address: str, run: str, member: Member, access: Access = OPEN) -> AsyncGenerator[ControlPlane]:
        """Join the control plane for the time of the block; reconnects by itself.

        Raises:
            ConfigError: ``address`` is on another machine, and there is no TLS.
            UnavailableError: no broker answers at ``address`` now, or it and we do not trust each other.
        """
        plane = cls(address, run, member, access)
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
            ready.cancel()
            task.cancel()
            await asyncio.gather(ready, task, return_exceptions=True)
            if broken is not None:  # what nobody foresaw ends the process: deaf to a pause it must not go on
                raise broken


async def publish_state(address: str, run: str, state: RunState, access: Access = OPEN) -> None:
    """Set the run state from outside, without joining.

    Raises:
        ConfigError: ``address`` is on another machine, and there is no TLS.
        UnavailableError: no broker answers at ``address``, or it and we do not trust each other.
    """
    try:
        async with open_client(address, access) as client:
            await client.publish(f"treegrpo/{run}/state", state.value.encode(), qos=1, retain=True)
    except aiomqtt.MqttError as error:
        raise unavailable(address, access, error, "is the run up?") from error


def open_client(address: str, access: Access, timeout: float = CONNECT_SECONDS, **more: Any) -> aiomqtt.Client:
    """A client for the broker at ``address`` with what ``access`` has to show; ``more`` is aiomqtt's. Raises ConfigError."""
    access.check_reach("broker.address", address)
    host, port = split_address(within_reach(address), "broker.address")
    return aiomqtt.Client(
        host,
        port,
        username=access.broker_user or None,
        password=access.broker_password.get_secret_value() or None,
        tls_context=access.client_context(),
        keepalive=KEEPALIVE_SECONDS,
        timeout=timeout,
        **more,
    )


def unavailable(address: str, access: Access, error: aiomqtt.MqttError, remedy: str) -> UnavailableError:
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
