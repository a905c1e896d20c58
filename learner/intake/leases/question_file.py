"""Reader of question files: parses rows in the forms that Search-R1, verl and TRL write (docs/data.md).

A missing value may be absent, null or NaN, as one file of several sources has it. Nothing is guessed: a value that could not be
asked or scored is an error that names file, row and field.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from treegrpo.core.question import Message, Question
from treegrpo.errors import DataError
from treegrpo.net.limits import QUESTION_BYTES
from treegrpo.storage.row_files import read_rows
from treegrpo.storage.surrogates import has_lone_surrogate

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "answers", "golden_answers", "ground_truth", "solution", "completion", "target")
QUESTION_COLUMNS = (*PROMPT_COLUMNS, *ANSWER_COLUMNS, "data_source", "reward_model", "extra_info")
MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Templates write a role between control strings, so it is no place for free text."""
_ANSWER_KEYS = ("target", "targets", "answer", "answers", "text", "value", "aliases")
"""Keys of the answers in an object."""
_MAX_DEPTH = 4
"""Nested lists and objects of answers."""
_INVISIBLE = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))
"""Unicode's categories of characters that cannot be seen."""


def load_questions(path: Path) -> list[Question]:
    """Read the questions of a file of rows (docs/data.md).

    Raises:
        DataError: the file cannot be read, holds no question, a row lacks its prompt or its answer, or two rows share
            an id (source, split and index); the message names file and row.
    """
    rows = [row for _, row in read_rows(path, QUESTION_COLUMNS)]
    mixed = any(map(has_index, rows))  # then a row's number could be another's index
    questions: dict[str, Question] = {}
    for number, row in enumerate(rows, start=1):
        question = read_question(row, f"{path}, row {number}", f"row {number}" if mixed else str(number))
        if question.id in questions:
            raise DataError(f"{path}, row {number} has the id {question.id} of an earlier row; make extra_info.index unique.")
        questions[question.id] = question
    if not questions:
        raise DataError(f"{path} holds no question; check the data path.")
    return list(questions.values())


def read_question(row: Any, where: str, default_index: str) -> Question:
    """The question of a row; ``default_index`` stands for ``extra_info.index`` where that is missing. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: the row is not usable (it is {_type_name(row)}, not an object); {_HINT}.")
    fields = cast("Mapping[str, Any]", row)
    prompt = tuple(_iter_messages(fields, where))
    if not any(message.content.strip() for message in prompt):
        raise DataError(f"{where} has an empty prompt; give the question in prompt[].content.")
    answers = tuple(dict.fromkeys(text for text in _iter_answers(fields, where) if _is_visible(text)))
    if not answers:
        raise DataError(f"{where} has no answer; give at least one text in reward_model.ground_truth.target, or {_HINT}.")
    extra = _to_mapping(fields.get("extra_info"), f"{where}: extra_info")
    source = _to_label(fields.get("data_source"), f"{where}: data_source")
    split, index, family = (_to_label(extra.get(key), f"{where}: extra_info.{key}") for key in ("split", "index", "family"))
    question = Question(f"{source}/{split}/{index or default_index}", source, prompt, answers, family)
    _check_texts(question, where)
    return question


def has_index(row: Any) -> bool:
    """Whether a row has ``extra_info.index``, its number in its split."""
    extra = row.get("extra_info") if isinstance(row, Mapping) else None
    return isinstance(extra, Mapping) and not _is_missing(cast("Mapping[str, Any]", extra).get("index"))


_HINT = "see docs/data.md"


def _check_texts(question: Question, where: str) -> None:
    """Check that every text can be encoded, and all together are no longer than a question may be. Raises DataError."""
    texts = {
        "data_source or extra_info": [question.id, question.source, question.family],
        "the prompt": [text for message in question.prompt for text in (message.role, message.content)],
        "an answer": question.targets,
    }
    for what, parts in texts.items():
        if any(has_lone_surrogate(text) for text in parts):
            raise DataError(f"{where}: {what} has half a character (a lone surrogate, \\ud800 to \\udfff); write it whole.")
    if (size := sum(len(text.encode()) for parts in texts.values() for text in parts)) > QUESTION_BYTES:
        raise DataError(f"{where} has {size} bytes of text; {QUESTION_BYTES} are the most, shorten or leave it out.")


# ---- prompts


def _iter_messages(row: Mapping[str, Any], where: str) -> Iterator[Message]:
    column = next((name for name in PROMPT_COLUMNS if not _is_missing(row.get(name))), PROMPT_COLUMNS[0])
    value = _to_python(row.get(column))
    if isinstance(value, str):
        yield Message("user", value)
        return
    if not isinstance(value, Sequence):
        raise DataError(f"{where}: {column} is not usable (it is {_type_name(value)}, not messages or a text); {_HINT}.")
    for number, message in enumerate(cast("Sequence[Any]", value)):
        yield _to_message(message, f"{where}: {column}.{number}")


def _to_message(message: Any, where: str) -> Message:
    message = _to_python(message)
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is not usable (it is {_type_name(message)}, not an object with role and content); {_HINT}.")
    fields = cast("Mapping[str, Any]", message)
    role = fields.get("role")
    if role not in MESSAGE_ROLES:
        shown = repr(role)[:40]
        raise DataError(f"{where}.role is not usable ({shown} is none of {', '.join(MESSAGE_ROLES)}); {_HINT}.")
    return Message(role, _to_content(_to_python(fields.get("content")), f"{where}.content"))


def _to_content(value: Any, where: str) -> str:
    """A text, none, or the texts of a list of parts."""
    if _is_missing(value):
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise DataError(f"{where} is not usable (it is {_type_name(value)}, not a text); {_HINT}.")
    return "".join(
        _to_part_text(_to_python(part), f"{where}.{number}") for number, part in enumerate(cast("Sequence[Any]", value))
    )


def _to_part_text(part: Any, where: str) -> str:
    fields = cast("Mapping[str, Any]", part) if isinstance(part, Mapping) else {"type": "text", "text": part}
    text, kind = fields.get("text"), fields.get("type", "text")
    if kind != "text" or not isinstance(text, str):
        raise DataError(f"{where} is not usable (only parts of type text with a text are); {_HINT}.")
    return text


# ---- answers


def _iter_answers(row: Mapping[str, Any], where: str) -> Iterator[str]:
    model = _to_mapping(row.get("reward_model"), f"{where}: reward_model")
    if not _is_missing(truth := model.get("ground_truth")):
        yield from _iter_answer_texts(truth, f"{where}: reward_model.ground_truth")
        return
    column = next((name for name in ANSWER_COLUMNS if not _is_missing(row.get(name))), None)
    if column is not None:
        value = _to_python(row[column])
        if column == "completion" and isinstance(value, Sequence) and value and isinstance(value[-1], Mapping):
            value = _to_message(value[-1], f"{where}: completion").content
        yield from (_extract_final_answer(text) for text in _iter_answer_texts(value, f"{where}: {column}"))


def _is_visible(text: str) -> bool:
    """Whether any character of a text is visible; blanks, control characters and joiners alone are no answer."""
    return any(unicodedata.category(character) not in _INVISIBLE for character in text)


def _iter_answer_texts(value: Any, where: str, depth: int = 0) -> Iterator[str]:
    """The answers in a value: text, number, truth value, or lists and objects of them."""
    value = _to_python(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, bool):
        yield from ("yes", "true") if value else ("no", "false")
    elif isinstance(value, int | float | Decimal):
        yield _format_number(value, where)
    elif depth < _MAX_DEPTH and isinstance(value, Mapping) and any(key in value for key in _ANSWER_KEYS):
        fields = cast("Mapping[str, Any]", value)
        for key in (key for key in _ANSWER_KEYS if not _is_missing(fields.get(key))):
            yield from _iter_answer_texts(fields[key], f"{where}.{key}", depth + 1)
    elif depth < _MAX_DEPTH and isinstance(value, Sequence) and not isinstance(value, bytes):
        for number, item in enumerate(cast("Sequence[Any]", value)):
            if item is not None:
                yield from _iter_answer_texts(item, f"{where}.{number}", depth + 1)
    elif value is not None:
        raise DataError(f"{where} is not usable (it is {_type_name(value)}, not a text or a number); {_HINT}.")


def _format_number(value: float | Decimal, where: str) -> str:
    """Format a number as a text: 1987.0, which a column of numbers with a gap becomes, is 1987, and 0.50 is 0.5."""
    if isinstance(value, int):  # it may be more than a float can be
        return str(value)
    if not math.isfinite(value):
        raise DataError(f"{where} is not usable (it is {value}, which is not a finite number); give a text or a finite number.")
    if value == int(value):
        return str(int(value))
    return format(Decimal(str(value)).normalize(), "f")


def _extract_final_answer(text: str) -> str:
    r"""The answer of a worked solution: in <answer>, behind GSM8K's ####, in \boxed{}; or all of it. Linear in ``text``."""
    end = text.rfind("</answer>")
    if (start := text.rfind("<answer>", 0, max(end, 0))) >= 0:
        return text[start + len("<answer>") : text.index("</answer>", start)].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return _extract_boxed(text) if "\\boxed{" in text else text


def _extract_boxed(text: str) -> str:
    inner, depth = text.rpartition("\\boxed{")[2], 1
    for end, character in enumerate(inner):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inner[:end].strip()
    return text


# ---- values


def _to_python(value: Any) -> Any:
    """Convert arrays and scalars of numpy, and maps of parquet (lists of pairs), to Python values."""
    value = value.tolist() if hasattr(value, "tolist") else value
    is_map = isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in cast("list[Any]", value))
    return dict(cast("list[tuple[Any, Any]]", value)) if is_map else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _to_mapping(value: Any, where: str) -> Mapping[str, Any]:
    value = _to_python(value)
    if _is_missing(value):
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is not usable (it is {_type_name(value)}, not an object); {_HINT}.")
    return cast("Mapping[str, Any]", value)


def _to_label(value: Any, where: str) -> str:
    """A text or a number, "" where it is missing."""
    value = _to_python(value)
    if _is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int | float):
        raise DataError(f"{where} is not usable (it is {_type_name(value)}, not a text or a number); {_HINT}.")
    return str(value)


def _type_name(value: Any) -> str:
    """The type of a value, for an error message."""
    known: dict[type, str] = {type(None): "null", str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return known.get(type(value), type(value).__name__)
