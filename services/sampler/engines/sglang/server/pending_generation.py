"""A completion in progress on SGLang: the request, and the tokens of one or several responses so far.

The server's stop strings are a hint. It looks for them in a window of tokens that its own tokenizer thinks long
enough, so it may see one late, and its text of a token may differ from ours. Where a completion ends is decided here,
from the ids: tokens beyond the stop are cut off, and after a premature stop another request continues.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from services.sampler.engines.generation import Generation
from services.sampler.engines.sglang.server.responses import GenerateResponse
from services.sampler.engines.stop_strings import StopStrings


@dataclass(slots=True, eq=False)
class PendingGeneration(Generation):
    """Prefix, and the tokens that responses have added to it."""

    room: int
    """Tokens the completion may have."""
    stops: StopStrings
    eos: frozenset[int]
    responses: int = field(default=0, init=False)

    def request_body(self, rid: str, cache_namespace: str) -> dict[str, Any]:
        """The body of the next `/generate` request; ``cache_namespace`` keeps its cache apart from other policy versions'."""
        return {
            "rid": rid,
            "input_ids": self.sequence.tolist(),
            "extra_key": cache_namespace,
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": self.room - len(self.ids),
                "temperature": self.sampling.temperature,
                "stop": list(self.sampling.stop),
                "stop_token_ids": sorted(self.eos),
                # Overrides the model's generation_config: training divides by the full softmax.
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

    def append_response(self, response: GenerateResponse) -> None:
        """Append what a server sampled, up to where the completion ends."""
        self._count_prefill(response)
        starts = {start: version for version, start in response.versions}
        for at, (token, logprob) in enumerate(zip(response.ids, response.logprobs, strict=True)):
            self.append(token, logprob, starts.get(at) or self.versions[-1][0])
            if token in self.eos or self.stops.is_completed(self.ids, self.sampling.stop):
                self.finish = "stop"
            elif len(self.ids) == self.room:
                self.finish = "length"
            if self.finish is not None:
                return
        if response.matched is not None:  # the server knows of one more token that ends a sequence
            self.finish = "stop"

    def _count_prefill(self, response: GenerateResponse) -> None:
        if not self.responses:
            self.cached = response.cached
        self.responses += 1
        # New weights make the server compute everything again; what siblings then share it does not tell.
        redone = sum(response.prompt + start for _, start in response.versions if start)
        self.prefilled += response.prompt - response.cached + redone
