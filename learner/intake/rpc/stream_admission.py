"""Checks the Hello that opens a rollout stream: its names, the sampler's certificate, and the number of samplers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import grpc

from learner.intake.rpc.auth_interceptor import peer_identity
from learner.intake.rpc.refused_calls import RefusedCalls
from treegrpo.config.security import Role
from treegrpo.net import limits
from treegrpo.v1 import rollout_pb2 as pb

NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{limits.NAME_BYTES}}}")
Context = grpc.aio.ServicerContext[Any, Any]


class CallRefusal(NamedTuple):
    reason: str
    """The metric's label."""
    code: grpc.StatusCode
    sentence: str
    """What the sampler's operator is to do."""


class StreamAdmission:
    def __init__(self, refused_calls: RefusedCalls, max_samplers: int) -> None:
        self._refused_calls = refused_calls
        self._max_samplers = max_samplers

    async def admit_stream(self, first: pb.RolloutRequest | None, context: Context, connected: int) -> pb.Hello:
        """The Hello, or the end of the call; ``first``: None if the stream has ended; ``connected``: open sessions."""
        refusal = check_hello(first, peer_identity(context), connected, self._max_samplers)
        if refusal is not None:
            await self._refused_calls.abort_call(context, *refusal)
        assert first is not None  # noqa: S101 - check_hello refuses it
        return first.hello


def check_hello(
    first: pb.RolloutRequest | None, identity: tuple[Role, str] | None, connected: int, max_samplers: int
) -> CallRefusal | None:
    """Why a stream that begins with ``first`` is refused; None if it is not."""
    invalid, denied = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED
    if first is None or first.WhichOneof("kind") != "hello":
        return CallRefusal("hello", invalid, "A rollout stream begins with Hello and the sampler's name.")
    hello = first.hello
    for what, name in (("sampler", hello.sampler), ("engine", hello.engine)):
        if not NAME.fullmatch(name):
            rule = f"a name has 1 to {limits.NAME_BYTES} letters, digits or _.-"
            return CallRefusal("hello", invalid, f"Hello.{what} is {name[: limits.NAME_BYTES]!r}; {rule}")
    if identity is not None and identity[1] and identity[1] != hello.sampler:
        sentence = f"Sampler {hello.sampler!r} shows the certificate of sampler {identity[1]!r}; set sampler.id = {identity[1]}."
        return CallRefusal("forged", denied, sentence)
    if connected >= max_samplers:
        sentence = f"{connected} samplers are connected, the most one learner takes; stop some."
        return CallRefusal("peers", grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
    return None
