"""The engine protocol: token ids in, sampled ids with their log-probabilities out.

Engines know nothing of leases, trees or streams. `tests/engines/conformance.py` holds every engine to the same
behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
from prometheus_client import Metric

from treegrpo.core.step import Logprobs, PolicyVersion, TokenIds, VersionSpan
from treegrpo.errors import EngineError

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one completion. There is no top-p or top-k: training divides by the full softmax."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy; log-probabilities are then those at temperature 1."""
    stop: tuple[str, ...] = ()
    """Generation ends with the token that completes one of these strings, or with an end-of-sequence token."""
    seed: int | None = None
    """Of this completion alone, so that other requests and their order do not matter. None: any. The completion is the same
    only where the engine also computes the same: the embedded one does so alone in its batch and without a cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What the engine sampled after a prefix."""

    ids: TokenIds
    """[n] sampled tokens, the stop token included."""
    logprobs: Logprobs
    """[n] log-softmax(logits / temperature) of each sampled token, from the weights named in ``spans``."""
    finish: Finish
    spans: tuple[VersionSpan, ...]
    """Which policy version sampled which tokens: weights may arrive in the middle of a completion."""
    prefilled: int
    """Tokens that went through the model as input: the uncached part of the prefix, and what a swap made it redo."""
    cached: int
    """Prefix tokens whose keys and values the cache held."""


@dataclass(slots=True)
class EngineCounters:
    """Counters and gauges of an engine, for metrics."""

    prefilled: int = 0
    """Prefix tokens computed, since the start."""
    cached: int = 0
    """Prefix tokens served from the cache, since the start."""
    decoded: int = 0
    """Tokens sampled, since the start."""
    evicted: int = 0
    """Tokens evicted from the cache for want of room, since the start; 0 where the engine does not report it."""
    running: int = 0
    waiting: int = 0
    limit: int = 0
    """Requests that may run at once now."""
    cache_tokens: int = 0
    """Tokens whose keys and values are held now; those of running requests where an engine reports no more."""
    cache_capacity: int = 0
    stalled: float = 0.0
    """Seconds in which servers generated nothing because of weight updates, since the start."""
    restarts: int = 0
    """Times a server of the engine was started again."""
    errors: Mapping[str, int] = field(default_factory=dict[str, int])
    """Failures that the engine handled itself, by type, since the start."""


class Engine(Protocol):
    """Generates from the current policy version. Safe to call from many tasks of one event loop."""

    @property
    def version(self) -> PolicyVersion: ...

    @property
    def context(self) -> int:
        """Tokens that prefix and completion may have together."""
        ...

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: SamplingParams) -> Completion:
        """Sample one completion. Cancelling the call ends the request and frees its memory.

        Raises:
            EngineError: the prefix does not fit, or the engine failed.
        """
        ...

    async def load_weights(self, version: PolicyVersion, path: Path) -> None:
        """Swap in the weights of a model directory while requests run; these go on with the new weights.

        No key or value of the old version is used afterwards. Raises WeightsError and keeps the old version when the
        file does not fit the model.
        """
        ...

    async def check_health(self) -> None:
        """Return if the engine can generate. Raises EngineError with the reason."""
        ...

    async def close_engine(self) -> None:
        """Free all resources; waiting requests fail with an EngineError."""
        ...


class ManagedEngine(Engine, Protocol):
    """An engine with counters, closed at the end of an ``async with`` block."""

    @property
    def counters(self) -> EngineCounters:
        """The counters and gauges now."""
        ...

    @property
    def server_metrics(self) -> Mapping[str, Sequence[Metric]]:
        """The Prometheus metrics of its servers, by URL."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...


def check_request(prefix: Sequence[int] | TokenIds, sampling: SamplingParams, context: int, vocabulary: int) -> TokenIds:
    """The prefix as ids. Raises EngineError for a request that no engine of this ``context`` and ``vocabulary`` can run."""
    ids = np.asarray(prefix, np.int64)
    if not 0 < len(ids) < context:
        raise EngineError(f"A prefix of {len(ids)} tokens leaves no room in a context of {context}; give 1 to {context - 1}.")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise EngineError(f"The prefix has an id outside the model's vocabulary 0 … {vocabulary - 1}; use the model's tokenizer.")
    if sampling.max_tokens < 1 or sampling.temperature < 0 or not all(sampling.stop):
        raise EngineError(f"{sampling} is out of range; ask for a token or more, a temperature ≥ 0, no empty stop string.")
    return ids.astype(np.uint32)
