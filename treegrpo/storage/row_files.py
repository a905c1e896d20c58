"""Reads files of rows: JSON lines, one JSON array, or parquet, told apart by their first bytes."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

from treegrpo.errors import DataError, describe
from treegrpo.storage.text_files import open_text

PARQUET = b"PAR1"
SUFFIXES = (".parquet", ".pq")
_HEAD = 1024


def read_rows(path: Path, columns: Collection[str]) -> Iterator[tuple[int, Any]]:
    """The rows of a file, each with its number from 1 on: of its line, where it is JSON lines. Parquet: ``columns`` alone.

    Raises:
        DataError: the file cannot be read, has another format, or a row is not JSON.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            is_json = head.removeprefix(BOM_UTF8).lstrip()[:1] in (b"{", b"[")
            is_parquet = head.startswith(PARQUET) or (path.suffix.lower() in SUFFIXES and not is_json)
        yield from _parquet(path, columns) if is_parquet else _json(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or describe(error)}); check the data path.") from error
    except UnicodeError as error:
        raise DataError(f"{path} is neither JSON lines nor parquet ({describe(error)}); check the data path.") from error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    with open_text(path) as lines:
        rows = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        for place, (number, line) in enumerate(rows):
            if place == 0 and line.lstrip().startswith("["):
                yield from enumerate(_array(line + lines.read(), path), start=1)
                return
            yield number, _parsed(line, f"{path}, line {number}", "write one object a line")


def _array(text: str, path: Path) -> list[Any]:
    return cast("list[Any]", _parsed(text, str(path), "write one object a line, or one array of objects"))


def _parsed(text: str, where: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON ({error.msg}); {remedy}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise DataError(f"{where} cannot be read as JSON ({describe(error)}); {remedy}.") from error


def _parquet(path: Path, columns: Collection[str]) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            known = [name for name in file.schema_arrow.names if name in columns]
            number = 0
            for batch in file.iter_batches(columns=known):
                for row in cast("list[Any]", _as_written(batch).to_pylist()):
                    number += 1
                    yield number, row
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as parquet ({describe(error)}); check the data path.") from error


def _as_written(batch: Any) -> Any:
    """``batch`` with doubles for narrower floating-point numbers, by their shortest decimal: 3.14, which itself is not quite."""
    import pyarrow as pa

    types = [field.type for field in batch.schema]
    decimals, doubles = ([_with_floats(one, to) for one in types] for to in (pa.string(), pa.float64()))
    columns = [
        column if one == double else column.cast(text).cast(double)
        for column, one, text, double in zip(batch.columns, types, decimals, doubles, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _with_floats(type_: Any, to: Any) -> Any:
    """``type_`` with ``to`` in the place of the floating-point numbers below double, also those in lists and objects."""
    import pyarrow as pa

    if pa.types.is_float32(type_) or pa.types.is_float16(type_):
        return to
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(_with_floats(field.type, to)) for field in type_])
    for kind, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if kind(type_):
            return make(type_.value_field.with_type(_with_floats(type_.value_type, to)))
    return type_
