"""One completion on its way: what was asked, and what one or several answers have given so far.

The server's stop strings are a hint. It looks for them in a window of tokens that its own tokenizer thinks long
enough, so it may see one late, and its text of a token may differ from ours. Where a completion ends is decided here,
from the ids: what the server sampled beyond is cut off, and where it stopped too early it is asked to go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from services.sampler.engines.base import Completion, Finish, Sampling
from services.sampler.engines.sglang.answers import Answer
from services.sampler.engines.stopping import StopStrings
from treegrpo.step import PolicyVersion, TokenIds, VersionSpan


@dataclass(slots=True)
class Draft:
    """Prefix, and the tokens that answers have added to it."""

    prefix: TokenIds
    sampling: Sampling
    room: int
    """Tokens the completion may have."""
    stops: StopStrings
    eos: frozenset[int]
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    versions: list[tuple[PolicyVersion, int]] = field(default_factory=list[tuple[PolicyVersion, int]])
    """(version, index of the first token it sampled)"""
    finish: Finish | None = None
    prefilled: int = 0
    cached: int = 0
    answers: int = 0

    @property
    def sequence(self) -> TokenIds:
        """[n] the prefix and what has been sampled."""
        return np.concatenate((self.prefix, np.array(self.ids, np.uint32))) if self.ids else self.prefix

    def request(self, rid: str, space: str) -> dict[str, Any]:
        """The body that asks a server to go on; ``space`` keeps its cache apart from other policy versions'."""
        return {
            "rid": rid,
            "input_ids": self.sequence.tolist(),
            "extra_key": space,
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": self.room - len(self.ids),
                "temperature": self.sampling.temperature,
                "stop": list(self.sampling.stop),
                "stop_token_ids": sorted(self.eos),
                # Whatever the model's generation_config says: training divides by the full softmax.
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "frequency_penalty": 0.0,
                "presence_penalty": 0.0,
                "min_new_tokens": 0,
                "ignore_eos": False,
                "skip_special_tokens": False,
                "no_stop_trim": True,
                # Heeded only by servers with --enable-deterministic-inference.
                **({} if self.sampling.seed is None else {"sampling_seed": self.sampling.seed & 0x7FFFFFFF}),
            },
        }

    def take(self, answer: Answer) -> None:
        """Append what a server sampled, up to where the completion ends."""
        self._charge(answer)
        starts = {start: version for version, start in answer.versions}
        for at, (token, logprob) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
            if at in starts and (not self.versions or self.versions[-1][0] != starts[at]):
                self.versions.append((starts[at], len(self.ids)))
            self.ids.append(token)
            self.logprobs.append(logprob)
            if token in self.eos or self.stops.completed(self.ids, self.sampling.stop):
                self.finish = "stop"
            elif len(self.ids) == self.room:
                self.finish = "length"
            if self.finish is not None:
                return
        if answer.matched is not None:  # the server knows of one more token that ends a sequence
            self.finish = "stop"

    def _charge(self, answer: Answer) -> None:
        if not self.answers:
            self.cached = answer.cached
        self.answers += 1
        # New weights make the server compute everything again; what siblings then share it does not tell.
        redone = sum(answer.prompt + start for _, start in answer.versions if start)
        self.prefilled += answer.prompt - answer.cached + redone

    def completion(self) -> Completion:
        """The result; call it once `finish` is set."""
        assert self.finish is not None  # noqa: S101  # only finished drafts are delivered
        bounds = [*(start for _, start in self.versions), len(self.ids)]
        spans = (VersionSpan(version, *ends) for (version, _), ends in zip(self.versions, pairwise(bounds), strict=True))
        return Completion(
            ids=np.array(self.ids, np.uint32),
            logprobs=np.array(self.logprobs, np.float32),
            finish=self.finish,
            spans=tuple(spans),
            prefilled=self.prefilled,
            cached=self.cached,
        )
