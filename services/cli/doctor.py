"""`treegrpo doctor`: is everything there, and if not, what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

from rich.table import Table

from services.cli.checks.caution import Caution
from services.cli.checks.run_checks import Check, up_checks
from services.cli.processes.readiness import broker_ready, learner_ready, retriever_ready
from services.cli.reports.terminal import Justify, cell, table
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.errors import ConfigError, TreeGrpoError, UnavailableError
from treegrpo.net.http_client import public_url
from treegrpo.runtime.machine_memory import memory_limit
from treegrpo.security.credentials import Credentials

PYTHON = (3, 11)
MEMORY_GIB = 4
DISK_GIB = 2
PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "aiomqtt", "amqtt", "bm25s", "pydantic-settings")
INK = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: what was looked at, how it is, and what was found or is to be done."""

    subject: str
    verdict: str
    """ok, warn or fail."""
    text: str


def machine() -> list[Finding]:
    """Python, packages, cores, memory, disk."""
    python = "ok" if sys.version_info >= PYTHON else "fail"
    remedy = "" if python == "ok" else f"; install Python {PYTHON[0]}.{PYTHON[1]} or later"
    return [
        Finding("python", python, platform.python_version() + remedy),
        *map(_package, PACKAGES),
        Finding("cores", "ok", str(os.cpu_count())),
        _at_least("memory", memory_limit(), MEMORY_GIB, "use a machine with more"),
        _at_least("disk", shutil.disk_usage(Path.cwd()).free, DISK_GIB, "make room for checkpoints and weights"),
    ]


def files(checks: dict[str, Check]) -> list[Finding]:
    """The checks `treegrpo up` makes before it starts anything, all of them; the same fault is told once."""
    found = [_tried(subject, check) for subject, check in checks.items()]
    said = [finding.text for finding in found]
    return [finding for place, finding in enumerate(found) if finding.verdict != "fail" or finding.text not in said[:place]]


async def peers(config: Config) -> list[Finding]:
    """Broker, learner and retriever: reachable now? That none runs is only a warning."""
    learner = config.sampler.learner or config.learner.listen
    try:
        access = Credentials.from_config(config.security, Role.OPERATOR)
    except ConfigError as error:  # a finding, not an end
        return [Finding("security", "fail", str(error))]
    return [
        await _reached("broker", config.broker.address, partial(broker_ready, config.broker.address, access)),
        await _reached("learner", learner, partial(learner_ready, learner, access)),
        await _reached("retriever", public_url(config.search_url), partial(retriever_ready, config, access)),
    ]


async def examine(config: Config) -> list[Finding]:
    """All findings. Ports and run directory that are in use are no fault while a run is up."""
    reached = await peers(config)
    found = files(up_checks(config))
    if any(peer.verdict == "ok" for peer in reached):
        found = [_excused(finding) if finding.subject in ("ports", "run directory") else finding for finding in found]
    return [*machine(), *found, *reached]


def report(findings: list[Finding]) -> Table:
    """The findings as a table."""
    headings: list[tuple[str, Justify]] = [("what", "left"), ("", "left"), ("found, or what to do", "left")]
    return table(headings, [(found.subject, cell(found.verdict, INK[found.verdict]), found.text) for found in findings])


def _excused(finding: Finding) -> Finding:
    return replace(finding, verdict="warn", text=f"a run is up: {finding.text}") if finding.verdict == "fail" else finding


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "fail", "is not installed; run `make setup`")


def _at_least(subject: str, size: float, gib: int, remedy: str) -> Finding:
    have = size / 2**30
    return Finding(subject, "ok", f"{have:.1f} GiB") if have >= gib else Finding(subject, "warn", f"{have:.1f} GiB; {remedy}")


def _tried(subject: str, check: Check) -> Finding:
    try:
        text = check()
    except TreeGrpoError as error:  # a finding, not an end
        return Finding(subject, "fail", str(error))
    return Finding(subject, "warn" if isinstance(text, Caution) else "ok", text)


async def _reached(subject: str, address: str, probe: Callable[[], Awaitable[None]]) -> Finding:
    try:
        await probe()
    except (UnavailableError, ConfigError) as error:  # a finding, not an end
        return Finding(subject, "warn", str(error))
    return Finding(subject, "ok", f"answers at {address}")
