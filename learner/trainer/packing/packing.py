"""Packing, from trees to tensors: the distinct tokens of many paths in one row without padding.

Paths in lexicographic order share prefixes with their neighbours: the steps of one tree,
the prompt of one question, the instructions of all. A pack is a stretch of that order within a budget of tokens. Where a
tree does not fit, its paths go to several packs, and each repeats the prefix it needs.

An action token is predicted by the token before it *on its path*: for the first one of a step that is the last token of
the parent, wherever this lies in the pack. The last token of a path is only ever predicted, so it is no input.

Shapes: T tokens of a pack, A, P and L of `targets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.trainer.algorithm.credit_assignment import Credit, CreditedTree
from learner.trainer.algorithm.targets import Targets
from learner.trainer.packing.layout import Layout, PathIds, lay_out, shared_prefix
from treegrpo.core.step import PolicyVersion, Step
from treegrpo.core.tree import Tree
from treegrpo.errors import ContractError

Indices = NDArray[np.int64]
Key = tuple[int, int]
"""A step of the batch: id of its tree, node."""

PAIR_COST = 1 / 6000
"""Cost of a (query, key) pair in tokens: a layer does about 24·h² operations for a token and 4·h for a pair; h is some 1000."""

PACKS_PER_RANK = 3
"""At most, unless the budget of a pack asks for more: every pack costs the ranks an exchange of all weights."""


@dataclass(frozen=True, slots=True)
class Pack:
    """The input of one forward and backward pass."""

    ids_T: Tensor
    """int64."""
    position_T: Tensor
    """int64: depth on the path."""
    layout: Layout
    predictor_A: Tensor
    """int64: which of T predicts the action token."""
    targets: Targets
    path_tokens: int
    """Tokens of the paths one by one: what computing each by itself would take."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids_T)

    @property
    def cost(self) -> float:
        """Its cost, in tokens without attention: packs are balanced by it."""
        return self.tokens + self.layout.pairs * PAIR_COST

    def to(self, device: torch.device | str) -> Pack:
        """The same pack with its tensors on ``device``."""
        return replace(
            self,
            ids_T=self.ids_T.to(device),
            position_T=self.position_T.to(device),
            predictor_A=self.predictor_A.to(device),
            targets=self.targets.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _CreditedPath:
    """A root→leaf path with its credit."""

    ids: PathIds
    """Its inputs: all tokens but the last action token and what follows it."""
    tree: Tree
    steps: list[Step]
    credit: Credit


def pack(
    trees: Sequence[CreditedTree], pack_tokens: int, *, keep_zero: bool, ranks: int = 1, now: PolicyVersion | None = None
) -> list[Pack]:
    """All credited paths in packs of at most ``pack_tokens`` tokens; a longer path has its own.

    Args:
        trees: trees with credited leaves.
        pack_tokens: the limit.
        keep_zero: also pack paths with no advantage. They matter to a penalty; to the policy loss they are nothing.
        ranks: processes that share the packs; with several, packs are as small as makes the step short.
        now: the version that the batch is trained from; its own tokens are marked.

    Raises:
        ContractError: a tree has no prompt, so that its first token is predicted by nothing.
    """
    credited = [(one.tree, leaf, c) for one in trees for leaf, c in one.credits.items() if keep_zero or c.advantage_D.any()]
    paths = [_credited_path(*one) for one in credited]
    paths.sort(key=lambda path: path.ids.astype(">u4").tobytes())  # bytes in this order compare like the numbers
    prefixes = [0, *(shared_prefix(a.ids, b.ids) for a, b in pairwise(paths))]
    cuts = _best_cuts(np.array([len(path.ids) for path in paths]), np.array(prefixes), pack_tokens, ranks) if paths else []
    signs, counted = _signs(paths), set[Key]()
    return [_make_pack(paths[a:b], [0, *prefixes[a + 1 : b]], signs, counted, now) for a, b in cuts]


def empty_pack() -> Pack:
    """A pack of one token without a loss: for a rank without packs, which has to take part in a step."""
    layout, _ = lay_out([np.zeros(1, np.uint32)], [0])
    return Pack(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), layout, *_targets([], {}, set(), None), 0)


def _credited_path(tree: Tree, leaf: int, credit: Credit) -> _CreditedPath:
    if not len(tree.prompt):
        raise ContractError(f"The tree with leaf {leaf} has no prompt; a tree's first subtree carries it.")
    steps = tree.path(leaf)
    parts = [tree.prompt, *(part for step in steps for part in (step.action, step.observation))]
    last = max(i for i, step in enumerate(steps) if len(step.action))
    end = len(tree.prompt) + sum(step.length for step in steps[:last]) + len(steps[last].action)
    return _CreditedPath(np.concatenate(parts)[: end - 1], tree, steps, credit)


