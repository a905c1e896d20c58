"""The run's progress file, progress.jsonl: one record for each step, each evaluation and each long wait, by the intake."""

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


class Account(BaseModel):
    """The ledger in one currency: granted = spent + refunded + forfeited + outstanding."""

    granted: int = 0
    spent: int = 0
    refunded: int = 0
    forfeited: int = 0
    outstanding: int = 0


class StepRecord(BaseModel):
    """One optimiser step, with the books as they stood after it; None is a figure that the step had nothing to make of."""

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
    ledger: dict[str, dict[str, Account]]
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
    def training(self) -> Account:
        """The tokens of training leases."""
        return self.ledger.get("train", {}).get("tokens", Account())


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
    """Nothing has moved for a while."""

    what: str = Field(alias="for")
    """What is waited for."""
    seconds: float
    """For how long."""


Record = StepRecord | EvalRecord | WaitingRecord
_KINDS: dict[str, type[Record]] = {"step": StepRecord, "eval": EvalRecord, "waiting": WaitingRecord}


@dataclass(slots=True)
class Progress:
    """The run so far, as it counts: a resumed run goes back to its checkpoint, and so does this."""

    steps: list[StepRecord] = field(default_factory=list[StepRecord])
    evals: list[EvalRecord] = field(default_factory=list[EvalRecord])
    waiting: WaitingRecord | None = None
    """What the run waits for now, if that is worth saying."""

    def add(self, record: Record) -> None:
        """Append ``record``; what was recorded for its step or a later one was orphaned by a restart."""
        self.waiting = record if isinstance(record, WaitingRecord) else None
        if isinstance(record, StepRecord):
            self.steps = [*(old for old in self.steps if old.step < record.step), record]
            self.evals = [old for old in self.evals if old.step < record.step]
        elif isinstance(record, EvalRecord):
            self.evals = [*(old for old in self.evals if old.step < record.step), record]


class Tail:
    """Reads what was appended to a progress file since the last look. What is no record is left out; see `complaint`."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLinesFile(path)

    def new(self) -> list[Record]:
        """The new records, none while there is no file; a line still being written waits. Raises RunFileError."""
        return [record for row in self._lines.read_new_rows() if (record := self._record(row)) is not None]

    @property
    def complaint(self) -> str:
        """A sentence about lines that are no records; empty if there is none."""
        return self._lines.skipped_summary

    def _record(self, row: dict[str, Any]) -> Record | None:
        kind = _KINDS.get(str(row.get("kind")))
        if kind is None and isinstance(row.get("kind"), str):
            return None  # a kind that is for others
        try:
            record = (kind or StepRecord).model_validate(row)
            if isinstance(record, EvalRecord):
                PolicyVersion.parse(record.version)
        except (ValueError, ContractError) as error:
            self._lines.skip_line(error.errors()[0]["msg"] if isinstance(error, ValidationError) else describe(error))
            return None
        return record


def read_progress(run_dir: Path) -> Progress:
    """The progress of the run in ``run_dir``, empty if it has none. Raises RunFileError."""
    progress, tail = Progress(), Tail(run_dir / FILE_NAME)
    for record in tail.new():
        progress.add(record)
    if tail.complaint:
        log.warning("%s", tail.complaint)
    return progress
