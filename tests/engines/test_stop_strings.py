from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sampler.engines.stop_strings import StopStrings
from services.sampler.text.tokenizer import Tokenizer

pytestmark = pytest.mark.pure

STOP = ("</search>", "</answer>", "fin.\n", "né", "☃")


PIECES = st.sampled_from(
    [*STOP, "<search>", "search", " answer", "</", ">", "fin", ".", "\n", "é", "n", "☃", "🙂", " the river", "x"]
)


@given(st.lists(PIECES, max_size=12).map("".join))
def test_the_first_token_that_completes_a_stop_string_is_found(tokenizer: Tokenizer, text: str) -> None:
    stops = StopStrings(tokenizer)
    ids = tokenizer.encode(text).tolist()
    fired = next((n for n in range(1, len(ids) + 1) if stops.is_completed(ids[:n], STOP)), None)
    naive = next((n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in STOP)), None)
    assert fired == naive


def test_without_stop_strings_none_is_completed(tokenizer: Tokenizer) -> None:
    assert not StopStrings(tokenizer).is_completed(tokenizer.encode("</search>").tolist(), ())
