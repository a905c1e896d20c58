"""One optimiser step over a batch of packs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from learner.trainer.loss import Clip, Tally, policy_loss, reference_penalty
from learner.trainer.model import Dtype, score
from learner.trainer.packing import Pack
from treegrpo.config import Config

log = logging.getLogger(__name__)
Outcome = Literal["applied", "no_signal", "not_finite"]


@dataclass(frozen=True, slots=True)
class Update:
    """What a step did."""

    outcome: Outcome = "no_signal"
    loss: float = 0.0
    grad_norm: float = 0.0
    """Before clipping."""
    lr: float = 0.0
    tokens: int = 0
    """Tokens forwarded and backwarded."""
    tally: Tally = field(default_factory=Tally)


class Updater:
    """Owns the policy, its optimiser and the frozen reference policy."""

    def __init__(self, config: Config, model: PreTrainedModel, reference: PreTrainedModel | None) -> None:
        self.model = model
        self.reference = reference
        """None if the reference penalty is off."""
        self._train, self._temperature = config.train, config.rollout.temperature
        self._dtype: Dtype = config.model.dtype
        self._clip = Clip(config.train.clip_low, config.train.clip_high)
        self._device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay, fused=True
        )

    def update(self, packs: Sequence[Pack], step: int) -> Update:
        """Add up the gradients of ``packs`` and step once.

        A gradient that is exactly zero is not applied, or momentum and weight decay would move the policy without
        reason; nor is one that is not finite.
        """
        lr = learning_rate(step, self._train.lr, self._train.warmup_ratio, self._train.steps)
        self.optimizer.zero_grad()
        total, tally = 0.0, Tally()
        for pack in packs:
            loss, counted = self._loss(pack.to(self._device))
            loss.backward()
            total, tally = total + loss.item(), tally + counted
        norm = clip_grad_norm_(self.model.parameters(), self._train.max_grad_norm).item()
        outcome = _outcome(total, norm)
        if outcome == "applied":
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = lr
            self.optimizer.step()
        elif outcome == "not_finite":
            log.error(
                "step %d is not applied: loss %s, gradient norm %s; look at kl_mismatch and train.lr", step + 1, total, norm
            )
        self.optimizer.zero_grad()
        return Update(outcome, total, norm, lr, sum(pack.tokens for pack in packs), tally)

    def _loss(self, pack: Pack) -> tuple[Tensor, Tally]:
        logprob_A, entropy_A = score(self.model, pack, self._temperature, self._dtype)
        loss, tally = policy_loss(logprob_A, pack.sampled_A, pack.plus_A, pack.minus_A, self._clip)
        tally += Tally(0, {"entropy": entropy_A.sum().item()})
        if self.reference is None:
            return loss, tally
        with torch.no_grad():
            reference_A, _ = score(self.reference, pack, self._temperature, self._dtype)
        penalty, counted = reference_penalty(logprob_A, reference_A, pack.weight_A)
        return loss + self._train.kl_coef * penalty, tally + counted


def _outcome(loss: float, norm: float) -> Outcome:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return "not_finite"
    return "applied" if norm > 0 else "no_signal"


def learning_rate(step: int, peak: float, warmup_ratio: float, steps: int) -> float:
    """The rate of the step after ``step`` steps: linear over the first ``warmup_ratio`` of ``steps``, then ``peak``."""
    return peak * min(1.0, (step + 1) / max(1.0, warmup_ratio * steps))
