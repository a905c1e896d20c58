"""Who may call what of the intake's gRPC server, and how long a call may take to be said and to be heard.

    RolloutService, WeightsService   samplers
    Health                           every role

No call publishes weights: the trainer hands them over by a local socket.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn, Protocol, cast

import grpc
from google.protobuf.message import DecodeError

from learner.intake.rpc.request_limits import read_request
from treegrpo.config.security import Role
from treegrpo.net.limits import CHUNK_SECONDS, NAMED_CALLS, REQUEST_SECONDS
from treegrpo.security.server_role import role_of_uris

ALLOWED = {
    "treegrpo.v1.RolloutService": {Role.SAMPLER},
    "treegrpo.v1.WeightsService": {Role.SAMPLER},
    "grpc.health.v1.Health": set(Role),
}
EOF: Any = cast("Any", grpc.aio).EOF
Context = grpc.aio.ServicerContext[Any, Any]
Serve = Callable[..., Any]


class Guard(Protocol):
    """Counts; see `learner.intake.rpc.server.ConnectionMonitor`."""

    async def refuse(self, context: Context, reason: str, code: grpc.StatusCode, sentence: str) -> NoReturn: ...

    def called(self, peer: str) -> None: ...


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Lets each role call what is its own, and hangs up on who is slow.

    gRPC waits for ever for the one message of a unary call, and for who does not read a stream. So every call is served as
    one that streams its request, which looks the same on the wire, and its message is read here.
    """

    def __init__(self, guard: Guard, *, roles: bool) -> None:
        """``roles``: who calls has shown a certificate, and only what its role may do is done."""
        self._guard = guard
        self._roles = roles
        self._calls = Counter[str]()
        """That are served, by the name in the caller's certificate."""

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # no such method: gRPC says so
        method = str(handler_call_details.method)
        if handler.request_streaming:
            guarded = self._guarded(handler.stream_stream or handler.stream_unary, method)
        else:
            guarded = self._guarded(self._patient(handler.unary_stream or handler.unary_unary), method)
        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        read = read_request if method.endswith("/Rollout") else handler.request_deserializer
        return make(guarded, read, handler.response_serializer)

    def _guarded(self, serve: Serve, method: str) -> Serve:
        async def answer(requests: object, context: Context) -> Any:
            self._guard.called(context.peer())
            holder = peer_identity(context)
            if self._roles:
                await self._check(method, context, holder)
            async with self._counted(holder[1] if holder else "", context):
                return await serve(requests, context)

        return answer

    def _patient(self, serve: Serve) -> Serve:
        async def answer(_requests: object, context: Context) -> Any:
            request = await self._only(context)
            if not inspect.isasyncgenfunction(serve):
                return await serve(request, context)
            async with aclosing(serve(request, context)) as responses:
                async for response in responses:
                    await self._write(response, context)
            return None

        return answer

    async def _only(self, context: Context) -> Any:
        """The one message of a call."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                request = await context.read()
        except TimeoutError:
            sentence = f"Nothing came for {REQUEST_SECONDS:.0f} s; a call says at once what it wants."
            await self._guard.refuse(context, "slow", grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
        except DecodeError:
            request = EOF
        if request == EOF:
            await self._guard.refuse(context, "message", grpc.StatusCode.INVALID_ARGUMENT, "The call has no request of ours.")
        return request

    async def _write(self, response: object, context: Context) -> None:
        try:
            async with asyncio.timeout(CHUNK_SECONDS):
                await context.write(response)
        except TimeoutError:
            sentence = f"Nothing was read for {CHUNK_SECONDS:.0f} s; ask again from where it broke."
            await self._guard.refuse(context, "slow", grpc.StatusCode.DEADLINE_EXCEEDED, sentence)

    @asynccontextmanager
    async def _counted(self, name: str, context: Context) -> AsyncGenerator[None]:
        """A call of ``name`` is served for the time of the block; a certificate without a name is many samplers'."""
        if not name:
            yield
            return
        if self._calls[name] >= NAMED_CALLS:
            sentence = f"Sampler {name} has {NAMED_CALLS} calls at once, the most that one may have; end some."
            await self._guard.refuse(context, "calls", grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
        self._calls[name] += 1
        try:
            yield
        finally:
            self._calls[name] -= 1
            if not self._calls[name]:
                del self._calls[name]

    async def _check(self, method: str, context: Context, holder: tuple[Role, str] | None) -> None:
        allowed = ALLOWED.get(method.strip("/").partition("/")[0], set[Role]())
        if holder is None or holder[0] not in allowed:
            who = f"The role {holder[0].value}" if holder else "A certificate without a role"
            whose = ", ".join(sorted(role.value for role in allowed)) or "nobody"
            sentence = f"{who} may not call {method}; that is for {whose}."
            await self._guard.refuse(context, "role", grpc.StatusCode.PERMISSION_DENIED, sentence)


def peer_identity(context: Context) -> tuple[Role, str] | None:
    """Role and name in the certificate of who calls; None in plain text."""
    names = cast("dict[str, list[bytes]]", context.auth_context()).get("x509_subject_alternative_name", [])
    return role_of_uris([name.decode(errors="replace") for name in names])
