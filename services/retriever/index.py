"""A corpus and its BM25 index: pure, in memory, without a server."""

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
"""Terms of one query: dense retrievers cut theirs at as many tokens."""
_WORD = re.compile(r"\w+")
IDS = ("id", "_id", "docid")
CONTENTS = ("contents", "text", "content")
COLUMNS = (*IDS, *CONTENTS, "title")
"""As Search-R1, BEIR and others call them."""


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
    if not any(words(document.contents) for document in documents):
        raise DataError(f"the corpus {path} has no word in any of its {len(documents)} documents; nothing could be found in it")
    return documents


def _document(row: Any, where: str, number: int) -> Document:
    fields = _known(cast("dict[str, Any]", row), number) if isinstance(row, dict) else row
    try:
        return Document.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the row"
        raise DataError(
            f'{where}: {place}: {first["msg"].lower()}; each row is {{"id": …, "contents": "Title\\ntext"}} (docs/data.md)'
        ) from error


def _known(row: dict[str, Any], number: int) -> dict[str, Any]:
    """``id`` and ``contents`` of a row, whatever they are called in it; null and NaN are as if they were not there."""
    given = {name: value for name, value in row.items() if not (value is None or _is_nan(value))}
    identity = next((given[name] for name in IDS if name in given), number)
    contents = next((given[name] for name in CONTENTS if name in given), None)
    title = given.get("title")
    if "contents" not in given and isinstance(contents, str) and isinstance(title, str | int | float):
        contents = f"{title}\n{contents}"
    if isinstance(contents, str):
        contents = replace_surrogates(contents)
    return {"id": identity, **({} if contents is None else {"contents": contents})}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def words(text: str) -> list[str]:
    """The terms of a text: lower case, without accents, split at everything that is no letter or digit.

    Example:
        >>> words("São Tomé-Nord")
        ['sao', 'tome', 'nord']
    """
    return _WORD.findall(text.casefold().translate(_PLAIN))


class _Plain(dict[int, str]):
    """Letter → its decomposition without accents, letter by letter.

    Decomposing a whole text would also sort the accents of each letter, in quadratic time, for nothing.
    """

    def __missing__(self, letter: int) -> str:
        decomposed = unicodedata.normalize("NFKD", chr(letter))
        plain = self[letter] = "".join(part for part in decomposed if not unicodedata.combining(part))
        return plain


_PLAIN = _Plain()


class Index:
    """BM25 (Lucene's variant) over a corpus.

    Example:
        hits = Index(load_corpus(path)).search("Ghazni", topk=2)
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents
        self._scorer = bm25s.BM25()
        self._scorer.index([words(document.contents) for document in documents], show_progress=False)

    def search(self, query: str, topk: int) -> list[Hit]:
        """The documents that share a term with ``query``, best first, at most ``topk``; equal scores in corpus order.

        The first QUERY_WORDS terms that the corpus knows count.
        """
        known = list(islice((word for word in words(query) if word in self._scorer.vocab_dict), QUERY_WORDS))
        if not known or topk < 1:
            return []
        score_D = self._scorer.get_scores(known)  # D = documents of the corpus
        return [Hit(self.documents[place], float(score_D[place])) for place in _best(score_D, topk)]


def _best(score_D: np.ndarray, topk: int) -> list[int]:
    """Places of at most ``topk`` positive scores, best first, ties by place.

    Most documents score 0: leaving them out first is what makes a search cost microseconds.
    """
    found = np.flatnonzero(score_D > 0)
    if len(found) > topk:
        score_F = score_D[found]
        found = found[score_F >= np.partition(score_F, -topk)[-topk]]
    return found[np.argsort(-score_D[found], kind="stable")[:topk]].tolist()
