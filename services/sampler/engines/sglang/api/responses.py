"""What a server answers, checked field by field: a proxy, a crash or another program may have written it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError

AnswerFinish = Literal["stop", "length", "abort"]
M = TypeVar("M", bound=BaseModel)
IDS = 1 << 32
"""What `TokenIds` can hold."""


class ForeignVersionError(ContractError):
    """Tokens of a version that is none of ours: somebody else gave the server its weights, or it began again unseen."""


class _Finish(BaseModel):
    type: AnswerFinish
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


class Info(BaseModel):
    """What `/server_info` says about a server."""

    version: str
    context_length: int | None = None
    max_total_num_tokens: int
    skip_tokenizer_init: bool = False


class Model(BaseModel):
    """What `/model_info` says about the model that a server serves."""

    model_type: str
    """As config.json says it."""
    model_path: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server sampled after the ids it was given."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[tuple[PolicyVersion, int]]
    """(version, index of the first token it sampled), tokens in all."""
    finish: AnswerFinish
    matched: int | None
    """The token that the server takes for an end of the sequence."""
    prompt: int
    cached: int
    """Of the prompt, when the request was first admitted."""
    retractions: int
    """Times the server put the request back and computed its keys and values again."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a server is, all of its data parallel ranks together."""

    running: int
    queued: int
    used: int
    """Tokens of running requests."""
    capacity: int
    usage: float
    """Share of the capacity that running requests hold, of the fullest rank."""


def read_answer(body: Any, asked: int) -> Answer:
    """The answer to a request for at most ``asked`` tokens. Raises ContractError, also ForeignVersionError, when it is none."""
    meta = _parse(_Generated, body).meta_info
    triples, spans = meta.output_token_logprobs, [span for span in meta.weight_versions if span.end > span.start]
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != len(triples):
        raise ContractError(f"it says that versions {meta.weight_versions} sampled {len(triples)} tokens")
    if len(triples) > asked or any(not (math.isfinite(logprob) and 0 <= token < IDS) for logprob, token, _ in triples):
        raise ContractError(
            f"its {len(triples)} tokens, {asked} at most, have ids that are none or log-probabilities that are not finite"
        )
    if meta.cached_tokens > meta.prompt_tokens:
        raise ContractError(f"{meta.cached_tokens} of {meta.prompt_tokens} prompt tokens were cached, it says")
    return Answer(
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
        raise ForeignVersionError(f"it sampled with version {text[:64]!r}, which is none of ours") from error


def read_load(body: Any) -> Load:
    """The answer of `/v1/loads`. Raises ContractError."""
    loads = _parse(_Loads, body).loads
    return Load(
        running=sum(load.num_running_reqs for load in loads),
        queued=sum(load.num_waiting_reqs for load in loads),
        used=sum(load.num_used_tokens for load in loads),
        capacity=sum(load.max_total_num_tokens for load in loads),
        usage=max(load.token_usage for load in loads),
    )


def read_info(body: Any) -> Info:
    """The answer of `/server_info`. Raises ContractError."""
    return _parse(Info, body)


def read_model(body: Any) -> Model:
    """The answer of `/model_info`. Raises ContractError."""
    return _parse(Model, body)


def _parse(model: type[M], body: Any) -> M:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(f"{'.'.join(map(str, first['loc'])) or 'its body'}: {first['msg']}") from error
