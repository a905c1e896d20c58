"""A fake intake: the real protocol over a real socket; it samples one-step episodes with the published policy."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.builders import START, VOCABULARY, group, step, subtree
from treegrpo.core.step import PolicyVersion
from treegrpo.wire.trainer_protocol import (
    Covered,
    Done,
    Evaluate,
    Evaluation,
    Message,
    Publish,
    Refused,
    StepReport,
    Take,
    Taken,
    encode_message,
    pack_group,
    receive_message,
)

PROMPT = [1, 2]
EPISODE = 4
Policy = Callable[[int], tuple[np.ndarray, np.ndarray]]


def sampler(folder: Path, seed: int) -> Policy:
    """Draws ``count`` continuations of PROMPT from the model in ``folder``; returns tokens and log-probabilities."""
    model = cast("Any", AutoModelForCausalLM.from_pretrained(folder, local_files_only=True))
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        ids, logprobs = torch.tensor([PROMPT] * count), list[torch.Tensor]()
        for _ in range(EPISODE):
            logprob_BV = torch.log_softmax(model(input_ids=ids).logits[:, -1], -1)
            token = torch.multinomial(logprob_BV.exp(), 1, generator=generator)
            logprobs.append(logprob_BV.gather(1, token))
            ids = torch.cat([ids, token], 1)
        return ids[:, len(PROMPT) :].numpy(), torch.cat(logprobs, 1).numpy()

    return draw


def low_half(tokens: np.ndarray) -> float:
    """The reward: the share of tokens in the lower half of the vocabulary."""
    return float((tokens < VOCABULARY // 2).mean())


@dataclass
class FakeIntake:
    """Serves for the time of the ``with`` block, from a thread of its own."""

    path: str
    reward: Callable[[np.ndarray], float] = low_half
    state: str = "running"
    steps_before_drain: int = 1000
    answers: Callable[[Message], bool] = lambda _request: True
    """Called with each request; False: the intake goes away instead of answering."""
    beyond: frozenset[int] = frozenset()
    """The groups at these positions have a token beyond the vocabulary."""
    torn: frozenset[int] = frozenset()
    """And these have lost their end."""
    kept: int = 0
    """Groups at positions before this are gone."""
    em: Callable[[int], float] = lambda step: step / 100
    """By the evaluated step."""
    had: frozenset[str] = frozenset()
    """Versions whose records it has already."""
    asked: list[Message] = field(default_factory=list[Message])
    evaluations: list[str] = field(default_factory=list[str])
    reports: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _policy: Policy | None = None
    _version: PolicyVersion = START

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="fake intake")
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.asked if isinstance(message, kind)]

    async def _serve(self, ready: threading.Event) -> None:
        torch.set_num_threads(1)
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_unix_server(self._talk, self.path)
        ready.set()
        await self._end.wait()
        server.close()
        while connections := asyncio.all_tasks() - {asyncio.current_task()}:  # those being accepted among them
            await asyncio.gather(*connections)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):  # a trainer that was killed
            while (request := await receive_message(reader)) is not None and self.answers(request):
                self.asked.append(request)
                writer.write(encode_message(self._answer(request)))
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def _answer(self, request: Message) -> Message:
        match request:
            case Take(position) if position < self.kept:
                return Refused(f"Position {position} is gone.")
            case Take(position, count):
                if len(self.reports) >= self.steps_before_drain:
                    self.state = "draining"
                groups = [] if self.state == "draining" else [self._group(position + n) for n in range(count)]
                return Taken(groups, self.state)
            case Publish(version, path, _):
                self._version = PolicyVersion.parse(version)
                self._policy = sampler(Path(path), seed=self._version.step)
                return Done()
            case Evaluate(version):
                # Asked once it only begins, as the real one may.
                self.evaluations.append(version)
                done = self.evaluations.count(version) > 1
                return Evaluation(done, 10, em=self.em(self._version.step), state=self.state)
            case StepReport(values):
                if values["version"] not in {*self.had, *(report["version"] for report in self.reports)}:
                    self.reports.append(values)
                return Done()
            case Covered():
                return Done()
            case _:
                raise AssertionError(request)

    def _group(self, number: int) -> bytes:
        """Two trees of three one-step episodes."""
        assert self._policy is not None
        tokens, logprobs = self._policy(6)
        prompt = [1, VOCABULARY] if number in self.beyond else PROMPT
        subtrees = [
            subtree(
                [step(i % 3 + 1, 0, tokens[i].tolist(), logprobs=logprobs[i].tolist(), version=self._version)],
                {i % 3 + 1: self.reward(tokens[i])},
                prompt=prompt if i % 3 == 0 else (),
                tree=i // 3,
                index=i % 3,
            )
            for i in range(6)
        ]
        packed = pack_group(group(subtrees, str(number)), subtrees)
        return packed[:-3] if number in self.torn else packed
