"""One completion on its way: what was asked, what has been sampled, where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np

from services.sampler.engines.base import Completion, Finish, Sampling
from treegrpo.step import PolicyVersion, TokenIds, VersionSpan


@dataclass(slots=True, eq=False)
class Request:
    """Waiting, running in a row, or finished (`finish` is set)."""

    prefix: TokenIds
    sampling: Sampling
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    versions: list[tuple[PolicyVersion, int]] = field(default_factory=list[tuple[PolicyVersion, int]])
    """(version, index of the first token it sampled)"""
    finish: Finish | None = None
    prefilled: int = 0
    cached: int = 0
    chance: Random | None = field(init=False)
    """Random numbers of its own; None: the engine's."""

    def __post_init__(self) -> None:
        self.chance = None if self.sampling.seed is None else Random(self.sampling.seed)

    @property
    def length(self) -> int:
        """Tokens of the prefix and the completion so far."""
        return len(self.prefix) + len(self.ids)

    def sequence(self) -> TokenIds:
        """[length] the prefix and what has been sampled."""
        return np.concatenate((self.prefix, np.array(self.ids, np.uint32)))

    def append(self, token: int, logprob: float, version: PolicyVersion) -> None:
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append((version, len(self.ids)))
        self.ids.append(token)
        self.logprobs.append(logprob)

    def completion(self) -> Completion:
        """The result; call it once `finish` is set."""
        assert self.finish is not None  # noqa: S101  # only finished requests are delivered
        return Completion(
            ids=np.array(self.ids, np.uint32),
            logprobs=np.array(self.logprobs, np.float32),
            finish=self.finish,
            spans=tuple(self._spans()),
            prefilled=self.prefilled,
            cached=self.cached,
        )

    def _spans(self) -> Iterator[VersionSpan]:
        ends = [start for _, start in self.versions[1:]] + [len(self.ids)]
        for (version, start), end in zip(self.versions, ends, strict=True):
            yield VersionSpan(version, start, end)
