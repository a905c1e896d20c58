"""The section `train` of the configuration: the training algorithm, and which keys each choice uses."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from treegrpo.config.base import Section

Loss = Literal["ppo", "cispo", "gspo", "dppo"]
Correction = Literal["none", "decoupled", "tis", "icepop", "m2po"]
M2poTokens = Literal["trust_region", "all"]
KlEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["leaf_mean", "token_mean"]
Singleton = Literal["zero", "raw"]
Estimator = Literal["tree", "inter", "intra", "two_norm", "rloo", "treepo", "treerl", "sibling_loo", "at2po"]
ESTIMATOR_OPTIONS = {
    "tree": {"inter_weight", "intra_weight", "singleton", "std_floor"},
    "inter": {"singleton", "std_floor"},
    "intra": {"singleton", "std_floor"},
    "two_norm": {"singleton", "std_floor"},
    "at2po": {"singleton", "std_floor"},
    "rloo": {"singleton"},
    "treepo": {"singleton"},
}
LOSS_OPTIONS = {
    "ppo": {"clip_low", "clip_high", "dual_clip"},
    "cispo": {"clip_low", "clip_high"},
    "gspo": {"clip_low", "clip_high"},
    "dppo": {"dppo_delta", "dppo_cap"},
}
CORRECTION_OPTIONS = {"tis": {"tis_cap"}, "icepop": {"icepop_low", "icepop_high"}, "m2po": {"m2po_tau", "m2po_tokens"}}
OPTIONS = {"estimator": ESTIMATOR_OPTIONS, "loss": LOSS_OPTIONS, "correction": CORRECTION_OPTIONS}
"""By the key that chooses: what each choice uses. Options of other choices are refused, not ignored, unless they have
their default: a configuration that was written out whole can be read again."""

CLIPS = {"cispo": (1.0, 0.2), "gspo": (3e-4, 4e-4)}
"""`clip_low` and `clip_high` of the losses that need others than the fields' defaults."""
GSPO_CLIP_MAX = 0.05
"""The ratio of a whole leaf hardly moves: a wider clip, like that of ppo, would be none."""


def _fitting(option: str, table: dict[str, set[str]]) -> list[str]:
    return [choice for choice, options in table.items() if option in options]