def _best_cuts(lengths: Indices, prefixes: Indices, pack_tokens: int, ranks: int) -> list[tuple[int, int]]:
    """The cuts that several ranks are soonest done with: even shares are worth nothing if prefixes are repeated for them.

    Ranks go in step, so a round of one pack each takes as long as its largest.
    """
    new = lengths - prefixes
    if ranks == 1:
        return [*_cuts(new, prefixes, pack_tokens)]
    total = int(new.sum())
    shares = [-(-total // count) for count in range(1, PACKS_PER_RANK * ranks + 1)]
    limits = {min(pack_tokens, limit) for share in shares for limit in (share, share * 9 // 8, share * 5 // 4)}
    found = [[*_cuts(new, prefixes, limit)] for limit in sorted(limits, reverse=True)]

    def time(cuts: Sequence[tuple[int, int]]) -> int:
        tokens = sorted((int(new[a:b].sum() + prefixes[a]) for a, b in cuts), reverse=True)
        return sum(tokens[::ranks])

    return min(found, key=time)


def _cuts(new: Indices, prefixes: Indices, limit: int) -> Iterator[tuple[int, int]]:
    """Cut the order of paths into stretches of at most ``limit`` tokens, each where the last quarter shares least.

    Args:
        new: tokens of each path that the one before does not have.
        prefixes: the other tokens of the first path of a stretch.
        limit: tokens.
    """
    ends = np.cumsum(new)
    first, count = 0, len(new)
    while first < count:
        before = ends[first] - new[first] - prefixes[first]
        end = max(first + 1, int(np.searchsorted(ends, before + limit, side="right")))
        if end < count:
            begin = max(first + 1, int(np.searchsorted(ends, before + (ends[end - 1] - before) * 3 / 4)))
            end = min(range(end, min(begin, end) - 1, -1), key=lambda i: prefixes[i])
        yield first, end
        first = end


def _make_pack(
    paths: Sequence[_CreditedPath],
    prefixes: Sequence[int],
    signs: Mapping[Key, int],
    counted: set[Key],
    now: PolicyVersion | None,
) -> Pack:
    layout, places = lay_out([path.ids for path in paths], prefixes)
    predictor_A, targets = _targets(list(zip(paths, places, strict=True)), signs, counted, now)
    path_tokens = sum(len(path.ids) for path in paths)
    return Pack(torch.from_numpy(layout.ids_T), torch.from_numpy(layout.position_T), layout, predictor_A, targets, path_tokens)


def _targets(
    paths: Sequence[tuple[_CreditedPath, Indices]], signs: Mapping[Key, int], counted: set[Key], now: PolicyVersion | None
) -> tuple[Tensor, Targets]:
    """predictor_A and the loss's targets; adds to ``counted`` the tokens that this pack is the first to contain."""
    begins: dict[Key, int] = {}
    steps: list[tuple[Step, Indices, Key]] = []
    token: list[Indices] = []
    leaf: list[Indices] = []
    values: list[NDArray[np.float64]] = [np.zeros((2, 0))]
    total = 0
    for number, (path, place) in enumerate(paths):
        at, credit = len(path.tree.prompt), path.credit
        for step, advantage in zip(path.steps, credit.advantage_D, strict=True):
            size, key = len(step.action), (id(path.tree), step.node)
            if key not in begins:
                begins[key] = total
                steps.append((step, place[at - 1 : at - 1 + size], key))
                total += size
            token.append(np.arange(begins[key], begins[key] + size))
            leaf.append(np.full(size, number))
            values.append(np.outer([credit.weight, advantage], np.ones(size)))
            at += step.length
    weight_P, advantage_P = np.concatenate(values, axis=1)
    targets = Targets(
        label_A=_join([step.action for step, _, _ in steps], np.int64),
        sampled_A=_join([step.logprobs for step, _, _ in steps], np.float32),
        counted_A=_join([np.full(len(step.action), key not in counted) for step, _, key in steps], np.bool_),
        fresh_A=_join([_fresh(step, now) for step, _, _ in steps], np.bool_),
        sign_A=_join([np.full(len(step.action), signs[key]) for step, _, key in steps], np.int64),
        token_P=_join(token, np.int64),
        leaf_P=_join(leaf, np.int64),
        advantage_P=_join([advantage_P], np.float32),
        weight_P=_join([weight_P], np.float32),
        leaves=len(paths),
    )
    counted.update(begins)
    return _join([place for _, place, _ in steps], np.int64), targets


def _fresh(step: Step, now: PolicyVersion | None) -> NDArray[np.bool_]:
    """Which action tokens of ``step`` the version ``now`` has sampled."""
    fresh = np.zeros(len(step.action), np.bool_)
    for span in step.spans:
        fresh[span.start : span.end] = span.version == now
    return fresh


def _join(parts: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype))


def _signs(paths: Sequence[_CreditedPath]) -> dict[Key, int]:
    """For every step the index into `targets.SIGNS` of the advantages of all leaves below it, whichever packs they are in."""
    sums: dict[Key, NDArray[np.float64]] = {}
    for path in paths:
        sides = path.credit.weight * np.array([path.credit.inter, path.credit.intra])
        for step in path.steps:
            key = (id(path.tree), step.node)
            sums[key] = sums.get(key, 0.0) + sides
    return {key: 1 + 2 * (inter < 0) + (intra < 0) if inter and intra else 0 for key, (inter, intra) in sums.items()}
