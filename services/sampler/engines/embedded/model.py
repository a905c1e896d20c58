"""The forward pass of Qwen2, Qwen3 and Llama for inference: few, large operations, no autograd.

Weights are prepared once: q, k, v are one matrix, gate and up another; RMSNorm weights are multiplied into the matrix
that follows; the two halves that rotary embedding pairs are interleaved, so that a rotation is one complex product
(q·k does not change when both are permuted alike); queries carry the factor head_dim ** −½.
Shape suffixes: _T tokens, _M hidden, _V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import linear, rms_norm, silu

from services.sampler.engines.checkpoint import read_tensors
from services.sampler.engines.embedded.architecture import (
    Architecture,
    architecture_of,
    check_servable,
    read_supported_config,
    rope_table,
)
from services.sampler.engines.embedded.attention import Attention
from treegrpo.errors import ModelError, WeightsError

Weights = dict[str, torch.Tensor]
"""Tensors of a checkpoint as float32, by Hugging Face name."""


@dataclass(frozen=True, slots=True)
class _Block:
    """One layer's matrices, [out, in]."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    """[heads + kv_heads, head_dim]"""
    out: torch.Tensor
    out_bias: torch.Tensor | None
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class EmbeddedModel:
    """One policy version, ready to run. Sequences may be ``len(rope)`` tokens long."""

    def __init__(self, architecture: Architecture, weights: Weights, rope: torch.Tensor) -> None:
        self.architecture = architecture
        self.rope = rope
        self._embedding = weights["model.embed_tokens.weight"]
        self._norm = weights["model.norm.weight"]
        self._head = self._embedding if architecture.tied else weights["lm_head.weight"]
        self._blocks = [_block(architecture, weights, f"model.layers.{layer}.") for layer in range(architecture.layers)]

    @classmethod
    def read_directory(cls, path: Path, context: int) -> EmbeddedModel:
        """Read a model directory for sequences of up to ``context`` tokens. Raises ModelError."""
        try:
            config, architecture = check_servable(path, context)
            weights = read_weights(path, architecture)
        except WeightsError as error:
            raise ModelError(str(error)) from error
        return cls(architecture, weights, rope_table(config, context))

    def with_weights(self, path: Path) -> EmbeddedModel:
        """The same model with the weights in ``path``. Raises WeightsError when they belong to another one."""
        if (path / "config.json").is_file():
            try:
                other = architecture_of(read_supported_config(path), path)
            except ModelError as error:
                raise WeightsError(str(error)) from error
            if other != self.architecture:
                raise WeightsError(
                    f"{path / 'config.json'} describes another model than the one that runs; publish weights of the same model."
                )
        return EmbeddedModel(self.architecture, read_weights(path, self.architecture), self.rope)

    def forward(self, ids_T: torch.Tensor, position_T: torch.Tensor, attend: Attention) -> torch.Tensor:
        """[T, M] hidden states after the last layer; ``attend`` keeps the keys and values."""
        a = self.architecture
        rotated = a.heads + a.kv_heads
        rope = self.rope[position_T][:, None]
        x_TM = self._embedding[ids_T]
        for layer, block in enumerate(self._blocks):
            qkv = linear(rms_norm(x_TM, (a.hidden,), None, a.eps), block.qkv, block.qkv_bias).unflatten(1, (-1, a.head_dim))
            qk, v = qkv[:, :rotated], qkv[:, rotated:]
            if block.qk_norm is not None:
                qk = rms_norm(qk, (a.head_dim,), None, a.eps) * block.qk_norm
            qk = torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * rope).flatten(-2)
            x_TM = _add(x_TM, attend(layer, qk[:, : a.heads], qk[:, a.heads :], v), block.out, block.out_bias)
            gate, up = linear(rms_norm(x_TM, (a.hidden,), None, a.eps), block.gate_up, block.gate_up_bias).chunk(2, dim=-1)
            x_TM = _add(x_TM, silu(gate).mul_(up), block.down, block.down_bias)
        return x_TM

    def logits(self, hidden_TM: torch.Tensor) -> torch.Tensor:
        """[T, V]"""
        return linear(rms_norm(hidden_TM, (self.architecture.hidden,), self._norm, self.architecture.eps), self._head)


def _add(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``residual`` + x · weightᵀ + bias."""
    return torch.addmm(residual if bias is None else residual + bias, x, weight.t())


def _block(a: Architecture, weights: Weights, prefix: str) -> _Block:
    def get(name: str) -> torch.Tensor | None:
        return weights.get(prefix + name)

    def join(*names: str) -> torch.Tensor | None:
        parts = [part for name in names if (part := get(name)) is not None]
        return torch.cat(parts) if parts else None

    def norm(name: str) -> torch.Tensor:
        return weights[f"{prefix}{name}.weight"]

    rows = _row_order(a)
    scale = torch.ones(len(rows), 1)
    if not a.qk_norm:
        scale[: a.heads * a.head_dim] = a.head_dim**-0.5
    qkv = torch.cat([weights[f"{prefix}self_attn.{n}_proj.weight"] for n in "qkv"])
    qkv_bias = join("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
    gate_up = torch.cat([weights[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up")])
    return _Block(
        qkv=(qkv * norm("input_layernorm"))[rows] * scale,
        qkv_bias=None if qkv_bias is None else qkv_bias[rows] * scale[:, 0],
        qk_norm=_qk_norm(a, weights, prefix) if a.qk_norm else None,
        out=weights[f"{prefix}self_attn.o_proj.weight"],
        out_bias=get("self_attn.o_proj.bias"),
        gate_up=gate_up * norm("post_attention_layernorm"),
        gate_up_bias=join("mlp.gate_proj.bias", "mlp.up_proj.bias"),
        down=weights[f"{prefix}mlp.down_proj.weight"],
        down_bias=get("mlp.down_proj.bias"),
    )


def _interleaved(head_dim: int) -> torch.Tensor:
    """[head_dim] 0, h, 1, h+1, …: the two halves of a head that rotary embedding pairs, side by side."""
    return torch.arange(head_dim).view(2, -1).t().flatten()


def _row_order(a: Architecture) -> torch.Tensor:
    """Rows of the joined q, k, v matrix: the heads of q and k interleaved, v as it is."""
    rotated = a.heads + a.kv_heads
    q_and_k = torch.arange(rotated)[:, None] * a.head_dim + _interleaved(a.head_dim)
    v = torch.arange(rotated * a.head_dim, (rotated + a.kv_heads) * a.head_dim)
    return torch.cat((q_and_k.flatten(), v))


def _qk_norm(a: Architecture, weights: Weights, prefix: str) -> torch.Tensor:
    order = _interleaved(a.head_dim)
    q = weights[f"{prefix}self_attn.q_norm.weight"][order] * a.head_dim**-0.5
    k = weights[f"{prefix}self_attn.k_norm.weight"][order]
    return torch.cat((q.expand(a.heads, -1), k.expand(a.kv_heads, -1)))


def read_weights(path: Path, architecture: Architecture) -> Weights:
    """Read all tensors of the checkpoint in ``path``. Raises WeightsError (`read_tensors`)."""
    # A copy, because what safetensors returns lies in the file, which may be replaced while the model runs.
    return {
        name: tensor.to(torch.float32, copy=True)
        for name, tensor in read_tensors(path, architecture.tensors(), tied=architecture.tied)
    }
