"""Tiny models, small trees and the configuration of a run of seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from learner.trainer.packing.model import load_model
from treegrpo.config.schema import Config
from treegrpo.core.question import Question
from treegrpo.core.step import Leaf, PolicyVersion, Step, StepStatus, Subtree, VersionSpan
from treegrpo.core.tree import Group, Tree

VOCABULARY = 64
CPU = torch.device("cpu")
STOP = 63
START = PolicyVersion(0, 0)


def write_tiny(folder: Path, seed: int = 0) -> Path:
    """A random Qwen2 of 20 thousand parameters as a model directory."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=STOP,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def tiny(folder: Path) -> PreTrainedModel:
    return load_model(write_tiny(folder), CPU)


def configure(folder: Path, **train: Any) -> Config:
    """A run in ``folder``/run with the model in ``folder``/model."""
    values = {"steps": 4, "batch": 2, "lr": 1e-2, "kl_coef": 0.0, "warmup_ratio": 0.0, "pack_tokens": 256, **train}
    return Config.model_validate({"run": {"dir": folder / "run"}, "model": {"path": folder / "model"}, "train": values})


def step(
    node: int,
    parent: int,
    action: Sequence[int],
    observation: Sequence[int] = (),
    *,
    logprobs: Sequence[float] | None = None,
    status: StepStatus = StepStatus.OK,
    version: PolicyVersion = START,
) -> Step:
    """A step sampled with ``logprobs`` (−1 each unless told) from one version."""
    return Step(
        node,
        parent,
        np.array(action, np.uint32),
        np.array([-1.0] * len(action) if logprobs is None else logprobs, np.float32),
        np.array(observation, np.uint32),
        (VersionSpan(version, 0, len(action)),),
        status,
    )


def subtree(
    steps: Sequence[Step], leaves: dict[int, float], *, prompt: Sequence[int] = (), tree: int = 0, index: int = 0
) -> Subtree:
    """A subtree whose ``leaves`` have these rewards by node; a full reward is an exact match."""
    made = tuple(Leaf(node, {"em": reward}, {"em": float(reward == 1)}) for node, reward in leaves.items())
    return Subtree("lease", tree, index, steps[0].parent, tuple(steps), made, np.array(prompt, np.uint32))


def forked(rewards: tuple[float, float] = (1.0, 0.0), prompt: Sequence[int] = (1, 2, 3), tree: int = 0) -> list[Subtree]:
    """A tree of two leaves that share their first step: prompt → 1 → {2, 3}."""
    chain = [step(1, 0, [10, 11], [30, 31, 32]), step(2, 1, [12, STOP])]
    branch = [step(3, 1, [13, 14, STOP])]
    return [
        subtree(chain, {2: rewards[0]}, prompt=prompt, tree=tree),
        subtree(branch, {3: rewards[1]}, tree=tree, index=1),
    ]


def grown(subtrees: Sequence[Subtree]) -> Tree:
    tree = Tree()
    for part in subtrees:
        tree.append_subtree(part)
    return tree


def group(subtrees: Sequence[Subtree], name: str = "q") -> Group:
    made = Group(name, Question(name, "test", (), ("x",)))
    for part in subtrees:
        made.append_subtree(part)
    return made


def random_group(rng: np.random.Generator, name: str = "q", trees: int = 2, vocabulary: int = VOCABULARY) -> Group:
    """Random trees of several steps, with branches off random nodes and log-probabilities far from the model's."""
    subtrees: list[Subtree] = []
    for index in range(trees):
        nodes = [0]
        for number in range(3):
            parent, steps = int(rng.choice(nodes)) if number else 0, list[Step]()
            for depth in range(int(rng.integers(1, 4))):
                node = 10 * number + depth + 1
                action = rng.integers(0, vocabulary, int(rng.integers(1, 6)))
                logprobs = rng.normal(-4.1, 0.5, len(action))
                steps.append(step(node, parent, action.tolist(), logprobs=logprobs.tolist()))
                parent = node
            seen = [step(s.node, s.parent, s.action.tolist(), [5, 6], logprobs=s.logprobs.tolist()) for s in steps[:-1]]
            prompt = rng.integers(0, vocabulary, 4).tolist() if number == 0 else ()
            subtrees.append(subtree([*seen, steps[-1]], {parent: float(rng.normal())}, prompt=prompt, tree=index, index=number))
            nodes += [s.node for s in seen]
    return group(subtrees, name)
