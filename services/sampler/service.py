"""A sampler replica from start to goodbye. It keeps nothing that matters if it dies.

Start:  /metrics → broker → a run that does not drain → learner → first policy version → engine → environment → rollout stream
Stop:   a stop signal, run state "draining" or the learner's word → running branches end → every subtree is acked →
        the stream closes → environment → engine → weights → learner → broker
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from contextlib import AsyncExitStack

from services.sampler.engines.base import Engine
from services.sampler.expansion.expander import Expander
from services.sampler.expansion.stall_monitor import Want, Watch
from services.sampler.factory import observe, open_engine, open_environment, weights_dir
from services.sampler.learner_link.channel import connect
from services.sampler.learner_link.rollout_client import LearnerClient
from services.sampler.learner_link.weight_sync import Follower, WeightStore, first_version
from services.sampler.lease_worker import Identity, LeaseHolder
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
"""The longest goodbye; the intake waits as long for the leases that are out."""
FINISH_SECONDS = DRAIN_SECONDS / 2
"""Of it, what branches that run get to come to their end. The rest is for the learner to take in what is done."""
TICK_SECONDS = 1.0


async def run(config: Config) -> None:
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
        await _not_draining(control)
        channel = await connect(address, access)
        stack.push_async_callback(channel.close)
        store = WeightStore(channel, stack.enter_context(locked_temp_dir(weights_dir(config))), metrics)
        version, path = await first_version(store)
        engine = await stack.enter_async_context(await open_engine(config, path, version, name, access))
        tokenizer = await asyncio.to_thread(Tokenizer.open, path)
        environment = await stack.enter_async_context(open_environment(config, tokenizer, access))
        expander = Expander(engine, environment, tokenizer, retries=config.sampler.retries, metrics=metrics)
        identity = Identity(name, incarnation, config.engine.kind, config.engine.max_running)
        log.info("sampler %s serves version %s to the learner at %s", name, version, address)
        client = LearnerClient(channel, address, metrics)
        async with asyncio.TaskGroup() as tasks:
            gauges = tasks.create_task(observe(engine, metrics), name="engine-gauges")
            await Sampler(identity, engine, expander, store, client, control, metrics).run()
            gauges.cancel()


async def _not_draining(control: ControlPlane) -> None:
    """Return when the run goes on: what starts samplers again after a drain needs no other way to tell when."""
    await control.wait_retained_state()
    if control.state is RunState.DRAINING:
        log.info("the run drains; waiting until it goes on")
    while control.state is RunState.DRAINING:
        await control.wait_change()


class Sampler:
    """The parts at work together."""

    def __init__(
        self,
        identity: Identity,
        engine: Engine,
        expander: Expander,
        store: WeightStore,
        client: LearnerClient,
        control: ControlPlane,
        metrics: SamplerMetrics,
    ) -> None:
        self._identity = identity
        self._engine = engine
        self._expander = expander
        self._client = client
        self._control = control
        self._metrics = metrics
        self._follower = Follower(store, engine, metrics)
        self._watch = Watch(self._wants, lambda: expander.clock.progress, metrics)

    def _wants(self) -> list[Want | None]:
        """What each part waits for; what holds up others comes first."""
        parts = (*self._expander.outages, self._client, self._follower)
        lost = self._control.lost
        broker = None if lost is None else Want("broker", f"the MQTT broker at {lost[0]}", lost[1])
        return [*(part.want for part in parts), self._expander.clock.running, broker]

    async def run(self) -> None:
        """Work until told to drain, then say goodbye.

        Raises:
            DeadlineError: the goodbye took too long.
            EngineError: the engine died.
            ContractError: the learner refuses this sampler.
        """
        async with asyncio.TaskGroup() as tasks:
            holder = LeaseHolder(
                self._identity,
                self._engine,
                self._expander,
                self._follower,
                self._client,
                self._watch,
                self._metrics,
                tasks,
            )
            for number in stop_signals():
                asyncio.get_running_loop().add_signal_handler(number, holder.drain)
            streaming = tasks.create_task(self._client.run(holder), name="learner-stream")
            helpers = [
                tasks.create_task(self._follower.run(), name="weights"),
                tasks.create_task(self._obey(holder), name="control"),
                tasks.create_task(self._tick(holder), name="tick"),
                *(tasks.create_task(outage.watch(), name="outage") for outage in self._expander.outages),
            ]
            await holder.draining.wait()
            await self._goodbye(holder, streaming)
            for helper in helpers:
                helper.cancel()

    async def _obey(self, holder: LeaseHolder) -> None:
        """Follow the run state and the announced version."""
        while True:
            self._follower.hear(self._control.version)
            match self._control.state:
                case RunState.RUNNING:
                    holder.resume()
                case RunState.PAUSED:
                    holder.pause()
                case RunState.DRAINING:
                    holder.drain()
            await self._control.wait_change()

    async def _tick(self, holder: LeaseHolder) -> None:
        """Count idle seconds; a dead engine ends the process, and its leases go to another. Raises EngineError."""
        _, engine_outage = self._expander.outages
        while True:
            holder.count_waiting()
            self._watch.look()
            try:
                await self._engine.health()
            except EngineAwayError as error:
                engine_outage.suspect(error)
            await asyncio.sleep(TICK_SECONDS)

    async def _goodbye(self, holder: LeaseHolder, streaming: asyncio.Task[None]) -> None:
        log.info("draining: running branches are finished")
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await holder.drained(FINISH_SECONDS)
                await self._client.delivered()
                self._client.close()
                await streaming
        except TimeoutError as error:
            raise DeadlineError(
                f"Draining took more than {DRAIN_SECONDS:.0f} s; the learner gives what is unfinished to another sampler "
                f"({self._client.unacked} subtrees were not acked)."
            ) from error
        log.info("drained: all work is delivered")
