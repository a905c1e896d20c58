"""Parses a mapping from another process as a dataclass: every field is required and type-checked."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")


def parse_dataclass(kind: type[Kind], row: object) -> Kind:
    """``kind(**row)``. Raises ValueError and TypeError with short messages, since ``row`` is untrusted.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Covered:
        ...     position: int
        >>> parse_dataclass(Covered, {"position": "3"})
        Traceback (most recent call last):
        ValueError: position is not of type int
    """
    if not isinstance(row, dict):
        raise TypeError(f"it is not a mapping but {type(row).__name__}")
    made = kind(**cast("dict[str, Any]", row))
    for name, hint in _hints(kind).items():
        if not _is(getattr(made, name), hint):
            raise ValueError(f"{name} is not of type {getattr(hint, '__name__', hint)}")
    return made


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is(value: object, hint: Any) -> bool:
    """Whether ``value`` has a type; a bool is not an int here, and an int is a float."""
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is(one, get_args(hint)[0]) for one in cast("list[object]", value))
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    return type(value) is hint or (hint is float and type(value) is int)
