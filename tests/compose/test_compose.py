"""The real docker-compose.yml on a real engine, from the build to the resumption. `make test-compose` runs it, in this order."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from deploy.grafana.__main__ import BOARDS
from deploy.grafana.queries import alert_rules, annotation_queries, panel_queries
from deploy.grafana.render import render_dashboard
from tests.compose.compose_project import PROJECT, SERVICES, ComposeProject, docker, lines, scaled_limit, why_no_docker

if os.environ.get("TEST_COMPOSE") != "1":
    pytest.skip("it takes minutes; make test-compose runs it", allow_module_level=True)
if reason := why_no_docker():
    pytest.skip(reason, allow_module_level=True)
pytestmark = pytest.mark.timeout(1200)

HEALTHY_SECONDS = 90
JOINED_SECONDS = 20
"""On a machine with nothing else to do; see `scaled_limit`."""
OURS = ("treegrpo-learner:0.1.0", "treegrpo-sampler:0.1.0")
MAY_BE_EMPTY = {
    "Learning / Effective sample by advantage": "a batch where inter and intra advantage nowhere point apart has no such class",
}
"""Panels that have no value now and then, with the reason. Everything else answers on a fresh run."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeProject]:
    stack = ComposeProject(tmp_path_factory.mktemp("compose"))
    stack.run_compose("down", "-v", "-t", "1")
    began = time.monotonic()
    stack.run_compose("build", "init", "sampler")
    stack.seconds["build"] = time.monotonic() - began
    try:
        yield stack
    finally:
        print(stack.compose("logs", "--no-color", "--tail", "40").stdout)
        print(json.dumps({what: round(seconds, 1) for what, seconds in stack.seconds.items()}))
        stack.compose("down", "-v", "-t", "5")


def test_all_are_healthy_within_90_seconds(stack: ComposeProject) -> None:
    began = time.monotonic()
    stack.run_compose("up", "-d", *SERVICES)
    stack.wait_until("all are healthy", lambda: all(stack.healthy(service) for service in SERVICES), 300)
    stack.seconds["healthy"] = time.monotonic() - began
    assert stack.seconds["healthy"] <= scaled_limit(HEALTHY_SECONDS)


def test_the_run_trains(stack: ComposeProject) -> None:
    stack.seconds["three steps"] = stack.wait_until("three steps", lambda: stack.value("treegrpo_step") >= 3, 180)


def test_samplers_join_a_running_run_and_take_leases(stack: ComposeProject) -> None:
    began = time.time()
    stack.run_compose("up", "-d", "--scale", "sampler=3", *SERVICES)

    def joined() -> list[float]:
        rows = [json.loads(line) for line in stack.logs("learner") if " joined (" in line]
        return [datetime.fromisoformat(row["time"]).timestamp() for row in rows]

    stack.wait_until("three have joined", lambda: len(joined()) >= 3, 180)
    stack.seconds["joined"] = max(joined()) - began
    assert stack.seconds["joined"] <= scaled_limit(JOINED_SECONDS)
    working = 'count(treegrpo_engine_tokens_total{how="decoded"} > 0)'
    stack.wait_until("all three work", lambda: stack.value(working) == 3, 120)
    stack.wait_until("the learner knows all three", lambda: stack.value("treegrpo_samplers_connected") == 3, 30)


def test_every_panel_and_every_alert_has_an_answer(stack: ComposeProject) -> None:
    stack.wait_until("rates have two points", lambda: not math.isnan(stack.value("run:prefix_hit:ratio_rate5m")), 60)
    deadline = time.monotonic() + 60
    while (empty := [name for name, query in panel_queries().items() if not stack.query(query)]) and time.monotonic() < deadline:
        time.sleep(2)
    assert [name for name in empty if not name.startswith(tuple(MAY_BE_EMPTY))] == []
    annotations = {name: len(stack.query(query)) for name, query in annotation_queries().items()}
    assert annotations["starts"] >= len(("intake", "trainer", "sampler", "retriever"))
    for rule in alert_rules().values():
        stack.query(rule["expr"])  # an error would raise; a result is an alert, which a run that is well has not
    firing = {row["metric"]["alertname"] for row in stack.query('ALERTS{alertstate="firing"}')}
    assert firing <= {"LearnerStarved", "SamplersStarved", "JournalDiskNearlyFull"}, "of a small machine"


