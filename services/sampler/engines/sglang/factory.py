"""Factory of the SGLang engine: on a server started as a child, or on servers that others run."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from services.sampler.engines.sglang.engine import RequestLimits, SGLangEngine
from services.sampler.engines.sglang.server.aimd_limit import AimdLimit
from services.sampler.engines.sglang.server.http_client import SGLangClient
from services.sampler.engines.sglang.server.launch_command import CONTEXT_MARGIN, ServerLaunch, check_version, find_installation
from services.sampler.engines.sglang.server.responses import ServerInfo
from services.sampler.engines.sglang.server.server import SGLangServer
from services.sampler.engines.sglang.server.server_process import SGLangProcess
from services.sampler.engines.sglang.server.timings import TIMINGS, SGLangTimings
from services.sampler.engines.sglang.server.weight_staging import StagedVersion, WeightStaging
from services.sampler.engines.sglang.supervision import ServerSupervisor
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ConfigError, ContractError, DeadlineError, EngineError, UnavailableError
from treegrpo.net.address import address_family, join_address, reachable_address
from treegrpo.storage.model_config import check_context, read_model_config


@dataclass(frozen=True, slots=True)
class EngineRequirements:
    """What the engine has to serve."""

    model: Path
    """A Hugging Face directory with config.json, safetensors and tokenizer."""
    version: PolicyVersion
    """The policy version these weights are."""
    context: int
    """Tokens a prefix and its completion may have together."""
    max_running: int
    """Requests that run at once, at most, on all servers together."""
    weights_dir: Path
    """Where versions are staged for the servers to read."""


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """Where a child process listens, and the log that gets its output."""

    host: str
    port: int
    """0: a free one."""
    log: Path


async def open_child(
    requirements: EngineRequirements, listen: ListenOptions, python: Path, flags: tuple[str, ...], **launch: Any
) -> SGLangEngine:
    """Start a server and wait until it is ready; it ends with the engine, and with this process.

    Args:
        requirements: what it has to serve.
        listen: where it listens.
        python: of the environment that has SGLang.
        flags: of `sglang.launch_server`, beside those that follow from the rest.
        launch: cache_tokens, dtype, threads and seed of `ServerLaunch`.

    Raises:
        EngineError: the server ended; with its last error.
        ModelError, WeightsError, ConfigError: the model, engine.python or engine.weights_dir cannot be used.
        DeadlineError: it was not ready in time.
    """
    limits = _request_limits(requirements)
    installation = await asyncio.to_thread(find_installation, python)
    plan = ServerLaunch(installation, limits.context, requirements.max_running, flags=flags, **launch)
    port = listen.port or _free_port(listen.host)
    server = SGLangServer(SGLangClient(f"http://{_reachable_address(listen.host, port)}"), AimdLimit(requirements.max_running))

    async def launch_server(served: StagedVersion) -> SGLangProcess:
        command = plan.command_line(served.path, str(served.version), listen.host, port)
        return await SGLangProcess.start_server(command, plan.environment(), listen.log)

    staging, served, tokenizer = await _stage_model(requirements, limits.vocabulary)
    supervisor = ServerSupervisor(server, launch_server)
    try:
        await supervisor.start_child(served)
        _check_room(
            await server.client.get_server_info(),
            limits.context,
            "The SGLang server",
            "give the server more memory with --mem-fraction-static or --max-total-tokens in engine.flags.",
        )
    except BaseException:
        await supervisor.stop_child()
        await server.client.close_connections()
        staging.remove_directory()
        raise
    return SGLangEngine([server], supervisor, staging, served, tokenizer, limits)


async def open_remote(
    requirements: EngineRequirements,
    urls: Sequence[str],
    verify: ssl.SSLContext | bool,
    timings: SGLangTimings = TIMINGS,
) -> SGLangEngine:
    """Use the servers at ``urls``; at least one must answer, the others are used once they do.

    Raises:
        ConfigError: a server is too old, serves another model, or was started without what is needed.
        DeadlineError, UnavailableError: none answers, or none takes the weights.
        ModelError, WeightsError, ConfigError: the model or engine.weights_dir cannot be used.
    """
    limits = _request_limits(requirements)
    share = -(-requirements.max_running // len(urls))
    clients = [SGLangClient(url, verify, timings) for url in urls]
    servers = [
        SGLangServer(client, AimdLimit(share), check_usable=partial(_check_server, requirements, client)) for client in clients
    ]
    try:
        await _wait_for_first_server(requirements, clients, timings)
        staging, served, tokenizer = await _stage_model(requirements, limits.vocabulary)
    except BaseException:
        await asyncio.gather(*(client.close_connections() for client in clients))
        raise
    engine = SGLangEngine(servers, None, staging, served, tokenizer, limits, timings)
    try:
        await engine.wait_until_up(timings.first_contact.seconds)
    except BaseException:
        await engine.close_engine()
        raise
    return engine


async def _wait_for_first_server(
    requirements: EngineRequirements, clients: Sequence[SGLangClient], timings: SGLangTimings
) -> None:
    """Wait until a server gives valid responses; one that does not may come later.

    Raises:
        ConfigError: one answers and cannot be used: an error now is better than a server missing later.
        UnavailableError: none gives a valid response.
    """
    retries = timings.first_contact.schedule()
    while True:
        found = await asyncio.gather(*(_check_server(requirements, client) for client in clients), return_exceptions=True)
        errors = [error for error in found if isinstance(error, BaseException)]
        for error in errors:
            if not isinstance(error, UnavailableError | DeadlineError | ContractError | EngineError):
                raise error
        if len(errors) < len(clients):
            return
        if not await retries.sleep():
            raise UnavailableError(f"{errors[0]} Start it, or correct engine.urls.") from errors[0]


async def _check_server(requirements: EngineRequirements, client: SGLangClient) -> None:
    """Raise ConfigError if the server, which others run, does not meet ``requirements``."""
    info = await client.get_server_info()
    check_version(info.version, f"the server at {client.url}")
    if info.skip_tokenizer_init:
        raise ConfigError(f"The SGLang server at {client.url} has no tokenizer; start it without --skip-tokenizer-init.")
    serves, ours = (await client.get_model_info()).model_type, read_model_config(requirements.model).kind
    if serves != ours:
        raise ConfigError(
            f"The SGLang server at {client.url} serves a {serves}, the learner trains a {ours}; start it on that model."
        )
    more = "start it with more --mem-fraction-static, --max-total-tokens or --context-length."
    _check_room(info, requirements.context, f"The SGLang server at {client.url}", more)


def _check_room(info: ServerInfo, context: int, who: str, remedy: str) -> None:
    """Raise ConfigError if the server has no room for one request of ``context`` tokens."""
    room = max(0, min(info.max_total_num_tokens, info.context_length or info.max_total_num_tokens) - CONTEXT_MARGIN)
    if room < context:
        raise ConfigError(
            f"{who} has room for {room} tokens, and a request may have rollout.max_context = {context}; lower that, or {remedy}"
        )


async def _stage_model(requirements: EngineRequirements, vocabulary: int) -> tuple[WeightStaging, StagedVersion, Tokenizer]:
    tokenizer = await asyncio.to_thread(Tokenizer.open, requirements.model)
    tokenizer.check_fits(vocabulary, requirements.model)
    staging = await asyncio.to_thread(WeightStaging, requirements.weights_dir)
    try:
        return staging, await asyncio.to_thread(staging.stage_model, requirements.version, requirements.model), tokenizer
    except BaseException:
        staging.remove_directory()
        raise


def _request_limits(requirements: EngineRequirements) -> RequestLimits:
    config = read_model_config(requirements.model)
    check_context(config, requirements.context)
    return RequestLimits(requirements.context, config.vocabulary)


def _reachable_address(host: str, port: int) -> str:
    """The address at which a server that listens on ``host`` is reached from here."""
    return reachable_address(join_address(host, port))


def _free_port(host: str) -> int:
    with closing(socket.create_server((host, 0), family=address_family(host))) as listener:
        return listener.getsockname()[1]
