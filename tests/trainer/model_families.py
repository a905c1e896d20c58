"""Random models of several families as directories: supported on trees, and unsupported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.trainer.builders import VOCABULARY

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 63,
    "pad_token_id": 63,
}
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
_RANDOM: dict[str, Any] = dict.fromkeys((*_DROPOUTS, "layerdrop"), 0.5)
"""What OPT and BioGPT do at random in training mode, as each of them calls it."""
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SIZES, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False, attention_bias=True),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=63),
    "mistral": lambda: MistralConfig(**_SIZES, tie_word_embeddings=False, sliding_window=None),
    # A window that no layer uses: the list of layers says so.
    "qwen2_full": lambda: Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "gemma3_full": lambda: Gemma3TextConfig(**_SIZES, sliding_window=4, layer_types=["full_attention"] * 2),
    "olmo3_full": lambda: Olmo3Config(**_SIZES, sliding_window=4, layer_types=["full_attention"] * 2),
    "granite": lambda: GraniteConfig(**_SIZES, logits_scaling=1.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256, **_RANDOM),
    "biogpt": lambda: BioGptConfig(**_SIZES, max_position_embeddings=256, **_RANDOM),
}
_OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2_sliding": lambda: Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=4096, max_window_layers=0),
    "mistral_sliding": lambda: MistralConfig(**_SIZES, sliding_window=4096),
    "dynamic": lambda: LlamaConfig(**_SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    "linear": lambda: LlamaConfig(**_SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "granite_scaled": lambda: GraniteConfig(**_SIZES, logits_scaling=1.004),
    "cohere_scaled": lambda: CohereConfig(**_SIZES, logit_scale=0.999),
    "gemma3_capped": lambda: Gemma3TextConfig(**_SIZES, final_logit_softcapping=1000.0, layer_types=["full_attention"] * 2),
}


def write_family(folder: Path, family: str, seed: int = 0) -> Path:
    """A random model of ``family`` in ``folder``."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config((FAMILIES | _OTHERS)[family]()).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder
