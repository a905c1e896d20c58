from __future__ import annotations

import gzip
import json
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from learner.intake.leases.question_file import load_questions
from learner.intake.leases.question_queue import QuestionQueue
from tests.intake.builders import question
from treegrpo.core.question import Message
from treegrpo.errors import DataError

pytestmark = pytest.mark.pure


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
        ([row(reward_model={})], "row 1 has no answer"),
        ([row(reward_model={"ground_truth": {"target": None}})], "row 1 has no answer"),
        (
            [row(reward_model={"ground_truth": {"target": ["a", {"b": 1}]}})],
            r"ground_truth.target.1 is not usable \(it is an object",
        ),
        ([row(reward_model={"ground_truth": float("nan")}, answer=float("inf"))], "answer is not usable .it is inf"),
        ([row(reward_model={"ground_truth": [float("nan")]})], "row 1: reward_model.ground_truth.0 is not usable .it is nan"),
        ([row(prompt=7)], "row 1: prompt is not usable .it is int"),
        ([row(prompt=[{"role": "end", "content": "a"}])], "row 1: prompt.0.role is not usable .'end' is none of system,"),
        ([row(prompt=[{"role": "user", "content": [{"type": "image"}]}])], "row 1: prompt.0.content.0 is not usable"),
        ([row(prompt=[{"role": "user", "content": 7}])], "row 1: prompt.0.content is not usable"),
        ([row(data_source=["a"])], "row 1: data_source is not usable .it is a list"),
        ([row(data_source="\ud800")], "row 1: data_source or extra_info has half a character"),
        ([row(extra_info={"family": "\udfff"})], "row 1: data_source or extra_info has half a character"),
        ([row(prompt="a\ud800")], "row 1: the prompt has half a character"),
        ([row(reward_model={"ground_truth": "\ud800"})], "row 1: an answer has half a character"),
        ([row(data_source="x" * (1 << 20))], r"row 1 has \d+ bytes of text; 1048576 are the most"),
        ([row(extra_info={"family": "x" * (1 << 20)})], r"row 1 has \d+ bytes of text"),
        ([row(extra_info={"index": "x" * (1 << 20)})], r"row 1 has \d+ bytes of text"),
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


def test_a_row_that_is_no_json_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row()) + "\n\n{broken", encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3 is not valid JSON"):
        load_questions(path)


def test_a_number_is_an_answer_too(tmp_path: Path) -> None:
    (read,) = load_questions(write(tmp_path / "q.jsonl", [row(reward_model={"ground_truth": {"target": [93]}})]))
    assert read.targets == ("93",)


TRUTH = {"reward_model": None}


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        ({"reward_model": {"style": "rule", "ground_truth": "72"}}, ("72",)),  # verl's GSM8K
        ({"reward_model": {"ground_truth": ["a", None, "b"]}}, ("a", "b")),
        ({"reward_model": {"ground_truth": {"target": {"value": "a", "aliases": ["b"]}}}}, ("a", "b")),
        ({"reward_model": {"ground_truth": {"target": 1987.0}}}, ("1987",)),
        ({"reward_model": {"ground_truth": 3.5}}, ("3.5",)),
        ({"reward_model": {"ground_truth": True}}, ("yes", "true")),
        ({"reward_model": {"ground_truth": "?"}}, ("?",)),
        ({**TRUTH, "answer": "Natalia sold 72 clips.\n#### 72"}, ("72",)),  # GSM8K itself
        ({**TRUTH, "solution": r"Hence $\boxed{\frac{1}{2}}$."}, (r"\frac{1}{2}",)),
        ({**TRUTH, "golden_answers": ["a", "b"]}, ("a", "b")),
        ({**TRUTH, "completion": [{"role": "assistant", "content": "<think>x</think><answer> a </answer>"}]}, ("a",)),
        ({**TRUTH, "completion": " blue."}, (" blue.",)),
        ({**TRUTH, "answer": 10**400}, ("1" + "0" * 400,)),  # more than a float can be
        ({**TRUTH, "solution": "<answer>" * 100_000}, ("<answer>" * 100_000,)),  # in linear time
        ({**TRUTH, "solution": "<answer>a</answer> or <answer>b</answer></answer> <answer>"}, ("b",)),
    ],
)
def test_an_answer_is_read_as_it_would_be_said(changes: dict[str, Any], targets: tuple[str, ...], tmp_path: Path) -> None:
    (read,) = load_questions(write(tmp_path / "q.jsonl", [row(**changes)]))
    assert read.targets == targets


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({"prompt": "Where?"}, [Message("user", "Where?")]),
        ({"prompt": None, "question": "Where?"}, [Message("user", "Where?")]),
        (
            {
                "prompt": [
                    {"role": "system", "content": None},
                    {"role": "user", "content": [{"type": "text", "text": "Where?"}, "!"]},
                ]
            },
            [Message("system", ""), Message("user", "Where?!")],
        ),
    ],
)
def test_a_prompt_is_messages_or_a_text(changes: dict[str, Any], prompt: list[Message], tmp_path: Path) -> None:
    (read,) = load_questions(write(tmp_path / "q.jsonl", [row(**changes)]))
    assert list(read.prompt) == prompt


