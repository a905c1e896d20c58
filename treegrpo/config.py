"""The configuration: every key with its type, its bounds, its default and what it means.

`treegrpo.settings.load` reads it. A limit that follows from other values is a property, not a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from treegrpo.lease import Plan


class Input:
    """Marks a path that is read, hence relative to the file that names it."""


InputPath = Annotated[Path, Input()]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


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
    dtype: Literal["float32", "bfloat16"] = "float32"


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


class TrainConfig(Section):
    steps: int = Field(default=100, ge=1)
    batch: int = Field(default=32, ge=1)
    """Groups (questions) of one optimiser step."""
    max_lag: int = Field(default=1, ge=0)
    """Staleness bound in versions, from which the leases in flight follow. A slow group that others overtake is told to
    stop expanding at the bound; the branches it still finishes can make it a version later (`version_lag_max` shows it)."""
    lr: float = Field(default=1e-6, gt=0)
    warmup_ratio: float = Field(default=0.285, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly; constant afterwards."""
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps of one batch, each on its share of the groups."""
    loss: Literal["ppo", "cispo", "gspo", "dppo"] = "ppo"
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.2, gt=0)
    dual_clip: float = Field(default=0.0, ge=0)
    """c > 1 bounds the ratio where the advantage is negative; 0: no bound."""
    dppo_delta: float = Field(default=0.2, gt=0, le=1)
    correction: Literal["none", "decoupled", "tis", "icepop", "m2po"] = "none"
    """none: the ratio is against the policy that sampled. Otherwise it is against the policy at the start of the batch, and
    the weight ρ between the two is used whole, capped (tis), or masked (icepop, m2po)."""
    tis_cap: float = Field(default=2.0, gt=0)
    icepop_low: float = Field(default=0.5, ge=0)
    icepop_high: float = Field(default=5.0, gt=0)
    m2po_tau: float = Field(default=0.04, gt=0)
    kl_coef: float = Field(default=0.001, ge=0)
    """β of the penalty against the reference policy; 0 does without the reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = Field(default=0.0, ge=0)
    aggregation: Literal["leaf_mean", "token_mean"] = "leaf_mean"
    estimator: Literal["tree", "inter", "intra", "rloo", "two_norm", "treerl", "sibling_loo", "treepo", "at2po"] = "tree"
    inter_weight: float = Field(default=1.0, ge=0)
    """Of the estimator "tree"."""
    intra_weight: float = Field(default=1.0, ge=0)
    singleton: Literal["zero", "raw"] = "zero"
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
    """Ranks of the trainer on this machine; `treegrpo up` and `treegrpo learner` start them with torchrun."""
    threads: int = Field(default=1, ge=1)
    """Of each rank."""


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

    @property
    def endpoint(self) -> str:
        return self.url or f"http://{self.listen}"


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
