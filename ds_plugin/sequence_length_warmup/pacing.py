"""Pacing functions: which length comes at which point of the warmup. Pure, and without floats, in integers or decimal
numbers whose every digit is defined, so that every rank and every machine computes the same length."""

import functools
import math
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal, localcontext

#: a user's schedule: (share of the duration in [0, 1], start length, end length) -> length in tokens
Custom = Callable[[float, int, int], float]

_DIGITS = 30  # of decimal numbers; half of them are rounded away, so that 64 is not 63.999...
_SMALL = Decimal(10) ** -_DIGITS
_PI = Decimal("3.141592653589793238462643383279502884197169399375")


def linear(done: int, *, start: int, end: int, duration: int) -> int:
    """``start + (end - start) * done / duration``, rounded down (arXiv 2108.06084, section 4)."""
    return start + (end - start) * done // duration


def root(done: int, *, start: int, end: int, duration: int, degree: int) -> int:
    """``start + (end - start) * (done / duration) ** (1 / degree)``, rounded down; grows faster at first. It is the
    largest n with ``n / (end - start) <= (done / duration) ** (1 / degree)``, found without a float."""
    grows = end - start
    return start + bisect_right(range(grows + 1), grows**degree * done, key=lambda n: n**degree * duration) - 1


def sinusoidal(done: int, *, start: int, end: int, duration: int) -> int:
    """``start + (end - start) * sin(pi / 2 * done / duration)``, rounded down; grows faster at first and eases into the
    full length (SkyLadder, arXiv 2503.15450, section on schedules)."""
    with localcontext(prec=_DIGITS):
        angle = _PI / 2 * done / duration
        term, sine, n = angle, angle, 1
        while abs(term) > _SMALL:  # the power series; at most 15 terms up to pi / 2
            term = -term * angle * angle / ((n + 1) * (n + 2))
            sine, n = sine + term, n + 2
        return start + math.floor(round((end - start) * sine, _DIGITS // 2))


def exponential(done: int, *, start: int, end: int, duration: int) -> int:
    """``start * (end / start) ** (done / duration)``, rounded down: equal shares of the warmup multiply the length by
    equal factors; grows slower at first (SkyLadder, as above)."""
    with localcontext(prec=_DIGITS):
        return math.floor(round(start * (_logarithm(end, start) * done / duration).exp(), _DIGITS // 2))


@functools.cache
def _logarithm(end: int, start: int) -> Decimal:
    with localcontext(prec=_DIGITS):
        return (Decimal(end) / start).ln()


def custom(done: int, *, start: int, end: int, duration: int, function: Custom) -> int:
    """A user's function of the share that is done, rounded down. Raises ValueError: it returned no finite number."""
    value = function(done / duration, start, end)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"returned {value!r}, which is not a finite number of tokens")
    return math.floor(value)


def floored(length: int, *, start: int, end: int, multiple_of: int) -> int:
    """``length`` rounded down to a multiple, at least the first multiple from ``start`` on, at most ``end``, which is a
    multiple itself."""
    lowest = -(-start // multiple_of) * multiple_of
    return min(max(length // multiple_of * multiple_of, lowest), end)


def divisors(*, start: int, end: int, multiple_of: int) -> list[int]:
    """The lengths from the first on that divide the full one: what samples are cut into equal parts of. The first may
    be shorter than ``start``, where nothing longer below the full length divides it."""
    lowest = floored(start, start=start, end=end, multiple_of=multiple_of)
    found = [length for length in range(multiple_of, end + 1, multiple_of) if end % length == 0]
    return [length for length in found if length >= max(n for n in found if n <= lowest)]


def levels(*, start: int, end: int, multiple_of: int, count: int) -> list[int]:
    """At most ``count`` lengths from the first to the full one, evenly spaced: all that a bounded schedule uses."""
    lowest = floored(start, start=start, end=end, multiple_of=multiple_of)
    exact = (lowest + (end - lowest) * i // (count - 1) for i in range(count))
    return sorted({floored(length, start=start, end=end, multiple_of=multiple_of) for length in exact})
