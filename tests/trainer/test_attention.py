from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from learner.trainer.packing.attention import TreeAttention, block_mask
from learner.trainer.packing.layout import Layout
from tests.trainer.test_layout import laid_out

pytestmark = pytest.mark.pure

DEEP = [[1] * 40, [1] * 20 + [2] * 30, [1] * 20 + [2] * 10 + [3] * 5, [1] * 20 + [2] * 10 + [4], [1] * 3 + [5], [6] * 7]
"""Forks on forks, a run of one token, a second root."""


def visible(layout: Layout) -> Tensor:
    at = torch.arange(layout.tokens)
    return (at <= at[:, None]) & (at[:, None] < torch.from_numpy(layout.end_T))


def inputs(layout: Layout, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers hands them over: views whose heads lie beside each other."""
    rng = torch.Generator().manual_seed(1)
    shapes = [(1, layout.tokens, heads, 8) for heads in (4, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=rng, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes)
    return q, k, v


def tree_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return cast("Tensor", cast("Any", TreeAttention).apply(q, k, v, layout, 0.3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_output_and_gradients_are_those_of_the_masked_attention(kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    _, layout, _ = laid_out(DEEP)
    qkv = inputs(layout, kv_heads, dtype)
    out_1THD = tree_attention(*qkv, layout)
    masked = scaled_dot_product_attention(*qkv, attn_mask=visible(layout), scale=0.3, enable_gqa=True).transpose(1, 2)
    assert (out_1THD - masked).abs().max() < tolerance
    grad = torch.randn(out_1THD.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    found, wanted = (torch.autograd.grad(out, qkv, grad) for out in (out_1THD, masked))
    assert max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) < 10 * tolerance


def test_bfloat16_is_as_close_as_bfloat16_gets() -> None:
    _, layout, _ = laid_out(DEEP)
    qkv = inputs(layout, 2, torch.float64)
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in qkv)
    exact, rough = tree_attention(*qkv, layout), tree_attention(q, k, v, layout)
    assert rough.dtype == torch.bfloat16
    assert (exact - rough).abs().max() < 0.05
    found, wanted = (torch.autograd.grad(out.float().square().sum(), of) for out, of in ((rough, (q, k, v)), (exact, qkv)))
    assert all((a - b).norm() < 0.05 * b.norm() for a, b in zip(found, wanted, strict=True))


def test_a_sibling_changes_nothing_and_an_ancestor_every_descendant() -> None:
    paths, layout, places = laid_out([[1, 2, 3, 4], [1, 2, 5, 6], [1, 7, 8]])
    q, k, v = inputs(layout, 2, torch.float64)
    before = tree_attention(q, k, v, layout).detach()
    for path, place in zip(paths, places, strict=True):
        for at in place.tolist():
            moved = v.detach().clone()
            moved[:, :, at] += 1
            changed_T = (tree_attention(q, k, moved, layout) != before).flatten(2).any(2)[0]
            assert changed_T.tolist() == [at <= i < layout.end_T[at] for i in range(layout.tokens)], (path, at)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_of_cuda_sees_the_same() -> None:
    """FlexAttention runs uncompiled here; its kernel needs CUDA."""
    layout = long_tree(200, 150, 4)
    q, k, v = (x.detach() for x in inputs(layout, 2, torch.float32))
    mask = block_mask(layout, torch.device("cpu"))
    out = cast("Any", flex_attention)(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
    assert (out.transpose(1, 2) - tree_attention(q, k, v, layout)).abs().max() < 1e-5


def long_tree(trunk: int, branch: int, branches: int) -> Layout:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, trunk).tolist()
    return laid_out([[*ids, 10 + i, *rng.integers(0, 9, branch).tolist()] for i in range(branches)])[1]


@pytest.mark.parametrize("shape", [(256, 511, 6), (300, 100, 5), (1, 130, 3), (128, 127, 2), (40, 10, 4)])
def test_the_block_mask_has_the_blocks_of_the_whole_mask(shape: tuple[int, int, int]) -> None:
    layout = long_tree(*shape)
    end_T, device = torch.from_numpy(layout.end_T), torch.device("cpu")

    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end_T[key])

    whole = create_block_mask(sees, None, None, layout.tokens, layout.tokens, device="cpu")
    made = block_mask(layout, device)
    assert made.to_dense().tolist() == whole.to_dense().tolist()
    assert (made.shape, made.sparsity()) == (whole.shape, whole.sparsity())


def test_the_block_mask_of_a_long_tree_leaves_blocks_out() -> None:
    mask = block_mask(long_tree(256, 511, 6), torch.device("cpu"))
    assert mask.sparsity() > 70  # a causal mask of as many tokens has about half
