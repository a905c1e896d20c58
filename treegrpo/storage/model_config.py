"""Reads a model directory's config.json and generation_config.json, for every service, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from treegrpo.errors import ModelError, describe

CONFIG, GENERATION = "config.json", "generation_config.json"
RESTORE = "restore it from the model's source"
_COUNTS = ("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, slots=True)
class CausalLMConfig:
    """The values of config.json that every service needs."""

    folder: Path
    kind: str
    """`model_type`; empty where the file has none."""
    vocabulary: int
    """`vocab_size`: ids go from 0 to one less."""
    context: int | None
    """`max_position_embeddings`: the longest sequence the model was made for."""
    tied: bool | None
    """`tie_word_embeddings`; None: the default of this kind of model."""
    quantisation: str | None
    """`quant_method` of `quantization_config`; None: the weights are plain numbers."""
    eos: frozenset[int]
    """`eos_token_id` of config.json and generation_config.json."""

    @property
    def file(self) -> Path:
        return self.folder / CONFIG


def read_model_config(folder: Path) -> CausalLMConfig:
    """Read config.json, and generation_config.json where there is one.

    Raises:
        ModelError: a file cannot be read, is not a JSON object, or has a value of another type than it must have.
    """
    file = folder / CONFIG
    values = _object(file)
    values = {**_part(file, values, "text_config"), **values}  # a model that reads text alone has it all outside
    for key in _COUNTS:
        if values.get(key) is not None:
            _whole(file, key, values[key])
    kind, tied = values.get("model_type", ""), values.get("tie_word_embeddings")
    if not isinstance(kind, str):
        raise ModelError(f"{file} has model_type {kind!r}, which is not a name; {RESTORE}.")
    if tied is not None and not isinstance(tied, bool):
        raise ModelError(f"{file} has tie_word_embeddings {tied!r}, not true or false; {RESTORE}.")
    quantised = _part(file, values, "quantization_config")
    return CausalLMConfig(
        folder=folder,
        kind=kind,
        vocabulary=_whole(file, "vocab_size", values.get("vocab_size"), what="the model's number of token ids"),
        context=values.get("max_position_embeddings"),
        tied=tied,
        quantisation=str(quantised.get("quant_method", "unknown")) if quantised else None,
        eos=frozenset(_ids(file, values)) | eos_ids(folder),
    )


def check_context(config: CausalLMConfig, context: int) -> None:
    """Raise ModelError if the model was made for sequences shorter than ``context`` tokens."""
    if config.context is not None and config.context < context:
        raise ModelError(
            f"{config.file} allows {config.context} positions (max_position_embeddings), and rollout.max_context = {context} are "
            "asked for; lower the context, or take a model made for longer ones."
        )


def eos_ids(folder: Path) -> frozenset[int]:
    """The ``eos_token_id`` of config.json and generation_config.json. Raises ModelError."""
    files = (folder / CONFIG, folder / GENERATION)
    return frozenset(one for file in files if file.exists() for one in _ids(file, _object(file)))


def _object(file: Path) -> Mapping[str, Any]:
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"), parse_constant=_constant)
    except FileNotFoundError as error:
        where = f"it has no {file.name}" if file.parent.is_dir() else "there is no such directory"
        raise ModelError(f"The model directory {file.parent} cannot be used: {where}; give a Hugging Face causal LM.") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror or error}); give a Hugging Face causal LM.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON ({describe(error)}); {RESTORE}.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} is not a JSON object; {RESTORE}.")
    return cast("Mapping[str, Any]", found)


def _constant(word: str) -> float:
    """Parse Infinity, which some models' configs contain. Raises ValueError for NaN."""
    if word == "NaN":
        raise ValueError("NaN is the value of a key")
    return float(word)


def _part(file: Path, values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested object; empty if it is missing."""
    part = values.get(key)
    if part is not None and not isinstance(part, dict):
        raise ModelError(f"{file} has {key} {part!r}, not a JSON object; {RESTORE}.")
    return cast("Mapping[str, Any]", part or {})


def _whole(file: Path, key: str, value: object, what: str = "a whole number above 0") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{file} has {key} {value!r}, not {what}; {RESTORE}.")
    return value


def _ids(file: Path, values: Mapping[str, Any]) -> list[int]:
    """``eos_token_id``: a number, a list of them, or nothing."""
    found = values.get("eos_token_id")
    ids = cast("list[object]", [] if found is None else found if isinstance(found, list) else [found])
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool) or one < 0:
            raise ModelError(f"{file} has eos_token_id {found!r}, not the numbers of tokens; give their ids, or {RESTORE}.")
    return cast("list[int]", ids)
