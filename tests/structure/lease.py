"""Counts what one lease of two branches runs through, from the engine's first token to the optimizer's step.

    broker, retriever ─► intake, trainer, sampler (traced) ─► some steps of GeoHop, each on one lease ─► files, functions, moves

With one group a batch and no lag, leases follow one another: what lies between the first `generate` after a step and the end of
the next step belongs to one lease. Which turns a policy takes differs, so the figures are medians over the leases of a run.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.ports import free_address, free_ports

STEPS = 12
SKIPPED = 2
"""Steps at the beginning, in which the held-out questions are answered too and modules are imported."""
DEADLINE_SECONDS = 300.0
INTAKE = "learner.intake"
TRACED = (INTAKE, "learner.trainer", "services.sampler")
ANONYMOUS = re.compile(r"(\.<locals>|\.<\w+>)+$")
SETTINGS = {
    "rollout.trees": 1,
    "rollout.rounds": 1,
    "rollout.expansions": 1,
    "train.batch": 1,
    "train.max_lag": 0,
    "train.steps": STEPS,
    "train.entropy_coef": 0.001,  # else a group whose leaves are equally good is not trained on
    "train.checkpoint_every": 1000,
    "eval.every": 0,
    "eval.questions": 1,
    "sampler.count": 1,
}


@dataclass(frozen=True)
class Call:
    """A function of the product that begins, and the one that called it."""

    seconds: float
    process: str
    """The module that was started."""
    caller: str
    callee: str

    @property
    def is_named(self) -> bool:
        """Whether the function is one with a name. A lambda or generator is part of the function that has it in its text."""
        return not self.callee.rpartition(".")[2].startswith("<")

    @property
    def pair(self) -> tuple[str, str]:
        """The function that calls, and the one that is called."""
        return ANONYMOUS.sub("", self.caller), self.callee

    @property
    def is_move(self) -> bool:
        """Whether it goes from one file to another."""
        return path_of(self.caller) != path_of(self.callee)


@dataclass(frozen=True)
class LeasePath:
    """What one lease ran through."""

    calls: tuple[Call, ...]

    @property
    def files(self) -> frozenset[str]:
        return frozenset(path_of(call.callee) for call in self._starts)

    def files_below(self, folder: str) -> int:
        return sum(file.startswith(folder) for file in self.files)

    @property
    def functions(self) -> frozenset[str]:
        return frozenset(call.callee for call in self._starts if call.is_named)

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """Pairs of functions of which one calls the other."""
        return frozenset(call.pair for call in self._calls)

    @property
    def moves(self) -> frozenset[tuple[str, str]]:
        """Those whose functions are in two files."""
        return frozenset(call.pair for call in self._calls if call.is_move)

    @property
    def _calls(self) -> list[Call]:
        return [call for call in self._starts if call.is_named and call.caller != "-"]

    @property
    def _starts(self) -> list[Call]:
        return [call for call in self.calls if not call.callee.startswith("return:")]

    def accepting(self, folder: str = "") -> frozenset[str]:
        """Files below ``folder`` that the intake runs through, to accept a subtree, from the call with the message on."""
        files = set[str]()
        outermost = ""
        for call in (call for call in self.calls if call.process == INTAKE):
            if not outermost and _accepts(call.callee):
                outermost = call.callee
                files.add(path_of(call.caller))
            if outermost and not call.callee.startswith("return:"):
                files.add(path_of(call.callee))
            if call.callee == f"return:{outermost}":
                outermost = ""
        return frozenset(file for file in files if file.startswith(folder))


def path_of(function: str) -> str:
    return function.partition(":")[0]


def leases(calls: Sequence[Call]) -> Iterator[LeasePath]:
    """The calls of each lease: from the first `generate` of an engine to the end of the optimizer's step."""
    ends = [call.seconds for call in calls if call.callee == "torch:step"]
    for earlier, end in pairwise(ends):
        between = [call for call in calls if earlier < call.seconds <= end and call.callee != "torch:step"]
        starts = [call.seconds for call in between if _generates(call.callee)]
        if starts:
            yield LeasePath(tuple(call for call in between if call.seconds >= min(starts)))


def _accepts(function: str) -> bool:
    return function.startswith("learner/intake/") and function.rpartition(".")[2] in {"accept", "accept_subtree"}


def _generates(function: str) -> bool:
    return function.startswith("services/sampler/engines/") and function.endswith(".generate")


def read_calls(events: Path) -> list[Call]:
    """Calls of one process, in the order in which they were made."""
    fields = (line.split() for line in events.read_text("utf-8").splitlines())
    return [Call(float(seconds), events.stem, caller, callee) for seconds, caller, callee in fields]


def trace(root: Path) -> list[LeasePath]:
    """Run some steps of GeoHop with the code of ``root``; returns what each lease ran through."""
    with tempfile.TemporaryDirectory(prefix="structure-") as folder:
        events = _run(root, Path(folder))
        calls = sorted((call for file in events for call in read_calls(file)), key=lambda call: call.seconds)
    return list(leases(calls))[SKIPPED:]


def _run(root: Path, folder: Path) -> list[Path]:
    arguments = _arguments(root, folder)
    tracer = Path(__file__).with_name("traced.py")
    events = [folder / f"{module}.calls" for module in TRACED]
    commands = [[str(tracer), str(root), str(file), module, *arguments] for module, file in zip(TRACED, events, strict=True)]
    with ExitStack() as running:
        running.enter_context(_process(root, ["-m", "treegrpo", "broker", *arguments], folder / "broker.log"))
        running.enter_context(_process(root, ["-m", "services.retriever", *arguments], folder / "retriever.log"))
        intake, trainer, sampler = (
            running.enter_context(_process(root, command, file.with_suffix(".log")))
            for command, file in zip(commands, events, strict=True)
        )
        _wait_for(trainer, (intake, sampler), folder)
    return events


def _arguments(root: Path, folder: Path) -> list[str]:
    """The command line that every service is given: GeoHop, with one group a batch and addresses that are free."""
    served = ("broker.address", "retriever.listen", "learner.listen", "sampler.metrics")
    ports: dict[str, str] = {name: free_address() for name in served}
    ports["learner.metrics"] = f"127.0.0.1:{free_ports(2)[0]}"  # the trainer's is the one after it
    settings = {**SETTINGS, **ports, "run.dir": folder / "run"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [str(root / "examples/geohop/geohop.toml"), *flags]


@contextmanager
def _process(root: Path, command: Sequence[str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A process of the checkout for the time of the block."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=root, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(trainer: subprocess.Popen[bytes], others: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while trainer.poll() is None and all(other.poll() is None for other in others) and time.monotonic() < deadline:
        time.sleep(0.2)
    if trainer.poll() != 0:
        logs = "\n".join(f"{log.name}: {log.read_text('utf-8', 'replace')[-2000:]}" for log in sorted(folder.glob("*.log")))
        raise RuntimeError(f"the run to be traced did not reach its end\n{logs}")


def median_of(values: Sequence[int]) -> int:
    return round(statistics.median(values))
