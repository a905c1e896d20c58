"""The warm start: a small Qwen2 and its supervised training on demonstrations."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Qwen2Config, Qwen2ForCausalLM

from examples.geohop.demonstrations import Demonstration

BATCH = 32
_BUCKET = 16 * BATCH
_WARM_UP_STEPS = 20
_REPORT_EVERY = 10
_LAST_SHARE = 0.1


def small_qwen2(vocabulary: int, end: int, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of about a million parameters, freshly initialised. ``end`` is the id of the end-of-turn token."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return Qwen2ForCausalLM(config)


@dataclass(frozen=True, slots=True)
class TrainingPhase:
    """One phase of the supervised training."""

    right_share: Mapping[str, float]
    """By family shown, the share of demonstrations that follow the right plan."""
    steps: int
    lr: float
    """Of AdamW, at its peak."""
    muon_lr: float = 0.0
    """Of Muon, which then trains the matrices between the embeddings; 0: AdamW trains everything."""
    whole: bool = False
    """Train on all tokens, not only on the policy's own: documents repeat the names they are about."""


def train_supervised(
    model: Qwen2ForCausalLM, shown: Sequence[Demonstration], phase: TrainingPhase, seed: int, report: Callable[[str], None]
) -> None:
    """Train on ``shown`` as ``phase`` says, 32 demonstrations a step."""
    steps = phase.steps
    optimizers = _optimizers(model, phase)
    schedules = [LambdaLR(optimizer, lambda step: lr_share(step, steps)) for optimizer in optimizers]
    began, losses = time.monotonic(), 0.0
    for step, batch in zip(range(1, steps + 1), _batches(shown, seed), strict=False):
        loss = _loss(model, batch, phase.whole)
        model.zero_grad()
        loss.backward()
        for stepped in (*optimizers, *schedules):
            stepped.step()
        losses += loss.item()
        if step % _REPORT_EVERY == 0:
            report(f"step {step}/{steps}  loss {losses / _REPORT_EVERY:.4f}  {time.monotonic() - began:.0f} s")
            losses = 0.0


def _optimizers(model: Qwen2ForCausalLM, phase: TrainingPhase) -> list[Optimizer]:
    inner = [weights for name, weights in model.named_parameters() if weights.ndim == 2 and "embed" not in name]
    if not phase.muon_lr:
        return [torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.98))]
    chosen = {id(weights) for weights in inner}
    outer = [weights for weights in model.parameters() if id(weights) not in chosen]
    return [
        torch.optim.Muon(inner, lr=phase.muon_lr, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(outer, lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def lr_share(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: a linear warm-up, then half a cosine down to a tenth."""
    if step < _WARM_UP_STEPS:
        return (step + 1) / _WARM_UP_STEPS
    done = min(1.0, (step - _WARM_UP_STEPS) / max(1, steps - _WARM_UP_STEPS))
    return _LAST_SHARE + 0.5 * (1 - _LAST_SHARE) * (1 + math.cos(math.pi * done))


def _batches(shown: Sequence[Demonstration], seed: int) -> Iterator[Sequence[Demonstration]]:
    """Batches for ever, of demonstrations of about one length, in a seeded order."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(shown)), len(shown))
        batches: list[list[Demonstration]] = []
        for start in range(0, len(order), _BUCKET):
            bucket = sorted((shown[place] for place in order[start : start + _BUCKET]), key=lambda one: len(one.ids))
            batches += [bucket[first : first + BATCH] for first in range(0, len(bucket), BATCH)]
        rng.shuffle(batches)
        yield from batches


def _loss(model: Qwen2ForCausalLM, batch: Sequence[Demonstration], whole: bool) -> Tensor:
    """Mean cross-entropy of the trained tokens. Padding stands on the right, where causal attention never looks."""
    longest = max(len(one.ids) for one in batch)
    ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    trained_BT = torch.zeros(len(batch), longest, dtype=torch.bool)
    for place, one in enumerate(batch):
        ids_BT[place, : len(one.ids)] = torch.tensor(one.ids)
        trained_BT[place, : len(one.ids)] = True if whole else torch.tensor(one.trained)
    hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_BTH[:, :-1][trained_BT[:, 1:]])
    return torch.nn.functional.cross_entropy(logits_NV, ids_BT[:, 1:][trained_BT[:, 1:]])
