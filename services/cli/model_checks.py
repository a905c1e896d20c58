"""What can be wrong with a model directory and with what is asked of it: found without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from learner.trainer.suitability import check_suitable
from services.sampler.engines.checkpoint import is_tied, library_config
from services.sampler.engines.embedded.architecture import check_servable
from services.sampler.tokenizer import Tokenizer
from treegrpo.config import EngineKind
from treegrpo.errors import ModelError, WeightsError
from treegrpo.model_config import check_context, read_model_config
from treegrpo.weight_files import check_finite, check_head, check_plain_numbers, read_heads


def check_model(path: Path, engine: EngineKind, context: int) -> str:
    """The model directory is whole, ``engine`` runs it for ``context`` tokens, and it can be trained. Raises ModelError."""
    config = read_model_config(path)
    if not config.kind:
        raise ModelError(f"{config.file} has no model_type; restore it from the model's source.")
    if config.quantisation:
        raise ModelError(
            f"{config.file} says that the weights are quantised ({config.quantisation}), which cannot be trained; "
            "give the model in bfloat16, float16 or float32."
        )
    try:
        weights = _check_weights(path)
        library: Any = check_servable(path, context)[0] if engine == "embedded" else library_config(path)
    except WeightsError as error:
        raise ModelError(str(error)) from error
    check_context(config, context)
    check_suitable(library, path)
    Tokenizer.open(path)
    return f"{path} ({config.kind}, {weights})"


def _check_weights(path: Path) -> str:
    tensors = read_heads(path)
    check_plain_numbers(tensors)
    check_head(tensors, path, tied=is_tied(path))
    return check_finite(tensors)
