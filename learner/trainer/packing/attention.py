"""Tree attention: attention over a pack that computes only visible pairs, as an implementation for transformers.

A softmax over keys in several places is the softmax over each place, weighed by their log-sum-exps: with O_b and S_b the
output and the log-sum-exp of block b (FlashAttention, arXiv 2205.14135),

    S = log Σ exp S_b        O = Σ exp(S_b − S)·O_b

and a block's gradients follow from the block, the whole O and the whole S alone. So every run and every cross of a
`layout` is one call of the processor's fused kernel, on views, with nothing masked but the triangle of a run. CUDA has a
kernel for whole masks: FlexAttention, whose block mask comes from ``end_T``.

Shapes: T tokens, H query heads, K key-value heads, D width of a head; a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from learner.trainer.packing.layout import Layout
from treegrpo.errors import ModelError

NAME = "treegrpo_tree"
UNSUPPORTED = {
    "softcap": "soft-capped attention",
    "s_aux": "attention sinks",
    "sliding_window": "a sliding window",
    "position_bias": "a bias of positions",
    "attention_bias": "a bias of positions",
}
"""Arguments of transformers for features that tree attention does not compute."""
BLOCK = 128
"""Tokens of a side of FlexAttention's blocks."""
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001  what scaled_dot_product_attention calls
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


class TreeAttention(torch.autograd.Function):
    """Attention of a pack on a CPU, exact, in as many calls as it has runs and crosses."""

    @staticmethod
    def forward(ctx: Any, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, layout: Layout, scale: float) -> Tensor:
        out_1THD = torch.empty_like(q_1HTD.transpose(1, 2), memory_format=torch.contiguous_format)
        out_1HTD = out_1THD.transpose(1, 2)
        total_1HT = torch.empty(q_1HTD.shape[:3], dtype=torch.promote_types(q_1HTD.dtype, torch.float32))
        for a, b in layout.runs:
            q, k, v = q_1HTD[:, :, a:b], k_1KTD[:, :, a:b], v_1KTD[:, :, a:b]
            out_1HTD[:, :, a:b], total_1HT[:, :, a:b] = _forward(q, k, v, 0.0, True, scale=scale)
        for (a, b), (c, d) in layout.crosses:
            q, k, v = q_1HTD[:, :, a:b], k_1KTD[:, :, c:d], v_1KTD[:, :, c:d]
            out, total = _forward(q, k, v, 0.0, False, scale=scale)
            # o + (o' − o)·sigmoid(s' − s) is the weighing of two blocks; the log-sum-exp of both is the new one.
            share = torch.sigmoid(total - total_1HT[:, :, a:b]).unsqueeze(-1).to(out.dtype)
            out_1HTD[:, :, a:b].lerp_(out, share)
            total_1HT[:, :, a:b] = torch.logaddexp(total, total_1HT[:, :, a:b])
        ctx.save_for_backward(q_1HTD, k_1KTD, v_1KTD, out_1THD, total_1HT)
        ctx.layout, ctx.scale = layout, scale
        return out_1THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total = ctx.saved_tensors
        grad, out = grads[0].transpose(1, 2), out.transpose(1, 2)
        wide = torch.promote_types(q.dtype, torch.float32)  # a trunk adds up what many branches give it
        dq, dk, dv = (torch.empty_like(x, dtype=wide) for x in (q, k, v))

        def block(queries: tuple[int, int], keys: tuple[int, int], *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            rows, columns = slice(*queries), slice(*keys)
            return _backward(
                grad[:, :, rows],
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                out[:, :, rows],
                total[:, :, rows],
                0.0,
                causal,
                scale=ctx.scale,
            )

        for run in ctx.layout.runs:
            rows = slice(*run)
            dq[:, :, rows], dk[:, :, rows], dv[:, :, rows] = block(run, run, causal=True)
        for queries, keys in ctx.layout.crosses:
            part_q, part_k, part_v = block(queries, keys, causal=False)
            dq[:, :, slice(*queries)] += part_q
            dk[:, :, slice(*keys)] += part_k
            dv[:, :, slice(*keys)] += part_v
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def prepare_layout(layout: Layout, device: torch.device) -> Layout | BlockMask:
    """Prepare the ``layout`` argument of `attend` for this device, once for all layers."""
    return block_mask(layout, device) if device.type == "cuda" else layout


def block_mask(layout: Layout, device: torch.device) -> BlockMask:
    """FlexAttention's mask of a pack, from which keys j are seen by [j, end_T[j]); T² is never laid out.

    A block of keys is left out where its last one has ended before the block of queries begins, and needs no mask where
    all its keys are seen by all of these queries.
    """
    blocks = -(-layout.tokens // BLOCK)
    padded = np.pad(layout.end_T, (0, blocks * BLOCK - layout.tokens), mode="edge").reshape(blocks, BLOCK)
    last_B, first_B = padded.max(1), padded.min(1)
    begin_B = np.arange(blocks) * BLOCK
    before_BB = np.tri(blocks, k=-1, dtype=bool)  # [queries, keys]
    full_BB = before_BB & (first_B >= np.minimum(begin_B + BLOCK, layout.tokens)[:, None])
    some_BB = (before_BB & (last_B > begin_B[:, None]) & ~full_BB) | np.eye(blocks, dtype=bool)
    end_T = torch.from_numpy(layout.end_T).to(device)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end_T[key])

    size = (layout.tokens, layout.tokens)
    return BlockMask.from_kv_blocks(*_block_lists(some_BB, device), *_block_lists(full_BB, device), BLOCK, sees, seq_lengths=size)


def _block_lists(kept_BB: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of key blocks of each query block, and their indices, these first."""
    order_BB = np.argsort(~kept_BB, axis=1, kind="stable").astype(np.int32)
    counts_B = kept_BB.sum(1).astype(np.int32)
    return torch.from_numpy(counts_B)[None, None].to(device), torch.from_numpy(order_BB)[None, None].to(device)


@cache
def _flex() -> Callable[..., Tensor]:
    """Compiled for any length. More variants than it keeps are an error: what it falls back to lays out T²."""
    cast("Any", torch).compiler.config.fail_on_recompile_limit_hit = True
    return cast("Callable[..., Tensor]", torch.compile(flex_attention, dynamic=True))


def attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    *,
    layout: Layout | BlockMask,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; ``layout`` is from `prepare_layout` and passed to the model's decoder.

    Raises:
        ModelError: the layer asks for more than attention, and would be computed as if it did not.
    """
    for name, what in UNSUPPORTED.items():
        if others.get(name) is not None:
            raise ModelError(f"its layers ask for {what} ({name}), which attention over trees does not compute")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what was rotated in float32
    if isinstance(layout, Layout):
        return cast("Tensor", TreeAttention.apply(query, key, value, layout, scale)), None
    out = _flex()(query, key, value, block_mask=layout, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
