"""`treegrpo doctor`: diagnoses the machine, the files and the peers of a run, with a remedy for each fault."""

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

from services.cli.checks.check import Check, CheckWarning
from services.cli.checks.run_checks import up_checks
from services.cli.processes.readiness import probe_broker, probe_learner, probe_retriever
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
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the report: subject, verdict, and what was found or what to do."""

    subject: str
    verdict: str
    """ok, warn or fail."""
    text: str


def machine_findings() -> list[Finding]:
    """Python, packages, cores, memory, disk."""
    python = "ok" if sys.version_info >= PYTHON else "fail"
    remedy = "" if python == "ok" else f"; install Python {PYTHON[0]}.{PYTHON[1]} or later"
    return [
        Finding("python", python, platform.python_version() + remedy),
        *map(_package_finding, PACKAGES),
        Finding("cores", "ok", str(os.cpu_count())),
        _size_finding("memory", memory_limit(), MEMORY_GIB, "use a machine with more"),
        _size_finding("disk", shutil.disk_usage(Path.cwd()).free, DISK_GIB, "free space for checkpoints and weights"),
    ]


def check_findings(checks: dict[str, Check]) -> list[Finding]:
    """All checks that `treegrpo up` makes before it starts anything; the same fault is reported once."""
    found = [_check_finding(subject, check) for subject, check in checks.items()]
    texts = [finding.text for finding in found]
    return [finding for place, finding in enumerate(found) if finding.verdict != "fail" or finding.text not in texts[:place]]


async def peer_findings(config: Config) -> list[Finding]:
    """Whether broker, learner and retriever are reachable now. That none runs is only a warning."""
    learner = config.sampler.learner or config.learner.listen
    try:
        access = Credentials.from_config(config.security, Role.OPERATOR)
    except ConfigError as error:  # a finding, not an end
        return [Finding("security", "fail", str(error))]
    return [
        await _peer_finding("broker", config.broker.address, partial(probe_broker, config.broker.address, access)),
        await _peer_finding("learner", learner, partial(probe_learner, learner, access)),
        await _peer_finding("retriever", public_url(config.search_url), partial(probe_retriever, config, access)),
    ]


async def diagnose(config: Config) -> list[Finding]:
    """All findings. Ports and a run directory in use are no fault while a run is up."""
    reached = await peer_findings(config)
    found = check_findings(up_checks(config))
    if any(peer.verdict == "ok" for peer in reached):
        found = [_downgraded(finding) if finding.subject in ("ports", "run directory") else finding for finding in found]
    return [*machine_findings(), *found, *reached]


def findings_table(findings: list[Finding]) -> Table:
    """The findings as a table."""
    headings: list[tuple[str, Justify]] = [("what", "left"), ("", "left"), ("found, or what to do", "left")]
    return table(headings, [(found.subject, cell(found.verdict, COLOURS[found.verdict]), found.text) for found in findings])


def _downgraded(finding: Finding) -> Finding:
    return replace(finding, verdict="warn", text=f"a run is up: {finding.text}") if finding.verdict == "fail" else finding


def _package_finding(name: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "fail", "is not installed; run `make setup`")


def _size_finding(subject: str, size: float, gib: int, remedy: str) -> Finding:
    have = size / 2**30
    return Finding(subject, "ok", f"{have:.1f} GiB") if have >= gib else Finding(subject, "warn", f"{have:.1f} GiB; {remedy}")


def _check_finding(subject: str, check: Check) -> Finding:
    try:
        text = check()
    except TreeGrpoError as error:  # a finding, not an end
        return Finding(subject, "fail", str(error))
    return Finding(subject, "warn" if isinstance(text, CheckWarning) else "ok", text)


async def _peer_finding(subject: str, address: str, probe: Callable[[], Awaitable[None]]) -> Finding:
    try:
        await probe()
    except (UnavailableError, ConfigError) as error:  # a finding, not an end
        return Finding(subject, "warn", str(error))
    return Finding(subject, "ok", f"answers at {address}")
