"""A row of a data file as a question, in the forms that Search-R1, verl and TRL write (docs/data.md).

What is missing may be absent, null or NaN, as one file of several sources has it. Nothing is guessed: a value that could not be
asked or scored is refused with its file, row and field.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, cast

from treegrpo.core.question import Message, Question
from treegrpo.errors import DataError
from treegrpo.net.limits import QUESTION_BYTES
from treegrpo.storage.surrogates import has_lone_surrogate

PROMPTS = ("prompt", "question", "problem")
ANSWERS = ("answer", "answers", "golden_answers", "ground_truth", "solution", "completion", "target")
COLUMNS = (*PROMPTS, *ANSWERS, "data_source", "reward_model", "extra_info")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Templates write a role between control strings, so it is no place for free text."""
_KEYS = ("target", "targets", "answer", "answers", "text", "value", "aliases")
"""Where answers are in an object."""
_DEPTH = 4
"""Lists and objects in one another."""
_UNSEEN = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))
"""Unicode's categories of what cannot be seen."""


def read_question(row: Any, where: str, place: str) -> Question:
    """The question of a row; ``place`` stands for ``extra_info.index`` where that is missing. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: the row is not usable (it is {_kind(row)}, not an object); {_SEE}.")
    fields = cast("Mapping[str, Any]", row)
    prompt = tuple(_prompt(fields, where))
    if not any(message.content.strip() for message in prompt):
        raise DataError(f"{where} has an empty prompt; give the question in prompt[].content.")
    answers = tuple(dict.fromkeys(text for text in _answers(fields, where) if _is_seen(text)))
    if not answers:
        raise DataError(f"{where} has no answer; give at least one text in reward_model.ground_truth.target, or {_SEE}.")
    extra = _object(fields.get("extra_info"), f"{where}: extra_info")
    source = _label(fields.get("data_source"), f"{where}: data_source")
    split, index, family = (_label(extra.get(key), f"{where}: extra_info.{key}") for key in ("split", "index", "family"))
    question = Question(f"{source}/{split}/{index or place}", source, prompt, answers, family)
    _check_texts(question, where)
    return question


def has_index(row: Any) -> bool:
    """Whether a row says where in its split it is."""
    extra = row.get("extra_info") if isinstance(row, Mapping) else None
    return isinstance(extra, Mapping) and not _missing(cast("Mapping[str, Any]", extra).get("index"))


_SEE = "see docs/data.md"


def _check_texts(question: Question, where: str) -> None:
    """Every text can be written down, and all of them together are no longer than a question may be."""
    texts = {
        "data_source or extra_info": [question.id, question.source, question.family],
        "the prompt": [text for message in question.prompt for text in (message.role, message.content)],
        "an answer": question.targets,
    }
    for what, of in texts.items():
        if any(has_lone_surrogate(text) for text in of):
            raise DataError(f"{where}: {what} has half a character (a lone surrogate, \\ud800 to \\udfff); write it whole.")
    if (size := sum(len(text.encode()) for of in texts.values() for text in of)) > QUESTION_BYTES:
        raise DataError(f"{where} has {size} bytes of text; {QUESTION_BYTES} are the most, shorten or leave it out.")


# ---- prompts


def _prompt(row: Mapping[str, Any], where: str) -> Iterator[Message]:
    column = next((name for name in PROMPTS if not _missing(row.get(name))), PROMPTS[0])
    value = _plain(row.get(column))
    if isinstance(value, str):
        yield Message("user", value)
        return
    if not isinstance(value, Sequence):
        raise DataError(f"{where}: {column} is not usable (it is {_kind(value)}, not messages or a text); {_SEE}.")
    for place, message in enumerate(cast("Sequence[Any]", value)):
        yield _message(message, f"{where}: {column}.{place}")


def _message(message: Any, where: str) -> Message:
    message = _plain(message)
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is not usable (it is {_kind(message)}, not an object with role and content); {_SEE}.")
    fields = cast("Mapping[str, Any]", message)
    role = fields.get("role")
    if role not in ROLES:
        shown = repr(role)[:40]
        raise DataError(f"{where}.role is not usable ({shown} is none of {', '.join(ROLES)}); {_SEE}.")
    return Message(role, _content(_plain(fields.get("content")), f"{where}.content"))


def _content(value: Any, where: str) -> str:
    """A text, none, or the texts of a list of parts."""
    if _missing(value):
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise DataError(f"{where} is not usable (it is {_kind(value)}, not a text); {_SEE}.")
    return "".join(_part(_plain(part), f"{where}.{place}") for place, part in enumerate(cast("Sequence[Any]", value)))


def _part(part: Any, where: str) -> str:
    fields = cast("Mapping[str, Any]", part) if isinstance(part, Mapping) else {"type": "text", "text": part}
    text, kind = fields.get("text"), fields.get("type", "text")
    if kind != "text" or not isinstance(text, str):
        raise DataError(f"{where} is not usable (only parts of type text with a text are); {_SEE}.")
    return text


# ---- answers


def _answers(row: Mapping[str, Any], where: str) -> Iterator[str]:
    model = _object(row.get("reward_model"), f"{where}: reward_model")
    if not _missing(truth := model.get("ground_truth")):
        yield from _texts(truth, f"{where}: reward_model.ground_truth")
        return
    column = next((name for name in ANSWERS if not _missing(row.get(name))), None)
    if column is not None:
        value = _plain(row[column])
        if column == "completion" and isinstance(value, Sequence) and value and isinstance(value[-1], Mapping):
            value = _message(value[-1], f"{where}: completion").content
        yield from (_final(text) for text in _texts(value, f"{where}: {column}"))


def _is_seen(text: str) -> bool:
    """Whether anything of a text can be seen: an answer of blanks, control characters or joiners nobody gives."""
    return any(unicodedata.category(letter) not in _UNSEEN for letter in text)


def _texts(value: Any, where: str, depth: int = 0) -> Iterator[str]:
    """The answers in a value: text, number, truth value, or lists and objects of them."""
    value = _plain(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, bool):
        yield from ("yes", "true") if value else ("no", "false")
    elif isinstance(value, int | float | Decimal):
        yield _number(value, where)
    elif depth < _DEPTH and isinstance(value, Mapping) and any(key in value for key in _KEYS):
        fields = cast("Mapping[str, Any]", value)
        for key in (key for key in _KEYS if not _missing(fields.get(key))):
            yield from _texts(fields[key], f"{where}.{key}", depth + 1)
    elif depth < _DEPTH and isinstance(value, Sequence) and not isinstance(value, bytes):
        for place, item in enumerate(cast("Sequence[Any]", value)):
            if item is not None:
                yield from _texts(item, f"{where}.{place}", depth + 1)
    elif value is not None:
        raise DataError(f"{where} is not usable (it is {_kind(value)}, not a text or a number); {_SEE}.")


def _number(value: float | Decimal, where: str) -> str:
    """As one would say it: 1987.0, which a column of numbers with a gap becomes, is 1987, and 0.50 is 0.5."""
    if isinstance(value, int):  # it may be more than a float can be
        return str(value)
    if not math.isfinite(value):
        raise DataError(f"{where} is not usable (it is {value}, which nobody can answer); give a text or a finite number.")
    if value == int(value):
        return str(int(value))
    return format(Decimal(str(value)).normalize(), "f")


def _final(text: str) -> str:
    r"""What a worked solution comes to: in <answer>, behind GSM8K's ####, in \boxed{}; or else all of it. Linear in ``text``."""
    end = text.rfind("</answer>")
    if (start := text.rfind("<answer>", 0, max(end, 0))) >= 0:
        return text[start + len("<answer>") : text.index("</answer>", start)].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return _boxed(text) if "\\boxed{" in text else text


def _boxed(text: str) -> str:
    inner, depth = text.rpartition("\\boxed{")[2], 1
    for place, letter in enumerate(inner):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inner[:place].strip()
    return text


# ---- values


def _plain(value: Any) -> Any:
    """Arrays and scalars of numpy, and maps of parquet (lists of pairs), as Python has them."""
    value = value.tolist() if hasattr(value, "tolist") else value
    is_map = isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in cast("list[Any]", value))
    return dict(cast("list[tuple[Any, Any]]", value)) if is_map else value


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _object(value: Any, where: str) -> Mapping[str, Any]:
    value = _plain(value)
    if _missing(value):
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is not usable (it is {_kind(value)}, not an object); {_SEE}.")
    return cast("Mapping[str, Any]", value)


def _label(value: Any, where: str) -> str:
    """A text or a number, "" where it is missing."""
    value = _plain(value)
    if _missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int | float):
        raise DataError(f"{where} is not usable (it is {_kind(value)}, not a text or a number); {_SEE}.")
    return str(value)


def _kind(value: Any) -> str:
    """What a value is, in a word."""
    known: dict[type, str] = {type(None): "null", str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return known.get(type(value), type(value).__name__)
