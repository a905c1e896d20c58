"""Checks of a model directory, and of memory and disk for it, without loading the model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from learner.trainer.packing.model_support import check_trainable
from services.cli.checks.check import CheckWarning
from services.sampler.engines.checkpoint import is_tied, library_config
from services.sampler.engines.embedded.architecture import architecture_of, check_servable, read_supported_config
from services.sampler.engines.embedded.kv_memory import check_kv_memory
from services.sampler.text.prompts import render_prompts
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.config.schema import Config, EngineKind
from treegrpo.core.question import Question
from treegrpo.errors import ConfigError, DataError, ModelError, WeightsError
from treegrpo.runtime.machine_memory import GIB, memory_limit
from treegrpo.runtime.run_directory import check_writable
from treegrpo.storage.manifest import check_model_files
from treegrpo.storage.model_config import check_context, read_model_config
from treegrpo.storage.weight_files import check_finite, check_head, check_plain_numbers, read_heads
from treegrpo.wire.trainer_protocol import KEEP_VERSIONS

TRAINING_BYTES = 16
"""Bytes of a parameter in training: weight, gradient and the optimiser's two averages, in float32."""
WEIGHT_BYTES = 4
CHECKPOINT_BYTES = 12
"""Bytes of a parameter in a checkpoint: weight and the optimiser's two averages."""


def check_model(path: Path, engine: EngineKind, context: int) -> str:
    """The model directory is complete, ``engine`` serves it for ``context`` tokens, and it can be trained. Raises ModelError."""
    check_model_files(path)
    config = read_model_config(path)
    if not config.kind:
        raise ModelError(f"{config.file} has no model_type; restore it from the model's source.")
    if config.quantisation:
        raise ModelError(
            f"{config.file} says that the weights are quantised ({config.quantisation}), which cannot be trained; "
            "give the model in bfloat16, float16 or float32."
        )
    try:
        tensors = read_heads(path)
        check_plain_numbers(tensors)
        check_head(tensors, path, tied=is_tied(path))
        library = check_servable(path, context)[0] if engine == "embedded" else library_config(path)
        finite = check_finite(tensors)
    except WeightsError as error:
        raise ModelError(str(error)) from error
    check_context(config, context)
    check_trainable(library, path)
    return f"{path} ({config.kind}, {finite})"


def check_tokenizer(path: Path) -> str:
    """The tokenizer can be read, and the model has an embedding for each of its ids. Raises ModelError."""
    config, tokenizer = read_model_config(path), Tokenizer.open(path)
    tokenizer.check_fits(config.vocabulary, path)
    template = "a chat template" if tokenizer.has_template else "no chat template: prompts are their plain contents"
    found = f"{len(tokenizer)} ids for {config.vocabulary} embeddings, {template}"
    return found if tokenizer.has_template else CheckWarning(found)


def check_prompts(model: Path, questions: Sequence[Question], key: str, context: int) -> str:
    """The prompts of a file can be rendered, and leave room in a context of ``context`` tokens.

    Raises:
        ModelError: the chat template fails on each of them, or there is none that could tell their roles apart.
        DataError: none of them leaves room.
    """
    tokenizer = Tokenizer.open(model)
    if not tokenizer.has_template and (mixed := next((q for q in questions if len({m.role for m in q.prompt}) > 1), None)):
        raise ModelError(
            f"{model} has no chat template, and prompts of {key} have several roles (question {mixed.id}), which only a template "
            "can tell apart; save chat_template.jinja beside the model, or give each prompt as one message."
        )
    report = render_prompts(tokenizer, questions, context)
    if not report.lengths:
        raise ModelError(f"{model}: {report.failed[0]} So with all {report.count} prompts of {key} that were tried.")
    if report.all_identical:
        raise ModelError(
            f"{model}: the chat template renders all {report.count} prompts of {key} that were tried alike, so no question is in "
            "its prompt; fix it."
        )
    if len(report.unfit) == len(report.lengths):
        raise DataError(
            f"None of the {report.count} prompts of {key} that were tried leaves room for an answer: the shortest has "
            f"{min(report.lengths)} tokens, and rollout.max_context = {context}; raise it, or shorten the prompts."
        )
    if lost := (*report.failed, *report.unfit):
        return CheckWarning(
            f"{len(lost)} of {report.count} prompts of {key} cannot be used, and each such question is set aside after some "
            f"tries: {lost[0]}"
        )
    return f"{report.count} prompts of {key}, {min(report.lengths)} to {max(report.lengths)} tokens of {context}"


def check_memory(config: Config, samplers: int, *, trains: bool) -> str:
    """Check that weights, keys and values on the CPU fit in this machine's memory together.

    Args:
        config: resolved.
        samplers: of this machine.
        trains: the trainer runs here too.

    Raises:
        ConfigError: they do not. The estimate is a lower bound.
    """
    path, engine, context = config.model.path, config.engine, config.rollout.max_context
    parameters = count_parameters(path)
    sampler = 0
    if engine.kind == "embedded":
        architecture = architecture_of(read_supported_config(path), path)
        cache = check_kv_memory(architecture, engine.max_running, context, engine.cache_tokens)
        sampler = samplers * (cache + WEIGHT_BYTES * parameters)
    trainer = parameters * (TRAINING_BYTES + (WEIGHT_BYTES if config.train.kl_coef else 0)) if trains and not _has_gpu() else 0
    limit, needed = memory_limit(), sampler + trainer
    if needed > limit:
        raise ConfigError(
            f"The weights of {path}, and the keys and values of {samplers} samplers with engine.max_running = "
            f"{engine.max_running} and rollout.max_context = {context}, need {needed / GIB:.1f} GiB of memory at least, and "
            f"there are {limit / GIB:.1f} GiB; lower sampler.count, engine.max_running or rollout.max_context, or take a smaller "
            "model."
        )
    return f"{needed / GIB:.2f} of {limit / GIB:.1f} GiB at least"


def check_disk(config: Config) -> str:
    """Check the disk space for a policy version and a checkpoint; warn if it is too little for all. Raises ConfigError."""
    parameters, run_dir = count_parameters(config.model.path), config.run.dir
    free = shutil.disk_usage(check_writable(run_dir, "run.dir")).free
    version = parameters * (WEIGHT_BYTES if config.model.dtype == "float32" else WEIGHT_BYTES // 2)
    checkpoint = parameters * CHECKPOINT_BYTES
    least, most = version + checkpoint, (KEEP_VERSIONS + 2) * version + (config.train.keep_checkpoints + 1) * checkpoint
    if free < least:
        raise ConfigError(
            f"run.dir = {run_dir} has {free / GIB:.2f} GiB free, and one policy version and one checkpoint need "
            f"{least / GIB:.2f} GiB; free space there, or choose another directory."
        )
    found = f"{free / GIB:.1f} GiB free, up to {most / GIB:.2f} GiB needed for policy versions and checkpoints"
    if free < most and not run_dir.exists():
        return CheckWarning(f"{found}: free space in {run_dir}, or lower train.keep_checkpoints")
    return found


def count_parameters(path: Path) -> int:
    """The number of parameters of a model. Raises ModelError."""
    try:
        return sum(math.prod(tensor.shape) for tensor in read_heads(path).values())
    except WeightsError as error:
        raise ModelError(str(error)) from error


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
