"""Rows out of data files, each with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distill.errors import DataError

LINES = (".jsonl", ".json")
SUFFIXES = (*LINES, ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file."""

    where: str
    """`file:line`, for messages."""
    values: Mapping[str, Any]


def read_rows(path: Path, split: str | None = None) -> Iterator[Row]:
    """All rows of a file or a data set folder, in order.

    Raises:
        DataError: nothing there, an unknown file type, a broken line, or a split that must be named.
    """
    path = Path(path)
    if path.is_dir():
        yield from _folder_rows(path, split)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder; set data.prompts")
    elif split is not None:
        raise DataError(f"data.split={split!r}: {path} is one file and has no splits; leave data.split out")
    else:
        yield from _file_rows(path)


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix in LINES:
        yield from json_lines(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise DataError(f"{path}: unknown type {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")


def json_lines(path: Path) -> Iterator[Row]:
    """Rows of a JSON Lines file; blank lines are passed over.

    Raises:
        DataError: a line that is not UTF-8, not one JSON object, or holds text or numbers that cannot be kept, with
            its number.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                values = json.loads(line)
                if b"\\u" in line:
                    # a half of a surrogate pair can be escaped in JSON, but is no character
                    json.dumps(values, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise DataError(f"{where}: {half!r} is half a character; write whole ones, or both halves") from error
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 at byte {error.start + 1} of the line") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not usable JSON: {error}") from error
            if not isinstance(values, dict):
                raise DataError(f"{where}: one JSON object per line is expected, got a {type(values).__name__}")
            yield Row(where, values)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _folder_rows(folder: Path, split: str | None) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        yield from _saved_rows(folder, split)
        return
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and not _hidden(file, folder))
    if not files:
        raise DataError(f"{folder}: holds no data; expected {', '.join(SUFFIXES)} or a saved data set")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(file.name.split(".")[0].split("-")[0], []).append(file)
    for file in by_split[_choose(folder, split, list(by_split))]:
        yield from _file_rows(file)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _saved_rows(folder: Path, split: str | None) -> Iterator[Row]:
    """A folder written by `save_to_disk`: arrow tables, without code."""
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: the saved data set cannot be read: {str(error).splitlines()[0]}") from error
    where = str(folder)
    if isinstance(found, DatasetDict):
        split = _choose(folder, split, list(found))
        found, where = found[split], f"{folder} ({split})"
    elif split is not None:
        raise DataError(f"data.split={split!r}: {folder} has no splits; leave data.split out")
    for number, values in enumerate(found, start=1):
        yield Row(f"{where}, row {number}", values)


def _choose(folder: Path, split: str | None, allowed: list[str]) -> str:
    """Never mixes what the folder keeps apart: a test split must not slip into training."""
    if split is None and len(allowed) == 1:
        return allowed[0]
    if split not in allowed:
        given = "not set" if split is None else repr(split)
        raise DataError(f"data.split is {given}: {folder} holds {', '.join(allowed)}; name one of them")
    return split
