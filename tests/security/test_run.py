"""A whole run with everything on: real processes, TLS everywhere; and its secrets stay where they are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from services.certs.issue import make_certificates
from services.cli.reports.progress_reader import read_progress
from tests.cli.command_harness import treegrpo
from tests.cli.small_run import SmallRun
from tests.cli.test_up import Up, UpProcess, up
from tests.security.credential_builders import access
from treegrpo.config.security import Role
from treegrpo.security.credentials import Credentials, bearer_header
from treegrpo.wire.control import open_client

__all__ = ["up"]
"""The fixture."""
SECONDS = 30.0
SECRET = "correct-horse-battery-staple"


@pytest.fixture
def small_run(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def secrets_in(folder: Path) -> list[str]:
    """Every password, token and private key."""
    words = [path.read_text().strip() for path in folder.iterdir() if path.suffix in {".password", ".token"}]
    keys = [line for path in folder.glob("*.key") for line in path.read_text().splitlines() if "-----" not in line]
    return [*words, *keys]


def command_lines(run: UpProcess) -> str:
    """The arguments of every process of a run."""
    return "\n".join(Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in run.pids)


async def pages(small_run: SmallRun, who: Credentials) -> list[str]:
    """What every /metrics says, with the token and without."""
    said: list[str] = []
    addresses = {Role.LEARNER: small_run.keys["learner.metrics"], Role.RETRIEVER: small_run.keys["retriever.listen"]}
    for headers in ({}, bearer_header(who.metrics_token)):
        for role, address in addresses.items():
            async with httpx.AsyncClient(verify=who.web_context(role), headers=headers) as web:
                said.append((await web.get(f"https://{address}/metrics")).text)
    return said


async def retained(small_run: SmallRun, who: Credentials) -> str:
    """What the broker tells everybody who may read."""
    heard: dict[str, str] = {}
    async with open_client(small_run.keys["broker.address"], who) as client, asyncio.timeout(SECONDS):
        await client.subscribe("treegrpo/#", qos=1)
        async for message in client.messages:
            heard[message.topic.value] = repr(message.payload)
            if {topic.split("/")[2] for topic in heard} == {"owner", "state", "weights", "members"}:
                break
    return str(heard)


@pytest.mark.whole_run
async def test_a_run_with_everything_on_trains_to_its_end_and_tells_no_secret(small_run: SmallRun, up: Up) -> None:
    """Every file it wrote, every argument of its processes, every page and message of it, and what our commands say of it."""
    folder = small_run.folder / "certs"
    make_certificates(folder, [], [])
    who, flags = access(folder, Role.OPERATOR), small_run.flags(security__dir=str(folder), train__steps="4")
    run = await up(*flags)
    await run.wait_for_line("step 1/")
    published = [*(await pages(small_run, who)), await retained(small_run, who), command_lines(run)]
    assert "treegrpo_tls_handshakes_total" in published[2]
    assert "learner.intake" in published[-1]
    for command in (["doctor"], ["state", "running"]):
        done = await asyncio.to_thread(treegrpo, *command, *flags)
        published += [done.out, done.error]
    assert await run.wait_for_end() == 0
    assert [step.step for step in read_progress(small_run.run_dir).steps] == list(range(1, 5))

    published += [*run.lines, treegrpo("up", *flags, "--dry-run").out]
    files = [path for path in small_run.run_dir.rglob("*") if path.is_file()]
    assert {"intake.log", "progress.jsonl", "model.safetensors"} <= {path.name for path in files}
    published += [path.read_bytes().decode(errors="replace") for path in files]
    secrets = secrets_in(folder)
    assert len(secrets) > 20
    assert not [secret for secret in secrets for text in published if secret in text]


def test_a_secret_of_the_environment_is_told_by_no_command(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BROKER_PASSWORD", "METRICS_TOKEN", "RETRIEVER_TOKEN"):
        monkeypatch.setenv(f"TREEGRPO_SECURITY__{name}", SECRET)
    for command in (["doctor"], ["state", "running"], ["sampler"]):
        done = treegrpo(*command, *small_run.flags())
        assert done.out + done.error
        assert SECRET not in done.out + done.error
    for flag in ("--dry-run", "--security.metrics_token=x"):
        done = treegrpo("up", *small_run.flags(), flag)
        assert SECRET not in done.out + done.error


def test_beyond_this_machine_a_run_is_refused_before_it_begins(small_run: SmallRun) -> None:
    port = small_run.keys["learner.listen"].rpartition(":")[2]
    sentence = treegrpo("up", *small_run.flags(learner__listen=f"0.0.0.0:{port}")).sentence
    assert sentence.startswith(f"learner.listen = 0.0.0.0:{port} listens where other machines can reach it, in plain text;")
    assert "`treegrpo certs DIR`" in sentence
    assert "security.insecure_network = true" in sentence
    assert not small_run.run_dir.exists()


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("retriever", "retriever.listen"),
        ("sampler", "sampler.metrics"),
        ("broker", "broker.address"),
        ("intake", "learner.metrics"),
    ],
)
def test_so_is_each_service_by_itself(small_run: SmallRun, command: str, key: str) -> None:
    port = small_run.keys.get(key, "127.0.0.1:0").rpartition(":")[2]
    assert (
        f"{key} = 0.0.0.0:{port} " in treegrpo(command, *small_run.flags(**{key.replace(".", "__"): f"0.0.0.0:{port}"})).sentence
    )


def test_a_missing_file_is_named_before_anything_begins(small_run: SmallRun) -> None:
    sentence = treegrpo("up", *small_run.flags(security__dir=str(small_run.folder / "none"))).sentence
    assert "ca.pem (the authorities to trust) cannot be read (No such file or directory)" in sentence
    assert not small_run.run_dir.exists()
