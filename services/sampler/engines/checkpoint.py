"""Reading a checkpoint: every tensor is there, has its shape and is finite, or nothing is used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from treegrpo.errors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor by its Hugging Face name."""
INDEX = "model.safetensors.index.json"
_CHECKED = (torch.float32, torch.float16, torch.bfloat16)
"""Narrower types cannot say "not finite" on every device."""


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """What the checkpoint in ``path`` holds, from the heads of its files. Raises WeightsError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _files(path):
        with _Opened(file) as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  # not a dict
    return shapes


def weights_among(shapes: Shapes, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Those of a checkpoint's tensors that are weights.

    A model whose output matrix is ``tied`` to its embedding may carry a copy of it, an old one its rotary buffers.
    """
    return {
        name: shape for name, shape in shapes.items() if not (name.endswith("inv_freq") or (tied and name == "lm_head.weight"))
    }


def read_tensors(path: Path, expected: Shapes, *, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the checkpoint in ``path``, one after the other, each checked.

    Args:
        path: directory with safetensors files.
        expected: the shape each of the model's tensors must have.
        tied: the model has no output matrix of its own; a copy in the file is left out.

    Raises:
        WeightsError: files or tensors are missing, unreadable, of another shape, unknown to the model, or not finite.
    """
    shapes = weights_among(read_shapes(path), tied=tied)
    if missing := sorted(expected.keys() - shapes.keys()):
        raise WeightsError(f"{path} lacks {len(missing)} tensors of the model, {missing[0]} first; publish the complete model.")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise WeightsError(
            f"{path} has {len(unknown)} tensors the model does not know, {unknown[0]} first; publish weights of the same model."
        )
    for file in _files(path):
        with _Opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                if name in shapes:
                    yield name, _checked(name, tensors.get_tensor(name), expected[name], path)


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...], path: Path) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise WeightsError(
            f"{name} in {path} has shape {tuple(tensor.shape)}, the model needs {shape}; publish weights of the same model."
        )
    if tensor.dtype in _CHECKED and not torch.isfinite(tensor).all():
        raise WeightsError(f"{name} in {path} has values that are not finite; go back to an earlier policy version.")
    return tensor


class _Opened:
    """A safetensors file, open for the time of the block; what cannot be read is a WeightsError."""

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


def _files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        try:
            names: dict[str, str] = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path / INDEX} is not a safetensors index ({error!r}); fetch this version again.") from error
        files = [path / name for name in sorted(set(names.values()))]
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file} does not exist; save the model with safetensors (save_pretrained does).")
    return files
