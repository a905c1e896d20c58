"""Tiny models with a tokenizer, made in a second, and what plain Hugging Face says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as Bpe
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.step import TokenIds

VOCABULARY = 288
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3_ROPE}),
}
KINDS = tuple(_CLASSES)
END = "<|end|>"
_TEXT = [
    "<search>which river runs through town</search> <answer>the river of the town</answer>",
    "search answer river town the",
] * 3


def save_tokenizer(path: Path, end: str | None = END) -> None:
    """A byte-level BPE whose tags are split over several tokens, with or without an end-of-sequence token."""
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end).save_pretrained(path)


def make_model(kind: str, seed: int, **changes: Any) -> Any:
    """A random Hugging Face model; weights are large enough for a clear argmax."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "tie_word_embeddings": kind == "qwen2",
        **changes,
    }
    config, model_class, own = _CLASSES[kind]
    torch.manual_seed(seed)
    model = model_class(config(**own, **shape))
    _stir(model)
    return model.eval()


def _stir(model: Any) -> None:
    """Biases and norms start as 0 and 1 and would hide a mistake: make them random too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def save_model(path: Path, kind: str = "qwen2", seed: int = 0, end: str | None = END, **changes: Any) -> Path:
    """A model directory with config, weights and tokenizer."""
    make_model(kind, seed, **changes).save_pretrained(path)
    save_tokenizer(path, end)
    return path


def save_endless(folder: Path) -> tuple[Path, Path]:
    """Two versions of a model that never ends a sequence, for tests that need long completions."""
    return save_model(folder / "0", seed=10, end=None), save_model(folder / "1", seed=11, end=None)


def open_reference(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def greedy(model: Any, prefix: TokenIds, tokens: int, end: int | None = None) -> list[int]:
    """A plain loop: forward everything, take the argmax, again; ends after ``end``."""
    ids = [int(token) for token in prefix]
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prefix) :]


@torch.no_grad()
def next_probabilities(model: Any, prefix: TokenIds) -> np.ndarray:
    """[V] softmax over the token after ``prefix``."""
    return model(torch.from_numpy(prefix.astype(np.int64))[None]).logits[0, -1].softmax(-1).numpy()


@torch.no_grad()
def logprobs(model: Any, prefix: TokenIds, ids: TokenIds, temperature: float = 1.0) -> np.ndarray:
    """[len(ids)] log-probabilities of ``ids`` after ``prefix`` in one forward pass."""
    sequence = torch.from_numpy(np.concatenate((prefix, ids)).astype(np.int64))
    logits = model(sequence[None]).logits[0, len(prefix) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, sequence[len(prefix) :, None])[:, 0].numpy()


def stop_strings_in(tokenizer: Tokenizer, ids: TokenIds) -> list[str]:
    """Strings that occur in the text of ``ids``: whole tokens, and from within one token to within another."""
    texts = [tokenizer.decode(ids[first : first + size]) for size in (1, 2, 3) for first in range(4, len(ids) - size, 5)]
    inside = [text[1:] for text in texts] + [text[:-1] for text in texts]
    return sorted({text for text in texts + inside if text and "\ufffd" not in text})


def until(tokenizer: Tokenizer, ids: TokenIds, stop: str) -> list[int]:
    """The shortest beginning of ``ids`` whose text has ``stop``."""
    size = next(n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n]))
    return ids[:size].tolist()


def prompt(seed: int, length: int) -> TokenIds:
    """Random ids without the special token."""
    return np.random.default_rng(seed).integers(1, VOCABULARY, length).astype(np.uint32)
