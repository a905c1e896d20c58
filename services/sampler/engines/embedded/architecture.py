"""Architecture of a Hugging Face causal LM of the Qwen2, Qwen3 or Llama kind, read from its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.sampler.engines.checkpoint import check_shapes, library_config
from treegrpo.errors import ModelError
from treegrpo.storage.model_config import check_context, read_model_config

KINDS = ("llama", "qwen2", "qwen3")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rope types whose angles do not depend on how long the sequence has become."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The parameters of a forward pass and of a check of weights. Two models are interchangeable iff these are equal."""

    kind: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    tied: bool
    context: int
    """Longest sequence the model was made for."""
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rope: str
    """Rope parameters as canonical JSON."""

    @property
    def qk_norm(self) -> bool:
        return self.kind == "qwen3"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint must have."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in self._block().items()})
        return shapes

    def _block(self) -> dict[str, tuple[int, ...]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }
        linear = {
            "self_attn.q_proj": (q, self.hidden, self.qkv_bias),
            "self_attn.k_proj": (kv, self.hidden, self.qkv_bias),
            "self_attn.v_proj": (kv, self.hidden, self.qkv_bias),
            "self_attn.o_proj": (self.hidden, q, self.out_bias),
            "mlp.gate_proj": (self.inner, self.hidden, self.mlp_bias),
            "mlp.up_proj": (self.inner, self.hidden, self.mlp_bias),
            "mlp.down_proj": (self.hidden, self.inner, self.mlp_bias),
        }
        for name, (out, into, bias) in linear.items():
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes


def read_supported_config(path: Path) -> Any:
    """The Hugging Face config of a model directory.

    Raises:
        ModelError: there is none, it cannot be read, or its kind of model is not supported.
    """
    config = read_model_config(path)
    if config.kind not in KINDS:
        raise ModelError(
            f"{config.file} has model_type {config.kind!r}; the embedded engine runs {', '.join(KINDS)}; use SGLang for others."
        )
    return library_config(path)


def check_servable(path: Path, context: int) -> tuple[Any, Architecture]:
    """Check that the embedded engine can serve the model directory ``path`` with ``context`` tokens; reads no weights.

    Returns:
        The Hugging Face config, and the architecture.

    Raises:
        ModelError: it cannot be served.
        WeightsError: the weights are not those of the model.
    """
    check_context(read_model_config(path), context)
    config = read_supported_config(path)
    architecture = architecture_of(config, path)
    check_shapes(path, architecture.tensors(), tied=architecture.tied)
    return config, architecture


def architecture_of(config: Any, path: Path) -> Architecture:
    """The architecture in ``config`` (read from ``path``). Raises ModelError for a variant that would be computed wrongly."""
    rope: dict[str, Any] = dict(config.rope_parameters)
    layer_types: list[str] = list(getattr(config, "layer_types", None) or [])
    unsupported = {
        "sliding-window attention": any(kind != "full_attention" for kind in layer_types),
        f"hidden_act {config.hidden_act!r}": config.hidden_act != "silu",
        f"rope_type {rope.get('rope_type')!r}": rope.get("rope_type") not in _STATIC_ROPE,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for what, present in unsupported.items():
        if present:
            raise ModelError(
                f"{path / 'config.json'} asks for {what}, which the embedded engine does not compute; use SGLang for this model."
            )
    kind: str = config.model_type
    attention_bias = bool(getattr(config, "attention_bias", False))
    return Architecture(
        kind=kind,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        inner=config.intermediate_size,
        eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        context=config.max_position_embeddings,
        qkv_bias=kind == "qwen2" or attention_bias,
        out_bias=kind != "qwen2" and attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        rope=json.dumps(rope, sort_keys=True),
    )


def rope_table(config: Any, length: int) -> torch.Tensor:
    """[length, head_dim/2] complex rotations per position, from Hugging Face's own rotary module (its scalings too)."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, :half], sin[0, :, :half]).contiguous()
