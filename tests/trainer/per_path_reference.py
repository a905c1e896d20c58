"""Reference implementation of a step, one path at a time through the transformers model: what packs must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from learner.trainer.algorithm.advantages import EstimatorOptions, advantages
from learner.trainer.algorithm.credit_assignment import CreditedTree, assign_credit, select_usable
from learner.trainer.algorithm.loss import kl, policy_loss
from learner.trainer.optimizer_steps import Updater
from learner.trainer.packing.packing import Pack, pack
from tests.trainer.builders import random_group
from tests.trainer.target_builders import places
from treegrpo.config.schema import Config
from treegrpo.core.tree import Group, Tree


def credited(groups: Sequence[Group], config: Config) -> list[CreditedTree]:
    batch, options = select_usable(groups), EstimatorOptions.from_config(config.train)
    return assign_credit(batch, [advantages(one.tree_arrays, options) for one in batch], config.train.aggregation)


def packs_of(groups: Sequence[Group], config: Config, ranks: int = 1) -> list[Pack]:
    """As the loop makes them for ``ranks`` processes."""
    keep_zero = config.train.kl_coef > 0 or config.train.entropy_coef > 0
    return pack(credited(groups, config), config.train.pack_tokens, keep_zero=keep_zero, ranks=ranks)


def in_float64(packs: Sequence[Pack]) -> list[Pack]:
    """The same numbers in float64, so that sums over leaves are exact too."""
    names = ("sampled_A", "advantage_P", "weight_P")
    doubled = ({name: getattr(one.targets, name).double() for name in names} for one in packs)
    return [replace(one, targets=replace(one.targets, **values)) for one, values in zip(packs, doubled, strict=True)]


def random_groups(seed: int, count: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [random_group(rng, str(number)) for number in range(count)]


def plain(folder: Path) -> PreTrainedModel:
    """The model of a directory as transformers has it, but for a pad token that learns like any other."""
    model = Qwen2ForCausalLM.from_pretrained(folder).eval()
    cast("Any", model.get_input_embeddings()).padding_idx = None
    return exact(model)


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """In float64 all through; the norms of transformers go by way of float32 whatever comes in."""

    def norm(self: Qwen2RMSNorm | LlamaRMSNorm, hidden: Tensor) -> Tensor:
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if isinstance(module, Qwen2RMSNorm | LlamaRMSNorm):
            module.forward = MethodType(norm, module)
    return model.double()


def by_path(policy: PreTrainedModel, tree: Tree, leaf: int) -> tuple[Tensor, Tensor, list[float]]:
    """logprob and entropy of one leaf's action tokens, and the sampler's logprobs, found by walking along its path."""
    ids, labels, sampled = tree.prompt.tolist(), list[int](), list[float]()
    for part in tree.path(leaf):
        labels += range(len(ids), len(ids) + len(part.action))
        sampled += part.logprobs.tolist()
        ids += part.action.tolist() + part.observation.tolist()
    logprob_SV = torch.log_softmax(cast("Any", policy)(input_ids=torch.tensor([ids])).logits[0], -1)
    predicted_AV = logprob_SV[[label - 1 for label in labels]]
    return predicted_AV[range(len(labels)), [ids[i] for i in labels]], -(predicted_AV.exp() * predicted_AV).sum(-1), sampled


def naive_loss(
    policy: PreTrainedModel, start: PreTrainedModel, reference: PreTrainedModel, groups: Sequence[Group], config: Config
) -> Tensor:
    """One leaf at a time: its policy loss against ``start`` as proximal policy, the penalty, the entropy."""
    train, losses = config.train, list[Tensor]()
    for one in credited(groups, config):
        for leaf, given in one.credits.items():
            logprob, entropy, sampled = by_path(policy, one.tree, leaf)
            with torch.no_grad():
                proximal, compared = (by_path(model, one.tree, leaf)[0] for model in (start, reference))
            steps = one.tree.path(leaf)
            carried = np.repeat(given.advantage_D.astype(np.float32), [len(step.action) for step in steps])
            weight = float(np.float32(given.weight))  # packs hold float32
            targets = places(sampled, [list(enumerate(carried.tolist()))], [weight])
            penalty = weight * kl(logprob, compared, train.kl_estimator).sum()
            bonus = weight * entropy.sum()
            loss, _ = policy_loss(logprob, proximal, targets, train)
            losses.append(loss + train.kl_coef * penalty - train.entropy_coef * bonus)
    return torch.stack(losses).sum()


def applied_gradients(updater: Updater) -> list[list[Tensor]]:
    """A list that fills with the gradients of each optimiser step, as the optimiser gets them."""
    seen: list[list[Tensor]] = []

    def look(*_: Any) -> None:
        seen.append([p.grad.clone() for p in updater.model.parameters() if p.grad is not None])

    updater.optimizer.register_step_pre_hook(look)
    return seen


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    scale = max(gradient.abs().max().item() for gradient in wanted)
    assert max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) <= tolerance * scale
