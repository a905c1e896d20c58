"""What stands in the way of real servers is told in a sentence; and what is said of their metrics is so."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from services.sampler.engines.base import SamplingParams
from services.sampler.engines.sglang import ListenOptions, open_child, open_remote
from services.sampler.engines.sglang.server.timings import SGLangTimings
from tests.engines import builders
from tests.sglang.sampling_harness import LAUNCH, child
from tests.sglang.server_harness import PYTHON, ServerPool, remote, requirements
from treegrpo.errors import ConfigError, EngineError
from treegrpo.timing.backoff import Backoff

DOCS = Path("docs/sglang.md").read_text(encoding="utf-8")


async def test_a_flag_it_does_not_take_is_told_in_its_own_words(tmp_path: Path, endless: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --no-such-flag"):
        async with child(endless[0], tmp_path / "server.log", "--no-such-flag"):
            pass


async def test_a_model_it_refuses_is_told_in_its_own_words(tmp_path: Path) -> None:
    path = builders.save_model(tmp_path / "model", "qwen2")
    config = (path / "config.json").read_text(encoding="utf-8")
    (path / "config.json").write_text(config.replace("Qwen2ForCausalLM", "NoSuchModel"), encoding="utf-8")
    with pytest.raises(EngineError, match="NoSuchModel"):
        async with child(path, tmp_path / "server.log"):
            pass


async def test_an_address_without_a_server_is_an_error(endless: tuple[Path, Path]) -> None:
    with pytest.raises(ConnectionError, match=r"engine\.urls"):
        await open_remote(
            requirements(endless[0]),
            ["http://127.0.0.1:9"],
            verify=True,
            timings=SGLangTimings(first_contact=Backoff((0.1,), seconds=0.5)),
        )


async def test_a_server_with_another_model_is_not_used(
    pool: ServerPool,
    tmp_path: Path,
) -> None:
    llama, url = builders.save_model(tmp_path, "llama"), pool.url("qwen2")
    with pytest.raises(ConfigError, match=f"{url} serves a qwen2, the learner trains a llama"):
        async with remote(llama, url):
            pass


async def test_a_port_that_somebody_took_is_told_in_its_own_words(endless: tuple[Path, Path], tmp_path: Path) -> None:
    """`treegrpo` looks first; this is for who comes between the look and the start."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = ListenOptions("127.0.0.1", taken.getsockname()[1], tmp_path / "server.log")
        with pytest.raises(EngineError, match="address already in use"):
            await open_child(requirements(endless[0]), listen, PYTHON, ("--log-level", "warning"), **LAUNCH)


async def test_the_metrics_that_the_docs_name_are_there(pool: ServerPool, endless: tuple[Path, Path]) -> None:
    named = set(re.findall(r"`(sglang:\w+)", DOCS))
    assert len(named) >= 5
    async with remote(endless[0], pool.url("qwen2")) as engine:
        for _ in range(2):
            await engine.generate(builders.prompt(0, 40), SamplingParams(8))
        families = await engine.servers[0].client.get_metrics()
    samples = [sample for family in families for sample in family.samples]
    assert named <= {sample.name for sample in samples}
    modes = {sample.labels["mode"] for sample in samples if sample.name == "sglang:realtime_tokens_total"}
    assert modes >= {"prefill_cache", "prefill_compute"}
