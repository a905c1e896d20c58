"""The configuration: every key with its type, its bounds, its default and what it means.

`treegrpo.settings.load` reads it. A limit that follows from other values is a property, not a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from treegrpo.lease import Plan
from treegrpo.section import InputPath, Section
from treegrpo.security import SecurityConfig, within_reach


class RunConfig(Section):
    name: str = Field(default="treegrpo", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Names the run: the MQTT topics begin with treegrpo/NAME."""
    dir: Path = Path("runs/treegrpo")
    """Everything the run writes: journal, weights, checkpoints, progress, logs, plot."""
    seed: int = Field(default=0, ge=0)
    resume: bool = False
    """Continue the run in `dir` from its last checkpoint; without it a used directory is refused."""


class ModelConfig(Section):
    path: InputPath = Path("model")
    """A Hugging Face causal LM directory: config.json, safetensors weights, tokenizer."""
    dtype: Dtype = "float32"


class DataConfig(Section):
    train: InputPath = Path("train.jsonl")
    """Questions to train on, JSONL or parquet, Search-R1's columns."""
    heldout: InputPath = Path("heldout.jsonl")
    """Questions to evaluate on."""


class RolloutConfig(Section):
    trees: int = Field(default=2, ge=1)
    """M: initial chains of a question."""
    rounds: int = Field(default=1, ge=0)
    """L: rounds of expansions; each waits for the one before."""
    expansions: int = Field(default=2, ge=0)
    """N: nodes drawn in every tree in a round."""
    max_turns: int = Field(default=4, ge=1)
    """Turns with tools; one more follows without."""
    max_action_tokens: int = Field(default=256, ge=1)
    """Tokens of one turn."""
    max_context: int = Field(default=4096, ge=16)
    """Tokens of an episode, prompt included; one that no longer fits ends as truncated."""
    temperature: float = Field(default=1.0, gt=0)

    @property
    def plan(self) -> Plan:
        """The same values as a lease carries them."""
        return Plan(**self.model_dump())


Dtype = Literal["float32", "bfloat16"]
Loss = Literal["ppo", "cispo", "gspo", "dppo"]
Correction = Literal["none", "decoupled", "tis", "icepop", "m2po"]
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
    "dppo": {"dppo_delta"},
}
CORRECTION_OPTIONS = {"tis": {"tis_cap"}, "icepop": {"icepop_low", "icepop_high"}, "m2po": {"m2po_tau"}}
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
    that others would push beyond is told to stop expanding, and closed with the leaves it has if that is not enough."""
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
    kl_coef: float = Field(default=0.001, ge=0)
    """β of the penalty against the reference policy; 0 does without the reference model."""
    kl_estimator: KlEstimator = "k3"
    """Of the penalty, if there is one; `kl_reference` reports k3 whatever this is."""
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
    keep_checkpoints: int = Field(default=2, ge=1)
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

    @field_validator("dual_clip")
    @classmethod
    def _dual_clip_fits(cls, bound: float) -> float:
        if 0 < bound <= 1:
            raise PydanticCustomError("dual_clip", "a dual clip is a bound above 1, like 3; 0 does without")
        return bound

    @field_validator("clip_low", "clip_high")
    @classmethod
    def _clip_fits(cls, clip: float, info: ValidationInfo) -> float:
        if info.data.get("loss") == "gspo" and clip > GSPO_CLIP_MAX:
            raise PydanticCustomError(
                "clip",
                "train.loss = gspo clips the mean ratio of a whole leaf, which so wide a clip never holds; "
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


class EvalConfig(Section):
    every: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0: only before the first and after the last."""
    questions: int = Field(default=0, ge=0)
    """Held-out questions of one evaluation; 0: all."""


class EnvironmentConfig(Section):
    reward: Literal["em", "f1"] = "em"
    format_penalty: float = Field(default=0.2, ge=0)
    """λ_f: taken off when the transcript breaks the protocol."""
    topk: int = Field(default=3, ge=1)
    """Documents of one search."""
    max_observation_tokens: int = Field(default=512, ge=16)
    timeout: float = Field(default=20.0, gt=0)
    """Seconds a search may take."""


class EngineConfig(Section):
    kind: Literal["embedded"] = "embedded"
    max_running: int = Field(default=64, ge=1)
    """Generations that run at once."""
    cache_tokens: int = Field(default=65536, ge=0)
    """Tokens whose keys and values the prefix cache keeps."""
    threads: int = Field(default=1, ge=1)


class RetrieverConfig(Section):
    corpus: InputPath = Path("corpus.jsonl")
    """Documents, JSONL with id and contents ("Title\\ntext")."""
    listen: str = "127.0.0.1:8765"
    url: str = ""
    """Where samplers find it; empty: at `listen`."""


class LearnerConfig(Section):
    listen: str = "127.0.0.1:50051"
    """gRPC address samplers connect to."""
    metrics: str = "127.0.0.1:9400"
    """Prometheus address of the intake; the trainer's is the next port."""


class SamplerConfig(Section):
    count: int = Field(default=2, ge=1)
    """Samplers that `treegrpo up` starts."""
    id: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]{0,64}$")
    """Empty: the host name and process id."""
    learner: str = ""
    """The learner's gRPC address; empty: learner.listen."""
    metrics: str = "127.0.0.1:0"
    """Prometheus address; port 0 takes a free one and logs it."""
    retries: int = Field(default=2, ge=0)
    """Times a step is tried again after an engine or tool error."""


class BrokerConfig(Section):
    address: str = "127.0.0.1:1883"
    embedded: bool = True
    """`treegrpo up` starts a broker in a process of its own at `address`; false: one runs there already."""


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    engine: EngineConfig = EngineConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    learner: LearnerConfig = LearnerConfig()
    sampler: SamplerConfig = SamplerConfig()
    broker: BrokerConfig = BrokerConfig()
    security: SecurityConfig = SecurityConfig()

    @property
    def search_url(self) -> str:
        """Where the retriever is."""
        scheme = "https" if self.security.tls else "http"
        return self.retriever.url or f"{scheme}://{within_reach(self.retriever.listen)}"
