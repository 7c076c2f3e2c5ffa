"""Rows of a sweep as CSV: frozen dataclasses of str, int and float, written so that they read back equal."""

import csv
import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from ds_plugin.core.errors import DataError
from ds_plugin.core.files import atomic_path

Record = TypeVar("Record")


def write_records(kind: type[Record], records: Iterable[Record], path: Path) -> None:
    """Replace ``path`` by a header of the field names of ``kind`` and a line per record."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([getattr(record, name) for name in names] for record in records)


def read_records(kind: type[Record], path: Path) -> list[Record]:
    """The records of `write_records`. Raises DataError for a file that is not one of them."""
    hints = typing.get_type_hints(kind)
    types: dict[str, Any] = {name: hint if hint in (int, float) else str for name, hint in hints.items()}
    try:
        with open(path, newline="") as stream:
            return [kind(**{name: types[name](text) for name, text in row.items()}) for row in csv.DictReader(stream)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not hold the records of a sweep ({error}); move it away") from None
