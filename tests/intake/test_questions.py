from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from learner.intake.questions import QuestionQueue, load_questions
from tests.intake.builders import question
from treegrpo.errors import DataError


def row(**changes: Any) -> dict[str, Any]:
    return {
        "data_source": "geo",
        "prompt": [{"role": "user", "content": "Where?"}],
        "ability": "qa",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["there"]}},
        "extra_info": {"split": "train", "index": 0, "family": "easy"},
        **changes,
    }


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_rows_are_read_from_jsonl_and_parquet_alike(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "q.jsonl", [row()])
    parquet = tmp_path / "q.parquet"
    pq.write_table(pa.Table.from_pylist([row()]), parquet)  # pyright: ignore[reportUnknownMemberType]
    (read,) = load_questions(jsonl)
    assert [read] == load_questions(parquet)
    assert (read.id, read.family, read.targets, read.prompt[0].content) == ("geo/train/0", "easy", ("there",), "Where?")


def test_ids_of_merged_sources_do_not_collide(tmp_path: Path) -> None:
    other = row(data_source="sea")
    heldout = row(extra_info={"split": "test", "index": 0})
    assert len(load_questions(write(tmp_path / "q.jsonl", [row(), other, heldout]))) == 3


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row(), row(reward_model={"ground_truth": {"target": []}}, extra_info={"index": 1})], "row 2 has no answer"),
        ([row(reward_model={})], "row 1: reward_model.ground_truth is not usable"),
        ([row(reward_model={"ground_truth": {"target": None}})], "row 1: reward_model.ground_truth.target is not usable"),
        ([row(prompt="Where?")], "row 1: prompt is not usable"),
        ([row(extra_info="none")], "row 1: extra_info is not usable"),
        ([row(), "text"], "row 2: the row is not usable"),
        ([row(prompt=[{"role": "user", "content": " "}])], "row 1 has an empty prompt"),
        ([row(), row()], "row 2 has the id geo/train/0"),
        ([], "holds no question"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_row(tmp_path: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        load_questions(write(tmp_path / "bad.jsonl", rows))
    assert "bad.jsonl" in str(caught.value)


def test_a_row_that_is_no_json_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row()) + "\n\n{broken", encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl, row 2 is not valid JSON"):
        load_questions(path)


def test_a_number_is_an_answer_too(tmp_path: Path) -> None:
    (read,) = load_questions(write(tmp_path / "q.jsonl", [row(reward_model={"ground_truth": {"target": [93]}})]))
    assert read.targets == ("93",)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "broken.jsonl", "broken.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    if name.startswith("broken"):
        (tmp_path / name).write_text("{not json", encoding="utf-8")
    with pytest.raises(DataError, match=name):
        load_questions(tmp_path / name)


def draw(queue: QuestionQueue) -> int:
    taken = queue.next_draw
    queue.take(taken)
    return taken


def test_every_question_comes_once_an_epoch_in_a_new_order() -> None:
    queue = QuestionQueue([question(i) for i in range(20)], seed=3)
    epochs = [[queue[draw(queue)].id for _ in range(20)] for _ in range(3)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_draw_names_the_same_question_after_a_restart() -> None:
    made = [question(i) for i in range(7)]
    before, after = QuestionQueue(made, seed=1), QuestionQueue(made, seed=1)
    draws = [draw(before) for _ in range(10)]
    for made_before in draws[:8]:
        after.take(made_before)
    after.put_back(3)
    assert draw(after) == 3
    assert [draw(after), draw(after)] == draws[8:10]
    assert [after[d] for d in draws] == [before[d] for d in draws]
