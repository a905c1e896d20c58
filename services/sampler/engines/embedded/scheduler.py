"""The engine's inner loop: admit → prefill → decode, one step after the other.

Running requests hold rows 0 … n−1 of the memory, so a decode step works on views. A waiting request is admitted as
soon as a row is free; the keys and values of its longest cached prefix are copied into its row and only the rest is
computed. What it computes goes to the prefix cache at once, so that siblings share it. New weights send every running
request back to waiting, with what it has sampled as part of its prefix: one mechanism, nothing of the old version
survives.

Nothing here is safe to call from two threads at a time; `engine.py` takes care of that.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import torch

from services.sampler.engines.base import EngineCounters
from services.sampler.engines.embedded.attention import DecodeAttention, PrefillAttention, PrefillSlice
from services.sampler.engines.embedded.kv_memory import KvMemory
from services.sampler.engines.embedded.model import EmbeddedModel
from services.sampler.engines.embedded.radix import RadixTree, common_prefix
from services.sampler.engines.embedded.sampling import sample_tokens
from services.sampler.engines.generation import Generation
from services.sampler.engines.stop_strings import StopStrings
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.step import PolicyVersion, TokenIds
from treegrpo.errors import EngineError

_PREFILL_TOKENS = 4096
"""New prefix tokens in one forward pass, unless one request alone has more: bounds the step's memory and duration."""


@dataclass(slots=True, eq=False)
class Request(Generation):
    """A request in the scheduler: waiting, running in a row, or finished (`finish` is set)."""

    random: Random | None = field(init=False)
    """Its own random number generator; None: the engine's."""

    def __post_init__(self) -> None:
        self.random = None if self.sampling.seed is None else Random(self.sampling.seed)

    @property
    def length(self) -> int:
        """Tokens of the prefix and the completion so far."""
        return len(self.prefix) + len(self.ids)


@dataclass(frozen=True, slots=True)
class _Admitted:
    request: Request
    sequence: TokenIds
    cached: int


