"""Configuration schema: every key with its type, bounds, default and meaning.

`treegrpo.config.loader.load_config` reads it. A limit that follows from other values is a property, not a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from treegrpo.config.base import InputPath, Place, Section
from treegrpo.config.security import SecurityConfig
from treegrpo.config.train import TrainConfig
from treegrpo.core.lease import Plan
from treegrpo.net.address import reachable_address
from treegrpo.net.limits import GROUP_LEAVES, TURNS

Dtype = Literal["float32", "bfloat16"]
EngineKind = Literal["embedded", "sglang"]


class RunConfig(Section):
    name: str = Field(default="treegrpo", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Names the run: the MQTT topics begin with treegrpo/NAME."""
    dir: Path = Path("runs/treegrpo")
    """Everything the run writes: journal, weights, checkpoints, progress, logs, plot. An existing run in it is continued."""
    seed: int = Field(default=0, ge=0, lt=2**32)


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
    trees: int = Field(default=2, ge=1, le=GROUP_LEAVES)
    """M: initial chains of a question."""
    rounds: int = Field(default=1, ge=0, le=GROUP_LEAVES)
    """L: rounds of expansions, one after the other."""
    expansions: int = Field(default=2, ge=0, le=GROUP_LEAVES)
    """N: nodes drawn in every tree in a round."""
    max_turns: int = Field(default=4, ge=1, le=TURNS)
    """Turns with tools; one more follows without."""
    max_action_tokens: int = Field(default=256, ge=1, lt=2**31)
    """Tokens of one turn."""
    max_context: int = Field(default=4096, ge=16, lt=2**31)
    """Tokens of an episode, prompt included; one that no longer fits ends as truncated."""
    temperature: float = Field(default=1.0, gt=0)

    @property
    def plan(self) -> Plan:
        """The same values as a lease carries them."""
        return Plan(**self.model_dump())


class EvalConfig(Section):
    every: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0: only before the first and after the last."""
    questions: int = Field(default=0, ge=0)
    """Held-out questions of one evaluation; 0: all."""


class EnvironmentConfig(Section):
    reward: Literal["em", "f1"] = "em"
    """The score of an answer that is the reward; the other one is only reported."""
    reward_shape: Literal["penalty", "tree_grpo"] = "penalty"
    """The format's part of the reward: `penalty` subtracts format_penalty; `tree_grpo` is Tree-GRPO's (docs/search_qa.md)."""
    format_penalty: float = Field(default=0.2, ge=0)
    """λ_f of the shape `penalty`: subtracted when the transcript breaks the protocol."""
    topk: int = Field(default=3, ge=1)
    """Documents of one search."""
    max_observation_tokens: int = Field(default=512, ge=16)
    timeout: float = Field(default=20.0, gt=0)
    """Time limit of a search in seconds, from connecting to the last byte of the response."""

    @field_validator("format_penalty")
    @classmethod
    def _shape_uses_it(cls, penalty: float, info: ValidationInfo) -> float:
        if info.data.get("reward_shape") == "tree_grpo" and penalty != cls.model_fields["format_penalty"].default:
            raise PydanticCustomError("shape", "it is not used with environment.reward_shape = tree_grpo; remove it")
        return penalty


class EngineConfig(Section):
    kind: EngineKind = "embedded"
    """`embedded` computes in the sampler's process on the CPU; `sglang` in a server (docs/sglang.md)."""
    max_running: int = Field(default=64, ge=1)
    """Generations that run at once; with SGLang at most, on all servers together, as memory allows."""
    cache_tokens: int = Field(default=65536, ge=0)
    """Tokens whose keys and values the prefix cache keeps; SGLang on a GPU has --mem-fraction-static instead."""
    threads: int = Field(default=1, ge=1)
    """Threads of computations on the CPU."""
    urls: tuple[Place, ...] = ()
    """SGLang servers that others run; empty: each sampler starts one."""
    python: Path = Path(".venv-sglang/bin/python")
    """The Python of the environment SGLang is installed in, to start a server with."""
    listen: Place = "127.0.0.1:0"
    """The listen address of a started server; port 0 takes a free one, a fixed port lets Prometheus find it."""
    flags: str = ""
    """More flags for `sglang.launch_server`, as in a shell: "--tp-size 2 --mem-fraction-static 0.85"."""
    weights_dir: Path = Path("/dev/shm")  # noqa: S108  # it is meant to be memory
    """Directory from which SGLang servers read policy versions, at the same path on their machine; best in memory."""


class RetrieverConfig(Section):
    corpus: InputPath = Path("corpus.jsonl")
    """Documents, JSONL with id and contents ("Title\\ntext")."""
    listen: Place = "127.0.0.1:8765"
    url: Place = ""
    """The retriever's URL for samplers; empty: `listen`."""


class LearnerConfig(Section):
    listen: Place = "127.0.0.1:50051"
    """gRPC address samplers connect to."""
    metrics: Place = "127.0.0.1:9400"
    """Prometheus address of the intake; the trainer's is the next port."""


class SamplerConfig(Section):
    count: int = Field(default=2, ge=1)
    """Samplers that `treegrpo up` starts."""
    id: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]{0,64}$")
    """Empty: the host name and process id."""
    learner: Place = ""
    """The learner's gRPC address; empty: learner.listen."""
    metrics: Place = "127.0.0.1:0"
    """Prometheus address; port 0 takes a free one and logs it."""
    retries: int = Field(default=2, ge=0)
    """Retries of a step after an engine or tool error. Waiting for an unavailable engine or tool does not count."""


class BrokerConfig(Section):
    address: Place = "127.0.0.1:1883"
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
        """The URL of the retriever."""
        scheme = "https" if self.security.tls else "http"
        return self.retriever.url or f"{scheme}://{reachable_address(self.retriever.listen)}"
