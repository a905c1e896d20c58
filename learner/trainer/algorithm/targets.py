"""Targets of the loss in a pack: its action tokens, and their places on the paths to the leaves.

Shapes: A action tokens of a pack; L leaves; P places, one for each action token on the path of each leaf. A token on a
shared prefix is one of A and as many of P as there are leaves below it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SIGNS = ("none", "up_up", "up_down", "down_up", "down_down")
"""Where a token's inter-tree and intra-tree advantage point, in this order; "none" if one of them is 0."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Action tokens with sampled log-probabilities, and the leaves they lead to with advantages and weights."""

    label_A: Tensor
    """int64: the action tokens."""
    sampled_A: Tensor
    """float32: the log-probabilities the sampler recorded (policy q)."""
    counted_A: Tensor
    """bool: False where another pack counts the token in its figures, on the repeated prefix of a tree that was split."""
    fresh_A: Tensor
    """bool: sampled by the version that the batch is trained from, at lag 0."""
    sign_A: Tensor
    """int64: index into `SIGNS`."""
    token_P: Tensor
    """int64: which of A."""
    leaf_P: Tensor
    """int64: which of L; the places of a leaf are in the order of its path."""
    advantage_P: Tensor
    """float32: A of the leaf, for this token's node."""
    weight_P: Tensor
    """float32: w of the leaf."""
    leaves: int
    """L."""

    def per_token(self, values_P: Tensor) -> Tensor:
        """values_A: for every token the sum over its places."""
        return values_P.new_zeros(len(self.label_A)).index_add(0, self.token_P, values_P)

    @property
    def plus_A(self) -> Tensor:
        """A⁺ = Σ w·max(A, 0) over the leaves below the token."""
        return self.per_token(self.weight_P * self.advantage_P.clamp(min=0))

    @property
    def minus_A(self) -> Tensor:
        """A⁻ = Σ w·min(A, 0)."""
        return self.per_token(self.weight_P * self.advantage_P.clamp(max=0))

    @property
    def weight_A(self) -> Tensor:
        """W = Σ w."""
        return self.per_token(self.weight_P)

    def to(self, device: torch.device | str) -> Targets:
        """The same with its tensors on ``device``."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "leaves"})