class Scheduler:
    """All requests of one engine and the state they share."""

    def __init__(
        self,
        model: EmbeddedModel,
        version: PolicyVersion,
        tokenizer: Tokenizer,
        *,
        max_running: int,
        cache_tokens: int,
        seed: int,
    ) -> None:
        self.model = model
        self.version = version
        self.context = len(model.rope)
        self._max_running = max_running
        self._memory = KvMemory(model.architecture, max_running, self.context, cache_tokens)
        self._cache = RadixTree(cache_tokens)
        self._stops = StopStrings(tokenizer)
        self._eos = tokenizer.eos
        self._random = Random(seed)
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        """By row."""
        self._totals = EngineCounters(cache_capacity=cache_tokens)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def counters(self) -> EngineCounters:
        """A snapshot."""
        return replace(
            self._totals,
            evicted=self._totals.evicted + self._cache.evicted,
            running=len(self._running),
            waiting=len(self._waiting),
            limit=self._max_running,
            cache_tokens=self._cache.used,
        )

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Remove ``request``, whether it waits or runs."""
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._running:
            self._release(self._running.index(request))

    def swap_weights(self, model: EmbeddedModel, version: PolicyVersion) -> None:
        """Go on with other weights: the cache starts empty and running requests are prefilled again."""
        self.model, self.version = model, version
        self._totals.evicted += self._cache.evicted
        self._cache = RadixTree(self._cache.capacity)
        self._waiting[:0] = self._running
        self._running.clear()

    @torch.inference_mode()
    def run_steps(self, interrupt: threading.Event) -> list[Request]:
        """Step until a request finishes, nothing is left, or ``interrupt`` is set; returns the finished ones."""
        finished: list[Request] = []
        while self.busy and not finished:
            if admitted := self._admit():
                self._prefill(admitted)
                finished += self._collect()
            if self._running:
                self._decode()
                finished += self._collect()
            if interrupt.is_set():
                break
        return finished

    def _admit(self) -> list[_Admitted]:
        """Requests to prefill together. One that shares more with another of them than the cache has waits a step."""
        admitted: list[_Admitted] = []
        waiting: list[Request] = []
        tokens = 0
        for at, request in enumerate(self._waiting):
            if len(self._running) + len(admitted) == self._max_running or tokens > _PREFILL_TOKENS:
                waiting += self._waiting[at:]
                break
            sequence = request.sequence
            # The last token is always computed: its logits are what is sampled from.
            slots = self._cache.match(sequence[:-1])
            if any(common_prefix(sequence[:-1], other.sequence) > len(slots) for other in admitted):
                waiting.append(request)
                continue
            self._memory.load_prefix(len(self._running) + len(admitted), slots)
            admitted.append(_Admitted(request, sequence, len(slots)))
            tokens += len(sequence) - len(slots)
        self._waiting = waiting
        return admitted

    def _prefill(self, admitted: list[_Admitted]) -> None:
        """Compute the uncached part of each prefix, sample each request's next token, put new keys and values into the cache."""
        first_row = len(self._running)
        parts = [PrefillSlice(first_row + i, a.cached, len(a.sequence) - a.cached) for i, a in enumerate(admitted)]
        ids = torch.from_numpy(np.concatenate([a.sequence[a.cached :] for a in admitted]).astype(np.int64))
        positions = torch.cat([torch.arange(s.start, s.start + s.size) for s in parts])
        hidden = self.model.forward(ids, positions, PrefillAttention(self._memory.rows, parts))
        last = torch.tensor([s.size for s in parts]).cumsum(0) - 1
        for part, a in zip(parts, admitted, strict=True):
            if not a.request.ids:
                a.request.cached = a.cached
            a.request.prefilled += part.size
            self._totals.cached += a.cached
            self._totals.prefilled += part.size
            self._store_in_cache(part.row, a.sequence)
            self._running.append(a.request)
        self._sample(hidden[last], self._running[first_row:])

    def _decode(self) -> None:
        """One more token for every running request."""
        ids = torch.tensor([request.ids[-1] for request in self._running])
        positions = torch.tensor([request.length - 1 for request in self._running])
        hidden = self.model.forward(ids, positions, DecodeAttention(self._memory.rows, positions))
        self._sample(hidden, self._running)

    def _sample(self, hidden: torch.Tensor, requests: list[Request]) -> None:
        temperature = torch.tensor([request.sampling.temperature for request in requests])
        uniform = torch.tensor([(request.random or self._random).random() for request in requests], dtype=torch.float64)
        ids, logprobs = sample_tokens(self.model.logits(hidden), temperature, uniform)
        if not torch.isfinite(logprobs).all():
            raise EngineError(
                f"The weights of policy version {self.version} give no finite log-probabilities; go back to an earlier one."
            )
        for request, token, logprob in zip(requests, ids.tolist(), logprobs.tolist(), strict=True):
            request.append(token, logprob, self.version)
            if token in self._eos or self._stops.is_completed(request.ids, request.sampling.stop):
                request.finish = "stop"
            elif len(request.ids) == request.sampling.max_tokens or request.length == self.context:
                request.finish = "length"
        self._totals.decoded += len(requests)

    def _collect(self) -> list[Request]:
        """Remove finished requests from their rows; their keys and values stay in the cache."""
        finished = [request for request in self._running if request.finish]
        for request in finished:
            row = self._running.index(request)
            # The last token was sampled but never an input: it has no key and value.
            self._store_in_cache(row, request.sequence[:-1])
            self._release(row)
        return finished

    def _store_in_cache(self, row: int, sequence: TokenIds) -> None:
        start, slots = self._cache.insert(sequence)
        self._memory.store_prefix(row, start, slots)

    def _release(self, row: int) -> None:
        """Free a row; the last running request moves into it, so that rows stay without gaps."""
        last = self._running.pop()
        if row < len(self._running):
            self._memory.move_row(len(self._running), row, last.length)
            self._running[row] = last
