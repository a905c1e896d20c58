"""Reads checkpoints: every tensor is there, has its shape and is finite, or none is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from treegrpo.errors import ModelError, WeightsError, describe
from treegrpo.storage.model_config import RESTORE, read_model_config
from treegrpo.storage.weight_files import HEAD, check_head, read_heads, weight_files

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor by its Hugging Face name."""
_CHECKED_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Narrower types have no "not finite" on every device."""


def library_config(folder: Path) -> Any:
    """The config of a model directory as transformers reads it, with its defaults. Raises ModelError."""
    config = read_model_config(folder)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a wrong value surfaces as any of a dozen types
        raise ModelError(f"{config.file} cannot be used ({describe(error)}); {RESTORE}.") from error


def is_tied(folder: Path) -> bool:
    """Whether a model's output matrix is its embedding, by config.json or transformers' default. Raises ModelError."""
    tied = read_model_config(folder).tied
    return bool(getattr(library_config(folder), "tie_word_embeddings", False)) if tied is None else tied


def read_weight_shapes(path: Path, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """The weights that the checkpoint in ``path`` holds, from the heads of its files.

    A model whose output matrix is ``tied`` to its embedding may carry a copy of it, an old one its rotary buffers.

    Raises:
        WeightsError: a file cannot be read, or the output matrix is not what ``tied`` says.
    """
    heads = read_heads(path)
    check_head(heads, path, tied=tied)
    return {name: tensor.shape for name, tensor in heads.items() if not (name.endswith("inv_freq") or (tied and name == HEAD))}


def check_shapes(path: Path, expected: Shapes, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """`read_weight_shapes` of a checkpoint that is as ``expected``. Raises WeightsError."""
    shapes = read_weight_shapes(path, tied=tied)
    if missing := sorted(expected.keys() - shapes.keys()):
        raise WeightsError(f"{path} lacks {len(missing)} tensors of the model, {missing[0]} first; publish the complete model.")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise WeightsError(
            f"{path} has {len(unknown)} tensors the model does not know, {unknown[0]} first; publish weights of the same model."
        )
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise WeightsError(
                f"{name} in {path} has shape {shape}, the model needs {expected[name]}; publish weights of the same model."
            )
    return shapes


def read_tensors(path: Path, expected: Shapes, *, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the checkpoint in ``path``, one after the other, each checked.

    Args:
        path: directory with safetensors files.
        expected: the shape each of the model's tensors must have.
        tied: the model has no output matrix of its own; a copy in the file is left out.

    Raises:
        WeightsError: files or tensors are missing, unreadable, of another shape, unknown to the model, or not finite.
    """
    shapes = check_shapes(path, expected, tied=tied)
    for file in weight_files(path):
        with _OpenSafetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                if name in shapes:
                    yield name, _check_finite(name, tensors.get_tensor(name), path)


def _check_finite(name: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    if tensor.dtype in _CHECKED_TYPES and not torch.isfinite(tensor).all():
        raise WeightsError(f"{name} in {path} has values that are not finite; go back to an earlier policy version.")
    return tensor


class _OpenSafetensors:
    """A safetensors file, open within the block; a file that cannot be read raises WeightsError."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tensors: Any = None

    def __enter__(self) -> Any:
        try:
            self._tensors = safe_open(self._file, framework="pt")
            return self._tensors.__enter__()
        except (SafetensorError, OSError) as error:
            raise self._unreadable(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tensors.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError | OSError):
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> WeightsError:
        return WeightsError(f"{self._file} cannot be read ({error}); fetch this policy version again.")
