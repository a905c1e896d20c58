"""How many token ids the model knows, read without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from treegrpo.errors import ModelError


def vocabulary(model: Path) -> int:
    """``vocab_size`` of a model directory's config.json: ids go from 0 to one less. Raises ModelError."""
    path = model / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} (model.path) cannot be read ({error.strerror}); give a Hugging Face causal LM.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); restore it from the model's source.") from error
    size = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ModelError(
            f"{path} has vocab_size {size!r}, not the model's number of token ids; restore it from the model's source."
        )
    return size
