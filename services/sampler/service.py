"""The sampler service: one replica, from start to shutdown. It has no state that must survive a crash.

Start:  /metrics → broker → a run that does not drain → learner → first policy version → engine → environment → rollout stream
Stop:   a stop signal, run state "draining" or the learner's Drain → running branches end → every subtree is acked →
        the stream closes → environment → engine → weights → learner → broker
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass

from services.sampler.engines.base import Engine
from services.sampler.expansion.expander import Expander
from services.sampler.expansion.stall_monitor import STALL_SECONDS, StallMonitor, WaitReason
from services.sampler.factory import export_engine_metrics, open_engine, open_environment, weights_dir
from services.sampler.learner_link.channel import connect_learner
from services.sampler.learner_link.rollout_client import RolloutClient
from services.sampler.learner_link.weight_store import WeightStore
from services.sampler.learner_link.weight_sync import WeightSync, fetch_first_version
from services.sampler.lease_worker import LeaseWorker, SamplerIdentity
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.errors import DeadlineError, EngineAwayError
from treegrpo.net.address import join_address, split_address
from treegrpo.observability.metrics import SamplerMetrics, serve_metrics
from treegrpo.runtime.stop_signals import stop_signals
from treegrpo.security.credentials import Credentials
from treegrpo.storage.temp_dir import locked_temp_dir
from treegrpo.wire.control import ControlPlane, Member, RunState

log = logging.getLogger(__name__)
DRAIN_SECONDS = 20.0
"""The longest a drain takes; the intake waits as long for the leases that are out."""


@dataclass(frozen=True, slots=True)
class SamplerTimings:
    """Time limits and periods of the sampler, in seconds."""

    drain: float = DRAIN_SECONDS
    """The longest a drain takes."""
    finish_branches: float = DRAIN_SECONDS / 2
    """Of it, the time for running branches to finish. The rest is for the learner to acknowledge what is done."""
    health_check: float = 1.0
    """Between two checks of the engine's health."""
    stall: float = STALL_SECONDS
    """Without progress, before the sampler counts as stalled."""


async def run_sampler(config: Config) -> None:
    """Serve until told to drain; returns when all work is delivered.

    Raises:
        AddressInUseError: sampler.metrics is taken.
        UnavailableError: broker or learner do not answer, or the learner has no policy version.
        ModelError: the learner's model cannot be served.
        EngineError: the engine died.
        ContractError: the learner refuses this sampler.
        DeadlineError: draining took too long; the learner gives the rest to another sampler.
    """
    name = config.sampler.id or f"{socket.gethostname()}-{os.getpid()}"
    address = config.sampler.learner or config.learner.listen
    metrics = SamplerMetrics()
    host, _ = split_address(config.sampler.metrics, "sampler.metrics")
    access = Credentials.from_config(config.security, Role.SAMPLER)
    access.check_reach("broker.address", config.broker.address)
    port = serve_metrics(metrics, config.sampler.metrics, "sampler.metrics", access)
    metrics_address = join_address(host, port)
    log.info("metrics at %s", metrics_address)
    incarnation = secrets.randbits(64)
    member = Member(name, "sampler", incarnation, metrics=metrics_address)
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(ControlPlane.connect(config.broker.address, config.run.name, member, access))
        await wait_while_draining(control)
        channel = await connect_learner(address, access)
        stack.push_async_callback(channel.close)
        store = WeightStore(channel, stack.enter_context(locked_temp_dir(weights_dir(config))), metrics)
        version, path = await fetch_first_version(store)
        engine = await stack.enter_async_context(await open_engine(config, path, version, name, access))
        tokenizer = await asyncio.to_thread(Tokenizer.open, path)
        environment = await stack.enter_async_context(open_environment(config, tokenizer, access))
        expander = Expander(engine, environment, tokenizer, retries=config.sampler.retries, metrics=metrics)
        identity = SamplerIdentity(name, incarnation, config.engine.kind, config.engine.max_running)
        log.info("sampler %s serves version %s to the learner at %s", name, version, address)
        client = RolloutClient(channel, address, metrics)
        async with asyncio.TaskGroup() as tasks:
            gauges = tasks.create_task(export_engine_metrics(engine, metrics), name="engine-metrics")
            await Sampler(identity, engine, expander, store, client, control, metrics).serve_until_drained()
            gauges.cancel()


