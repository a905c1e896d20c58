"""Attention over the rows: many tokens of few requests (prefill), or one token of each running request (decode).

Both write the new keys and values to their rows first, then attend. Queries arrive scaled by head_dim ** −½.
Shape suffixes: _T new tokens, _H query heads, _K key/value heads, _D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

_QUERIES = 256
"""Queries per attention call in a prefill: bounds the mask's memory and skips most of what is masked."""


class Attention(Protocol):
    """Called once per layer and forward pass."""

    def __call__(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Returns [T, heads · head_dim]."""
        ...


@dataclass(frozen=True, slots=True)
class PrefillSlice:
    """New tokens of one request: ``size`` of them, the first at position ``start`` of ``row``."""

    row: int
    start: int
    size: int


_Block = tuple[int, torch.Tensor]
"""(first query, [queries, keys seen] mask to add)."""


def _blocks(part: PrefillSlice) -> list[_Block]:
    """The queries of ``part`` in blocks; one sees what is before it and itself."""
    blocks: list[_Block] = []
    for first in range(0, part.size, _QUERIES):
        size = min(_QUERIES, part.size - first)
        before = part.start + first
        blocks.append((first, torch.full((size, before + size), float("-inf")).triu_(before + 1)))
    return blocks


class PrefillAttention:
    """The parts of several requests side by side, without padding; each sees its own row up to itself."""

    def __init__(self, rows: torch.Tensor, parts: list[PrefillSlice]) -> None:
        self._rows = rows
        self._kv_heads = rows.shape[3]
        self._slices = [(part, _blocks(part)) for part in parts]

    def __call__(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q_THD)
        at = 0
        for part, blocks in self._slices:
            own = slice(at, at + part.size)
            at += part.size
            end = part.start + part.size
            keys, values = self._rows[layer, 0, part.row], self._rows[layer, 1, part.row]
            keys[:, part.start : end] = k_TKD[own].transpose(0, 1)
            values[:, part.start : end] = v_TKD[own].transpose(0, 1)
            self._attend(q_THD[own], keys, values, blocks, out[own])
        return out.flatten(1)

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: list[_Block], out: torch.Tensor) -> None:
        group = q.shape[1] // self._kv_heads
        for first, mask in blocks:
            size, seen = mask.shape
            # [K, group · size, D]: the query heads of one key head are further queries, so keys are not repeated.
            block = q[first : first + size].unflatten(1, (self._kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)[None]
            found = scaled_dot_product_attention(
                block, keys[None, :, :seen], values[None, :, :seen], attn_mask=mask.repeat(group, 1), scale=1.0
            )
            out[first : first + size] = found.view(self._kv_heads, group, size, -1).permute(2, 0, 1, 3).flatten(1, 2)


class DecodeAttention:
    """One new token for each of the first ``n`` rows, at ``position``: views of the rows, nothing gathered.

    Two batched products beat scaled_dot_product_attention here: with one query per head it has nothing to tile.
    """

    def __init__(self, rows: torch.Tensor, position_T: torch.Tensor) -> None:
        n, longest = len(position_T), int(position_T.max()) + 1
        self._rows = rows[:, :, :n]
        self._length = longest
        self._position = position_T
        self._row = torch.arange(n)
        kv_heads = rows.shape[3]
        unseen = torch.arange(longest)[None] > position_T[:, None]
        mask = torch.zeros(n, longest).masked_fill_(unseen, float("-inf"))
        self._mask = mask.repeat_interleave(kv_heads, dim=0)[:, None]

    def __call__(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        keys, values = self._rows[layer, 0], self._rows[layer, 1]
        keys[self._row, :, self._position] = k_TKD
        values[self._row, :, self._position] = v_TKD
        n, heads, head_dim = q_THD.shape
        q = q_THD.reshape(n * keys.shape[1], -1, head_dim)
        weight = torch.baddbmm(self._mask, q, keys.flatten(0, 1)[:, : self._length].transpose(1, 2)).softmax(-1)
        return torch.bmm(weight, values.flatten(0, 1)[:, : self._length]).view(n, heads * head_dim)