def test_what_is_missing_may_be_null_or_nan(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [
        row(),
        row(data_source=None, extra_info=None),
        row(data_source=nan, extra_info={"split": nan, "index": 3.0, "family": None}),
    ]
    jsonl, parquet = write(tmp_path / "q.jsonl", rows), tmp_path / "q.parquet"
    nulls = [row(), row(data_source=None, extra_info=None), row(data_source=None, extra_info={"index": 3})]
    pq.write_table(pa.Table.from_pylist(nulls), parquet)  # pyright: ignore[reportUnknownMemberType]
    read = load_questions(jsonl)
    assert [(question.id, question.family) for question in read] == [("geo/train/0", "easy"), ("//row 2", ""), ("//3", "")]
    assert read == load_questions(parquet)


@pytest.mark.parametrize(
    ("column", "targets"),
    [
        (pa.array([3.14], pa.float32()), ("3.14",)),
        (pa.array([[0.1, 1987.0]], pa.list_(pa.float32())), ("0.1", "1987")),
        (pa.array([{"target": 1e-7}], pa.struct([("target", pa.float32())])), ("0.0000001",)),
        (pa.array([Decimal("0.50")]), ("0.5",)),
        (pa.array([[("target", "a")]], pa.map_(pa.string(), pa.string())), ("a",)),
        (pa.array(["a"]).dictionary_encode(), ("a",)),
    ],
)
def test_an_answer_of_parquet_is_read_as_it_was_written(column: Any, targets: tuple[str, ...], tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["Where?"], "answer": column}), tmp_path / "q.parquet")  # pyright: ignore[reportUnknownMemberType]
    assert load_questions(tmp_path / "q.parquet")[0].targets == targets


@pytest.mark.parametrize("answer", ["", " \n", "\u200b", "\ufeff\u2060", "\x00", "\u3000"])
def test_an_answer_that_cannot_be_seen_is_none(answer: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1 has no answer"):
        load_questions(write(tmp_path / "q.jsonl", [{"question": "Where?", "answer": answer}]))


def test_a_worked_solution_is_read_in_linear_time(tmp_path: Path) -> None:
    rows = [{"question": "Where?", "answer": mark * 60_000} for mark in ("<answer>", "</answer><answer>a", "####a", "\\boxed{")]
    began = time.monotonic()
    load_questions(write(tmp_path / "q.jsonl", rows))
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("name", ["q.JSONL", "q.json", "q.txt", "rows", "rows.parquet"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("array", [False, True])
def test_json_is_read_as_lines_or_array_whatever_its_name(name: str, mark: bytes, array: bool, tmp_path: Path) -> None:
    rows = [row(), row(data_source="sea")]
    text = json.dumps(rows, indent=1) if array else "\r\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(mark + b"\n" + text.encode())
    assert len(load_questions(tmp_path / name)) == 2


@pytest.mark.parametrize("name", ["q.PARQUET", "q.pq", "rows"])
def test_parquet_is_known_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([row()]), tmp_path / name)  # pyright: ignore[reportUnknownMemberType]
    assert len(load_questions(tmp_path / name)) == 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{}".encode("utf-16"), "byte order mark of UTF-16; save it as UTF-8"),
        ("{}".encode("utf-32"), "byte order mark of UTF-32; save it as UTF-8"),
        (gzip.compress(b"{}", mtime=0), "compressed with gzip; unpack it"),
        (b'{"a": "\xff"}', "neither JSON lines nor parquet"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"index": ' + b"9" * 5000 + b"}", "line 1 cannot be read as JSON"),
    ],
)
def test_a_file_of_another_kind_is_a_sentence(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=says):
        load_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "broken.jsonl", "broken.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    if name.startswith("broken"):
        (tmp_path / name).write_text("{not json", encoding="utf-8")
    with pytest.raises(DataError, match=name):
        load_questions(tmp_path / name)


def draw(queue: QuestionQueue) -> int:
    taken = queue.next_draw
    queue.mark_drawn(taken)
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
        after.mark_drawn(made_before)
    after.requeue_draw(3)
    assert draw(after) == 3
    assert [draw(after), draw(after)] == draws[8:10]
    assert [after[d] for d in draws] == [before[d] for d in draws]
