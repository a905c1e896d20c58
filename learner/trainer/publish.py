"""Policy versions on disk: one Hugging Face directory each, complete or absent."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from learner.trainer.durable import whole
from learner.trainer.model import Dtype
from treegrpo.errors import ContractError
from treegrpo.tree import PolicyVersion

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def write_model(model: PreTrainedModel, folder: Path, tokenizer_from: Path, dtype: Dtype = "float32") -> None:
    """Write ``model`` as a Hugging Face directory, weights as ``dtype``, with the tokenizer of another directory."""
    kind = getattr(torch, dtype)
    model.save_pretrained(folder, state_dict={name: value.to(kind) for name, value in model.state_dict().items()})
    config = cast("Any", copy.deepcopy(model.config))
    config.dtype = kind
    config.save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)


def export(model: PreTrainedModel, folder: Path, tokenizer_from: Path, dtype: Dtype) -> None:
    """`write_model`, in the place of whatever ``folder`` was before, all at once."""
    with whole(folder) as partial:
        write_model(model, partial, tokenizer_from, dtype)


def publish(model: PreTrainedModel, weights: Path, version: PolicyVersion, tokenizer_from: Path, dtype: Dtype) -> Path:
    """Write policy ``version`` below ``weights``; returns its directory."""
    folder = weights / str(version)
    export(model, folder, tokenizer_from, dtype)
    return folder


def prune(weights: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` versions."""
    for version in published(weights)[:-keep]:
        shutil.rmtree(weights / str(version))


def published(weights: Path) -> list[PolicyVersion]:
    """The versions below ``weights``, oldest first."""
    found: list[PolicyVersion] = []
    for folder in weights.glob("[!.]*"):
        try:
            found.append(PolicyVersion.parse(folder.name))
        except ContractError:
            continue  # somebody else's folder
    return sorted(found)
