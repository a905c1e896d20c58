"""The policy: a Hugging Face causal LM, and the log-probabilities it gives to the action tokens of a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.trainer.packing import Pack
from treegrpo.errors import ModelError

Dtype = Literal["float32", "bfloat16"]
CHUNK_ELEMENTS = 1 << 22
"""Logits that exist at a time, in float32: 16 MB."""


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """Read a model directory, weights in float32 whatever the file holds: an optimiser needs them so.

    Raises:
        ModelError: there is no config or no weights, or they cannot be read or do not belong together.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give model.path the directory of a Hugging Face causal LM.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no *.safetensors weights; save the model there with save_pretrained.")
    try:
        model, info = cast("Any", AutoModelForCausalLM).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except Exception as error:  # a broken file surfaces as any of a dozen types
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"The model in {folder} cannot be loaded ({reason}); restore it from its source.") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"The weights in {folder} lack {len(missing)} tensors, {missing[0]} first; restore them.")
    # Here padding is never looked at, and a token that is also the pad token must learn its embedding like any other.
    model.get_input_embeddings().padding_idx = None
    # Dropout would make the trained policy another one than the sampled one.
    return cast("PreTrainedModel", model.eval().to(device))


def score(model: PreTrainedModel, pack: Pack, temperature: float, dtype: Dtype = "float32") -> tuple[Tensor, Tensor]:
    """Log-probability and, without gradient, entropy in nats of every action token of ``pack``.

    They are those of log_softmax(logits / ``temperature``), the distribution the sampler draws from. Only the hidden
    states that predict an action token meet the vocabulary, a chunk at a time; a backward pass makes each chunk's
    logits again instead of keeping them.

    Returns:
        logprob_A, entropy_A: at least float32.
    """
    with torch.autocast(pack.ids_RS.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden_RSH = _decoder(model)(input_ids=pack.ids_RS, use_cache=False).last_hidden_state
        hidden_AH = hidden_RSH.flatten(0, 1).index_select(0, pack.predictor_A)
        head = cast("nn.Module", model.get_output_embeddings())
        size = max(1, CHUNK_ELEMENTS // int(cast("Any", model.config).vocab_size))
        parts = list(zip(hidden_AH.split(size), pack.label_A.split(size), strict=True))
        again = torch.is_grad_enabled() and len(parts) > 1
        scored = [_chunk(head, hidden, label, temperature, again=again) for hidden, label in parts]
    return torch.cat([logprob for logprob, _ in scored]), torch.cat([entropy for _, entropy in scored])


def _decoder(model: PreTrainedModel) -> nn.Module:
    return cast("nn.Module", cast("Any", model).get_decoder())


def _chunk(head: nn.Module, hidden: Tensor, label: Tensor, temperature: float, *, again: bool) -> tuple[Tensor, Tensor]:
    if again:
        return cast(
            "tuple[Tensor, Tensor]",
            checkpoint(_score, head, hidden, label, temperature, use_reentrant=False, preserve_rng_state=False),
        )
    return _score(head, hidden, label, temperature)


def _score(head: nn.Module, hidden_CH: Tensor, label_C: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_CV: Tensor = head(hidden_CH)
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    logprob_CV = torch.log_softmax(logits_CV.to(wide) / temperature, dim=-1)
    with torch.no_grad():
        entropy_C = -(logprob_CV.exp() * logprob_CV).sum(-1)
    return logprob_CV.gather(-1, label_C[:, None])[:, 0], entropy_C
