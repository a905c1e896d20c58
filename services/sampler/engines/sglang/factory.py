"""Opening the engine: a server started here, or servers that others run."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from services.sampler.engines.sglang.aimd_limit import Pressure
from services.sampler.engines.sglang.api.http_client import Api
from services.sampler.engines.sglang.api.launch_command import MARGIN, Launch, check_version, find
from services.sampler.engines.sglang.api.responses import Info
from services.sampler.engines.sglang.api.server_process import Child
from services.sampler.engines.sglang.engine import Limits, SGLangEngine
from services.sampler.engines.sglang.server import Server
from services.sampler.engines.sglang.supervision import Keeper
from services.sampler.engines.sglang.weight_staging import Stage, Staged
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ConfigError, ContractError, DeadlineError, EngineError, UnavailableError
from treegrpo.net.address import address_family, join_address, reachable_address
from treegrpo.storage.model_config import check_context, read_model_config

ANSWER_SECONDS = 60.0
"""The longest that servers which others run may take to be there."""
RETRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Demands:
    """What the engine is to be able to do."""

    model: Path
    """A Hugging Face directory with config.json, safetensors and tokenizer."""
    version: PolicyVersion
    """The policy version these weights are."""
    context: int
    """Tokens a prefix and its completion may have together."""
    max_running: int
    """Requests that run at once, at most, on all servers together."""
    weights_dir: Path
    """Where versions are put for the servers to read."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a child listens and what becomes of its output."""

    host: str
    port: int
    """0: a free one."""
    log: Path


async def open_child(demands: Demands, place: Place, python: Path, flags: tuple[str, ...], **launch: Any) -> SGLangEngine:
    """Start a server and wait until it is ready; it ends with the engine, and with this process.

    Args:
        demands: what it is to serve.
        place: where it listens.
        python: of the environment that has SGLang.
        flags: of `sglang.launch_server`, beside those that follow from the rest.
        launch: cache_tokens, dtype, threads and seed of `Launch`.

    Raises:
        EngineError: it ended; with its own words.
        ModelError, WeightsError, ConfigError: the model, engine.python or engine.weights_dir cannot be used.
        DeadlineError: it was not ready in time.
    """
    limits = _limits(demands)
    installed = await asyncio.to_thread(find, python)
    plan = Launch(installed, limits.context, demands.max_running, flags=flags, **launch)
    port = place.port or _free_port(place.host)
    server = Server(Api(f"http://{_reached(place.host, port)}"), Pressure(demands.max_running))

    async def start(served: Staged) -> Child:
        command = plan.command(served.path, str(served.version), place.host, port)
        return await Child.start(command, plan.environment(), place.log)

    stage, served, tokenizer = await _staged(demands, limits.vocabulary)
    keeper = Keeper(server, start)
    try:
        await keeper.start(served)
        _check_room(
            await server.api.info(),
            limits.context,
            "The SGLang server",
            "give the server more memory with --mem-fraction-static or --max-total-tokens in engine.flags.",
        )
    except BaseException:
        await keeper.stop()
        await server.api.close()
        stage.close()
        raise
    return SGLangEngine([server], keeper, stage, served, tokenizer, limits)


async def open_remote(demands: Demands, urls: Sequence[str], verify: ssl.SSLContext | bool) -> SGLangEngine:
    """Use the servers at ``urls``; at least one must be there, the others are used once they are.

    Raises:
        ConfigError: a server is too old, serves another model, or was started without what is needed.
        DeadlineError, UnavailableError: none answers, or none takes the weights.
        ModelError, WeightsError, ConfigError: the model or engine.weights_dir cannot be used.
    """
    limits = _limits(demands)
    share = -(-demands.max_running // len(urls))
    apis = [Api(url, verify) for url in urls]
    servers = [Server(api, Pressure(share), examine=partial(_examine, demands, api)) for api in apis]
    try:
        await _until_one_is_there(demands, apis)
        stage, served, tokenizer = await _staged(demands, limits.vocabulary)
    except BaseException:
        await asyncio.gather(*(api.close() for api in apis))
        raise
    engine = SGLangEngine(servers, None, stage, served, tokenizer, limits)
    try:
        await engine.arrived(ANSWER_SECONDS)
    except BaseException:
        await engine.close()
        raise
    return engine


async def _until_one_is_there(demands: Demands, apis: Sequence[Api]) -> None:
    """Wait until a server gives good answers; one that does not may come later.

    Raises:
        ConfigError: one answers, and is none that can be used: better told now than found missing later.
        UnavailableError: none gives a good answer.
    """
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        found = await asyncio.gather(*(_examine(demands, api) for api in apis), return_exceptions=True)
        errors = [error for error in found if isinstance(error, BaseException)]
        for error in errors:
            if not isinstance(error, UnavailableError | DeadlineError | ContractError | EngineError):
                raise error
        if len(errors) < len(apis):
            return
        if time.monotonic() > deadline:
            raise UnavailableError(f"{errors[0]} Start it, or mend engine.urls.") from errors[0]
        await asyncio.sleep(RETRY_SECONDS)


async def _examine(demands: Demands, api: Api) -> None:
    """Raise ConfigError if the server, which others run, is none that can be used."""
    info = await api.info()
    check_version(info.version, f"the server at {api.url}")
    if info.skip_tokenizer_init:
        raise ConfigError(f"The SGLang server at {api.url} has no tokenizer; start it without --skip-tokenizer-init.")
    serves, ours = (await api.model()).model_type, read_model_config(demands.model).kind
    if serves != ours:
        raise ConfigError(
            f"The SGLang server at {api.url} serves a {serves}, the learner trains a {ours}; start it on that model."
        )
    more = "start it with more --mem-fraction-static, --max-total-tokens or --context-length."
    _check_room(info, demands.context, f"The SGLang server at {api.url}", more)


def _check_room(info: Info, context: int, who: str, remedy: str) -> None:
    """Raise ConfigError if the server has no room for one request of ``context`` tokens."""
    room = max(0, min(info.max_total_num_tokens, info.context_length or info.max_total_num_tokens) - MARGIN)
    if room < context:
        raise ConfigError(
            f"{who} has room for {room} tokens, and a request may have rollout.max_context = {context}; lower that, or {remedy}"
        )


async def _staged(demands: Demands, vocabulary: int) -> tuple[Stage, Staged, Tokenizer]:
    tokenizer = await asyncio.to_thread(Tokenizer.open, demands.model)
    tokenizer.check_fits(vocabulary, demands.model)
    stage = await asyncio.to_thread(Stage, demands.weights_dir)
    try:
        return stage, await asyncio.to_thread(stage.first, demands.version, demands.model), tokenizer
    except BaseException:
        stage.close()
        raise


def _limits(demands: Demands) -> Limits:
    config = read_model_config(demands.model)
    check_context(config, demands.context)
    return Limits(demands.context, config.vocabulary)


def _reached(host: str, port: int) -> str:
    """The address at which who listens on ``host`` is reached from here."""
    return reachable_address(join_address(host, port))


def _free_port(host: str) -> int:
    with closing(socket.create_server((host, 0), family=address_family(host))) as listener:
        return listener.getsockname()[1]
