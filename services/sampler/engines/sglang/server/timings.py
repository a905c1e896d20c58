"""Time limits of the SGLang engine: deadlines of calls, intervals between checks, back-off delays."""

from __future__ import annotations

from dataclasses import dataclass

from treegrpo.runtime.supervisor import RestartPolicy
from treegrpo.timing.backoff import Backoff

RESTARTS = RestartPolicy(Backoff((1.0, 2.0, 5.0, 10.0, 20.0), retries=5), stable_seconds=120.0)


@dataclass(frozen=True, slots=True)
class SGLangTimings:
    """Deadlines and intervals in seconds, and back-off policies; tests pass shorter ones."""

    generate: float = 300.0
    """Deadline of one completion; a request that takes longer is abandoned and retried."""
    control: float = 10.0
    """Deadline of any other call."""
    health: float = 30.0
    """Deadline of a health check; the server itself waits 20 for its scheduler."""
    update: float = 300.0
    """Deadline for reading new weights."""
    poll: float = 0.5
    """Between two polls of a server's load."""
    metrics_interval: float = 5.0
    """Between two reads of a server's metrics, which Prometheus gets from the sampler."""
    health_interval: float = 15.0
    """Between two health checks."""
    start: float = 900.0
    """The longest a server may take to load a model and be ready."""
    first_contact: Backoff = Backoff((0.5,), seconds=60.0)
    """How servers that others run are polled for a first response when the engine opens."""
    outage: Backoff = Backoff((0.5,), seconds=300.0)
    """How a server that others run is polled when it does not answer, before it is given up."""
    restart: RestartPolicy = RESTARTS
    """When a child is restarted, and when it is given up."""
    retry: Backoff = Backoff((0.2, 0.5, 1.0, 2.0, 5.0), retries=7)
    """How a request is retried; the count begins anew with every token that arrives."""


TIMINGS = SGLangTimings()
