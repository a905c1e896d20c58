"""Readiness probes, one for each kind of service. A probe returns, or raises UnavailableError."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiomqtt
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.environments.retrieval import PROBE_QUERY
from services.sampler.learner_link.channel import explain_failure, open_channel
from services.sampler.retriever_client import open_retriever
from treegrpo.config.schema import Config
from treegrpo.config.security import web_address
from treegrpo.errors import ConfigError, DeadlineError, ToolAwayError, ToolError, UnavailableError
from treegrpo.net.address import reachable_address
from treegrpo.security.credentials import OPEN, Credentials
from treegrpo.wire.control import broker_unavailable_error, open_client

PROBE_SECONDS = 2.0
POLL_SECONDS = 0.1

Probe = Callable[[], Awaitable[None]]


async def probe_broker(address: str, access: Credentials = OPEN) -> None:
    """Connect to the MQTT broker at ``address``. Raises UnavailableError."""
    try:
        async with open_client(address, access, timeout=PROBE_SECONDS):
            return
    except aiomqtt.MqttError as error:
        raise broker_unavailable_error(address, access, error, "start one there.") from error


async def probe_retriever(config: Config, access: Credentials = OPEN) -> None:
    """Ask the retriever as samplers do: by the same client, for as many documents, with the same timeout.

    Raises:
        UnavailableError: there is no answer.
        ConfigError: it answers, but not what samplers can use.
    """
    web_address("retriever.url", config.search_url)
    try:
        async with open_retriever(config, access) as retriever:
            await retriever.search(PROBE_QUERY, config.environment.topk)
    except ToolAwayError as error:
        raise UnavailableError(
            f"No retriever answers: {error}; start one with `treegrpo retriever`, or correct retriever.url."
        ) from error
    except ToolError as error:
        raise ConfigError(
            f"The retriever cannot be used: {str(error).rstrip('.')}; correct retriever.url or environment.topk."
        ) from error


async def probe_learner(address: str, access: Credentials = OPEN) -> None:
    """Ask the gRPC health service of the intake at ``address``. Raises UnavailableError: it does not serve."""
    access.check_reach("learner.listen", reachable_address(address))
    async with open_channel(reachable_address(address), access) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check  # pyright: ignore[reportAttributeAccessIssue] - untyped stub
            reply = await check(health_pb2.HealthCheckRequest(), timeout=PROBE_SECONDS)
        except grpc.aio.AioRpcError as error:
            why = explain_failure(error.details() or "", access)
            raise UnavailableError(f"No learner answers at {address}{why}; start one with `treegrpo learner`.") from error
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise UnavailableError(f"The learner at {address} does not serve yet; wait for it or see its log.")


async def wait_until_ready(name: str, probe: Probe, seconds: float) -> None:
    """Probe until it succeeds. Raises DeadlineError with the last reason after ``seconds``."""
    reason = "no answer"
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    return await probe()
                except UnavailableError as error:
                    reason = str(error)
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError as error:
        raise DeadlineError(f"The {name} was not ready within {seconds:.0f} s: {reason}") from error
