"""Pacing functions: which length a step trains at. Pure integer arithmetic; nothing here knows a host."""


def linear(step: int, *, start: int, end: int, duration: int, multiple_of: int) -> int:
    """Length in tokens of optimizer step ``step`` (the first step is 1).

    ``start + (end - start) * min(step / duration, 1)``, floored to ``multiple_of``, never below the first multiple
    at or above ``start`` and never above ``end`` (arXiv 2108.06084, section 4). The division is an integer one, so
    that every rank and every machine computes the same length.
    """
    progressed = min(max(step, 0), duration)
    exact = start + (end - start) * progressed // duration
    floor = -(-start // multiple_of) * multiple_of
    return min(max(exact // multiple_of * multiple_of, floor), end)