def test_a_killed_replica_is_replaced_and_the_run_goes_on(stack: ComposeProject) -> None:
    before = stack.value("treegrpo_step")
    victim = stack.containers("sampler")[0]
    stack.kill_processes(victim)
    stack.wait_until("it has been started again", lambda: docker("inspect", "-f", "{{.RestartCount}}", victim).strip() == "1", 60)
    stack.seconds["replica back"] = stack.wait_until("all three serve", lambda: stack.healthy("sampler", 3), 120)
    stack.wait_until("two more steps", lambda: stack.value("treegrpo_step") >= before + 2, 120)


def test_a_killed_learner_goes_on_where_its_checkpoint_is(stack: ComposeProject) -> None:
    learner = stack.containers("learner")[0]
    before = max(row["step"] for row in stack.progress() if row["kind"] == "step")
    stack.kill_processes(learner)
    stack.wait_until(
        "it has been started again", lambda: docker("inspect", "-f", "{{.RestartCount}}", learner).strip() == "1", 60
    )
    stack.seconds["learner back"] = stack.wait_until("it serves", lambda: stack.healthy("learner"), 120)
    stack.wait_until("more steps than before", lambda: stack.value("treegrpo_step") > before, 180)
    balance = "max(run_kind_currency:budget_imbalance:abs)"  # nothing until the rule has seen the new process
    stack.wait_until("the ledger balances", lambda: stack.value(balance) == 0, 60)


def test_samplers_that_are_taken_away_lose_nothing(stack: ComposeProject) -> None:
    lost = 'sum(treegrpo_leases_ended_total{reason="lost"})'
    before, step = stack.value(lost), stack.value("treegrpo_step")
    stack.run_compose("up", "-d", "--scale", "sampler=1", *SERVICES)
    stack.wait_until("the learner knows one", lambda: stack.value("treegrpo_samplers_connected") == 1, 60)
    stack.wait_until("one more step", lambda: stack.value("treegrpo_step") > step, 120)
    assert stack.value(lost) == before
    assert stack.value("max(run_kind_currency:budget_imbalance:abs)") == 0


def test_the_broker_takes_commands_of_the_operator(stack: ComposeProject) -> None:
    stack.run_compose("run", "--rm", "operator", "state", "paused", "/data/geohop.toml")
    decoded = 'sum(rate(treegrpo_engine_tokens_total{how="decoded"}[15s]))'
    stack.wait_until("no engine computes", lambda: stack.value(decoded) == 0, 180)
    stack.run_compose("run", "--rm", "operator", "state", "running", "/data/geohop.toml")
    stack.wait_until("they go on", lambda: stack.value(decoded) > 0, 120)


def test_the_panels_can_be_drawn(stack: ComposeProject, tmp_path: Path) -> None:
    folder = Path(os.environ.get("DASHBOARD_IMAGES", str(tmp_path)))
    for board in BOARDS:
        assert render_dashboard(board, stack.prometheus, folder, 5).stat().st_size > 10_000


def test_nobody_is_root_and_nothing_can_be_written(stack: ComposeProject) -> None:
    for image in OURS:
        assert docker("image", "inspect", "-f", "{{.Config.User}}", image).strip() == "10001:10001"
    for service in SERVICES:
        for container in stack.containers(service):
            assert docker("exec", container, "id", "-u").strip() != "0", service
            refused = subprocess.run(
                ["docker", "exec", container, "touch", "/etc/written"], capture_output=True, text=True, check=False
            )
            assert "Read-only file system" in refused.stderr, service
            assert int(docker("inspect", "-f", "{{.HostConfig.Memory}}", container)) > 0, service


def test_no_compiler_is_left_in_an_image(stack: ComposeProject) -> None:
    for image in OURS:
        assert docker("run", "--rm", image, "sh", "-c", "command -v cc gcc g++ clang make || true").strip() == "", image


def test_logs_are_json_lines(stack: ComposeProject) -> None:
    for service in ("init", "retriever", "learner", "sampler", "prometheus"):
        strange = [line for line in stack.logs(service) if not line.startswith("{")]
        assert strange == [], service
        for line in stack.logs(service):
            json.loads(line)


