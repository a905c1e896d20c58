"""Builders of progress records, as the intake writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.cli.reports.progress_reader import FILE_NAME, EvalRecord, StepRecord


def ledger_fields(spent: int) -> dict[str, Any]:
    tokens = {"granted": 9 * spent, "spent": spent, "refunded": 7 * spent, "forfeited": 0, "outstanding": spent}
    ledger = {"train": {"tokens": tokens, "tool_calls": {**tokens, "spent": spent // 100}}}
    return {
        "ledger": ledger,
        "chain_tokens": 2 * spent,
        "saving": 0.5,
        "saving_tool_calls": 0.25,
        "recomputed": 0.125,
        "samplers": 2,
    }


def step_row(step: int, *, lineage: int = 0, spent: int = 1000, time: float = 0.0, em: float = 0.25) -> dict[str, Any]:
    row = {"kind": "step", "time": time, "step": step, "version": f"{lineage}.{step}", "reward_mean": 0.125, "em": em}
    return {**row, "lag_mean": 0.5, "lag_max": 1, "zero_signal_ratio": 0.1, "more": "is ignored", **ledger_fields(spent)}


def eval_row(step: int, em: float, *, failed: int = 0) -> dict[str, Any]:
    row = {"kind": "eval", "time": 0.0, "version": f"0.{step}", "questions": 20, "em": em, "reward": 0.1, "failed": failed}
    return {**row, **ledger_fields(1000)}


def step(number: int, **keys: Any) -> StepRecord:
    return StepRecord.model_validate(step_row(number, **keys))


def evaluation(number: int, em: float, **keys: Any) -> EvalRecord:
    return EvalRecord.model_validate(eval_row(number, em, **keys))


def write(run_dir: Path, *rows: dict[str, Any]) -> Path:
    """Append ``rows`` to the progress file of ``run_dir``."""
    with (run_dir / FILE_NAME).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return run_dir / FILE_NAME