class TrainConfig(Section):
    steps: int = Field(default=100, ge=1)
    batch: int = Field(default=32, ge=1)
    """Groups (questions) of one optimiser step."""
    max_lag: int = Field(default=1, ge=0)
    """Staleness bound in versions, from which the leases in flight follow: no token that is trained is older. A slow group
    that would exceed it is stopped, and, if that takes too long, closed with the leaves it has."""
    lr: float = Field(default=1e-6, gt=0)
    warmup_ratio: float = Field(default=0.285, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly; constant afterwards."""
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps of one batch, each on its share of the groups."""
    loss: Loss = "ppo"
    """The trust region: clipped ratio, clipped weight, clipped ratio of a whole leaf, mask by divergence. See docs/losses.md."""
    clip_low: float = Field(default=0.2, gt=0)
    """ε_low: a ratio below 1 − ε_low no longer pushes down. 3e-4 for gspo; 1 (no bound) for cispo; dppo has none."""
    clip_high: float = Field(default=0.2, gt=0)
    """ε_high: a ratio above 1 + ε_high no longer pulls up. 4e-4 for gspo."""
    dual_clip: float = Field(default=0.0, ge=0)
    """c > 1 bounds the ratio where the advantage is negative (ppo); 0: no bound."""
    dppo_delta: float = Field(default=0.2, gt=0, le=1)
    """δ: a token whose probability moved further than this from the sampler's is not moved on."""
    dppo_cap: float = Field(default=20.0, ge=0)
    """C > 1: r weighs at most this in dppo, as in verl; 0: no bound, as in the formula of the paper."""
    correction: Correction = "none"
    """none: the ratio is against the policy that sampled. Otherwise it is against the policy at the start of the batch, and
    the weight ρ between the two is used whole, capped (tis), or masked (icepop, m2po)."""
    tis_cap: float = Field(default=2.0, gt=0)
    """C: ρ is at most this."""
    icepop_low: float = Field(default=0.5, ge=0)
    icepop_high: float = Field(default=5.0, gt=0, validate_default=True)
    """Tokens with ρ outside icepop_low to icepop_high are left out."""
    m2po_tau: float = Field(default=0.04, gt=0)
    """τ: the tokens of largest (log ρ)² of a batch are left out until the mean of the others is at most this."""
    m2po_tokens: M2poTokens = "trust_region"
    """The tokens that m2po measures and may leave out. trust_region: those whose ρ has moved the way their advantage pulls,
    as in the paper. all: every token, as in AReaL."""
    kl_coef: float = Field(default=0.001, ge=0)
    """β of the penalty against the reference policy; 0 does without the reference model."""
    kl_estimator: KlEstimator = "k3"
    """Estimator of the penalty; `kl_reference` is always k3."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus; 0: none."""
    aggregation: Aggregation = "leaf_mean"
    estimator: Estimator = "tree"
    """From rewards to advantages, see docs/estimators.md. The four keys below are each of some estimators only."""
    inter_weight: float = Field(default=1.0, ge=0)
    """Of the estimator "tree"."""
    intra_weight: float = Field(default=1.0, ge=0)
    singleton: Singleton = "zero"
    """The advantage of a lone leaf: 0, or its reward as in the reference code."""
    std_floor: float = Field(default=0.0, ge=0)
    """Rewards are divided by at least this much: keeps tiny format differences of all-wrong groups tiny."""
    pack_tokens: int = Field(default=8192, ge=64)
    """Tokens of one forward and backward pass."""
    checkpoint_every: int = Field(default=20, ge=1)
    keep_checkpoints: int = Field(default=2, ge=2)
    gradient_checkpointing: bool = False
    """Compute a layer again in the backward pass instead of keeping what it made: less memory, about a third more time."""
    processes: int = Field(default=1, ge=1)
    """Ranks of the trainer on this machine, which it starts by itself; torchrun starts them on several."""
    threads: int = Field(default=1, ge=1)
    """Of each rank."""

    @model_validator(mode="before")
    @classmethod
    def _clips_of_the_loss(cls, values: Any) -> Any:
        if isinstance(values, dict) and (clips := CLIPS.get(str(cast("dict[str, Any]", values).get("loss")))):
            return {"clip_low": clips[0], "clip_high": clips[1], **values}
        return values

    @field_validator("minibatches")
    @classmethod
    def _minibatches_fit(cls, count: int, info: ValidationInfo) -> int:
        if count > (batch := info.data.get("batch", count)):
            raise PydanticCustomError("minibatches", "a batch of {batch} groups makes no more minibatches", {"batch": batch})
        return count

    @field_validator("dual_clip", "dppo_cap")
    @classmethod
    def _bound_fits(cls, bound: float) -> float:
        if 0 < bound <= 1:
            raise PydanticCustomError("bound", "it must be above 1, for example 3; 0 disables it")
        return bound

    @field_validator("clip_low", "clip_high")
    @classmethod
    def _clip_fits(cls, clip: float, info: ValidationInfo) -> float:
        if info.data.get("loss") == "gspo" and clip > GSPO_CLIP_MAX:
            raise PydanticCustomError(
                "clip",
                "train.loss = gspo clips the mean ratio of a whole leaf, on which a clip this wide has no effect; "
                "leave it out for the clip of gspo, or take at most {most}",
                {"most": GSPO_CLIP_MAX},
            )
        return clip

    @field_validator("correction")
    @classmethod
    def _correction_fits(cls, correction: str, info: ValidationInfo) -> str:
        if correction == "m2po" and info.data.get("loss") == "gspo":
            raise PydanticCustomError(
                "correction", "m2po picks single tokens where train.loss = gspo weighs whole leaves; take icepop or tis"
            )
        return correction

    @field_validator("icepop_high")
    @classmethod
    def _icepop_fits(cls, high: float, info: ValidationInfo) -> float:
        if high <= (low := info.data.get("icepop_low", 0.0)):
            raise PydanticCustomError("icepop", "it has to be above train.icepop_low, which is {low}", {"low": low})
        return high

    @field_validator("kl_estimator")
    @classmethod
    def _penalty_uses_it(cls, estimator: str, info: ValidationInfo) -> str:
        if estimator != cls.model_fields["kl_estimator"].default and info.data.get("kl_coef") == 0:
            raise PydanticCustomError("penalty", "there is no penalty with train.kl_coef = 0; leave it out")
        return estimator

    @field_validator("intra_weight")
    @classmethod
    def _weights_fit(cls, intra: float, info: ValidationInfo) -> float:
        if intra == info.data.get("inter_weight") == 0:
            raise PydanticCustomError("estimator", "with train.inter_weight = 0 as well every advantage would be 0")
        return intra

    @field_validator(*sorted({name for table in OPTIONS.values() for options in table.values() for name in options}))
    @classmethod
    def _choice_uses_it(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        choice, fitting = next((key, fits) for key, table in OPTIONS.items() if (fits := _fitting(name, table)))
        chosen = info.data.get(choice)  # missing if it is none of the choices, which is then the error
        if chosen is not None and chosen not in fitting and value != cls.model_fields[name].default:
            raise PydanticCustomError(
                "option",
                "only train.{choice} = {fitting} uses it, and train.{choice} is {chosen}; leave it out",
                {"choice": choice, "fitting": " or ".join(fitting), "chosen": chosen},
            )
        return value
