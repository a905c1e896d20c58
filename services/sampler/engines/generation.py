"""A completion in progress, on any engine: a prefix, and the tokens sampled after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from services.sampler.engines.base import Completion, Finish, SamplingParams
from treegrpo.core.step import PolicyVersion, TokenIds, VersionSpan


@dataclass(slots=True, eq=False)
class Generation:
    """The state of one completion."""

    prefix: TokenIds
    sampling: SamplingParams
    ids: list[int] = field(default_factory=list[int], init=False)
    logprobs: list[float] = field(default_factory=list[float], init=False)
    versions: list[tuple[PolicyVersion, int]] = field(default_factory=list[tuple[PolicyVersion, int]], init=False)
    """(version, index of the first token it sampled)"""
    finish: Finish | None = field(default=None, init=False)
    """None while tokens are missing."""
    prefilled: int = field(default=0, init=False)
    cached: int = field(default=0, init=False)

    @property
    def sequence(self) -> TokenIds:
        """[n] the prefix and the sampled tokens."""
        return np.concatenate((self.prefix, np.array(self.ids, np.uint32))) if self.ids else self.prefix

    def append(self, token: int, logprob: float, version: PolicyVersion) -> None:
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append((version, len(self.ids)))
        self.ids.append(token)
        self.logprobs.append(logprob)

    def completion(self) -> Completion:
        """The result; call it once `finish` is set."""
        assert self.finish is not None  # noqa: S101  # only what is finished is delivered
        bounds = [*(start for _, start in self.versions), len(self.ids)]
        spans = (VersionSpan(version, *ends) for (version, _), ends in zip(self.versions, pairwise(bounds), strict=True))
        return Completion(
            ids=np.array(self.ids, np.uint32),
            logprobs=np.array(self.logprobs, np.float32),
            finish=self.finish,
            spans=tuple(spans),
            prefilled=self.prefilled,
            cached=self.cached,
        )
