"""Reads a corpus and searches it with BM25, in memory."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import bm25s
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from treegrpo.errors import DataError
from treegrpo.storage.row_files import read_rows
from treegrpo.storage.surrogates import replace_surrogates

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
QUERY_WORDS = 256
"""Terms of one query that count: dense retrievers truncate queries at as many tokens."""
_WORD = re.compile(r"\w+")
IDS = ("id", "_id", "docid")
CONTENTS = ("contents", "text", "content")
COLUMNS = (*IDS, *CONTENTS, "title")
"""The columns of a corpus, as Search-R1, BEIR and others name them."""


class Document(BaseModel):
    """One row of a corpus file (Search-R1's format)."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(coerce_numbers_to_str=True)
    contents: str = Field(min_length=1)
    """``"Title\\ntext"``."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A document and its BM25 score."""

    document: Document
    score: float


def load_corpus(path: Path) -> list[Document]:
    """Read a corpus: a file of rows with ``id`` and ``contents`` (title, line feed, text), or ``title`` and ``text``.

    Raises:
        DataError: the file is missing or empty, or a row is no such object.
    """
    documents = [_document(row, f"{path}, line {number}", number) for number, row in read_rows(path, COLUMNS)]
    if not documents:
        raise DataError(f"the corpus {path} has no documents; give one JSON object per line with id and contents")
    if not any(split_terms(document.contents) for document in documents):
        raise DataError(f"the corpus {path} has no word in any of its {len(documents)} documents; no query could match")
    return documents


def _document(row: Any, where: str, number: int) -> Document:
    fields = _document_fields(cast("dict[str, Any]", row), number) if isinstance(row, dict) else row
    try:
        return Document.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the row"
        raise DataError(
            f'{where}: {place}: {first["msg"].lower()}; each row is {{"id": …, "contents": "Title\\ntext"}} (docs/data.md)'
        ) from error


def _document_fields(row: dict[str, Any], number: int) -> dict[str, Any]:
    """``id`` and ``contents`` of a row, under any of their names; null and NaN count as missing."""
    given = {name: value for name, value in row.items() if not (value is None or _is_nan(value))}
    document_id = next((given[name] for name in IDS if name in given), number)
    contents = next((given[name] for name in CONTENTS if name in given), None)
    title = given.get("title")
    if "contents" not in given and isinstance(contents, str) and isinstance(title, str | int | float):
        contents = f"{title}\n{contents}"
    if isinstance(contents, str):
        contents = replace_surrogates(contents)
    return {"id": document_id, **({} if contents is None else {"contents": contents})}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def split_terms(text: str) -> list[str]:
    """Split a text into terms: lower case, without accents, at everything that is no letter or digit.

    Example:
        >>> split_terms("São Tomé-Nord")
        ['sao', 'tome', 'nord']
    """
    return _WORD.findall(text.casefold().translate(_ACCENT_FREE))


class _AccentFreeTable(dict[int, str]):
    """Maps a character to its decomposition without accents, for `str.translate`.

    Decomposing a whole text would also sort the accents of each letter, needlessly and in quadratic time.
    """

    def __missing__(self, codepoint: int) -> str:
        decomposed = unicodedata.normalize("NFKD", chr(codepoint))
        plain = self[codepoint] = "".join(part for part in decomposed if not unicodedata.combining(part))
        return plain


_ACCENT_FREE = _AccentFreeTable()


class Index:
    """BM25 (Lucene's variant) over a corpus.

    Example:
        hits = Index(load_corpus(path)).search("Ghazni", topk=2)
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents
        self._scorer = bm25s.BM25()
        self._scorer.index([split_terms(document.contents) for document in documents], show_progress=False)

    def search(self, query: str, topk: int) -> list[Hit]:
        """The documents that share a term with ``query``, best first, at most ``topk``; equal scores in corpus order.

        The first QUERY_WORDS terms that the corpus knows count.
        """
        known = list(islice((word for word in split_terms(query) if word in self._scorer.vocab_dict), QUERY_WORDS))
        if not known or topk < 1:
            return []
        score_D = self._scorer.get_scores(known)  # D = documents of the corpus
        return [Hit(self.documents[row], float(score_D[row])) for row in _best(score_D, topk)]


def _best(score_D: np.ndarray, topk: int) -> list[int]:
    """Row numbers of at most ``topk`` positive scores, best first, ties by row.

    Most documents score 0: excluding them first makes a search take microseconds.
    """
    found = np.flatnonzero(score_D > 0)
    if len(found) > topk:
        score_F = score_D[found]
        found = found[score_F >= np.partition(score_F, -topk)[-topk]]
    return found[np.argsort(-score_D[found], kind="stable")[:topk]].tolist()
