"""gRPC interceptor of the intake: checks the client's role for each call.

    RolloutService, WeightsService   samplers
    Health                           every role

No call publishes weights: the trainer hands them over by a local socket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc

from learner.intake.rpc.refused_calls import RefusedCalls
from learner.intake.rpc.request_limits import read_request
from learner.intake.rpc.slow_client_timeouts import CallLimits, SlowClientTimeouts
from treegrpo.config.security import Role
from treegrpo.security.server_role import role_of_uris

ALLOWED_ROLES = {
    "treegrpo.v1.RolloutService": {Role.SAMPLER},
    "treegrpo.v1.WeightsService": {Role.SAMPLER},
    "grpc.health.v1.Health": set(Role),
}
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[..., Any]


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls that the client's role may not make, and applies `SlowClientTimeouts` to the others."""

    def __init__(self, refused_calls: RefusedCalls, *, check_roles: bool, call_limits: CallLimits | None = None) -> None:
        """``check_roles``: clients have certificates, and calls are limited by role."""
        self._refused_calls = refused_calls
        self._check_roles = check_roles
        self._limits = call_limits or CallLimits()
        self._slow_clients = SlowClientTimeouts(refused_calls, self._limits)
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
            checked = self._with_checks(self._slow_clients.with_timeouts(handler.unary_stream or handler.unary_unary), method)
        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        read = read_request if method.endswith("/Rollout") else handler.request_deserializer
        return make(checked, read, handler.response_serializer)

    def _with_checks(self, handler: Handler, method: str) -> Handler:
        async def serve(requests: object, context: Context) -> Any:
            self._refused_calls.record_call(context.peer())
            identity = peer_identity(context)
            if self._check_roles:
                await self._check_role(method, context, identity)
            async with self._counted_call(identity[1] if identity else "", context):
                return await handler(requests, context)

        return serve

    @asynccontextmanager
    async def _counted_call(self, name: str, context: Context) -> AsyncGenerator[None]:
        """Count an open call of ``name`` for the time of the block; several samplers may share a certificate without a name."""
        if not name:
            yield
            return
        most = self._limits.calls_per_name
        if self._open_calls[name] >= most:
            sentence = f"Sampler {name} has {most} calls at once, the most that one may have; end some."
            await self._refused_calls.abort_call(context, "calls", grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
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
            whose = ", ".join(sorted(role.value for role in allowed)) or "no role"
            sentence = f"{who} may not call {method}; it is allowed for {whose}."
            await self._refused_calls.abort_call(context, "role", grpc.StatusCode.PERMISSION_DENIED, sentence)


def peer_identity(context: Context) -> tuple[Role, str] | None:
    """Role and name in the client's certificate; None in plain text."""
    names = cast("dict[str, list[bytes]]", context.auth_context()).get("x509_subject_alternative_name", [])
    return role_of_uris([name.decode(errors="replace") for name in names])
