"""The sampler's end of the rollout stream: opened again whenever it breaks, and nothing is lost.

holder ──subtree, lease end──► outbox ──► stream ──► learner
  ▲                               └── kept until acked, sent again after a reconnect
  └──── welcome, void lease, lease, stop expanding, drain ◄──── stream
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from typing import Any, Protocol

import grpc

from services.sampler.expansion.stall_monitor import Want
from services.sampler.learner_link.outbox import Outbox
from treegrpo.core.lease import HEARTBEAT_SECONDS, LeaseEnd, Plan
from treegrpo.core.step import Subtree
from treegrpo.errors import ContractError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.backoff import Backoff
from treegrpo.timing.notifier import Notifier
from treegrpo.v1 import rollout_pb2, rollout_pb2_grpc

log = logging.getLogger(__name__)
WELCOME_SECONDS = 10.0
BACKOFF = Backoff((0.1, 0.5, 1.0, 2.0, 5.0))
"""Before the stream is opened again."""


class Holder(Protocol):
    """Who works on leases and hears what the learner says about them."""

    def hello(self) -> rollout_pb2.Hello:
        """Who this sampler is and which leases it works on."""
        ...

    def heartbeat(self) -> rollout_pb2.Heartbeat: ...

    def welcomed(self, welcome: rollout_pb2.Welcome) -> None:
        """A stream is open. Work on the leases that it calls void ends."""
        ...

    def leased(self, lease: rollout_pb2.Lease) -> None: ...

    def stop_expanding(self, lease: str) -> None: ...

    def drain(self) -> None:
        """Finish what is held and call `LearnerClient.close`."""
        ...


class LearnerClient:
    """Keeps a stream to the learner open from `run` until `close`."""

    def __init__(self, channel: grpc.aio.Channel, address: str, metrics: SamplerMetrics, backoff: Backoff = BACKOFF) -> None:
        self._backoff = backoff
        self._stub: Any = rollout_pb2_grpc.RolloutServiceStub(channel)
        self._address = address
        self._metrics = metrics
        self._outbox = Outbox()
        self._acked = Notifier()
        self._demand = 0
        self._closing = False
        self._queue: asyncio.Queue[rollout_pb2.RolloutRequest | None] | None = None
        """What the open stream has still to write; None in it ends the stream, None for it: no stream is open."""
        self._heard = time.monotonic()
        """When the learner last answered: with its welcome, with an ack, or by closing the stream."""

    @property
    def unacked(self) -> int:
        """Subtrees that the learner is not known to have."""
        return self._outbox.subtrees

    @property
    def want(self) -> Want | None:
        """What is waited for of the learner: itself, or that it takes in what it was sent."""
        if self._queue is None:
            return Want("learner", f"the learner at {self._address}", self._heard)
        if self._outbox.full:
            return Want("learner", f"the learner at {self._address} to take in {self.unacked} subtrees", self._heard)
        return None

    @property
    def leases(self) -> Collection[str]:
        """Leases of which something may not have arrived."""
        return self._outbox.leases

    def bound(self, leases: int, plan: Plan) -> None:
        """Keep no more unacked than so many leases of a plan can bring."""
        self._outbox.bound(leases, plan)

    async def send(self, subtree: Subtree) -> None:
        """Send a subtree, again and again until it is acked. While too much is not acked this waits.

        How long is the learner's to say: its acks end the wait, or a void lease cancels who waits.
        """
        while self._outbox.full:
            await self._acked.wait()
        self._write(self._outbox.put_subtree(subtree))
        self._metrics.unacked.set(self.unacked)

    def end(self, end: LeaseEnd) -> None:
        """Send the last message of a lease."""
        self._write(self._outbox.put_end(end))

    def demand(self, leases: int) -> None:
        """Say how many leases this sampler wants to hold at once."""
        if leases != self._demand:
            self._demand = leases
            self._write(self._demand_request())

    async def delivered(self) -> None:
        """Return when every subtree sent so far is acked. Whoever says goodbye says how long (`service.DRAIN_SECONDS`)."""
        while self.unacked:
            await self._acked.wait()

    def close(self) -> None:
        """Say goodbye after what has been sent; `run` returns when the learner has taken all of it."""
        self._closing = True
        self._write(None)

    async def run(self, holder: Holder) -> None:
        """Open the stream, and open it again whenever it breaks, until `close`.

        Raises:
            ContractError: the learner refuses what this sampler says; trying again would not help.
        """
        attempt = 0
        while True:
            welcomed, broken = await self._session(holder)
            if self._closing and broken is None:
                return
            attempt = 0 if welcomed else attempt + 1
            wait = self._backoff.delay(attempt)
            reason = "it closed the stream" if broken is None else broken
            log.warning("the stream to the learner at %s broke (%s); opening it again in %.1f s", self._address, reason, wait)
            await asyncio.sleep(wait)
            self._metrics.reconnects.inc()

    async def _session(self, holder: Holder) -> tuple[bool, str | None]:
        """One stream: whether it was welcomed, and why it broke (None: the learner ended it in order)."""
        call = self._stub.Rollout()
        try:
            async with asyncio.timeout(WELCOME_SECONDS):
                await call.write(rollout_pb2.RolloutRequest(hello=holder.hello()))
                first = await call.read()
            if not isinstance(first, rollout_pb2.RolloutResponse):
                return False, "it closed the stream"
            if first.WhichOneof("kind") != "welcome":
                raise ContractError(f"The learner at {self._address} did not begin with Welcome; it must be of this version.")
            for lease in first.welcome.void_leases:
                self._outbox.void(lease)
            self._metrics.unacked.set(self.unacked)
            self._acked.notify()
            holder.welcomed(first.welcome)
            self._metrics.serving.set(1)
            return True, await self._serve(call, holder)
        except TimeoutError:
            return False, f"no welcome within {WELCOME_SECONDS:.0f} s"
        except grpc.aio.AioRpcError as error:
            return False, self._reason(error)
        finally:
            self._metrics.serving.set(0)
            if self._queue is not None:
                self._queue, self._heard = None, time.monotonic()
            call.cancel()

    async def _serve(self, call: Any, holder: Holder) -> str | None:
        """Write and read until the stream ends; returns why it broke, if it did."""
        self._queue, self._heard = asyncio.Queue(), time.monotonic()
        for request in (self._demand_request(), *self._outbox, *([None] if self._closing else [])):
            self._queue.put_nowait(request)
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(self._write_out(call, self._queue), name="learner-writer")
            beating = tasks.create_task(self._beat(holder), name="learner-heartbeat")
            broken = await self._read(call, holder)
            writing.cancel()
            beating.cancel()
        return broken

    async def _read(self, call: Any, holder: Holder) -> str | None:
        try:  # however long nothing comes: gRPC's keepalive notices a learner that is gone, or stopped
            while isinstance(response := await call.read(), rollout_pb2.RolloutResponse):
                self._hear(response, holder)
        except grpc.aio.AioRpcError as error:
            return self._reason(error)
        return None

    def _hear(self, response: rollout_pb2.RolloutResponse, holder: Holder) -> None:
        match response.WhichOneof("kind"):
            case "ack":
                self._outbox.acked(response.ack.lease, response.ack.tree, response.ack.index)
                self._metrics.unacked.set(self.unacked)
                self._heard = time.monotonic()
                self._acked.notify()
                if response.ack.refusal:
                    self._metrics.errors.labels(ContractError.__name__).inc()
                    log.warning("the learner refused a subtree of lease %s: %s", response.ack.lease, response.ack.refusal)
            case "lease":
                holder.leased(response.lease)
            case "stop_expanding":
                holder.stop_expanding(response.stop_expanding.lease)
            case "drain":
                holder.drain()
            case kind:
                log.warning("ignored %s of the learner, which this sampler does not know", kind or "an empty message")

    async def _write_out(self, call: Any, queue: asyncio.Queue[rollout_pb2.RolloutRequest | None]) -> None:
        try:
            while (request := await queue.get()) is not None:
                await call.write(request)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream broke: the reader knows why, and the outbox still has everything

    async def _beat(self, holder: Holder) -> None:
        while True:
            if self._queue is not None and self._queue.empty():  # else there is something to hear already
                self._write(rollout_pb2.RolloutRequest(heartbeat=holder.heartbeat()))
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _write(self, request: rollout_pb2.RolloutRequest | None) -> None:
        if self._queue is not None:
            self._queue.put_nowait(request)

    def _demand_request(self) -> rollout_pb2.RolloutRequest:
        return rollout_pb2.RolloutRequest(demand=rollout_pb2.Demand(leases=self._demand))

    def _reason(self, error: grpc.aio.AioRpcError) -> str:
        if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED):
            raise ContractError(f"The learner at {self._address} refuses this sampler: {error.details()}") from error
        return f"{error.code().name}: {error.details()}"
