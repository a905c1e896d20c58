"""Safetensors files of a model: lists them, reads their headers, checks that their values can be used.

Needs no torch: a header is its length and JSON, followed by the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from treegrpo.errors import WeightsError, describe

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""How the names of input embeddings end."""
RESTORE = "restore it from where it came"
EXPONENTS: Mapping[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
"""By number type: its bits as an integer, and the bits of its exponent, which are all set in a value that is not finite."""
SCAN_BYTES = 1 << 30
"""Of a checkpoint that is larger, each tensor's beginning is looked at; a part that loads it looks at the rest."""
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the head of its file describes it."""

    file: Path
    name: str
    dtype: str
    """safetensors' word for it: F32, BF16, I8, …"""
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin in the file."""
    size: int
    """Their number."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, the index's where there is one. Raises WeightsError."""
    index = folder / INDEX
    if index.is_file():
        try:
            names: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(names.values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is not a safetensors index ({error!r}); {RESTORE}.") from error
    else:
        files = [folder / SINGLE]
    if missing := [file for file in files if not file.is_file()]:
        among = f", one of {len(files)} that {INDEX} lists," if len(files) > 1 else ""
        raise WeightsError(f"{missing[0]}{among} does not exist; save the model with safetensors (save_pretrained does).")
    return files


def read_heads(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in ``folder`` by its name. Raises WeightsError: a file is missing or torn."""
    return {tensor.name: tensor for file in weight_files(folder) for tensor in _head(file)}


def _head(file: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(file, "numpy") as tensors:  # it compares the head with the length of the file
            tensors.keys()
        with file.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            head: dict[str, Any] = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise WeightsError(f"{file} cannot be read ({describe(error)}); {RESTORE}.") from error
    for name, about in head.items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            yield StoredTensor(file, name, about["dtype"], tuple(about["shape"]), 8 + length + first, last - first)


def check_plain_numbers(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise WeightsError if weights have a type other than a floating-point number of at least 16 bits."""
    for tensor in tensors.values():
        if "weight" in tensor.name.rpartition(".")[2] and tensor.dtype not in EXPONENTS:
            raise WeightsError(
                f"{tensor.file} has quantised weights ({tensor.name} is {tensor.dtype}), which cannot be trained; "
                "give the model in bfloat16, float16 or float32."
            )


def check_head(tensors: Mapping[str, StoredTensor], folder: Path, *, tied: bool) -> None:
    """Check that the output matrix fits config.json.

    Readers differ about a model that ties it to the embedding and has another one in its file: transformers takes the
    one in the file, most engines the embedding. Then the policy that is trained is not the one that samples.

    Args:
        tensors: of the checkpoint in ``folder``.
        folder: for the sentence.
        tied: ``tie_word_embeddings`` of config.json.

    Raises:
        WeightsError: there is a head of its own where it is tied to the embedding, or none where it is not.
    """
    head = tensors.get(HEAD)
    embedding = next((tensor for name, tensor in tensors.items() if name.endswith(EMBEDDINGS)), None)
    if tied and head and embedding and not _equal(head, embedding):
        raise WeightsError(
            f"{folder} has an {HEAD} unlike {embedding.name}, and its config.json says tie_word_embeddings = true; "
            "set that to false if the model was trained with a head of its own, else remove the tensor."
        )
    if not tied and not head and embedding and embedding.name == "model.embed_tokens.weight":
        raise WeightsError(
            f"{folder} has no {HEAD}, and its config.json says tie_word_embeddings = false; set that to true if the model "
            "uses its embedding as head, else restore the tensor."
        )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(np.array_equal(a, b) for a, b in zip(_blocks(one, one.size), _blocks(other, other.size), strict=True))


def check_finite(tensors: Mapping[str, StoredTensor], scan_bytes: int = SCAN_BYTES) -> str:
    """Check that values are finite: of all tensors, or of the beginning of each if they are larger than ``scan_bytes`` together.

    Returns:
        How much was looked at.

    Raises:
        WeightsError: there is one.
    """
    total = sum(tensor.size for tensor in tensors.values())
    share = total if total <= scan_bytes else scan_bytes // len(tensors) // 8 * 8
    for tensor in tensors.values():
        if tensor.dtype in EXPONENTS and not all(_finite(block, tensor.dtype) for block in _blocks(tensor, share)):
            raise WeightsError(f"{tensor.name} in {tensor.file} has values that are not finite; {RESTORE}.")
    return "all values finite" if total <= scan_bytes else f"the first {share} bytes of each tensor finite"


def _blocks(tensor: StoredTensor, limit: int) -> Iterator[np.ndarray]:
    """The first ``limit`` bytes of ``tensor``, in blocks; ``limit`` is a multiple of 8, or all there is."""
    end = tensor.start + min(tensor.size, limit)
    with tensor.file.open("rb") as raw:
        raw.seek(tensor.start)
        while (place := raw.tell()) < end:
            yield np.frombuffer(raw.read(min(_BLOCK_BYTES, end - place)), np.uint8)


def _finite(block: np.ndarray, dtype: str) -> bool:
    bits, exponent = EXPONENTS[dtype]
    return int(np.max(np.bitwise_and(cast("Any", block.view(bits)), exponent), initial=0)) != exponent
