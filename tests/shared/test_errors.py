"""Sentences that are made from exceptions."""

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from treegrpo import errors
from treegrpo.errors import DESCRIBED_CHARACTERS, RunError, TreeGrpoError, describe

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
OURS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TreeGrpoError)}
WORDED = OURS | {"JSONDecodeError", "UnicodeDecodeError", "TOMLDecodeError", "SafetensorError", "SettingsError", "ArgumentError"}
"""Exceptions that never come without words."""
LOG = {"debug", "info", "warning", "error", "exception", "critical"}


def _names(kinds: ast.expr | None) -> Iterator[str]:
    if isinstance(kinds, ast.Tuple):
        yield from (name for kind in kinds.elts for name in _names(kind))
    elif kinds is not None:
        yield ast.unparse(kinds).rpartition(".")[2]


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _bare(node: ast.AST, name: str) -> bool:
    """Whether ``node`` puts the exception ``name`` into a sentence as it is."""
    if isinstance(node, ast.FormattedValue):
        return node.conversion == -1 and _is(node.value, name)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOG:
        return any(_is(argument, name) for argument in node.args[1:])
    return False


def _offences(tree: ast.AST) -> Iterator[int]:
    for handler in ast.walk(tree):
        if isinstance(handler, ast.ExceptHandler) and handler.name and not set(_names(handler.type)) <= WORDED:
            guarded = {ast.unparse(test.test) for test in ast.walk(handler) if isinstance(test, ast.IfExp)}
            if f"str({handler.name})" not in guarded:
                yield from (node.lineno for node in ast.walk(handler) if isinstance(node, ast.expr) and _bare(node, handler.name))


def test_every_foreign_exception_in_a_sentence_is_described() -> None:
    files = [path for top in ("treegrpo", "services", "learner") for path in (ROOT / top).rglob("*.py") if "v1" not in path.parts]
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in _offences(ast.parse(path.read_text()))]
    assert not found, "write describe(error): str(error) of some exceptions is empty"


@pytest.mark.parametrize("text", ['f"{error}"', 'log.warning("%s", error)', 'f"{describe(error)} {error}"'])
def test_an_exception_as_it_is_would_be_found(text: str) -> None:
    code = f"try: ...\nexcept (TimeoutError, ValueError) as error: {text}"
    assert list(_offences(ast.parse(code))) == [2]
    assert not list(_offences(ast.parse(code.replace("(TimeoutError, ValueError)", "ConfigError"))))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TimeoutError(), "TimeoutError"),
        (asyncio.CancelledError(), "CancelledError"),
        (ConnectionResetError(" \n "), "ConnectionResetError"),
        (OSError(2, "no\nsuch file"), "[Errno 2] no such file"),
        (RunError("a " * DESCRIBED_CHARACTERS), ("a " * DESCRIBED_CHARACTERS).strip()),
    ],
)
def test_an_exception_is_one_line_that_says_something(error: BaseException, text: str) -> None:
    assert describe(error) == text


def test_a_foreign_exception_does_not_say_too_much() -> None:
    assert len(describe(ValueError("x" * 100_000))) == DESCRIBED_CHARACTERS + 2


def test_a_long_text_ends_with_a_whole_sentence_or_word_and_no_cut_address() -> None:
    link = "https://example.org/" + "a" * (DESCRIBED_CHARACTERS // 3)
    assert describe(ValueError(f"The file is torn. See {link} for more. Then {link} and {link}.")) == (
        f"The file is torn. See {link} for more"
    )
    assert describe(ValueError(f"{link} {link} {link}")) == f"{link} {link} …"
