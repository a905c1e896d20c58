"""The interceptor of the intake's gRPC server: which role may call what, and how long a call may take to send and to read.

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
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from learner.intake.rpc.connection_monitor import ConnectionMonitor
from learner.intake.rpc.request_limits import read_request
from treegrpo.config.security import Role
from treegrpo.net.limits import CHUNK_SECONDS, NAMED_CALLS, REQUEST_SECONDS
from treegrpo.security.server_role import role_of_uris

ALLOWED_ROLES = {
    "treegrpo.v1.RolloutService": {Role.SAMPLER},
    "treegrpo.v1.WeightsService": {Role.SAMPLER},
    "grpc.health.v1.Health": set(Role),
}
EOF: Any = cast("Any", grpc.aio).EOF
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class CallLimits:
    request_seconds: float = REQUEST_SECONDS
    """The one message of a unary call comes within this time."""
    response_seconds: float = CHUNK_SECONDS
    """The client reads each message of a response stream within this time."""
    calls_per_name: int = NAMED_CALLS
    """Calls at once of one sampler, by the name in its certificate."""


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls that the client's role may not make, and ends calls of a slow client.

    gRPC waits without a limit for the one message of a unary call, and for a client that does not read a stream. So every
    call is served as one that streams its request, which looks the same on the wire, and its message is read here.
    """

    def __init__(self, monitor: ConnectionMonitor, *, check_roles: bool, call_limits: CallLimits | None = None) -> None:
        """``check_roles``: clients have certificates, and may do only what their role may do."""
        self._monitor = monitor
        self._check_roles = check_roles
        self._limits = call_limits or CallLimits()
        self._open_calls = Counter[str]()
        """By the name in the client's certificate."""

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # no such method: gRPC says so
        method = str(handler_call_details.method)
        if handler.request_streaming:
            checked = self._with_checks(handler.stream_stream or handler.stream_unary, method)
        else:
            checked = self._with_checks(self._with_deadlines(handler.unary_stream or handler.unary_unary), method)
        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        read = read_request if method.endswith("/Rollout") else handler.request_deserializer
        return make(checked, read, handler.response_serializer)

    def _with_checks(self, handler: Handler, method: str) -> Handler:
        async def serve(requests: object, context: Context) -> Any:
            self._monitor.record_call(context.peer())
            identity = peer_identity(context)
            if self._check_roles:
                await self._check_role(method, context, identity)
            async with self._counted_call(identity[1] if identity else "", context):
                return await handler(requests, context)

        return serve

    def _with_deadlines(self, handler: Handler) -> Handler:
        async def serve(_requests: object, context: Context) -> Any:
            request = await self._read_single_request(context)
            if not inspect.isasyncgenfunction(handler):
                return await handler(request, context)
            async with aclosing(handler(request, context)) as responses:
                async for response in responses:
                    await self._write_response(response, context)
            return None

        return serve

    async def _read_single_request(self, context: Context) -> Any:
        seconds = self._limits.request_seconds
        try:
            async with asyncio.timeout(seconds):
                request = await context.read()
        except TimeoutError:
            sentence = f"No request came for {seconds:.0f} s; a unary call sends it at once."
            await self._monitor.abort_call(context, "slow", grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
        except DecodeError:
            request = EOF
        if request == EOF:
            sentence = "The call has no request of this protocol."
            await self._monitor.abort_call(context, "message", grpc.StatusCode.INVALID_ARGUMENT, sentence)
        return request

    async def _write_response(self, response: object, context: Context) -> None:
        seconds = self._limits.response_seconds
        try:
            async with asyncio.timeout(seconds):
                await context.write(response)
        except TimeoutError:
            sentence = f"The client read nothing for {seconds:.0f} s; fetch again from the offset where it stopped."
            await self._monitor.abort_call(context, "slow", grpc.StatusCode.DEADLINE_EXCEEDED, sentence)

    @asynccontextmanager
    async def _counted_call(self, name: str, context: Context) -> AsyncGenerator[None]:
        """A call of ``name`` is open for the time of the block; many samplers may share a certificate without a name."""
        if not name:
            yield
            return
        most = self._limits.calls_per_name
        if self._open_calls[name] >= most:
            sentence = f"Sampler {name} has {most} calls at once, the most that one may have; end some."
            await self._monitor.abort_call(context, "calls", grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
        self._open_calls[name] += 1
        try:
            yield
        finally:
            self._open_calls[name] -= 1
            if not self._open_calls[name]:
                del self._open_calls[name]

    async def _check_role(self, method: str, context: Context, identity: tuple[Role, str] | None) -> None:
        allowed = ALLOWED_ROLES.get(method.strip("/").partition("/")[0], set[Role]())
        if identity is None or identity[0] not in allowed:
            who = f"The role {identity[0].value}" if identity else "A certificate without a role"
            whose = ", ".join(sorted(role.value for role in allowed)) or "nobody"
            sentence = f"{who} may not call {method}; that is for {whose}."
            await self._monitor.abort_call(context, "role", grpc.StatusCode.PERMISSION_DENIED, sentence)


def peer_identity(context: Context) -> tuple[Role, str] | None:
    """Role and name in the client's certificate; None in plain text."""
    names = cast("dict[str, list[bytes]]", context.auth_context()).get("x509_subject_alternative_name", [])
    return role_of_uris([name.decode(errors="replace") for name in names])
