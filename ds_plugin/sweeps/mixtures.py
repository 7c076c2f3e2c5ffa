"""Mixtures of experts as the sweeps' command line spells them."""

from fractions import Fraction
from typing import NamedTuple


class Mixture(NamedTuple):
    """``EXPERTS:ACTIVE:RATIO``: experts, how many of them a token goes through (at least 2: one alone would weigh 1,
    whatever its score), the hidden size of one over the width. Without a ratio it is 4 / ACTIVE: a token then goes
    through as many weights as in the dense model."""

    experts: int
    active: int
    ratio: Fraction

    @classmethod
    def of(cls, text: str) -> "Mixture":
        """What is spelt so. Raises ValueError: nothing is."""
        experts, active, *ratio = text.split(":")
        found = cls(int(experts), int(active), ratio_of(":".join(ratio) or f"4/{int(active)}"))
        if not 2 <= found.active <= found.experts <= 2**16:
            raise ValueError(text)
        return found

    def __str__(self) -> str:
        return ":".join(map(str, self))


def ratio_of(text: str) -> Fraction:
    """A number above 0, such as 2, 0.5 or 4/3. Raises ValueError for another."""
    try:
        found = Fraction(text)
    except ZeroDivisionError:
        raise ValueError(text) from None
    if not 2**-20 <= found <= 2**20:
        raise ValueError(text)
    return found
