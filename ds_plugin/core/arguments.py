"""Types of command-line arguments: each turns text into a value, or says in one sentence what to write instead."""

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ds_plugin.core.errors import ConfigError

MOST = 2**31 - 1  # of what is counted


class Parser(argparse.ArgumentParser):
    """Raises ConfigError in one line, where argparse prints its usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def checked(make: Callable[[str], Any], fits: Callable[[Any], Any], what: str) -> Callable[[str], Any]:
    """The type of what ``make`` makes of the text, where that ``fits``; ``what``: such a value, in words."""

    def value_of(text: str) -> Any:
        with contextlib.suppress(ValueError, OSError):
            if fits(value := make(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {what}")

    return value_of


def above(bound: float) -> Callable[[str], float]:
    """Finite numbers above ``bound``."""
    return checked(float, lambda value: bound < value < math.inf, f"a finite number above {bound:g}")


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Values of a kind with commas in between."""
    return lambda text: tuple(kind(part) for part in text.split(","))


count = checked(int, lambda value: 1 <= value <= MOST, f"a whole number from 1 to {MOST}")
tokens = checked(int, lambda value: 1 <= value <= 10**15, "a whole number from 1 to 10**15")
positive = above(0)
existing_file = checked(Path, Path.is_file, "a file that exists")
new_file = checked(Path, lambda path: path.parent.is_dir() and not path.is_dir(), "a file in a folder that exists")
new_folder = checked(
    Path,
    lambda path: next(place for place in (path, *path.absolute().parents) if place.exists()).is_dir(),
    "a folder, nor can one be made there: a file is in its place",
)
