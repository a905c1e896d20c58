"""Reading a checkpoint: every tensor is there, has its shape and is finite, or nothing is used."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from services.sampler.engines.embedded.architecture import Architecture
from treegrpo.errors import WeightsError

Weights = dict[str, torch.Tensor]
_INDEX = "model.safetensors.index.json"


def read_weights(path: Path, architecture: Architecture) -> Weights:
    """All tensors of the checkpoint in ``path`` as float32, by Hugging Face name.

    Raises:
        WeightsError: files or tensors are missing, unreadable, of another shape, unknown to the model, or not finite.
    """
    expected = architecture.tensors()
    weights: Weights = {}
    for file in _files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                # A tied model may carry a copy of its embedding, an old one its rotary buffers: neither is a weight.
                for name in tensors.keys():  # noqa: SIM118  # not a dict
                    if not (name.endswith("inv_freq") or (architecture.tied and name == "lm_head.weight")):
                        weights[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} cannot be read ({error}); fetch this policy version again.") from error
    if missing := sorted(expected.keys() - weights.keys()):
        raise WeightsError(f"{path} lacks {len(missing)} tensors of the model, {missing[0]} first; publish the complete model.")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise WeightsError(
            f"{path} has {len(unknown)} tensors the model does not know, {unknown[0]} first; publish weights of the same model."
        )
    return {name: _checked(name, tensor, expected[name], path) for name, tensor in weights.items()}


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...], path: Path) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise WeightsError(
            f"{name} in {path} has shape {tuple(tensor.shape)}, the model needs {shape}; publish weights of the same model."
        )
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{name} in {path} has values that are not finite; go back to an earlier policy version.")
    # A copy, because what safetensors returns lies in the file, which may be replaced while the model runs.
    return tensor.to(torch.float32, copy=True)


def _files(path: Path) -> list[Path]:
    if (path / _INDEX).is_file():
        try:
            names: dict[str, str] = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path / _INDEX} is not a safetensors index ({error!r}); fetch this version again.") from error
        files = [path / name for name in sorted(set(names.values()))]
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file} does not exist; save the model with safetensors (save_pretrained does).")
    return files
