"""SGLang's responses, validated field by field: a proxy, a crash or another program may have written them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError

FinishReason = Literal["stop", "length", "abort"]
M = TypeVar("M", bound=BaseModel)
MAX_IDS = 1 << 32
"""What `TokenIds` can hold."""


class ForeignVersionError(ContractError):
    """Tokens of a version that this engine did not send: another sampler sent weights, or the server restarted unnoticed."""


class _Finish(BaseModel):
    type: FinishReason
    matched: int | str | list[int] | None = None


class _Span(BaseModel):
    version: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)


class _Meta(BaseModel):
    finish_reason: _Finish
    prompt_tokens: int = Field(ge=0)
    cached_tokens: int = Field(ge=0)
    num_retractions: int = Field(default=0, ge=0)
    output_token_logprobs: list[tuple[float, int, str | None]]
    weight_versions: list[_Span]


class _Generated(BaseModel):
    meta_info: _Meta


class _Load(BaseModel):
    num_running_reqs: int
    num_waiting_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float


class _Loads(BaseModel):
    loads: list[_Load] = Field(min_length=1)


class ServerInfo(BaseModel):
    """Response of `/server_info`."""

    version: str
    context_length: int | None = None
    max_total_num_tokens: int
    skip_tokenizer_init: bool = False


class ServedModel(BaseModel):
    """Response of `/model_info`: the model that a server serves."""

    model_type: str
    """As in config.json."""
    model_path: str


@dataclass(frozen=True, slots=True)
class GenerateResponse:
    """Response of `/generate`: what a server sampled after the ids of the request."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[tuple[PolicyVersion, int]]
    """(version, index of the first token it sampled), tokens in all."""
    finish: FinishReason
    matched: int | None
    """The token that the server regards as an end of the sequence."""
    prompt: int
    cached: int
    """Of the prompt, when the request was first admitted."""
    retractions: int
    """Times the server put the request back and computed its keys and values again."""


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """Response of `/v1/loads`: how busy a server is, all of its data parallel ranks together."""

    running: int
    queued: int
    used: int
    """Tokens of running requests."""
    capacity: int
    usage: float
    """Share of the capacity that running requests hold, of the fullest rank."""


def parse_generate_response(body: Any, max_tokens: int) -> GenerateResponse:
    """The response to a request for at most ``max_tokens``. Raises ContractError, also ForeignVersionError, if it is invalid."""
    meta = _parse(_Generated, body).meta_info
    triples, spans = meta.output_token_logprobs, [span for span in meta.weight_versions if span.end > span.start]
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != len(triples):
        raise ContractError(f"it says that versions {meta.weight_versions} sampled {len(triples)} tokens")
    if len(triples) > max_tokens or any(not (math.isfinite(logprob) and 0 <= token < MAX_IDS) for logprob, token, _ in triples):
        raise ContractError(
            f"its {len(triples)} tokens, {max_tokens} at most, have invalid ids or log-probabilities that are not finite"
        )
    if meta.cached_tokens > meta.prompt_tokens:
        raise ContractError(f"{meta.cached_tokens} of {meta.prompt_tokens} prompt tokens are reported as cached")
    return GenerateResponse(
        ids=[token for _, token, _ in triples],
        logprobs=[logprob for logprob, _, _ in triples],
        versions=[(_version(span.version), span.start) for span in spans],
        finish=meta.finish_reason.type,
        matched=matched if isinstance(matched := meta.finish_reason.matched, int) else None,
        prompt=meta.prompt_tokens,
        cached=meta.cached_tokens,
        retractions=meta.num_retractions,
    )


def _version(text: str) -> PolicyVersion:
    try:
        return PolicyVersion.parse(text)
    except ContractError as error:
        raise ForeignVersionError(f"it sampled with version {text[:64]!r}, which this sampler did not send") from error


def parse_load(body: Any) -> ServerLoad:
    """Parse the response of `/v1/loads`. Raises ContractError."""
    loads = _parse(_Loads, body).loads
    return ServerLoad(
        running=sum(load.num_running_reqs for load in loads),
        queued=sum(load.num_waiting_reqs for load in loads),
        used=sum(load.num_used_tokens for load in loads),
        capacity=sum(load.max_total_num_tokens for load in loads),
        usage=max(load.token_usage for load in loads),
    )


def parse_server_info(body: Any) -> ServerInfo:
    """Parse the response of `/server_info`. Raises ContractError."""
    return _parse(ServerInfo, body)


def parse_model_info(body: Any) -> ServedModel:
    """Parse the response of `/model_info`. Raises ContractError."""
    return _parse(ServedModel, body)


def _parse(model: type[M], body: Any) -> M:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(f"{'.'.join(map(str, first['loc'])) or 'its body'}: {first['msg']}") from error