def test_no_secret_is_told(stack: ComposeProject) -> None:
    kinds = "('.password', '.token', '.key')"
    show = f"import pathlib; print(*(p.read_text() for p in pathlib.Path('/s').iterdir() if p.suffix in {kinds}), sep='\\n')"
    volume = f"{PROJECT}_secrets-authority:/s:ro"
    secrets = [
        line
        for line in docker("run", "--rm", "-v", volume, OURS[0], "python", "-c", show).splitlines()
        if line and "-----" not in line
    ]
    assert len(secrets) > 12
    published = {
        "config": stack.run_compose("config"),
        "logs": stack.run_compose("logs", "--no-color"),
        **{container: docker("inspect", container) for service in SERVICES for container in stack.containers(service)},
        **{image: docker("history", "--no-trunc", image) + docker("image", "inspect", image) for image in OURS},
    }
    assert [place for place, text in published.items() if any(secret in text for secret in secrets)] == []
    for image in OURS:
        keys = docker(
            "run",
            "--rm",
            image,
            "sh",
            "-c",
            "find / -xdev \\( -name '*.key' -o -name '*.password' -o -name .env \\) 2>/dev/null || true",
        )
        assert keys.strip() == ""


def test_each_service_has_its_own_secrets_alone(stack: ComposeProject) -> None:
    sampler = stack.containers("sampler")[0]
    assert set(docker("exec", sampler, "ls", "/secrets").split()) == {
        *("ca.pem", "sampler.pem", "sampler.key", "sampler.password", "metrics.token", "retriever.token")
    }
    assert set(docker("exec", stack.containers("prometheus")[0], "ls", "/secrets").split()) == {"ca.pem", "metrics.token"}


def test_down_and_up_goes_on(stack: ComposeProject) -> None:
    stack.run_compose("down")
    before = max(row["step"] for row in stack.progress() if row["kind"] == "step")
    stack.run_compose("up", "-d", *SERVICES)
    stack.seconds["healthy again"] = stack.wait_until("all are healthy", lambda: all(stack.healthy(one) for one in SERVICES), 180)
    stack.wait_until("it goes on behind", lambda: stack.value("treegrpo_step") > before, 180)
    steps = [row for row in stack.progress() if row["kind"] == "step"]
    assert any(row["step"] == before + 1 for row in steps), "after a drain no step is repeated or left out"
    for row in steps:
        for currencies in row["ledger"].values():
            for account in currencies.values():
                assert account["granted"] == sum(account[part] for part in ("spent", "refunded", "forfeited", "outstanding"))


def test_bad_input_is_answered_with_what_to_do(stack: ComposeProject, tmp_path: Path) -> None:
    (empty := tmp_path / "empty.env").write_text("", encoding="utf-8")
    assert "cp .env.example .env" in stack.compose("config", env_file=str(empty)).stderr
    if not Path("/proc/driver/nvidia/gpus").exists():
        without = stack.compose("run", "--rm", "--no-deps", "gpu-check")
        assert without.returncode == 2  # an error that stays
        assert "COMPOSE_PROFILES=cpu" in without.stdout + without.stderr
    for arguments, file in (
        (("-e", "TREEGRPO_SECURITY__DIR=/secrets/none"), "/secrets/none/ca.pem"),
        (("-u", "12345:12345"), "/secrets/"),
    ):
        program = ("python", "-m", "services.sampler", "/data/geohop.toml")  # as a service it waits after such an error
        unreadable = stack.compose("run", "--rm", "--no-deps", *arguments, "sampler", *program)
        assert unreadable.returncode == 2
        said = unreadable.stdout + unreadable.stderr
        assert file in said, said
        assert "treegrpo certs" in said, said
    no_config = stack.compose("run", "--rm", "--no-deps", "-e", "CONFIG=mine.toml", "init")
    assert no_config.returncode == 2
    assert "set CONFIG in .env" in no_config.stdout + no_config.stderr


def test_a_port_in_use_is_named(stack: ComposeProject, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        (taken := tmp_path / "taken.env").write_text(lines(stack.settings | {"PROMETHEUS_PORT": port}), encoding="utf-8")
        refused = stack.compose("run", "--rm", "--no-deps", "--service-ports", "prometheus", env_file=str(taken))
    assert refused.returncode != 0
    said = refused.stdout + refused.stderr
    assert f"127.0.0.1:{port}" in said, said
    assert "already in use" in said or "already allocated" in said, "docs/operations.md says what to do then"
