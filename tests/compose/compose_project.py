"""Runs docker-compose.yml on a Docker engine as a project of its own: start, query, stop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
PROJECT = "treegrpo-test"
SERVICES = ("mosquitto", "retriever", "learner", "sampler", "prometheus")
"""All but Grafana, which holds nothing of ours but files."""
SETTINGS = {
    "COMPOSE_PROFILES": "cpu",
    "TREEGRPO_TRAIN__STEPS": "100000",
    "TREEGRPO_TRAIN__BATCH": "8",
    "TREEGRPO_TRAIN__CHECKPOINT_EVERY": "2",
    "TREEGRPO_EVAL__QUESTIONS": "8",
}
PASSED_ON = ("PYTHON_IMAGE", "PIP_INDEX_URL", "TORCH_INDEX", "MOSQUITTO_IMAGE", "PROMETHEUS_IMAGE")
"""Where images and packages come from: as the environment says."""


def why_no_docker() -> str:
    """Why there is nothing to test with; empty if there is."""
    if shutil.which("docker") is None:
        return "there is no docker here"
    asked = subprocess.run(["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False)
    return "" if asked.returncode == 0 else f"no Docker engine answers ({asked.stderr.strip()})"


def compose_command() -> list[str]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


def example() -> dict[str, str]:
    """What .env.example sets: a user copies it, and that is all."""
    rows = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    return {name: value for name, equals, value in (row.partition("=") for row in rows) if equals and not name.startswith("#")}


def lines(settings: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def scaled_limit(seconds: float) -> float:
    """A time limit, longer where more processes than cores want to compute."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class ComposeProject:
    def __init__(self, folder: Path) -> None:
        self._command = compose_command()
        (self._port,) = free_ports(1)
        self._env = folder / "test.env"
        settings = SETTINGS | {"PROMETHEUS_PORT": str(self._port), "ENV_FILE": str(self._env)}
        settings |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.settings = example() | settings
        self._env.write_text(lines(self.settings), encoding="utf-8")
        self.seconds: dict[str, float] = {}
        """What took how long."""

    @property
    def prometheus(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def compose(self, *arguments: str, env_file: str | None = None) -> subprocess.CompletedProcess[str]:
        """`docker compose` with ``arguments``, whatever comes of it."""
        command = [*self._command, "-p", PROJECT, "--env-file", env_file or str(self._env), *arguments]
        environment = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, *PASSED_ON)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def run_compose(self, *arguments: str) -> str:
        """`compose` that must work; returns what it printed."""
        done = self.compose(*arguments)
        assert done.returncode == 0, f"docker compose {' '.join(arguments)}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def containers(self, service: str) -> list[str]:
        return docker(
            "ps",
            "-q",
            "--filter",
            f"label=com.docker.compose.project={PROJECT}",
            "--filter",
            f"label=com.docker.compose.service={service}",
        ).split()

    def healthy(self, service: str, count: int = 1) -> bool:
        found = self.containers(service)
        return len(found) == count and all(
            docker("inspect", "-f", "{{.State.Health.Status}}", one).strip() == "healthy" for one in found
        )

    def kill_processes(self, container: str) -> None:
        """Kill all its processes at once, as the kernel does when memory runs out; `docker kill` would count as a stop."""
        subprocess.run(
            ["docker", "exec", container, "python", "-c", "import os; os.kill(-1, 9)"], capture_output=True, check=False
        )

    def logs(self, *services: str) -> list[str]:
        return [
            line.partition("| ")[2] for line in self.run_compose("logs", "--no-color", *services).splitlines() if "| " in line
        ]

    def query(self, query: str) -> list[dict[str, Any]]:
        """The series that Prometheus has for a query, now."""
        url = f"{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    def value(self, query: str) -> float:
        """The one value of a query; NaN if there is none."""
        found = self.query(query)
        return float(found[0]["value"][1]) if found else float("nan")

    def progress(self) -> list[dict[str, Any]]:
        """The run's progress file."""
        text = self.run_compose("run", "--rm", "--entrypoint", "cat", "operator", "/var/lib/treegrpo/progress.jsonl")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def wait_until(self, what: str, holds: Callable[[], bool], seconds: float) -> float:
        """Ask again and again until it holds; returns the seconds it took. The limit is for a machine with nothing else to do."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < scaled_limit(seconds), (
                f"not within {seconds:.0f} s: {what}\n{self.run_compose('ps')}"
            )
            time.sleep(0.5)
        return time.monotonic() - began


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout
