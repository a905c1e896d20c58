"""Question: the prompt and the accepted answers of one lease."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message of a prompt."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a data file (Search-R1's format)."""

    id: str
    """``source/split/index``: unique across merged data sources."""
    source: str
    prompt: tuple[Message, ...]
    targets: tuple[str, ...]
    """Gold answers; any of them is right."""
    family: str = ""
    """An optional label from ``extra_info.family``, for reports only."""
