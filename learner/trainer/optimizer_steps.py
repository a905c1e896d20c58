"""Optimiser steps of one batch: from packs to a new policy.

(proximal policy) ─► for each minibatch: score ─► policy loss + β·penalty − c·entropy ─► gradients ─► clip ─► AdamW
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from learner.trainer.algorithm.corrections import m2po_limit, m2po_log_ratios, mismatch_sums
from learner.trainer.algorithm.loss import entropy_bonus, policy_loss, reference_penalty
from learner.trainer.algorithm.metric_sums import MetricSums
from learner.trainer.distributed.ranks import SINGLE_RANK, Ranks, full_tensor
from learner.trainer.packing.model import Policy
from learner.trainer.packing.packing import Pack
from treegrpo.config.schema import Config

log = logging.getLogger(__name__)
Outcome = Literal["applied", "no_signal", "not_finite"]
ROUNDING = 1e-7
"""A gradient this much smaller than the credit Σ|w·A| that made it is what float32 leaves of nothing."""


@dataclass(frozen=True, slots=True)
class Update:
    """The result of the optimiser steps of one batch."""

    outcomes: tuple[Outcome, ...]
    """One for each minibatch."""
    loss: float
    """Mean over the minibatches, like the norm."""
    grad_norm: float
    """Before clipping."""
    lr: float
    sums: MetricSums
    """Of all ranks: `tokens` forwarded and backwarded, and the figures of `loss` and `corrections`."""


@dataclass(frozen=True, slots=True)
class _Proximal:
    """Scores of the proximal policy, that at the start of the batch, taken before its first step."""

    logprob_A: list[Tensor] | None
    """For each pack of a minibatch; None: it is the policy that is being differentiated."""
    m2po_limit: float
    at_start: bool = True
    """Without ``logprob_A``: no step of the batch comes before this one."""


class Updater:
    """Owns the policy, its optimiser and the frozen reference policy."""

    def __init__(
        self, config: Config, model: PreTrainedModel, reference: PreTrainedModel | None, ranks: Ranks = SINGLE_RANK
    ) -> None:
        """Args:
        config: of the run.
        model: the policy to train, in main memory or, if there is one rank, anywhere.
        reference: None if the reference penalty is off.
        ranks: the weights of both are spread over them.
        """
        self.model = model
        self._train, self._ranks = config.train, ranks
        sides = config.rollout.temperature, config.model.dtype
        self._policy = ranks.shard_policy(Policy(model, *sides))
        self._reference = ranks.shard_policy(Policy(reference, *sides)) if reference is not None else None
        self._device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay, fused=True
        )

    @property
    def vocabulary(self) -> int:
        """Token ids of the policy."""
        return int(cast("Any", self.model.config).vocab_size)

    def step_minibatches(self, minibatches: Sequence[Sequence[Pack]], step: int) -> Update:
        """For each minibatch add up the gradients of its packs and step once.

        A gradient of nothing, or of what rounding leaves where advantages cancel out, is not applied, or AdamW would move
        the policy without reason; nor is one that is not finite.

        Args:
            minibatches: the packs of each, with weights that are normalised within it.
            step: batches done before this one.
        """
        lr = learning_rate(step, self._train.lr, self._train.warmup_ratio, self._train.steps)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        outcomes: list[Outcome] = []
        total, norms = MetricSums(), 0.0
        for packs, proximal in zip(minibatches, self._proximal(minibatches), strict=True):
            sums = self._gradients(packs, proximal)
            norm = full_tensor(clip_grad_norm_(self.model.parameters(), self._train.max_grad_norm)).item()
            outcomes.append(self._apply(sums, norm, step))
            total, norms = total + sums, norms + norm
        return Update(tuple(outcomes), total["loss"] / len(outcomes), norms / len(outcomes), lr, total)

    def _proximal(self, minibatches: Sequence[Sequence[Pack]]) -> list[_Proximal]:
        """Score all tokens once before the first step, unless there is one step only, which computes them itself."""
        m2po = self._train.correction == "m2po"
        if self._train.correction == "none" or (len(minibatches) == 1 and not m2po):
            return [_Proximal(None, math.inf, at_start=number == 0) for number in range(len(minibatches))]
        ahead = [[self._score_without_grad(self._policy, pack.to(self._device)) for pack in packs] for packs in minibatches]
        limit = self._m2po_limit(minibatches, ahead) if m2po else math.inf
        return [_Proximal(scored, limit) for scored in ahead]

    def _m2po_limit(self, minibatches: Sequence[Sequence[Pack]], ahead: Sequence[Sequence[Tensor]]) -> float:
        """`m2po_limit` over the batch of all ranks."""
        log_rho = [torch.zeros(0)]
        for packs, scored in zip(minibatches, ahead, strict=True):
            for pack, proximal_A in zip(packs, scored, strict=True):
                log_rho.append(m2po_log_ratios(proximal_A.cpu() - pack.targets.sampled_A, pack.targets, self._train))
        return m2po_limit(torch.cat(self._ranks.all_gather(torch.cat(log_rho))), self._train.m2po_tau)

    def _gradients(self, packs: Sequence[Pack], proximal: _Proximal) -> MetricSums:
        """Add up the gradients of ``packs``; the metric sums are those of all ranks."""
        self.optimizer.zero_grad()
        sums = MetricSums()
        for number, pack in enumerate(packs):
            known_A = proximal.logprob_A[number] if proximal.logprob_A is not None else None
            loss, figures = self._loss(pack.to(self._device), known_A, proximal)
            loss.backward()
            tokens = pack.tokens if pack.path_tokens else 0  # an empty pack's token does not count
            credit = (pack.targets.weight_P * pack.targets.advantage_P).abs().sum().item()
            own = {"loss": loss.item(), "credit": credit, "tokens": tokens, "path_tokens": pack.path_tokens}
            sums += figures + MetricSums(own)
        return sum(self._ranks.all_gather(sums), MetricSums())

    def _loss(self, pack: Pack, known_A: Tensor | None, proximal: _Proximal) -> tuple[Tensor, MetricSums]:
        train, targets = self._train, pack.targets
        bonus = train.entropy_coef > 0
        logprob_A, entropy_A = self._policy(pack, entropy_grad=bonus)
        proximal_A = logprob_A.detach() if known_A is None else known_A
        loss, sums = policy_loss(logprob_A, proximal_A, targets, train, proximal.m2po_limit)
        entropy, counted = entropy_bonus(entropy_A, targets)
        loss = loss - train.entropy_coef * entropy if bonus else loss
        sums += counted + mismatch_sums(proximal_A, targets, at_start=proximal.at_start)
        if self._reference is None:
            return loss, sums
        penalty, counted = reference_penalty(
            logprob_A, self._score_without_grad(self._reference, pack), targets, train.kl_estimator
        )
        return loss + train.kl_coef * penalty, sums + counted

    def _score_without_grad(self, policy: Policy, pack: Pack) -> Tensor:
        """logprob_A without a gradient."""
        with torch.no_grad():
            return policy(pack)[0]

    def _apply(self, sums: MetricSums, norm: float, step: int) -> Outcome:
        loss = sums["loss"]
        outcome = _outcome(loss, norm, ROUNDING * sums["credit"])
        if outcome == "applied":
            self.optimizer.step()
        elif outcome == "not_finite":
            log.error("step %d is not applied: loss %s, gradient norm %s; see kl_mismatch and train.lr", step + 1, loss, norm)
        self.optimizer.zero_grad()
        return outcome


def _outcome(loss: float, norm: float, noise: float) -> Outcome:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return "not_finite"
    return "applied" if norm > noise else "no_signal"


def learning_rate(step: int, peak: float, warmup_ratio: float, steps: int) -> float:
    """The rate of the step after ``step`` steps: linear over the first ``warmup_ratio`` of ``steps``, then ``peak``."""
    return peak * min(1.0, (step + 1) / max(1.0, warmup_ratio * steps))