async def wait_while_draining(control: ControlPlane) -> None:
    """Return when the run does not drain, so that samplers can be started before a drain is over."""
    await control.wait_retained_state()
    if control.state is RunState.DRAINING:
        log.info("the run drains; waiting until it is resumed")
    while control.state is RunState.DRAINING:
        await control.wait_change()


class Sampler:
    """Runs the parts of a sampler together: stream, leases, weights, run state and health checks."""

    def __init__(
        self,
        identity: SamplerIdentity,
        engine: Engine,
        expander: Expander,
        store: WeightStore,
        client: RolloutClient,
        control: ControlPlane,
        metrics: SamplerMetrics,
        timings: SamplerTimings | None = None,
    ) -> None:
        self._identity = identity
        self._engine = engine
        self._expander = expander
        self._client = client
        self._control = control
        self._metrics = metrics
        self._timings = timings or SamplerTimings()
        self._weight_sync = WeightSync(store, engine, metrics)
        self._stall_monitor = StallMonitor(
            self._wait_reasons, lambda: expander.call_timer.last_progress, metrics, self._timings.stall
        )

    def _wait_reasons(self) -> list[WaitReason | None]:
        """What each part waits for; what holds up others comes first."""
        parts = (*self._expander.availability_monitors, self._client, self._weight_sync)
        lost = self._control.lost
        broker = None if lost is None else WaitReason("broker", f"the MQTT broker at {lost[0]}", lost[1])
        return [*(part.wait_reason for part in parts), self._expander.call_timer.longest_call, broker]

    async def serve_until_drained(self) -> None:
        """Work until told to drain, then drain.

        Raises:
            DeadlineError: draining took too long.
            EngineError: the engine died.
            ContractError: the learner refuses this sampler.
        """
        async with asyncio.TaskGroup() as tasks:
            worker = LeaseWorker(
                self._identity,
                self._engine,
                self._expander,
                self._weight_sync,
                self._client,
                self._stall_monitor,
                self._metrics,
                tasks,
            )
            for number in stop_signals():
                asyncio.get_running_loop().add_signal_handler(number, worker.drain)
            streaming = tasks.create_task(self._client.run_stream(worker), name="learner-stream")
            helpers = [
                tasks.create_task(self._weight_sync.follow_versions(), name="weights"),
                tasks.create_task(self._follow_control(worker), name="control"),
                tasks.create_task(self._check_health(worker), name="health"),
                *(tasks.create_task(monitor.run_probes(), name="probes") for monitor in self._expander.availability_monitors),
            ]
            await worker.draining.wait()
            await self._finish_drain(worker, streaming)
            for helper in helpers:
                helper.cancel()

    async def _follow_control(self, worker: LeaseWorker) -> None:
        """Follow the run state and the announced version."""
        while True:
            self._weight_sync.note_announcement(self._control.version)
            match self._control.state:
                case RunState.RUNNING:
                    worker.resume()
                case RunState.PAUSED:
                    worker.pause()
                case RunState.DRAINING:
                    worker.drain()
            await self._control.wait_change()

    async def _check_health(self, worker: LeaseWorker) -> None:
        """Check the engine, stalls and idle seconds periodically.

        Raises:
            EngineError: the engine is dead; the process ends, and its leases go to another sampler.
        """
        _, engine_monitor = self._expander.availability_monitors
        while True:
            worker.count_idle_seconds()
            self._stall_monitor.report_stall()
            try:
                await self._engine.check_health()
            except EngineAwayError as error:
                engine_monitor.report_failure(error)
            await asyncio.sleep(self._timings.health_check)

    async def _finish_drain(self, worker: LeaseWorker, streaming: asyncio.Task[None]) -> None:
        log.info("draining: waiting for running branches to finish")
        try:
            async with asyncio.timeout(self._timings.drain):
                await worker.wait_drained(self._timings.finish_branches)
                await self._client.wait_delivered()
                self._client.close_stream()
                await streaming
        except TimeoutError as error:
            raise DeadlineError(
                f"Draining took more than {self._timings.drain:.0f} s; the learner gives what is unfinished to another sampler "
                f"({self._client.unacked} subtrees were not acked)."
            ) from error
        log.info("drained: all work is delivered")
