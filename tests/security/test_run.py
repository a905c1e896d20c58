"""A whole run with everything on: real processes, TLS at every door; and its secrets stay where they are."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from services.cli.certs import certs
from services.cli.progress import read_progress
from tests.cli.machine import treegrpo
from tests.cli.test_up import up
from tests.cli.workbench import Workbench
from tests.security.people import access
from treegrpo.access import bearer
from treegrpo.security import Role


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def secrets_in(folder: Path) -> list[str]:
    """Every password, token and private key."""
    words = [path.read_text().strip() for path in folder.iterdir() if path.suffix in {".password", ".token"}]
    keys = [line for path in folder.glob("*.key") for line in path.read_text().splitlines() if "-----" not in line]
    return [*words, *keys]


async def test_a_run_with_everything_on_trains_to_its_end_and_tells_no_secret(bench: Workbench) -> None:
    folder = bench.folder / "certs"
    certs(folder, [], [], new_ca=False, drop_old_ca=False)
    who = access(folder, Role.OPERATOR)
    run = await up(*bench.flags(security__dir=str(folder), train__steps="4"))
    await run.line("step 1/")
    async with httpx.AsyncClient(verify=who.web_context(), headers=bearer(who.metrics_token)) as web:
        page = (await web.get(f"https://{bench.keys['learner.metrics']}/metrics")).text
    assert "treegrpo_tls_handshakes_total" in page
    assert await run.end() == 0
    assert [step.step for step in read_progress(bench.run_dir).steps] == list(range(1, 5))

    told = [page, *run.lines, treegrpo("up", *bench.flags(security__dir=str(folder)), "--dry-run").out]
    told += [path.read_text(errors="replace") for path in bench.run_dir.rglob("*") if path.suffix in {".log", ".jsonl", ".json"}]
    secrets = secrets_in(folder)
    assert len(secrets) > 20
    assert not [secret for secret in secrets for text in told if secret in text]


def test_beyond_this_machine_a_run_is_refused_before_it_begins(bench: Workbench) -> None:
    port = bench.keys["learner.listen"].rpartition(":")[2]
    sentence = treegrpo("up", *bench.flags(learner__listen=f"0.0.0.0:{port}")).sentence
    assert sentence.startswith(f"learner.listen = 0.0.0.0:{port} listens where other machines can reach it, in plain text;")
    assert "`treegrpo certs DIR`" in sentence
    assert "security.insecure_network = true" in sentence
    assert not bench.run_dir.exists()


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("retriever", "retriever.listen"),
        ("sampler", "sampler.metrics"),
        ("broker", "broker.address"),
        ("intake", "learner.metrics"),
    ],
)
def test_so_is_each_service_by_itself(bench: Workbench, command: str, key: str) -> None:
    port = bench.keys.get(key, "127.0.0.1:0").rpartition(":")[2]
    assert f"{key} = 0.0.0.0:{port} " in treegrpo(command, *bench.flags(**{key.replace(".", "__"): f"0.0.0.0:{port}"})).sentence


def test_a_missing_file_is_named_before_anything_begins(bench: Workbench) -> None:
    sentence = treegrpo("up", *bench.flags(security__dir=str(bench.folder / "none"))).sentence
    assert "ca.pem (the authorities to trust) cannot be read (No such file or directory)" in sentence
    assert not bench.run_dir.exists()
