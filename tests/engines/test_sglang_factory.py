"""The factory of the SGLang engine: which servers it uses, which it waits for, which are an error."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from services.sampler.engines.sglang import EngineRequirements, ListenOptions, SGLangEngine, open_child, open_remote
from services.sampler.engines.sglang.server.timings import SGLangTimings
from tests.engines import builders
from tests.engines.sglang_stub import answering, answers, installed
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ConfigError, EngineAwayError, EngineError, UnavailableError
from treegrpo.timing.backoff import Backoff

CONTEXT = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture
def requirements(tmp_path: Path, model: Path) -> EngineRequirements:
    return EngineRequirements(model, PolicyVersion(0, 0), CONTEXT, 4, tmp_path)


# ---- servers that others run


@pytest.mark.parametrize(
    ("status", "said"),
    [("503 Service Unavailable", {}), ("502 Bad Gateway", {"/server_info": b"<html>"}), ("200 OK", {"/server_info": b"{}"})],
    ids=["not ready yet", "a proxy answers for it", "garbled"],
)
async def test_a_server_that_is_not_ready_does_not_delay_the_others(
    requirements: EngineRequirements, status: str, said: Mapping[str, bytes]
) -> None:
    async with (
        answering(answers()) as url,
        answering({**answers(), **said}, status=status) as late,
        await open_remote(requirements, [late, url], verify=True) as engine,
    ):
        assert [server.up for server in engine.servers] == [False, True]


async def test_a_server_that_is_not_ready_is_used_once_it_is(requirements: EngineRequirements) -> None:
    late = {**answers(), "/server_info": b"starting"}
    async with (
        answering(answers()) as url,
        answering(late) as other,
        await open_remote(requirements, [other, url], verify=True) as engine,
    ):
        late.update(answers())
        while not engine.servers[0].up:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_server_that_never_becomes_ready_is_an_error(requirements: EngineRequirements) -> None:
    timings = SGLangTimings(first_contact=Backoff((0.0,), seconds=-1.0))
    async with answering({}, status="503 Service Unavailable") as url:
        with pytest.raises(UnavailableError, match=rf"{url} answers /server_info with 503.* correct engine\.urls"):
            await open_remote(requirements, [url], verify=True, timings=timings)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (answers(version="0.4.9"), r"SGLang 0\.4\.9 in the server at http.* cannot be used"),
        (answers(skip_tokenizer_init=True), "has no tokenizer; start it without"),
        (answers(max_total_num_tokens=200), r"room for 192 tokens, .* rollout\.max_context = 256; lower that"),
        (
            answers() | {"/model_info": b'{"model_type": "llama", "model_path": ""}'},
            "serves a llama, the learner trains a qwen2",
        ),
    ],
)
async def test_an_unusable_server_is_an_error_at_the_start_even_beside_others(
    requirements: EngineRequirements, said: dict[str, bytes], sentence: str
) -> None:
    async with answering(answers()) as url, answering(said) as wrong:
        with pytest.raises(ConfigError, match=sentence):
            await open_remote(requirements, [url, wrong], verify=True)


# ---- a server of its own


async def child(
    requirements: EngineRequirements, path: Path, *, host: str = "127.0.0.1", port: int = 0, said: dict[str, bytes] | None = None
) -> SGLangEngine:
    """The engine on an SGLang that is installed in ``path``, and is none."""
    python = installed(path / "environment", said or answers())
    shape = {"cache_tokens": 1024, "dtype": "float32", "threads": 1, "seed": 0}
    return await open_child(requirements, ListenOptions(host, port, path / "server.log"), python, (), **shape)


IPV6 = pytest.mark.skipif(not (socket.has_ipv6 and Path("/proc/net/if_inet6").exists()), reason="this machine has no IPv6")


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=IPV6), pytest.param("::", marks=IPV6), "localhost"])
async def test_a_child_is_reached_at_every_listen_address(requirements: EngineRequirements, tmp_path: Path, host: str) -> None:
    async with await child(requirements, tmp_path, host=host) as engine:
        await engine.check_health()


async def test_another_server_at_the_port_is_not_used(requirements: EngineRequirements, tmp_path: Path) -> None:
    """Two samplers may be told the same port: the weights of one must not go to the server of the other."""
    async with answering(answers() | {"/model_info": b'{"model_type": "qwen2", "model_path": "/a/stranger"}'}) as url:
        with pytest.raises(EngineError, match=r"ended with exit code 1.*Address already in use"):
            await child(requirements, tmp_path, port=int(url.rpartition(":")[2]))


async def test_a_child_serves_even_if_its_log_cannot_be_written(requirements: EngineRequirements, tmp_path: Path) -> None:
    (tmp_path / "server.log").mkdir()
    async with await child(requirements, tmp_path) as engine:
        await engine.check_health()


@pytest.mark.parametrize("info", [{"max_total_num_tokens": 200}, {"context_length": 200}], ids=["memory", "context"])
async def test_a_server_without_room_for_one_request_is_an_error_at_the_start(
    requirements: EngineRequirements, tmp_path: Path, info: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match=r"room for 192 tokens.* rollout\.max_context = 256.*--mem-fraction-static"):
        await child(requirements, tmp_path, said=answers(**info))


async def test_a_crash_of_the_supervision_fails_the_engine(
    requirements: EngineRequirements, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours is not mended by starting the server again."""
    async with await child(requirements, tmp_path) as engine:
        monkeypatch.setattr(engine.servers[0].request_limit, "adjust_limit", None)
        with pytest.raises(EngineError, match=r"Supervision of an SGLang server failed \(TypeError"):
            await asyncio.wait_for(ended(engine), 10)


async def ended(engine: SGLangEngine) -> None:
    """Wait until the engine has failed; raises its error."""
    while True:
        try:
            await engine.check_health()
        except EngineAwayError:
            assert not engine.counters.restarts
        await asyncio.sleep(0.05)
