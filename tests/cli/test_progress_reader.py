from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.cli.reports.progress_reader import EvalRecord, ProgressTail, StepRecord, read_progress
from tests.cli.progress_rows import eval_row, step_row, write
from treegrpo.errors import RunFileError
from treegrpo.storage.run_files import JsonLinesFile

pytestmark = pytest.mark.pure


def test_records_are_read_by_kind_and_others_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, eval_row(0, 0.3), step_row(1), {"kind": "evaluation", "step": 1})
    assert [type(record) for record in ProgressTail(path).read_new_records()] == [EvalRecord, StepRecord]


def test_each_line_is_read_once_and_a_partial_line_is_waited_for(tmp_path: Path) -> None:
    path = write(tmp_path, step_row(1))
    tail = ProgressTail(path)
    assert [type(record) for record in tail.read_new_records()] == [StepRecord]
    write(tmp_path, step_row(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert tail.read_new_records() == []
    path.write_bytes(whole)
    assert [record for record in tail.read_new_records() if isinstance(record, StepRecord) and record.step == 2]
    assert tail.read_new_records() == []


def test_a_file_that_is_not_there_yet_has_no_records(tmp_path: Path) -> None:
    assert ProgressTail(tmp_path / "absent.jsonl").read_new_records() == []


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "step", "step": 1}', '{"step": 1}'])
def test_a_broken_line_is_left_out_and_named(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, step_row(1))
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    write(tmp_path, step_row(2))
    assert [step.step for step in read_progress(tmp_path).steps] == [1, 2]
    assert "progress.jsonl: line 2 is not a record" in caplog.text
    assert "1 line is left out" in caplog.text


def test_marks_ends_and_rubbish_of_other_programs_cost_no_record(tmp_path: Path) -> None:
    rows = [json.dumps(step_row(step)).encode() for step in (1, 2, 3)]
    path = tmp_path / "progress.jsonl"
    lines = [b"\xef\xbb\xbf" + rows[0] + b"\r\n", b"\xff" * 50 + b"\n", b"\n", b"[" * 100_000 + b"\n", rows[1] + b"\n", rows[2]]
    path.write_bytes(b"".join(lines))
    tail = ProgressTail(path)
    assert [record.step for record in tail.read_new_records() if isinstance(record, StepRecord)] == [1, 2]
    assert "line 2 is not a record" in tail.skipped_lines
    assert "2 lines are left out" in tail.skipped_lines
    path.write_bytes(b"".join(lines) + b"\n")
    assert [record.step for record in tail.read_new_records() if isinstance(record, StepRecord)] == [3]
    path.write_bytes(rows[0] + b"\n")
    assert [record.step for record in tail.read_new_records() if isinstance(record, StepRecord)] == [1], "written anew"


def test_a_line_without_an_end_is_not_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").write_bytes(b"x" * 5000 + b"\n" + json.dumps({"kind": "eval"}).encode() + b"\n")
    lines = JsonLinesFile(tmp_path / "progress.jsonl", line_bytes=1000)
    assert list(lines.read_new_rows()) == [{"kind": "eval"}]
    assert "line 1 is not a record" in lines.skipped_summary


def test_a_line_that_grows_while_it_is_read_is_read_whole_the_next_time(tmp_path: Path) -> None:
    class GrowingFile:
        """A file of which half a line is there at first."""

        def __init__(self) -> None:
            self.pieces = [b'{"kind": ', b'"eval"}\n']

        def readline(self, _limit: int) -> bytes:
            return self.pieces.pop(0)

    lines = JsonLinesFile(tmp_path / "progress.jsonl")
    assert (lines._whole_line(GrowingFile()), lines.complete_bytes) == (b"", 0)  # pyright: ignore[reportPrivateUsage]


def test_a_progress_file_that_is_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").mkdir()
    with pytest.raises(RunFileError, match=r"progress\.jsonl cannot be used \(Is a directory\)"):
        read_progress(tmp_path)


def test_a_wait_is_known_until_something_happens(tmp_path: Path) -> None:
    waiting = {"kind": "waiting", "for": "groups", "seconds": 60.0}
    write(tmp_path, step_row(1), waiting, {**waiting, "seconds": 120.0})
    progress = read_progress(tmp_path)
    assert progress.waiting is not None
    assert (progress.waiting.what, progress.waiting.seconds) == ("groups", 120.0)
    write(tmp_path, eval_row(1, 0.5))
    assert read_progress(tmp_path).waiting is None


def test_a_run_that_goes_on_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, eval_row(0, 0.1), *(step_row(n) for n in (1, 2, 3)), eval_row(3, 0.9))
    write(tmp_path, step_row(2, lineage=1, em=0.5))
    progress = read_progress(tmp_path)
    assert [record.version for record in progress.steps] == ["0.1", "1.2"]
    assert [record.em for record in progress.evals] == [0.1]
