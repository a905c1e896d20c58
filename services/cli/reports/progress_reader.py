"""Reads progress.jsonl, which the intake writes: one record for each step, each evaluation and each long wait."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError, describe
from treegrpo.storage.run_files import JsonLinesFile

log = logging.getLogger(__name__)
FILE_NAME = "progress.jsonl"


class LedgerTotals(BaseModel):
    """The totals of the ledger in one currency: granted = spent + refunded + forfeited + outstanding."""

    granted: int = 0
    spent: int = 0
    refunded: int = 0
    forfeited: int = 0
    outstanding: int = 0


class StepRecord(BaseModel):
    """One optimiser step, and the ledger after it; None where the step has no value."""

    time: float
    """Unix seconds."""
    step: int
    version: str
    reward_mean: float | None = None
    em: float | None = None
    """Share of the step's leaves with an exact match."""
    lag_mean: float | None = None
    lag_max: int | None = None
    zero_signal_ratio: float | None = None
    ledger: dict[str, dict[str, LedgerTotals]]
    """By lease kind, by currency."""
    chain_tokens: int
    """What chains to the same leaves would have needed so far."""
    saving: float
    """1 - tokens the trees needed / chain_tokens."""
    saving_tool_calls: float
    """The same in tool calls."""
    recomputed: float = 0.0
    """Share of the spent tokens that were computed again, mostly because the weights had changed."""
    samplers: int

    @property
    def training(self) -> LedgerTotals:
        """The tokens of training leases."""
        return self.ledger.get("train", {}).get("tokens", LedgerTotals())


class EvalRecord(BaseModel):
    """One evaluation on the held-out questions."""

    time: float
    version: str
    questions: int
    em: float
    """Share answered with an exact match, of those that could be rolled out."""
    reward: float
    failed: int

    @property
    def step(self) -> int:
        return PolicyVersion.parse(self.version).step


class WaitingRecord(BaseModel):
    """A long wait: nothing has progressed for a while."""

    what: str = Field(alias="for")
    """What is waited for."""
    seconds: float
    """For how long."""


Record = StepRecord | EvalRecord | WaitingRecord
_KINDS: dict[str, type[Record]] = {"step": StepRecord, "eval": EvalRecord, "waiting": WaitingRecord}


@dataclass(slots=True)
class RunProgress:
    """The records of a run that count: a run resumed from a checkpoint drops those of later steps."""

    steps: list[StepRecord] = field(default_factory=list[StepRecord])
    evals: list[EvalRecord] = field(default_factory=list[EvalRecord])
    waiting: WaitingRecord | None = None
    """What the run waits for now, if it has waited for long."""

    def add_record(self, record: Record) -> None:
        """Append ``record``; what was recorded for its step or a later one was orphaned by a restart."""
        self.waiting = record if isinstance(record, WaitingRecord) else None
        if isinstance(record, StepRecord):
            self.steps = [*(old for old in self.steps if old.step < record.step), record]
            self.evals = [old for old in self.evals if old.step < record.step]
        elif isinstance(record, EvalRecord):
            self.evals = [*(old for old in self.evals if old.step < record.step), record]


class ProgressTail:
    """Reads the records appended to a progress file. Lines that are no records are left out; see `skipped_lines`."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLinesFile(path)

    def read_new_records(self) -> list[Record]:
        """The new records, none while there is no file; a line still being written waits. Raises RunFileError."""
        return [record for row in self._lines.read_new_rows() if (record := self._parse_record(row)) is not None]

    @property
    def skipped_lines(self) -> str:
        """A sentence about lines that are no records; empty if there is none."""
        return self._lines.skipped_summary

    def _parse_record(self, row: dict[str, Any]) -> Record | None:
        kind = _KINDS.get(str(row.get("kind")))
        if kind is None and isinstance(row.get("kind"), str):
            return None  # a kind for other readers
        try:
            record = (kind or StepRecord).model_validate(row)
            if isinstance(record, EvalRecord):
                PolicyVersion.parse(record.version)
        except (ValueError, ContractError) as error:
            self._lines.skip_line(error.errors()[0]["msg"] if isinstance(error, ValidationError) else describe(error))
            return None
        return record


def read_progress(run_dir: Path) -> RunProgress:
    """The progress of the run in ``run_dir``, empty if it has none. Raises RunFileError."""
    progress, tail = RunProgress(), ProgressTail(run_dir / FILE_NAME)
    for record in tail.read_new_records():
        progress.add_record(record)
    if tail.skipped_lines:
        log.warning("%s", tail.skipped_lines)
    return progress
