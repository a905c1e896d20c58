from __future__ import annotations

from treegrpo.reasons import LENGTH, reason_of

LINK = "https://example.org/" + "a" * 120


def test_a_short_text_is_kept_on_one_line() -> None:
    assert reason_of(ValueError("no such\n  file.")) == "no such file"
    assert reason_of(KeyError()) == "KeyError"


def test_a_long_text_ends_with_a_whole_sentence_and_no_cut_address() -> None:
    text = f"The file is torn. See {LINK} for more. Then {LINK} and {LINK}."
    assert reason_of(ValueError(text)) == f"The file is torn. See {LINK} for more"


def test_a_long_sentence_ends_with_a_whole_word() -> None:
    kept = reason_of(ValueError(f"{LINK} {LINK} {LINK}"))
    assert kept == f"{LINK} {LINK} …"
    assert len(kept) <= LENGTH + 2
