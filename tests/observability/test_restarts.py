"""What ended for good is not started again: the entry point of containers, and that every service of ours has one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from treegrpo.runtime import healthcheck
from treegrpo.runtime.container import FAILURE_MARKER
from treegrpo.runtime.exit_report import CRASHED, FAILED, TRANSIENT

ROOT = Path(__file__).parents[2]
SAY_AND_END = "tests.cli.programs.print_and_exit"
OURS = ("learner", "learner-gpu", "sampler", "retriever")


@contextmanager
def container(temporary: Path, *program: str, job: bool = False) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "treegrpo.runtime.container", *(["--job"] if job else []), sys.executable, "-u", *program]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as one:
        try:
            yield one
        finally:
            one.kill()


def ended(one: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = one.communicate(timeout=60)
    return one.returncode, said


def ending(code: int, *report: str) -> tuple[str, ...]:
    return ("-m", SAY_AND_END, "--say", "a line", "--code", str(code), *(("--report", *report) if report else ()))


@pytest.mark.parametrize("code", [0, CRASHED, TRANSIENT])
def test_what_is_done_or_may_pass_ends_the_container_with_its_code(tmp_path: Path, code: int) -> None:
    with container(tmp_path, *ending(code, "Nobody answers.")) as one:
        assert ended(one)[0] == code
    assert not (tmp_path / FAILURE_MARKER).exists()


def test_a_crash_of_the_program_ends_the_container_as_a_shell_would(tmp_path: Path) -> None:
    with container(tmp_path, "-c", "import os; os.kill(os.getpid(), 9)") as one:
        assert ended(one)[0] == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("report", "sentence"), [(["No such key."], "No such key."), ([], "it gave no reason; see the lines above")]
)
def test_a_permanent_error_leaves_the_container_unhealthy_but_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], report: list[str], sentence: str
) -> None:
    (tmp_path / FAILURE_MARKER).write_text("of an earlier start")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with container(tmp_path, *ending(FAILED, *report)) as one:
        assert one.stderr is not None
        assert one.stderr.readline().rstrip().endswith(f"fix it and restart the container: {sentence}")
        assert (healthcheck.main(["http://127.0.0.1:9/health"]), capsys.readouterr().out) == (1, f"ended for good: {sentence}\n")
        assert healthcheck.main(["--alive", "http://127.0.0.1:9/health"]) == 0
        one.terminate()
        assert ended(one)[0] == FAILED


def test_a_job_ends_with_the_code_and_is_not_done_after_sigterm(tmp_path: Path) -> None:
    with container(tmp_path, *ending(FAILED, "No such key."), job=True) as one:
        assert ended(one)[0] == FAILED
    with container(tmp_path, *ending(0), job=True) as one:
        assert ended(one)[0] == 0
    for job, code in ((True, 128 + signal.SIGTERM), (False, 0)):
        with container(tmp_path, "-m", "tests.cli.programs.wait_for_sigterm", job=job) as one:
            assert one.stdout is not None
            assert one.stdout.readline() == "waiting\n"
            one.terminate()
            assert ended(one)[0] == code


@pytest.mark.parametrize("name", OURS)
def test_every_service_of_ours_in_compose_has_the_entry_point(name: str) -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"][name]
    assert service["command"][:3] == ["python", "-m", "treegrpo.runtime.container"]
    assert service["healthcheck"]["test"][1:4] == ["python", "-m", "treegrpo.runtime.healthcheck"], "which says the sentence"


def test_the_image_with_sglang_has_the_entry_point_around_its_gpu() -> None:
    (entry,) = [line for line in (ROOT / "deploy/Dockerfile.sampler-sglang").read_text().splitlines() if "ENTRYPOINT" in line]
    assert entry.startswith('ENTRYPOINT ["python3", "-m", "treegrpo.runtime.container", "python3", "/opt/treegrpo/claim_gpu.py"')
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]["sampler-gpu"]
    assert service["command"][1:3] == ["-m", "services.sampler"]


def pod(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The specification of a workload in deploy/kubernetes, and of its pod."""
    ones = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / f"{name}.yaml").read_text(encoding="utf-8"))
    spec = next(one["spec"] for one in ones if one["metadata"]["name"] == name and "template" in one["spec"])
    return spec, spec["template"]["spec"]


@pytest.mark.parametrize("name", ["sampler", "retriever"])
def test_every_deployment_of_ours_waits_and_is_alive_meanwhile(name: str) -> None:
    _, spec = pod(name)
    (one,) = spec["containers"]
    assert one["command"][:3] == ["python", "-m", "treegrpo.runtime.container"]
    for check in {"livenessProbe", "startupProbe"} & set(one):
        assert one[check]["exec"]["command"][:4] == ["python", "-m", "treegrpo.runtime.healthcheck", "--alive"], check


def test_the_job_fails_at_once_with_code_2_and_goes_on_after_any_other() -> None:
    job, spec = pod("learner")
    (one,) = spec["containers"]
    assert one["command"][:4] == ["python", "-m", "treegrpo.runtime.container", "--job"]
    assert spec["restartPolicy"] == "Never", "which podFailurePolicy asks for"
    first, *_ = job["podFailurePolicy"]["rules"]
    exits = {"containerName": one["name"], "operator": "In", "values": [FAILED]}
    assert first == {"action": "FailJob", "onExitCodes": exits}
