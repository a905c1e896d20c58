from __future__ import annotations

import json
import logging
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treegrpo.observability import log_setup
from treegrpo.observability.log_setup import INDENT, MESSAGE_CHARACTERS, JsonFormatter, TextFormatter
from treegrpo.observability.printable_text import UNPRINTABLE, clipped, printable, printable_json

pytestmark = pytest.mark.pure

NASTY = "\x1b[31m\x9b\r\n\x07\u202e\u2028\ud800\x7ferror: forged"
TEXTS = st.text(st.characters() | st.sampled_from(NASTY), max_size=40)


def record(message: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    about = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("sampler", logging.WARNING, "file.py", 1, message, args, about)


@given(TEXTS)
def test_printable_text_is_one_line_of_letters(text: str) -> None:
    shown = printable(text)
    assert UNPRINTABLE.search(shown) is None
    assert len(shown.splitlines()) <= 1
    shown.encode()


@given(TEXTS)
def test_json_says_the_same_in_printable_letters(text: str) -> None:
    shown = printable_json(text)
    assert UNPRINTABLE.search(shown) is None
    assert json.loads(shown) == json.loads(json.dumps(text))


def test_toml_reads_what_json_says() -> None:
    text = NASTY.replace("\ud800", "")  # TOML has no halves of a pair
    assert tomllib.loads(f"key = {printable_json(text)}") == {"key": text}


def test_letters_of_all_languages_stay() -> None:
    text = "Größe 北京 हिन्दी عربى 🙂 – “x”"
    assert printable(text) == text
    assert printable_json(text) == f'"{text}"'


@given(TEXTS)
def test_a_record_is_one_line_of_text_and_of_json(text: str) -> None:
    line = TextFormatter(who="rank 1: ").format(record("the retriever said %s", text))
    assert UNPRINTABLE.search(line) is None
    assert line.endswith(f"WARNING sampler: rank 1: the retriever said {printable(text)}")
    row = JsonFormatter().format(record("%s", text))
    assert UNPRINTABLE.search(row) is None
    assert json.loads(row)["level"] == "WARNING"


def test_a_long_message_is_cut_off() -> None:
    line = TextFormatter().format(record("%s", "x" * 10**6))
    assert len(line) < MESSAGE_CHARACTERS + 100
    assert line.endswith(f"… ({10**6 - MESSAGE_CHARACTERS} more letters)")
    assert clipped("abc", 3) == "abc"


def test_lines_of_a_traceback_cannot_be_taken_for_records() -> None:
    error = ValueError(NASTY)
    lines = TextFormatter().format(record("it failed", error=error)).split("\n")
    row = JsonFormatter().format(record("it failed", error=error))
    assert [line for line in lines[1:] if not line.startswith(INDENT)] == []
    assert any("error: forged" in line for line in lines)
    assert UNPRINTABLE.search("".join(lines)) is None
    assert "forged" in json.loads(row)["exception"]
    assert UNPRINTABLE.search(row) is None


def test_a_format_of_another_program_is_no_format_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", "%(message)s")
    assert log_setup.is_json_format() is False
