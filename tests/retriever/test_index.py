from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.retriever.index import Document, Index, load_corpus, split_terms
from treegrpo.errors import DataError

pytestmark = pytest.mark.pure


def index(*contents: str) -> Index:
    return Index([Document(id=str(place), contents=text) for place, text in enumerate(contents)])


def found(index: Index, query: str, topk: int) -> list[str]:
    return [hit.document.id for hit in index.search(query, topk)]


def corpus(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_document_about_the_query_comes_first() -> None:
    towns = index("Kabul\nKabul is large.", "Ghazni\nGhazni is near Kabul.", "Herat\nHerat is old.")
    assert found(towns, "kabul?", 3) == ["0", "1"]


def test_accents_and_case_do_not_matter() -> None:
    assert split_terms("São TOMÉ") == ["sao", "tome"]
    assert found(index("Asunción\nA city.", "Lima\nA city."), "ASUNCION", 1) == ["0"]


def test_nothing_is_found_for_unknown_words_or_none() -> None:
    towns = index("Kabul\nA city.", "Herat\nA city.")
    assert towns.search("Paris", 2) == []
    assert towns.search(" ?! ", 2) == []


def test_equal_scores_keep_the_order_of_the_corpus() -> None:
    assert found(index(*["same words"] * 9), "same", 4) == ["0", "1", "2", "3"]


@given(st.lists(st.text("abc ", min_size=1, max_size=12), min_size=1, max_size=12), st.text("abc ", max_size=5))
def test_a_smaller_topk_is_a_prefix_of_a_larger(contents: list[str], query: str) -> None:
    towns = index("a", *contents)
    everything = towns.search(query, len(contents) + 1)
    scores = [hit.score for hit in everything]
    assert scores == sorted(scores, reverse=True)
    for topk in range(1, len(contents) + 1):
        assert towns.search(query, topk) == everything[:topk]


def test_a_corpus_is_read_with_its_ids_as_text(tmp_path: Path) -> None:
    path = corpus(tmp_path, '{"id": 7, "contents": "A\\na", "url": "x"}\n\n{"id": "b", "contents": "B\\nb"}\n')
    assert load_corpus(path) == [Document(id="7", contents="A\na"), Document(id="b", contents="B\nb")]


@pytest.mark.parametrize("row", ['{"id": "1"}', '{"id": "1", "contents": ""}', '{"id": "1", "contents": 3}', "[]", "3"])
def test_a_broken_row_is_refused_with_its_file_and_line(tmp_path: Path, row: str) -> None:
    path = corpus(tmp_path, '{"id": "0", "contents": "A\\na"}\n' + row + "\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 2: .*each row is"):
        load_corpus(path)


def test_a_row_that_is_no_json_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 2 is not valid JSON"):
        load_corpus(corpus(tmp_path, '{"contents": "A"}\n{'))


def test_a_corpus_may_have_other_names_a_byte_order_mark_and_gaps(tmp_path: Path) -> None:
    rows = '{"_id": "a", "title": "A", "text": "x"}\r\n{"id": null, "contents": "B\\nb\\ud800", "title": "C"}\n'
    (tmp_path / "corpus.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert load_corpus(tmp_path / "corpus.jsonl") == [Document(id="a", contents="A\nx"), Document(id="2", contents="B\nb\ufffd")]


def test_null_and_nan_are_missing_and_a_number_is_a_title(tmp_path: Path) -> None:
    rows = '{"id": NaN, "contents": NaN, "title": 1984, "text": "x"}\n{"id": 2.5, "title": NaN, "text": "y"}\n'
    assert load_corpus(corpus(tmp_path, rows)) == [Document(id="1", contents="1984\nx"), Document(id="2.5", contents="y")]


def test_a_missing_or_empty_corpus_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl cannot be read"):
        load_corpus(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"corpus\.jsonl has no documents"):
        load_corpus(corpus(tmp_path, "\n"))
