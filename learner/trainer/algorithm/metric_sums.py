"""Metric sums of a step: sums and maxima, which add up over packs, minibatches and ranks; ratios are taken at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MetricSums:
    """Sums and maxima so far; those of several packs, minibatches or ranks are added with ``+``."""

    totals: dict[str, float] = field(default_factory=dict[str, float])
    maxima: dict[str, float] = field(default_factory=dict[str, float])
    """Of figures that are at least 0, or NaN."""

    def __add__(self, other: MetricSums) -> MetricSums:
        totals = {name: self[name] + other[name] for name in self.totals | other.totals}
        maxima = {name: _nan_max(self.maximum(name), other.maximum(name)) for name in self.maxima | other.maxima}
        return MetricSums(totals, maxima)

    def __getitem__(self, name: str) -> float:
        """A sum; 0 when nothing was counted."""
        return self.totals.get(name, 0.0)

    def maximum(self, name: str) -> float:
        """A maximum; 0 when nothing was counted."""
        return self.maxima.get(name, 0.0)

    def ratio(self, name: str, of: str) -> float:
        """One sum divided by another; 0 when the other is."""
        return self[name] / (self[of] or 1.0)

    @classmethod
    def sum_counted(cls, counted_X: Tensor, figures: Mapping[str, Tensor]) -> MetricSums:
        """The sums of figures over the entries that count, in float64 and with one transfer from the device."""
        sums = torch.stack([figure_X.detach()[counted_X].double().sum() for figure_X in figures.values()])
        return cls(dict(zip(figures, sums.tolist(), strict=True)))


def _nan_max(one: float, other: float) -> float:
    """NaN if either is, as with sums."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
