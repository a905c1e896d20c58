"""Policy versions on disk: one Hugging Face directory each, complete or absent."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from learner.trainer.distributed.ranks import ALONE, Ranks
from learner.trainer.persistence.atomic_directory import discard, on_disk
from treegrpo.config.schema import Dtype
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError
from treegrpo.storage import manifest

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


def write_model(
    model: PreTrainedModel, folder: Path, tokenizer_from: Path, dtype: Dtype = "float32", ranks: Ranks = ALONE
) -> None:
    """Write ``model`` as a Hugging Face directory, weights as ``dtype``, with the tokenizer of another directory.

    All ranks call it, as they do with what follows; rank 0 writes. Raises DiskError on all of them.
    """
    kind = getattr(torch, dtype)
    state = ranks.whole_state(model, kind)

    def write() -> None:
        with on_disk(folder):
            model.save_pretrained(folder, state_dict=state)
            config = cast("Any", copy.deepcopy(model.config))
            config.dtype = kind
            config.save_pretrained(folder)
            for name in _TOKENIZER_FILES:
                if (tokenizer_from / name).is_file():
                    shutil.copyfile(tokenizer_from / name, folder / name)

    ranks.first(write)


def export(model: PreTrainedModel, folder: Path, tokenizer_from: Path, dtype: Dtype, ranks: Ranks = ALONE) -> None:
    """`write_model`, in the place of whatever ``folder`` was before, all at once and with its manifest."""

    def write_manifest() -> None:
        with on_disk(folder):
            manifest.write_manifest(partial)

    with ranks.whole(folder) as partial:
        write_model(model, partial, tokenizer_from, dtype, ranks)
        ranks.first(write_manifest)


def publish(
    model: PreTrainedModel, weights: Path, version: PolicyVersion, tokenizer_from: Path, dtype: Dtype, ranks: Ranks = ALONE
) -> Path:
    """Write policy ``version`` below ``weights``; returns its directory."""
    folder = weights / str(version)
    export(model, folder, tokenizer_from, dtype, ranks)
    return folder


def prune(weights: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` versions, and what crashes have left half written."""
    for version in published(weights)[:-keep]:
        discard(weights / str(version))
    for partial in weights.glob(".*.partial"):
        discard(partial)


def published(weights: Path) -> list[PolicyVersion]:
    """The versions below ``weights``, oldest first."""
    found: list[PolicyVersion] = []
    for folder in weights.glob("[!.]*"):
        try:
            found.append(PolicyVersion.parse(folder.name))
        except ContractError:
            continue  # somebody else's folder
    return sorted(found)
