"""Figures of a step as sums and maxima, which add up over packs, minibatches and ranks; shares are made at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tally:
    """What was counted so far; those of several packs, minibatches or ranks are joined with ``+``."""

    sums: dict[str, float] = field(default_factory=dict[str, float])
    peaks: dict[str, float] = field(default_factory=dict[str, float])
    """Maxima of figures that are at least 0, or NaN."""

    def __add__(self, other: Tally) -> Tally:
        sums = {name: self[name] + other[name] for name in self.sums | other.sums}
        peaks = {name: _larger(self.peak(name), other.peak(name)) for name in self.peaks | other.peaks}
        return Tally(sums, peaks)

    def __getitem__(self, name: str) -> float:
        """A sum; 0 when nothing was counted."""
        return self.sums.get(name, 0.0)

    def peak(self, name: str) -> float:
        """A maximum; 0 when nothing was counted."""
        return self.peaks.get(name, 0.0)

    def per(self, name: str, of: str) -> float:
        """One sum divided by another; 0 when the other is."""
        return self[name] / (self[of] or 1.0)

    @classmethod
    def over(cls, counted_X: Tensor, figures: Mapping[str, Tensor]) -> Tally:
        """The sums of figures over the entries that count, in float64 and with one transfer from the device."""
        sums = torch.stack([figure_X.detach()[counted_X].double().sum() for figure_X in figures.values()])
        return cls(dict(zip(figures, sums.tolist(), strict=True)))


def _larger(one: float, other: float) -> float:
    """NaN if either is, as with sums."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
