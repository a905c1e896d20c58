"""What a model's configuration says about training it on trees, known before any weight is read."""

from __future__ import annotations

from typing import Any

from treegrpo.errors import ModelError

SHORT_SIGHTED = ("sliding_window", "attention_chunk_size")
MOVING_ROPE = ("dynamic", "longrope")
"""Rotary frequencies that depend on the longest sequence there is: in a pack that would be another path's."""


def unfit(config: Any) -> str:
    """What in a model's configuration trees cannot be computed with; empty if nothing. It shows on long paths only.

    Where there is a list of layers, it says which of them see a window, whatever width is named for those.
    """
    layers = getattr(config, "layer_types", None)
    if others := {kind for kind in layers or () if kind != "full_attention"}:
        return f"layers of the kind {', '.join(sorted(others))}"
    if not layers and getattr(config, "use_sliding_window", True) and any(getattr(config, name, None) for name in SHORT_SIGHTED):
        return "layers that see a window"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return f"rotary positions of the kind {rope}" if rope in MOVING_ROPE else ""


def check_suitable(config: Any, folder: object) -> None:
    """Raise ModelError if the model in ``folder`` with this Hugging Face ``config`` cannot be trained on trees."""
    if reason := unfit(config):
        raise ModelError(
            f"The model in {folder} has {reason}; trees need full attention and positions that stay as they are: "
            "choose another kind."
        )
