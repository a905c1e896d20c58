"""Policy versions on disk: one Hugging Face directory each, complete or absent."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from learner.trainer.distributed.ranks import SINGLE_RANK, Ranks
from learner.trainer.persistence.atomic_directory import replace_directory_on_ranks
from learner.trainer.persistence.disk_errors import translate_disk_errors
from treegrpo.config.schema import Dtype
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError
from treegrpo.storage import manifest
from treegrpo.storage.atomic import remove_tree

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
    model: PreTrainedModel, folder: Path, tokenizer_from: Path, dtype: Dtype = "float32", ranks: Ranks = SINGLE_RANK
) -> None:
    """Write ``model`` as a Hugging Face directory, weights as ``dtype``, with the tokenizer of another directory.

    All ranks call it; rank 0 writes. Raises DiskError on all of them.
    """
    kind = getattr(torch, dtype)
    state = ranks.gather_state(model, kind)

    def write() -> None:
        with translate_disk_errors(folder):
            model.save_pretrained(folder, state_dict=state)
            config = cast("Any", copy.deepcopy(model.config))
            config.dtype = kind
            config.save_pretrained(folder)
            for name in _TOKENIZER_FILES:
                if (tokenizer_from / name).is_file():
                    shutil.copyfile(tokenizer_from / name, folder / name)

    ranks.run_on_first(write)


def export_model(model: PreTrainedModel, folder: Path, tokenizer_from: Path, dtype: Dtype, ranks: Ranks = SINGLE_RANK) -> None:
    """Replace the directory ``folder`` atomically by the model and its manifest. All ranks call it."""

    def write_manifest() -> None:
        with translate_disk_errors(folder):
            manifest.write_manifest(partial)

    with replace_directory_on_ranks(folder, ranks) as partial:
        write_model(model, partial, tokenizer_from, dtype, ranks)
        ranks.run_on_first(write_manifest)


def write_version(
    model: PreTrainedModel, weights: Path, version: PolicyVersion, tokenizer_from: Path, dtype: Dtype, ranks: Ranks = SINGLE_RANK
) -> Path:
    """Write policy ``version`` below ``weights``; returns its directory. All ranks call it."""
    folder = weights / str(version)
    export_model(model, folder, tokenizer_from, dtype, ranks)
    return folder


def prune_versions(weights: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` versions, and partial ones that crashes have left."""
    for version in list_versions(weights)[:-keep]:
        remove_tree(weights / str(version))
    for partial in weights.glob(".*.partial"):
        remove_tree(partial)


def list_versions(weights: Path) -> list[PolicyVersion]:
    """The versions below ``weights``, oldest first."""
    found: list[PolicyVersion] = []
    for folder in weights.glob("[!.]*"):
        try:
            found.append(PolicyVersion.parse(folder.name))
        except ContractError:
            continue  # not a version
    return sorted(found)
