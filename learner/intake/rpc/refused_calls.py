"""Refused calls and TLS handshakes: counted in the metrics, logged with a rate limit."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import grpc

from treegrpo.net import limits
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.observability.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
HANDSHAKE_WARNING_COUNT = 8
"""Handshakes that no call has followed before the first warning; each later warning comes at twice as many."""

Context = grpc.aio.ServicerContext[Any, Any]


class RefusedCalls:
    """Aborts refused calls; compares handshakes with calls, since gRPC does not say how a handshake ends."""

    def __init__(self, metrics: IntakeMetrics) -> None:
        self._metrics = metrics
        self._refusals = RateLimitedLog(log)
        self._callers: dict[str, None] = {}
        """Connections that a call came on, the newest of them."""
        self._unmatched_handshakes = 0
        """Handshakes that no call has followed."""
        self._warning_count = HANDSHAKE_WARNING_COUNT

    async def abort_call(self, context: Context, reason: str, code: grpc.StatusCode, sentence: str) -> NoReturn:
        """Refuse a call; ``reason``: few values, the metric's label."""
        self._metrics.peers_refused.labels(reason).inc()
        self._refusals.log_refusal(context.peer().rpartition(":")[0], reason, sentence)  # a peer comes back from another port
        await context.abort(code, sentence)
        raise AssertionError  # it never returns

    def record_handshake(self) -> None:
        """Count the beginning of a TLS handshake."""
        self._metrics.handshakes.inc()
        self._unmatched_handshakes += 1
        if self._unmatched_handshakes >= self._warning_count:
            log.warning(
                "%d TLS handshakes led to no call: a client connects without a certificate of this authority, or in plain text; "
                "GRPC_VERBOSITY=INFO logs its address",
                self._unmatched_handshakes,
            )
            self._warning_count *= 2

    def record_call(self, peer: str) -> None:
        """Count a call, whose connection's handshake has succeeded."""
        if peer in self._callers:
            return
        self._metrics.connections.inc()
        self._unmatched_handshakes = max(0, self._unmatched_handshakes - 1)
        self._callers[peer] = None
        while len(self._callers) > 2 * limits.PEERS:
            del self._callers[next(iter(self._callers))]
