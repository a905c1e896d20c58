"""What SGLang servers answer, and the completions that come of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from services.sampler.engines.base import SamplingParams
from services.sampler.engines.sglang.server.pending_generation import PendingGeneration
from services.sampler.engines.sglang.server.responses import GenerateResponse, parse_generate_response, parse_load
from services.sampler.engines.stop_strings import StopStrings
from services.sampler.text.tokenizer import Tokenizer
from tests.engines import builders
from treegrpo.core.step import PolicyVersion, VersionSpan
from treegrpo.errors import ContractError

pytestmark = pytest.mark.pure

FIRST, SECOND = PolicyVersion(0, 0), PolicyVersion(0, 1)
GOOD: dict[str, Any] = {
    "text": "…",
    "meta_info": {
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": 5,
        "cached_tokens": 4,
        "num_retractions": 1,
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None], [0.0, 9, None]],
        "weight_versions": [{"version": "0.0", "start": 0, "end": 1}, {"version": "0.1", "start": 1, "end": 3}],
    },
}


def test_a_good_answer_is_read() -> None:
    answer = parse_generate_response(GOOD, max_tokens=3)
    assert (list(answer.ids), list(answer.logprobs)) == ([7, 8, 9], [-0.5, -1.5, 0.0])
    assert list(answer.versions) == [(FIRST, 0), (SECOND, 1)]
    assert (answer.finish, answer.prompt, answer.cached, answer.retractions) == ("length", 5, 4, 1)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("finish_reason", {"type": "bored"}),
        ("finish_reason", None),
        ("prompt_tokens", -1),
        ("cached_tokens", 6),
        ("output_token_logprobs", [[None, 7, None]] * 3),
        ("output_token_logprobs", [[-0.5, -7, None]] * 3),
        ("output_token_logprobs", [[-0.5, 1 << 32, None]] * 3),
        ("output_token_logprobs", [[-0.5, 7, None]] * 4),
        ("output_token_logprobs", "many"),
        ("weight_versions", []),
        ("weight_versions", [{"version": "0.0", "start": 0, "end": 2}]),
        ("weight_versions", [{"version": "0.0", "start": 1, "end": 3}]),
        ("weight_versions", [{"version": "default", "start": 0, "end": 3}]),
    ],
)
def test_an_answer_that_is_none_is_refused(where: str, what: object) -> None:
    body = copy.deepcopy(GOOD)
    body["meta_info"][where] = what
    with pytest.raises(ContractError):
        parse_generate_response(body, max_tokens=3)


@pytest.mark.parametrize("body", [None, [], "no", {}, {"meta_info": 3}, {"error": {"message": "no"}}])
def test_what_is_no_answer_at_all_is_refused(body: object) -> None:
    for read in (lambda: parse_generate_response(body, 3), lambda: parse_load(body)):
        with pytest.raises(ContractError):
            read()


# ---- drafts


def pending(tokenizer: Tokenizer, room: int, *stop: str) -> PendingGeneration:
    return PendingGeneration(builders.prompt(0, 5), SamplingParams(room, 1.0, stop), room, StopStrings(tokenizer), tokenizer.eos)


def answer(
    ids: list[int], *versions: tuple[PolicyVersion, int], finish: str = "stop", prompt: int = 5, cached: int = 3
) -> GenerateResponse:
    return GenerateResponse(ids, [-1.0] * len(ids), versions or [(FIRST, 0)], finish, None, prompt, cached, 0)  # pyright: ignore[reportArgumentType]


def test_what_was_sampled_beyond_a_stop_string_is_cut_off(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the river town search").tolist()
    one = pending(tokenizer, 40, "er t")
    one.append_response(answer(ids))
    done = one.completion()
    assert done.finish == "stop"
    assert "er t" in tokenizer.decode(done.ids)
    assert "er t" not in tokenizer.decode(done.ids[:-1])
    assert len(done.ids) < len(ids)
    assert done.spans == (VersionSpan(FIRST, 0, len(done.ids)),)


def test_a_server_that_stops_too_early_is_asked_to_go_on(tokenizer: Tokenizer) -> None:
    one = pending(tokenizer, 6, "never said")
    one.append_response(answer([5, 6], (FIRST, 0)))
    assert one.finish is None
    body = one.request_body("rid", "0.0")
    assert body["input_ids"] == [*builders.prompt(0, 5).tolist(), 5, 6]
    assert body["sampling_params"]["max_new_tokens"] == 4
    one.append_response(answer([7, 8, 9, 10], (FIRST, 0), (SECOND, 2), finish="length", prompt=7, cached=7))
    done = one.completion()
    assert (done.ids.tolist(), done.finish) == ([5, 6, 7, 8, 9, 10], "length")
    assert done.spans == (VersionSpan(FIRST, 0, 4), VersionSpan(SECOND, 4, 6))
    # 2 of the prompt; nothing to go on; and 7 + 2 again under the new weights.
    assert (done.prefilled, done.cached) == (2 + 0 + 9, 3)


def test_an_end_of_sequence_token_ends_a_draft_whatever_the_server_says(tokenizer: Tokenizer) -> None:
    end = next(iter(tokenizer.eos))
    one = pending(tokenizer, 10)
    one.append_response(answer([5, end, 6], finish="length"))
    assert (one.completion().ids.tolist(), one.completion().finish) == ([5, end], "stop")
