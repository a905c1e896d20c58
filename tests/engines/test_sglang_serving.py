"""Places on SGLang servers, updates and restarts: what of them needs no SGLang."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from services.sampler.engines.base import Sampling
from services.sampler.engines.sglang.admission_queue import Floor
from services.sampler.engines.sglang.aimd_limit import Pressure
from services.sampler.engines.sglang.api.http_client import Api
from services.sampler.engines.sglang.api.launch_command import check_listen
from services.sampler.engines.sglang.api.server_process import Child
from services.sampler.engines.sglang.engine import Limits, SGLangEngine
from services.sampler.engines.sglang.factory import Demands, open_remote
from services.sampler.engines.sglang.pending_generation import Draft
from services.sampler.engines.sglang.server import Server, wake
from services.sampler.engines.sglang.supervision import Keeper
from services.sampler.engines.sglang.weight_staging import Stage, Staged
from services.sampler.engines.stop_strings import StopStrings
from services.sampler.text.tokenizer import Tokenizer
from tests.engines import builders
from tests.engines.stubs import META, answering, answers
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

NOWHERE = "http://127.0.0.1:9"
OLD, NEW = Staged(PolicyVersion(0, 0), Path("/old")), Staged(PolicyVersion(0, 1), Path("/new"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_model(tmp_path_factory.mktemp("model"), "qwen2")


def server(api: Api | None = None) -> Server:
    return Server(api or Api(NOWHERE), Pressure(2), up=True, serves=OLD)


# ---- requests


@pytest.mark.parametrize("drawn", ["plain", "next\u0085line", "line\u2028separator"])
async def test_an_event_is_read_whole_whatever_the_policy_said(drawn: str) -> None:
    event = json.dumps({"text": drawn, "meta_info": META}, ensure_ascii=False).encode()
    async with answering({"/generate": b"data: " + event + b"\n\ndata: [DONE]\n\n"}) as url:
        api, told = Api(url), list[bool]()
        answer = await api.generate({"sampling_params": {"max_new_tokens": 1}}, lambda: told.append(True))
        await api.close()
    assert (answer.ids, told) == ([7], [True])


async def test_an_answer_that_never_ends_meets_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sampler.engines.sglang.api.http_client.GENERATE_SECONDS", 0.2)
    async with answering({}, drip=True) as url:
        api = Api(url)
        with pytest.raises(DeadlineError):
            await asyncio.wait_for(api.generate({"sampling_params": {"max_new_tokens": 1}}), 10)
        await api.close()


async def test_a_server_that_was_lost_while_a_request_waited_for_its_turn_is_not_asked(model: Path) -> None:
    tokenizer, one = Tokenizer.open(model), server()
    draft = Draft(builders.prompt(0, 40), Sampling(4), 4, StopStrings(tokenizer), tokenizer.eos)
    async with one.prefills.turn(draft.sequence):
        late = asyncio.create_task(one.ask(draft))
        await asyncio.sleep(0)
        one.lose()
    with pytest.raises(UnavailableError, match="before it was asked"):
        await late


@pytest.mark.parametrize("version", ["0.0", "default"], ids=["another sampler's", "that of a server which began again"])
async def test_what_was_sampled_from_somebody_elses_weights_is_not_taken(model: Path, version: str) -> None:
    tokenizer = Tokenizer.open(model)
    meta = {**META, "weight_versions": [{**META["weight_versions"][0], "version": version}]}
    async with answering({"/generate": json.dumps({"meta_info": meta}).encode()}) as url:
        one = server(Api(url))
        one.given.add(NEW.version)
        with pytest.raises(ContractError, match=f"version '?{version}'?, which is none of ours"):
            await one.ask(Draft(builders.prompt(0, 5), Sampling(1), 1, StopStrings(tokenizer), tokenizer.eos))
        assert (one.serves, one.suspect.is_set()) == (None, True)
        await one.close()
        await one.api.close()


async def test_who_is_cancelled_as_the_last_server_goes_is_cancelled() -> None:
    floor = Floor([])
    waiting = asyncio.create_task(floor.enter(builders.prompt(0, 8)))
    await asyncio.sleep(0)
    floor.fail(lambda: EngineError("gone"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert floor.waiting == 0


async def test_each_who_is_sent_away_gets_an_error_of_its_own() -> None:
    """One that many raise carries the tracebacks of all, and never lets go of what they held."""
    floor = Floor([])
    waiting = [asyncio.create_task(floor.enter(builders.prompt(0, 8))) for _ in range(2)]
    await asyncio.sleep(0)
    floor.fail(lambda: EngineError("gone"))
    first, second = await asyncio.gather(*waiting, return_exceptions=True)
    assert str(first) == str(second) == "gone"
    assert first is not second


# ---- updates


class Noted(Api):
    """Says no to updates by their path, and notes what it is told."""

    def __init__(self, refusals: dict[Path, Exception]) -> None:
        super().__init__(NOWHERE)
        self._refusals = refusals
        self.told: list[str] = []

    async def pause(self) -> None:
        self.told.append("pause")

    async def resume(self) -> None:
        self.told.append("resume")

    async def update(self, version: PolicyVersion, path: Path) -> None:
        self.told.append(path.name)
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
async def test_a_server_of_which_nobody_knows_what_it_serves_stays_paused(
    refusals: dict[Path, Exception], told: list[str], serves: Staged | None
) -> None:
    api = Noted(refusals)
    one = server(api)
    if serves == NEW:
        await one.swap(NEW)
    else:
        raised = UnavailableError if OLD.path in refusals else type(refusals[NEW.path])
        with pytest.raises(raised):
            await one.swap(NEW)
    assert (api.told, one.serves, one.swapping) == (told, serves, False)


# ---- servers that come and go


async def test_a_server_that_never_becomes_ready_is_given_up_however_long_each_start_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.sampler.engines.sglang.supervision.RESTART_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("services.sampler.engines.sglang.supervision.SETTLED_SECONDS", -1.0)
    one, counted = server(), list[BaseException]()
    one.lose()

    async def launch(_: Staged) -> Child:
        raise EngineError("There is no memory left.")

    why = await asyncio.wait_for(Keeper(one, launch).run(lambda: OLD, lambda: None, counted.append), 10)
    assert why == "There is no memory left. It has been started 3 times and is given up."
    assert len(counted) == 2


async def test_one_server_given_up_leaves_the_engine_to_those_that_are_not(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sampler.engines.sglang.supervision.ABSENT_SECONDS", -1.0)
    async with answering({}, drip=True) as url:  # this one is waited for
        servers = [Server(Api(NOWHERE), Pressure(2)), Server(Api(url), Pressure(2))]
        engine = SGLangEngine(servers, None, Stage(tmp_path), OLD, Tokenizer.open(model), Limits(512, builders.VOCABULARY))
        async with engine:
            await asyncio.wait(engine._tasks, return_when=asyncio.FIRST_COMPLETED)  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(EngineAwayError):
                await engine.health()


async def test_a_server_that_comes_later_is_examined_as_the_first_were(tmp_path: Path, model: Path) -> None:
    said = answers()
    demands = Demands(model, PolicyVersion(0, 0), 256, 4, tmp_path)
    async with answering(said) as url, await open_remote(demands, [url], verify=True) as engine:
        (one,) = engine.servers
        said.update(answers(context_length=128))
        with pytest.raises(ConfigError, match=r"has room for 120 tokens, .* rollout\.max_context = 256; lower that"):
            await wake(one, OLD)
        said["/model_info"] = b'{"model_type": "llama", "model_path": ""}'
        with pytest.raises(ConfigError, match="serves a llama"):
            await wake(one, OLD)


def test_a_server_that_others_could_reach_is_not_started_without_a_word() -> None:
    check_listen("127.0.0.1:0", insecure_network=False)
    check_listen("0.0.0.0:30000", insecure_network=True)
    with pytest.raises(ConfigError, match=r"engine\.listen = 0\.0\.0\.0:30000 .*insecure_network"):
        check_listen("0.0.0.0:30000", insecure_network=False)


# ---- what servers say to Prometheus

PAGE = b"""# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 3.0
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="m"} 40.0
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 7.0
"""


async def test_the_page_of_a_sampler_has_what_its_servers_say_and_who_says_it() -> None:
    metrics = SamplerMetrics()
    async with answering({"/metrics/": PAGE}) as one, answering({"/metrics/": PAGE}) as other:
        apis = [Api(one), Api(other)]
        metrics.servers.families = {api.url: await api.metrics() for api in apis}
        for api in apis:
            await api.close()
    page = generate_latest(metrics.registry).decode()
    for url in (one, other):
        assert f'sglang:num_running_reqs{{model_name="m",server="{url}"}} 3.0' in page
        assert f'sglang:prompt_tokens_total{{model_name="m",server="{url}"}} 40.0' in page
    assert page.count("# TYPE sglang:num_running_reqs gauge") == 1
    assert "python_gc" not in page


@pytest.mark.parametrize(
    "said", [b"[" * 200_000, b"9" * 5000, b"\xff", b"<html>"], ids=["too deep", "too long", "no text", "no JSON"]
)
async def test_an_answer_that_cannot_be_read_is_refused(said: bytes) -> None:
    async with answering(dict.fromkeys(("/v1/loads?include=core", "/generate"), said)) as url:
        api = Api(url)
        with pytest.raises(ContractError, match="is of no use"):
            await api.load()
        with pytest.raises(ContractError, match="is of no use"):
            await api.generate({"sampling_params": {"max_new_tokens": 1}})
        await api.close()


async def test_a_page_that_is_none_is_refused() -> None:
    async with answering({"/metrics/": b"sglang:x{ 3"}) as url:
        api = Api(url)
        with pytest.raises(ContractError, match="no page of metrics"):
            await api.metrics()
        await api.close()
