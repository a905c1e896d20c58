"""What the SGLang engine says of itself is so: tokens, failures, pressure."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from services.sampler.engines.base import Sampling
from services.sampler.engines.sglang import Demands, SGLangEngine, open_remote
from services.sampler.engines.sglang.aimd_limit import HIGH, LOW, Pressure
from services.sampler.engines.sglang.api.http_client import Api
from services.sampler.engines.sglang.api.responses import Answer, Load
from services.sampler.engines.sglang.engine import Limits
from services.sampler.engines.sglang.pending_generation import Draft
from services.sampler.engines.sglang.server import Server
from services.sampler.engines.sglang.supervision import look_after
from services.sampler.engines.sglang.weight_staging import Stage, Staged
from services.sampler.engines.stop_strings import StopStrings
from services.sampler.text.tokenizer import Tokenizer
from tests.engines import builders
from tests.engines.stubs import META, answering, answers
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import EngineError, WeightsError

FIRST, SECOND = PolicyVersion(0, 0), PolicyVersion(0, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_model(tmp_path_factory.mktemp("model"), "qwen2")


class Obedient(Api):
    """A server that does what it is told, but for the versions it refuses."""

    def __init__(self, name: str, *refused: PolicyVersion) -> None:
        super().__init__(f"http://{name}")
        self._refused = refused
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()
        self.retractions = 0

    async def generate(self, body: dict[str, Any], started: object = None) -> Answer:
        self.asked.set()
        await self.go_on.wait()
        return Answer([7], [-0.5], [(FIRST, 0)], "length", None, 5, 0, self.retractions)

    async def update(self, version: PolicyVersion, path: Path) -> None:
        if version in self._refused:
            raise WeightsError(f"The weights of version {version} were refused by {self.url}.")

    async def load(self) -> Load:
        return Load(0, 0, 0, 4096, 0.0)

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def health(self) -> None: ...

    async def metrics(self) -> list[Any]:
        return []


# ---- tokens


async def test_tokens_of_a_completion_that_is_given_up_were_computed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer brings two of three tokens; the second again two, more than were asked for."""
    monkeypatch.setattr("services.sampler.engines.sglang.engine.RETRY_SECONDS", ())
    two = {"output_token_logprobs": [[-0.5, 7, None]] * 2, "weight_versions": [{"version": "0.0", "start": 0, "end": 2}]}
    said = {**answers(), "/generate": json.dumps({"meta_info": META | two | {"cached_tokens": 1}}).encode()}
    demands = Demands(model, FIRST, 256, 4, tmp_path)
    async with answering(said) as url, await open_remote(demands, [url], verify=True) as engine:
        with pytest.raises(EngineError, match="its 2 tokens, 1 at most"):
            await engine.generate(builders.prompt(0, 5), Sampling(3))
        done = engine.counters
    assert (done.prefilled, done.cached, done.decoded) == (4, 1, 2)


# ---- failures


@pytest.mark.parametrize(
    ("refusing", "counted"),
    [((True,), {}), ((True, True), {"WeightsError": 1}), ((True, False), {"WeightsError": 1})],
    ids=["the only one, which is told", "both, of which one is told", "one of two, which is nobody else's business"],
)
async def test_an_update_that_fails_is_counted_here_unless_it_is_told(
    tmp_path: Path, model: Path, refusing: tuple[bool, ...], counted: dict[str, int]
) -> None:
    stage = Stage(tmp_path)
    served = stage.first(FIRST, model)
    apis = [Obedient(f"server-{n}", *([SECOND] if refuses else [])) for n, refuses in enumerate(refusing)]
    servers = [Server(api, Pressure(2), up=True, serves=served) for api in apis]
    async with SGLangEngine(servers, None, stage, served, Tokenizer.open(model), Limits(256, builders.VOCABULARY)) as engine:
        if all(refusing):
            with pytest.raises(WeightsError):
                await engine.load(SECOND, model)
        else:
            await engine.load(SECOND, model)
        assert engine.counters.errors == counted


@pytest.mark.parametrize("page", [b"sglang:x{ 3", b'sglang:x{a="b",\t="c"} 1'], ids=["cut off", "no name"])
async def test_a_page_of_metrics_that_is_none_is_counted_and_the_server_used_on(
    monkeypatch: pytest.MonkeyPatch, page: bytes
) -> None:
    monkeypatch.setattr("services.sampler.engines.sglang.supervision.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("services.sampler.engines.sglang.supervision.METRICS_SECONDS", 0.0)
    served, counted, looks, enough = Staged(FIRST, Path("/first")), list[BaseException](), list[None](), asyncio.Event()
    async with answering(answers() | {"/metrics/": page}) as url:
        server = Server(Api(url), Pressure(2), up=True, serves=served)

        def changed() -> None:
            looks.append(None)
            if len(looks) == 5:
                enough.set()

        looking = asyncio.create_task(look_after(server, lambda: served, changed, counted.append))
        await asyncio.wait_for(enough.wait(), 10)
        assert server.up
        assert {type(error).__name__ for error in counted} == {"ContractError"}
        looking.cancel()
        await asyncio.wait({looking})
        await server.api.close()


# ---- pressure


@pytest.mark.parametrize("refused", [False, True], ids=["taken", "refused"])
@pytest.mark.parametrize(("retractions", "limit"), [(1, 4), (2, 3)], ids=["by the pause", "once more for want of memory"])
async def test_a_request_that_new_weights_put_back_is_no_sign_of_pressure(
    model: Path, refused: bool, retractions: int, limit: int
) -> None:
    tokenizer, api = Tokenizer.open(model), Obedient("server", *([SECOND] if refused else []))
    server = Server(api, Pressure(8), up=True, serves=Staged(FIRST, Path("/first")), given={FIRST})
    asking = asyncio.create_task(server.ask(Draft(builders.prompt(0, 5), Sampling(1), 1, StopStrings(tokenizer), tokenizer.eos)))
    await api.asked.wait()
    try:
        await server.swap(Staged(SECOND, Path("/second")))
    except WeightsError:
        assert refused
    api.retractions = retractions
    api.go_on.set()
    await asking
    server.pressure.look((LOW + HIGH) / 2, 4)
    assert server.pressure.limit == limit
