"""The SGLang engine's counters: tokens, failures, retractions."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from services.sampler.engines.base import SamplingParams
from services.sampler.engines.sglang import EngineRequirements, SGLangEngine, open_remote
from services.sampler.engines.sglang.engine import RequestLimits
from services.sampler.engines.sglang.server.aimd_limit import HIGH_USAGE, LOW_USAGE, AimdLimit
from services.sampler.engines.sglang.server.http_client import SGLangClient
from services.sampler.engines.sglang.server.pending_generation import PendingGeneration
from services.sampler.engines.sglang.server.responses import GenerateResponse, ServerLoad
from services.sampler.engines.sglang.server.server import SGLangServer
from services.sampler.engines.sglang.server.timings import SGLangTimings
from services.sampler.engines.sglang.server.weight_staging import StagedVersion, WeightStaging
from services.sampler.engines.sglang.supervision import EngineCallbacks, monitor_server
from services.sampler.engines.stop_strings import StopStrings
from services.sampler.text.tokenizer import Tokenizer
from tests.engines import builders
from tests.engines.sglang_stub import META, answering, answers
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import EngineError, WeightsError
from treegrpo.timing.backoff import Backoff

FIRST, SECOND = PolicyVersion(0, 0), PolicyVersion(0, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_model(tmp_path_factory.mktemp("model"), "qwen2")


class ScriptedClient(SGLangClient):
    """A server that takes every version but those that it refuses."""

    def __init__(self, name: str, *refused: PolicyVersion) -> None:
        super().__init__(f"http://{name}")
        self._refused = refused
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()
        self.retractions = 0

    async def generate(self, body: dict[str, Any], on_first_token: object = None) -> GenerateResponse:
        self.asked.set()
        await self.go_on.wait()
        return GenerateResponse([7], [-0.5], [(FIRST, 0)], "length", None, 5, 0, self.retractions)

    async def update_weights(self, version: PolicyVersion, path: Path) -> None:
        if version in self._refused:
            raise WeightsError(f"The weights of version {version} were refused by {self.url}.")

    async def get_load(self) -> ServerLoad:
        return ServerLoad(0, 0, 0, 4096, 0.0)

    async def pause_generation(self) -> None: ...

    async def resume_generation(self) -> None: ...

    async def check_health(self) -> None: ...

    async def get_metrics(self) -> list[Any]:
        return []


# ---- tokens


async def test_tokens_of_an_abandoned_completion_are_counted(tmp_path: Path, model: Path) -> None:
    """The first answer brings two of three tokens; the second again two, more than were asked for."""
    two = {"output_token_logprobs": [[-0.5, 7, None]] * 2, "weight_versions": [{"version": "0.0", "start": 0, "end": 2}]}
    said = {**answers(), "/generate": json.dumps({"meta_info": META | two | {"cached_tokens": 1}}).encode()}
    requirements, timings = EngineRequirements(model, FIRST, 256, 4, tmp_path), SGLangTimings(retry=Backoff((0.0,), retries=0))
    async with answering(said) as url, await open_remote(requirements, [url], verify=True, timings=timings) as engine:
        with pytest.raises(EngineError, match="its 2 tokens, 1 at most"):
            await engine.generate(builders.prompt(0, 5), SamplingParams(3))
        done = engine.counters
    assert (done.prefilled, done.cached, done.decoded) == (4, 1, 2)


# ---- failures


@pytest.mark.parametrize(
    ("refusing", "counted"),
    [((True,), {}), ((True, True), {"WeightsError": 1}), ((True, False), {"WeightsError": 1})],
    ids=["the only one, raised", "both, one of them raised", "one of two, not raised"],
)
async def test_a_failed_update_is_counted_here_unless_it_is_raised(
    tmp_path: Path, model: Path, refusing: tuple[bool, ...], counted: dict[str, int]
) -> None:
    staging = WeightStaging(tmp_path)
    served = staging.stage_model(FIRST, model)
    clients = [ScriptedClient(f"server-{n}", *([SECOND] if refuses else [])) for n, refuses in enumerate(refusing)]
    servers = [SGLangServer(client, AimdLimit(2), up=True, serving=served) for client in clients]
    async with SGLangEngine(
        servers, None, staging, served, Tokenizer.open(model), RequestLimits(256, builders.VOCABULARY)
    ) as engine:
        if all(refusing):
            with pytest.raises(WeightsError):
                await engine.load_weights(SECOND, model)
        else:
            await engine.load_weights(SECOND, model)
        assert engine.counters.errors == counted


@pytest.mark.parametrize("page", [b"sglang:x{ 3", b'sglang:x{a="b",\t="c"} 1'], ids=["cut off", "no name"])
async def test_an_invalid_page_of_metrics_is_counted_and_costs_no_server(page: bytes) -> None:
    served, counted, polls, enough = StagedVersion(FIRST, Path("/first")), list[BaseException](), list[None](), asyncio.Event()
    async with answering(answers() | {"/metrics/": page}) as url:
        server = SGLangServer(SGLangClient(url), AimdLimit(2), up=True, serving=served)

        def changed() -> None:
            polls.append(None)
            if len(polls) == 5:
                enough.set()

        callbacks, timings = (
            EngineCallbacks(lambda: served, changed, counted.append),
            SGLangTimings(poll=0.0, metrics_interval=0.0),
        )
        monitoring = asyncio.create_task(monitor_server(server, callbacks, timings))
        await asyncio.wait_for(enough.wait(), 10)
        assert server.up
        assert {type(error).__name__ for error in counted} == {"ContractError"}
        monitoring.cancel()
        await asyncio.wait({monitoring})
        await server.client.close_connections()


# ---- retractions


@pytest.mark.parametrize("refused", [False, True], ids=["taken", "refused"])
@pytest.mark.parametrize(("retractions", "limit"), [(1, 4), (2, 3)], ids=["by the pause", "once more for want of memory"])
async def test_a_retraction_by_a_weight_update_does_not_lower_the_limit(
    model: Path, refused: bool, retractions: int, limit: int
) -> None:
    tokenizer, client = Tokenizer.open(model), ScriptedClient("server", *([SECOND] if refused else []))
    server = SGLangServer(client, AimdLimit(8), up=True, serving=StagedVersion(FIRST, Path("/first")), sent_versions={FIRST})
    asking = asyncio.create_task(
        server.continue_generation(
            PendingGeneration(builders.prompt(0, 5), SamplingParams(1), 1, StopStrings(tokenizer), tokenizer.eos)
        )
    )
    await client.asked.wait()
    try:
        await server.swap_weights(StagedVersion(SECOND, Path("/second")))
    except WeightsError:
        assert refused
    client.retractions = retractions
    client.go_on.set()
    await asking
    server.request_limit.adjust_limit((LOW_USAGE + HIGH_USAGE) / 2, 4)
    assert server.request_limit.current == limit
