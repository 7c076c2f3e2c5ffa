"""Files that hold one text in each record: JSON lines, parquet, folders of Hugging Face's ``Dataset.save_to_disk``."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_plugin.core.errors import DataError

_ROWS = 1024  # of a table that are held at a time


def kind_of(path: Path, key: str) -> str | None:
    """What to read a file by: "lines", "parquet"; None: it holds no records.

    A .json file holds records when its first line is one, with a text under ``key``: other JSON is text like any.
    """
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return "lines"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(".json"):
        try:
            with open(path, "rb") as stream:
                first = json.loads(stream.readline(1 << 24))
        except (OSError, ValueError, RecursionError):
            return None
        return "lines" if isinstance(first, dict) and isinstance(first.get(key), str) else None
    return None


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``folder`` is one of ``Dataset.save_to_disk``'s.

    Raises:
        DataError: it holds several of them, the splits of a ``DatasetDict``.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(
            f"data: {str(folder)!r} holds the splits {', '.join(splits)} of a data set; give the folder of one, like "
            f"{str(folder / (splits or ['train'])[0])!r}"
        )
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def read_records(path: Path, kind: str, key: str) -> Iterator[bytes | None]:
    """The text of each record, in UTF-8 if it is valid; None where there is none under ``key``.

    Raises:
        DataError: the file is damaged, its records have no ``key``, or it needs a package that is not installed.
    """
    try:
        yield from _READERS[kind](path, key)
    except ImportError as error:
        raise DataError(
            f"data: {str(path)!r} needs the package {error.name!r}; pip install 'ds-plugin[data]', or give plain text"
        ) from error
    except DataError:
        raise
    except Exception as error:  # each format's library has its own; nothing of ours runs in here
        raise DataError(
            f"data: {str(path)!r} cannot be read ({type(error).__name__}: {error}); make or copy it again"
        ) from error


def _lines(path: Path, key: str) -> Iterator[bytes | None]:
    opened = gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")
    with opened as stream:
        first = True
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"a {type(record).__name__}")
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"data: line {number} of {str(path)!r} is no JSON object ({error}); mend or remove that line"
                ) from None
            if first and key not in record:
                raise _no_key(path, key, list(record))
            first = False
            yield _text(record.get(key))


def _text(value: Any) -> bytes | None:
    """A lone surrogate, which JSON can spell, stays one, so that it is found not to be UTF-8."""
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else None


def _parquet(path: Path, key: str) -> Iterator[bytes | None]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if key not in names:
            raise _no_key(path, key, names)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[key]):
            yield from _column(path, key, batch.column(0))


def _saved(path: Path, key: str) -> Iterator[bytes | None]:
    import datasets

    saved = datasets.load_from_disk(str(path), keep_in_memory=False)
    if key not in saved.column_names:
        raise _no_key(path, key, saved.column_names)
    for table in saved.select_columns([key]).with_format("arrow").iter(batch_size=_ROWS):
        yield from _column(path, key, table.column(0))


def _column(path: Path, key: str, column: Any) -> Iterator[bytes | None]:
    """A column of strings as bytes: what is not UTF-8 in it is for the caller to find."""
    import pyarrow

    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        raise DataError(f"data: {key!r} in {str(path)!r} is of type {column.type}, not a text; give --text-key another")
    for value in column.cast(pyarrow.large_binary()):
        yield value.as_py()


def _no_key(path: Path, key: str, found: list[str]) -> DataError:
    known = ", ".join(map(repr, found[:12])) or "nothing"
    return DataError(f"data: the records of {str(path)!r} hold {known} and no {key!r}; give --text-key one of them")


_READERS = {"lines": _lines, "parquet": _parquet, "saved": _saved}
