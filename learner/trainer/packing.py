"""Trees to tensors: one row for each root→leaf path, rows of like length together, padded right.

A pack says for every action token which hidden state predicts it, so whoever computes the log-probabilities need not
know how the tokens were laid out. In a row that is simply the token before.

Shapes: R rows of a pack, S tokens of its longest row, A action tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.trainer.episodes import Credit, CreditedTree
from treegrpo.errors import ContractError
from treegrpo.tree import Step, Tree

PAD = 0
"""Any id does: nothing looks at a token to its right, and no action token lies in the padding."""


@dataclass(frozen=True, slots=True)
class Pack:
    """What one forward and backward pass takes."""

    ids_RS: Tensor
    """int64; the last token of a path is only ever predicted, so it is not here."""
    predictor_A: Tensor
    """int64: index into the flattened ``ids_RS`` of the token whose hidden state predicts the action token."""
    label_A: Tensor
    """int64: the action tokens."""
    sampled_A: Tensor
    """float32: log-probabilities the sampler recorded."""
    plus_A: Tensor
    """float32: A⁺ of `loss`."""
    minus_A: Tensor
    """float32: A⁻ of `loss`."""
    weight_A: Tensor
    """float32: W of `loss`."""
    tokens: int
    """Tokens that are not padding."""

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on ``device``."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "tokens"}
        return replace(self, **tensors)


@dataclass(frozen=True, slots=True)
class _Row:
    ids: NDArray[np.int64]
    """The whole path, prompt included."""
    actions: NDArray[np.int64]
    """Indices of its action tokens."""
    sampled: NDArray[np.float32]
    credit: Credit


def pack(trees: Sequence[CreditedTree], pack_tokens: int, *, keep_zero: bool) -> list[Pack]:
    """All credited paths in packs of at most ``pack_tokens`` tokens, padding included; a longer path has its own.

    Args:
        trees: trees with credited leaves.
        pack_tokens: the limit.
        keep_zero: also pack paths with advantage 0. They matter to a penalty; to the policy loss they are nothing.

    Raises:
        ContractError: a tree has no prompt, so that its first token is predicted by nothing.
    """
    rows = [_row(one.tree, leaf, c) for one in trees for leaf, c in one.credits.items() if keep_zero or c.advantage]
    rows.sort(key=lambda row: len(row.ids), reverse=True)
    return [_stack(part) for part in _batches(rows, pack_tokens)]


def _row(tree: Tree, leaf: int, credit: Credit) -> _Row:
    if not len(tree.prompt):
        raise ContractError(f"The tree with leaf {leaf} has no prompt; a tree's first subtree carries it.")
    path = tree.path(leaf)
    ids = np.concatenate([tree.prompt, *(part for step in path for part in (step.action, step.observation))])
    actions = np.flatnonzero(np.concatenate([np.zeros(len(tree.prompt), bool), *map(_is_action, path)]))
    return _Row(ids[: actions[-1] + 1].astype(np.int64), actions, np.concatenate([step.logprobs for step in path]), credit)


def _is_action(step: Step) -> NDArray[np.bool_]:
    return np.arange(step.length) < len(step.action)


def _batches(rows: Sequence[_Row], pack_tokens: int) -> Iterator[list[_Row]]:
    """Cut rows, longest first, where the next one would make the padded block too large."""
    part: list[_Row] = []
    for row in rows:
        if part and (len(part) + 1) * (len(part[0].ids) - 1) > pack_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _stack(rows: Sequence[_Row]) -> Pack:
    width = len(rows[0].ids) - 1
    ids_RS = np.full((len(rows), width), PAD, np.int64)
    for index, row in enumerate(rows):
        ids_RS[index, : len(row.ids) - 1] = row.ids[:-1]
    counts = [len(row.actions) for row in rows]
    weight_R = np.array([row.credit.weight for row in rows])
    advantage_R = np.array([row.credit.advantage for row in rows])

    def per_token(values_R: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(np.repeat(values_R, counts).astype(np.float32))

    return Pack(
        ids_RS=torch.from_numpy(ids_RS),
        predictor_A=torch.from_numpy(np.concatenate([i * width + row.actions - 1 for i, row in enumerate(rows)])),
        label_A=torch.from_numpy(np.concatenate([row.ids[row.actions] for row in rows])),
        sampled_A=torch.from_numpy(np.concatenate([row.sampled for row in rows])),
        plus_A=per_token(weight_R * advantage_R.clip(min=0)),
        minus_A=per_token(weight_R * advantage_R.clip(max=0)),
        weight_A=per_token(weight_R),
        tokens=sum(len(row.ids) - 1 for row in rows),
    )
