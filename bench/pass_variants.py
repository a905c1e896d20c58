"""Variants of a training pass that `bench.packing` compares: trees, and their paths padded or sequence-packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from bench.random_trees import Shape, TreeGenerator, credited, split_paths
from learner.trainer.algorithm.credit_assignment import CreditedTree
from learner.trainer.algorithm.loss import policy_loss
from learner.trainer.packing import attention
from learner.trainer.packing.model import score, score_hidden
from learner.trainer.packing.packing import Pack, pack
from treegrpo.config.schema import Dtype
from treegrpo.config.train import TrainConfig

TRAIN = TrainConfig()


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A Qwen2 and how much it gets to do."""

    config: dict[str, int]
    groups: tuple[int, ...]
    """For each of `SHAPES`."""
    budgets: tuple[int, ...]
    """Tokens of a pass: tree packs, sequence packs and padded blocks take their choice."""
    dtype: Dtype = "float32"


def _qwen(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


SIZES = {
    "1m": ModelSize(_qwen(1024, 128, 384, 5, 4, 2), (8, 2, 2), (1024, 2048, 4096)),
    "30m": ModelSize(_qwen(4096, 512, 1408, 10, 8, 2), (3, 1, 1), (1024, 2048, 4096)),
    "1.5b": ModelSize(_qwen(151936, 1536, 8960, 28, 12, 2), (24, 8, 8), (8192, 16384, 32768), "bfloat16"),
}


def build(size: ModelSize, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(**cast("Any", size.config), tie_word_embeddings=True, max_position_embeddings=32768)
    with device:
        return cast("PreTrainedModel", cast("Any", Qwen2ForCausalLM(config)).eval())


@dataclass(frozen=True, slots=True)
class Block:
    """Paths as rows, padded right."""

    ids_RS: Tensor
    predictor_A: Tensor
    """Index into the flattened rows."""
    paths: Pack
    """The same paths one after the other, for what is predicted and learned."""


def padded(paths: Pack, device: torch.device) -> Block:
    """The runs of a sequence pack as rows."""
    width = max(b - a for a, b in paths.layout.runs)
    ids_RS = torch.zeros(len(paths.layout.runs), width, dtype=torch.int64)
    place_T = torch.zeros(paths.tokens, dtype=torch.int64)
    for row, (a, b) in enumerate(paths.layout.runs):
        ids_RS[row, : b - a] = paths.ids_T[a:b]
        place_T[a:b] = row * width + torch.arange(b - a)
    return Block(ids_RS.to(device), place_T[paths.predictor_A].to(device), paths.to(device))


def rows_of_like_length(singles: Sequence[Pack], trees: Sequence[CreditedTree], budget: int) -> list[Pack]:
    """Sequence packs whose rows would fill at most ``budget`` tokens when padded; ``singles`` and ``trees`` go together."""
    order = sorted(range(len(singles)), key=lambda i: -singles[i].tokens)
    packs: list[Pack] = []
    while order:
        rows = max(1, budget // singles[order[0]].tokens)
        packs += pack([trees[i] for i in order[:rows]], 1 << 30, keep_zero=True)
        order = order[rows:]
    return packs


Pass = Callable[[], None]


class PackingCase:
    """One shape with one model: the ways to compute it."""

    def __init__(self, size: ModelSize, shape: Shape, groups: int, device: torch.device) -> None:
        self.model, self._size, self._device = build(size, device), size, device
        grower = TreeGenerator(size.config["vocab_size"])
        self._trees = credited([grower.group(shape, str(n)) for n in range(groups)])
        self._paths = split_paths(self._trees)
        (self.whole,), (self.whole_apart,) = (pack(trees, 1 << 30, keep_zero=True) for trees in (self._trees, self._paths))

    @property
    def token_ratio(self) -> float:
        return self.whole_apart.tokens / self.whole.tokens

    def tree(self, budget: int) -> Pass:
        return self._packed(pack(self._trees, budget, keep_zero=True))

    def sequence(self, budget: int) -> Pass:
        return self._packed(pack(self._paths, budget, keep_zero=True))

    def rows(self, budget: int) -> Pass:
        singles = [pack([one], 1 << 30, keep_zero=True)[0] for one in self._paths]
        blocks = [padded(one, self._device) for one in rows_of_like_length(singles, self._paths, budget)]

        def run() -> None:
            self.model.set_attn_implementation("sdpa")
            for block in blocks:
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._size.dtype == "bfloat16"):
                    hidden_RSH = cast("Any", self.model).get_decoder()(input_ids=block.ids_RS, use_cache=False).last_hidden_state
                    hidden_AH = hidden_RSH.flatten(0, 1).index_select(0, block.predictor_A)
                    logprob_A, _ = score_hidden(self.model, hidden_AH, block.paths.targets.label_A, 1.0)
                self._learn(logprob_A, block.paths)

        return run

    def _packed(self, packs: Sequence[Pack]) -> Pass:
        moved = [one.to(self._device) for one in packs]

        def run() -> None:
            self.model.set_attn_implementation(attention.NAME)
            for one in moved:
                self._learn(score(self.model, one, 1.0, self._size.dtype)[0], one)

        return run

    def _learn(self, logprob_A: Tensor, one: Pack) -> None:
        loss, _ = policy_loss(logprob_A, logprob_A.detach(), one.targets, TRAIN)
        loss.backward()
