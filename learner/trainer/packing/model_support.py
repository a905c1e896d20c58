"""Model support: checks by a model's config that it can be trained on trees, before any weight is read."""

from __future__ import annotations

from typing import Any

from treegrpo.errors import ModelError

WINDOW_KEYS = ("sliding_window", "attention_chunk_size")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary frequencies that depend on the longest sequence there is: in a pack that would be another path's."""


def unsupported_feature(config: Any) -> str:
    """The feature of a model's configuration that does not work on trees; empty if there is none. It fails on long paths only.

    A list of layers, if there is one, decides which of them use a window, not the configured width.
    """
    layers = getattr(config, "layer_types", None)
    if others := {kind for kind in layers or () if kind != "full_attention"}:
        return f"layers of the kind {', '.join(sorted(others))}"
    if not layers and getattr(config, "use_sliding_window", True) and any(getattr(config, name, None) for name in WINDOW_KEYS):
        return "layers that see a window"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return f"rotary positions of the kind {rope}" if rope in LENGTH_DEPENDENT_ROPE else ""


def check_trainable(config: Any, folder: object) -> None:
    """Raise ModelError if the model in ``folder`` with this Hugging Face ``config`` cannot be trained on trees."""
    if reason := unsupported_feature(config):
        raise ModelError(
            f"The model in {folder} has {reason}; trees need full attention and positions that stay as they are: "
            "choose another kind."
        )
