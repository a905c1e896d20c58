"""The run under test: GeoHop with its parts as processes, and a fault proxy for every connection between them.

sampler-0..n ──► intake (gRPC), retriever (HTTP), broker (MQTT)      hostile sampler ──► intake, without a proxy
intake ──► broker                        trainer ──► intake over a Unix socket, which has no proxy
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.cli.processes.program import Program
from tests.chaos.fault_proxy import FaultProxy
from tests.chaos.hostile_sampler import NAME as HOSTILE
from tests.ports import free_ports

GEOHOP = Path(__file__).parents[2] / "examples" / "geohop" / "geohop.toml"
RUN = "chaos"
SERVICES = ("broker", "retriever", "intake")


@dataclass(slots=True)
class ChaosRun:
    """The parts, their addresses, and their arguments."""

    run_dir: Path
    seed: int
    samplers: list[str]
    steps: int
    """Of the configuration; raised for the end of the run."""
    batch: int
    questions: int
    ports: dict[str, int] = field(default_factory=dict[str, int])
    proxies: dict[tuple[str, str], FaultProxy] = field(default_factory=dict[tuple[str, str], FaultProxy])
    """By (client, service)."""

    def __post_init__(self) -> None:
        # The trainer's metrics are one port further than the intake's, which is what the configuration says.
        names = [*SERVICES, *self.samplers, "metrics", "trainer"]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        clients = [*((name, service) for name in self.samplers for service in SERVICES), ("intake", "broker")]
        self.proxies = {link: FaultProxy(self.address(link[1]), self.seed + n) for n, link in enumerate(clients)}

    @property
    def parts(self) -> list[str]:
        """In the order in which they are started."""
        return ["broker", "retriever", "intake", "trainer", *self.samplers, HOSTILE]

    def address(self, name: str) -> str:
        """Where a service listens; of a sampler and the trainer, and for the intake as "metrics": where its metrics are."""
        return f"127.0.0.1:{self.ports[name]}"

    @property
    def metrics(self) -> dict[str, str]:
        """Part → where its /metrics is."""
        return {
            "retriever": self.address("retriever"),
            "intake": self.address("metrics"),
            "trainer": self.address("trainer"),
            **{name: self.address(name) for name in self.samplers},
        }

    def program(self, part: str) -> Program:
        if part == HOSTILE:
            return Program(part, "tests.chaos.hostile_sampler")
        module = {"broker": "services.broker.server", "retriever": "services.retriever"}.get(part, f"learner.{part}")
        return Program(part, "services.sampler" if part in self.samplers else module)

    def arguments(self, part: str) -> list[str]:
        """The command-line arguments of ``part``."""
        if part == HOSTILE:
            return [self.address("intake"), str(self.seed)]
        keys = {
            "run.name": RUN,
            "run.dir": str(self.run_dir),
            "run.seed": str(self.seed),
            "train.steps": str(self.steps),
            "train.batch": str(self.batch),
            "train.warmup_ratio": "0",  # of a number of steps that is not known yet
            "train.checkpoint_every": "3",
            "eval.every": "0",
            "eval.questions": str(self.questions),
            "learner.listen": self.address("intake"),
            "learner.metrics": self.address("metrics"),
            "retriever.listen": self.address("retriever"),
            "broker.address": self._address_for("broker", part),
        }
        if part in self.samplers:
            keys |= {
                "sampler.id": part,
                "sampler.metrics": self.address(part),
                "sampler.learner": self._address_for("intake", part),
                "retriever.url": f"http://{self._address_for('retriever', part)}",
            }
        return [str(GEOHOP), *(word for key, value in keys.items() for word in (f"--{key}", value))]

    def _address_for(self, service: str, client: str) -> str:
        """Where ``client`` finds ``service``."""
        proxy = self.proxies.get((client, service))
        return proxy.address if proxy else self.address(service)
