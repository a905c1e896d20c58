"""The law of tree packs: loss and every gradient are those of one path at a time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.trainer.optimizer_steps import Updater
from learner.trainer.packing.model import load_model
from tests.trainer.builders import CPU, STOP, configure, group, random_group, step, subtree, write_tiny
from tests.trainer.model_families import FAMILIES, write_family
from tests.trainer.per_path_reference import applied_gradients, assert_same, exact, in_float64, naive_loss, packs_of, plain
from treegrpo.config.schema import Config
from treegrpo.config.train import Estimator
from treegrpo.core.tree import Group

LOSSES: list[dict[str, Any]] = [
    {"loss": "ppo", "clip_low": 0.05, "clip_high": 0.1},
    {"loss": "ppo", "dual_clip": 1.1},
    {"loss": "cispo", "clip_low": 0.05, "clip_high": 0.1},
    {"loss": "gspo", "clip_low": 0.01, "clip_high": 0.02},
    {"loss": "dppo", "dppo_delta": 0.005},
]
BOTH = [*itertools.product(range(len(LOSSES)), get_args(Estimator))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("exact") / "model")


def compare(found: PreTrainedModel, wanted: PreTrainedModel, groups: list[Group], config: Config, tolerance: float) -> None:
    """Loss and gradients of ``found`` on packs against those of ``wanted`` one path at a time; the weights are the same."""
    expected = naive_loss(wanted, wanted, wanted, groups, config)
    gradients = torch.autograd.grad(expected, list(wanted.parameters()))
    packs = packs_of(groups, config)
    updater = Updater(config, found, None)
    seen = applied_gradients(updater)
    update = updater.step_minibatches([in_float64(packs) if tolerance < 1e-8 else packs], 0)
    scale = max(1.0, abs(expected.item()))
    assert abs(update.loss - expected.item()) <= tolerance * scale
    if max(g.abs().max().item() for g in gradients) < 1e-12:  # advantages that cancel out
        assert update.grad_norm < 1e-12
    else:
        assert_same(seen[0], gradients, tolerance)


@settings(max_examples=90, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), both=st.sampled_from(BOTH), budget=st.sampled_from([64, 100, 1024]))
def test_random_trees_in_float64(folder: Path, tmp_path: Path, seed: int, both: tuple[int, Estimator], budget: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [random_group(rng, str(n)) for n in range(int(rng.integers(1, 4)))]
    loss, estimator = LOSSES[both[0]], both[1]
    config = configure(tmp_path, **loss, estimator=estimator, pack_tokens=budget, lr=1e-12, max_grad_norm=1e9)
    compare(exact(load_model(folder, CPU)), plain(folder), groups, config, 1e-10)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), both=st.sampled_from(BOTH))
def test_random_trees_in_float32(folder: Path, tmp_path: Path, seed: int, both: tuple[int, Estimator]) -> None:
    groups = [random_group(np.random.default_rng(seed), str(n)) for n in range(2)]
    config = configure(tmp_path, **LOSSES[both[0]], estimator=both[1], lr=1e-12, max_grad_norm=1e9)
    compare(load_model(folder, CPU), plain(folder).float(), groups, config, 1e-5)


def edge(kind: str) -> Group:
    """The edge cases, each in a group of two leaves or more with rewards that differ."""
    match kind:
        case "single tokens":
            chain = [step(1, 0, [7]), step(2, 1, [8]), step(3, 2, [9])]
            return group([subtree(chain, {3: 1.0}, prompt=[1]), subtree([step(4, 1, [10])], {4: 0.0}, index=1)])
        case "duplicate leaves":
            first = [step(1, 0, [7, 8], [5, 6]), step(2, 1, [9, STOP])]
            branches = [subtree([step(n, 1, [9, STOP])], {n: r}, index=n) for n, r in ((3, 0.4), (4, 0.0))]
            return group([subtree(first, {2: 1.0}, prompt=[1, 2]), *branches, subtree([step(5, 1, [8])], {5: 0.1}, index=5)])
        case "an only child":
            chain = [step(1, 0, [7, 8]), step(2, 1, [9], [3, 3]), step(3, 2, [STOP])]
            return group([subtree(chain, {3: 1.0}, prompt=[1]), subtree([step(1, 0, [11])], {1: 0.2}, prompt=[1], tree=1)])
        case "observations at a fork":
            chain = [step(1, 0, [7, 8], [5, 6, 7]), step(2, 1, [9], [2]), step(3, 2, [STOP])]
            branches = [subtree([step(4, 1, [12, 13])], {4: 0.0}, index=1), subtree([step(5, 1, [9, 14])], {5: 0.5}, index=2)]
            return group([subtree(chain, {3: 1.0}, prompt=[1, 2]), *branches])
        case _:
            # A leaf whose tokens are the beginning of another leaf's.
            chain = [step(1, 0, [7, 8, 9, 10])]
            return group([subtree(chain, {1: 1.0}, prompt=[1]), subtree([step(2, 0, [7, 8])], {2: 0.0}, index=1)])


@pytest.mark.parametrize("kind", ["single tokens", "duplicate leaves", "an only child", "observations at a fork", "a beginning"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda train: "-".join(str(value) for value in train.values()))
def test_edge_cases(folder: Path, tmp_path: Path, kind: str, loss: dict[str, Any]) -> None:
    for estimator in ("tree", "treerl"):
        config = configure(tmp_path, **loss, estimator=estimator, lr=1e-12, max_grad_norm=1e9, kl_coef=0.0)
        compare(exact(load_model(folder, CPU)), plain(folder), [edge(kind)], config, 1e-10)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_every_family_with_and_without_gradient_checkpointing(tmp_path: Path, family: str, again: bool) -> None:
    model = write_family(tmp_path / "model", family)
    groups = [random_group(np.random.default_rng(n), str(n)) for n in range(2)]
    config = configure(tmp_path, clip_low=0.05, clip_high=0.1, lr=1e-12, max_grad_norm=1e9)
    compare(load_model(model, CPU, gradient_checkpointing=again), load_model_plain(model), groups, config, 1e-5)


def load_model_plain(model: Path) -> PreTrainedModel:
    """As transformers loads it, with its own attention."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    cast("Any", loaded.get_input_embeddings()).padding_idx = None
    return loaded
