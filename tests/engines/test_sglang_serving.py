"""Requests to SGLang servers, weight updates, restarts and metrics, without an SGLang."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from services.sampler.engines.base import SamplingParams
from services.sampler.engines.sglang.admission_queue import AdmissionQueue
from services.sampler.engines.sglang.engine import RequestLimits, SGLangEngine
from services.sampler.engines.sglang.factory import EngineRequirements, open_remote
from services.sampler.engines.sglang.server.aimd_limit import AimdLimit
from services.sampler.engines.sglang.server.http_client import SGLangClient
from services.sampler.engines.sglang.server.launch_command import check_listen_address
from services.sampler.engines.sglang.server.pending_generation import PendingGeneration
from services.sampler.engines.sglang.server.server import SGLangServer, bring_up_server
from services.sampler.engines.sglang.server.server_process import SGLangProcess
from services.sampler.engines.sglang.server.timings import SGLangTimings
from services.sampler.engines.sglang.server.weight_staging import StagedVersion, WeightStaging
from services.sampler.engines.sglang.supervision import EngineCallbacks, ServerSupervisor
from services.sampler.engines.stop_strings import StopStrings
from services.sampler.text.tokenizer import Tokenizer
from tests.engines import builders
from tests.engines.sglang_stub import META, answering, answers
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import (
    ConfigError,
    ContractError,
    DeadlineError,
    EngineAwayError,
    EngineError,
    UnavailableError,
    WeightsError,
)
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.runtime.supervisor import RestartPolicy
from treegrpo.timing.backoff import Backoff

NOWHERE = "http://127.0.0.1:9"
OLD, NEW = StagedVersion(PolicyVersion(0, 0), Path("/old")), StagedVersion(PolicyVersion(0, 1), Path("/new"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_model(tmp_path_factory.mktemp("model"), "qwen2")


def server(api: SGLangClient | None = None) -> SGLangServer:
    return SGLangServer(api or SGLangClient(NOWHERE), AimdLimit(2), up=True, serving=OLD)


# ---- requests


@pytest.mark.parametrize("drawn", ["plain", "next\u0085line", "line\u2028separator"])
async def test_an_event_with_line_separators_is_read_whole(drawn: str) -> None:
    event = json.dumps({"text": drawn, "meta_info": META}, ensure_ascii=False).encode()
    async with answering({"/generate": b"data: " + event + b"\n\ndata: [DONE]\n\n"}) as url:
        api, told = SGLangClient(url), list[bool]()
        answer = await api.generate({"sampling_params": {"max_new_tokens": 1}}, lambda: told.append(True))
        await api.close_connections()
    assert (answer.ids, told) == ([7], [True])


async def test_a_response_that_never_ends_meets_its_deadline() -> None:
    async with answering({}, drip=True) as url:
        api = SGLangClient(url, timings=SGLangTimings(generate=0.2))
        with pytest.raises(DeadlineError):
            await asyncio.wait_for(api.generate({"sampling_params": {"max_new_tokens": 1}}), 10)
        await api.close_connections()


async def test_a_server_lost_while_a_request_waited_is_not_asked(model: Path) -> None:
    tokenizer, one = Tokenizer.open(model), server()
    pending = PendingGeneration(builders.prompt(0, 40), SamplingParams(4), 4, StopStrings(tokenizer), tokenizer.eos)
    async with one.dedup.reserve_prefill(pending.sequence):
        late = asyncio.create_task(one.continue_generation(pending))
        await asyncio.sleep(0)
        one.mark_lost()
    with pytest.raises(UnavailableError, match="before the request was sent"):
        await late


@pytest.mark.parametrize("version", ["0.0", "default"], ids=["another sampler's", "that of a server which began again"])
async def test_tokens_of_foreign_weights_are_refused(model: Path, version: str) -> None:
    tokenizer = Tokenizer.open(model)
    meta = {**META, "weight_versions": [{**META["weight_versions"][0], "version": version}]}
    async with answering({"/generate": json.dumps({"meta_info": meta}).encode()}) as url:
        one = server(SGLangClient(url))
        one.sent_versions.add(NEW.version)
        with pytest.raises(ContractError, match=f"version '?{version}'?, which this sampler did not send"):
            await one.continue_generation(
                PendingGeneration(builders.prompt(0, 5), SamplingParams(1), 1, StopStrings(tokenizer), tokenizer.eos)
            )
        assert (one.serving, one.check_requested.is_set()) == (None, True)
        await one.cancel_requests()
        await one.client.close_connections()


async def test_a_cancelled_request_stays_cancelled_when_the_last_server_is_lost() -> None:
    queue = AdmissionQueue([])
    waiting = asyncio.create_task(queue.acquire_slot(builders.prompt(0, 8)))
    await asyncio.sleep(0)
    queue.fail_waiting(lambda: EngineError("gone"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert queue.waiting == 0


async def test_each_waiting_request_fails_with_an_error_of_its_own() -> None:
    """One that many raise carries the tracebacks of all, and never lets go of what they held."""
    queue = AdmissionQueue([])
    waiting = [asyncio.create_task(queue.acquire_slot(builders.prompt(0, 8))) for _ in range(2)]
    await asyncio.sleep(0)
    queue.fail_waiting(lambda: EngineError("gone"))
    first, second = await asyncio.gather(*waiting, return_exceptions=True)
    assert str(first) == str(second) == "gone"
    assert first is not second


# ---- updates


class RecordingClient(SGLangClient):
    """Refuses updates by their path, and records its calls."""

    def __init__(self, refusals: dict[Path, Exception]) -> None:
        super().__init__(NOWHERE)
        self._refusals = refusals
        self.calls: list[str] = []

    async def pause_generation(self) -> None:
        self.calls.append("pause")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def update_weights(self, version: PolicyVersion, path: Path) -> None:
        self.calls.append(path.name)
        if path in self._refusals:
            raise self._refusals[path]


@pytest.mark.parametrize(
    ("refusals", "told", "serves"),
    [
        ({}, ["pause", "new", "resume"], NEW),
        ({NEW.path: WeightsError("no")}, ["pause", "new", "old", "resume"], OLD),
        ({NEW.path: WeightsError("no"), OLD.path: WeightsError("gone")}, ["pause", "new", "old"], None),
        ({NEW.path: DeadlineError("late")}, ["pause", "new"], None),
        ({NEW.path: UnavailableError("cut")}, ["pause", "new"], None),
    ],
)
async def test_a_server_with_unknown_weights_stays_paused(
    refusals: dict[Path, Exception], told: list[str], serves: StagedVersion | None
) -> None:
    api = RecordingClient(refusals)
    one = server(api)
    if serves == NEW:
        await one.swap_weights(NEW)
    else:
        raised = UnavailableError if OLD.path in refusals else type(refusals[NEW.path])
        with pytest.raises(raised):
            await one.swap_weights(NEW)
    assert (api.calls, one.serving, one.swapping) == (told, serves, False)


# ---- servers that come and go


async def test_a_server_that_never_becomes_ready_is_given_up() -> None:
    timings = SGLangTimings(restart=RestartPolicy(Backoff((0.0,), retries=2), stable_seconds=0.0))
    one, counted = server(), list[BaseException]()
    one.mark_lost()

    async def launch(_: StagedVersion) -> SGLangProcess:
        raise EngineError("There is no memory left.")

    callbacks = EngineCallbacks(lambda: OLD, lambda: None, counted.append)
    why = await asyncio.wait_for(ServerSupervisor(one, launch, timings).supervise_child(callbacks), 10)
    assert why == "There is no memory left. It has been started 3 times and is given up."
    assert len(counted) == 3


async def test_a_server_given_up_leaves_the_engine_to_the_others(tmp_path: Path, model: Path) -> None:
    async with answering({}, drip=True) as url:  # this one is waited for
        servers = [SGLangServer(SGLangClient(NOWHERE), AimdLimit(2)), SGLangServer(SGLangClient(url), AimdLimit(2))]
        engine = SGLangEngine(
            servers,
            None,
            WeightStaging(tmp_path),
            OLD,
            Tokenizer.open(model),
            RequestLimits(512, builders.VOCABULARY),
            SGLangTimings(outage=Backoff((0.0,), seconds=-1.0)),
        )
        async with engine:
            await asyncio.wait(engine._tasks, return_when=asyncio.FIRST_COMPLETED)  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(EngineAwayError):
                await engine.check_health()


async def test_a_server_that_comes_later_is_checked_like_the_first(tmp_path: Path, model: Path) -> None:
    said = answers()
    requirements = EngineRequirements(model, PolicyVersion(0, 0), 256, 4, tmp_path)
    async with answering(said) as url, await open_remote(requirements, [url], verify=True) as engine:
        (one,) = engine.servers
        said.update(answers(context_length=128))
        with pytest.raises(ConfigError, match=r"has room for 120 tokens, .* rollout\.max_context = 256; lower that"):
            await bring_up_server(one, OLD)
        said["/model_info"] = b'{"model_type": "llama", "model_path": ""}'
        with pytest.raises(ConfigError, match="serves a llama"):
            await bring_up_server(one, OLD)


def test_a_server_that_others_could_reach_needs_consent() -> None:
    check_listen_address("127.0.0.1:0", insecure_network=False)
    check_listen_address("0.0.0.0:30000", insecure_network=True)
    with pytest.raises(ConfigError, match=r"engine\.listen = 0\.0\.0\.0:30000 .*insecure_network"):
        check_listen_address("0.0.0.0:30000", insecure_network=False)


# ---- Prometheus metrics

PAGE = b"""# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 3.0
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="m"} 40.0
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 7.0
"""


async def test_a_samplers_page_has_its_servers_metrics_with_their_urls() -> None:
    metrics = SamplerMetrics()
    async with answering({"/metrics/": PAGE}) as one, answering({"/metrics/": PAGE}) as other:
        apis = [SGLangClient(one), SGLangClient(other)]
        metrics.servers.families = {api.url: await api.get_metrics() for api in apis}
        for api in apis:
            await api.close_connections()
    page = generate_latest(metrics.registry).decode()
    for url in (one, other):
        assert f'sglang:num_running_reqs{{model_name="m",server="{url}"}} 3.0' in page
        assert f'sglang:prompt_tokens_total{{model_name="m",server="{url}"}} 40.0' in page
    assert page.count("# TYPE sglang:num_running_reqs gauge") == 1
    assert "python_gc" not in page


@pytest.mark.parametrize(
    "said", [b"[" * 200_000, b"9" * 5000, b"\xff", b"<html>"], ids=["too deep", "too long", "no text", "no JSON"]
)
async def test_an_unreadable_response_is_refused(said: bytes) -> None:
    async with answering(dict.fromkeys(("/v1/loads?include=core", "/generate"), said)) as url:
        api = SGLangClient(url)
        with pytest.raises(ContractError, match="is invalid"):
            await api.get_load()
        with pytest.raises(ContractError, match="is invalid"):
            await api.generate({"sampling_params": {"max_new_tokens": 1}})
        await api.close_connections()


async def test_an_invalid_page_of_metrics_is_refused() -> None:
    async with answering({"/metrics/": b"sglang:x{ 3"}) as url:
        api = SGLangClient(url)
        with pytest.raises(ContractError, match="not a metrics page"):
            await api.get_metrics()
        await api.close_connections()
