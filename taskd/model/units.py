"""Durations, rates and sizes as people write them: `5s`, `100/m`, `64KiB`.

The one parser for all three: the configuration and the plugin API both read them, and neither may
import the other. Every refusal is a `ValueError` whose message says what the form is; it never
repeats more than the offending text.
"""

from __future__ import annotations

import math
import re

MAX_RATE = 1_000_000.0
"""Starts a second; a higher rate is no limit."""

MAX_DURATION_S = 3660 * 86_400.0
"""About ten years: beyond it a duration is a typing error, and sums with dates overflow."""

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

# [0-9] and not \d: that takes the digits of every script.
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)/(s|m|h|d)")
_SIZE = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB|TiB)")


def duration(text: str) -> float:
    """Return the seconds that `text` names: a number with its unit, one of `ms s m h d`.

    Raises:
        ValueError: no such form, or longer than `MAX_DURATION_S`.

    >>> duration("250ms"), duration("2h")
    (0.25, 7200.0)
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{_shown(text)} is not a duration; write it like 250ms, 5s, 10m, 2h or 7d")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > MAX_DURATION_S:
        raise ValueError(f"{_shown(text)} is longer than ten years")
    return seconds


def rate(value: str | float) -> float:
    """Return how many a second `value` names: a number is by the second, a text names its span.

    Raises:
        ValueError: no such form, not above 0, or above `MAX_RATE` a second.

    >>> rate(10), rate("2/s"), rate("90/m")
    (10.0, 2.0, 1.5)
    """
    if isinstance(value, bool):
        raise ValueError("a rate is a number a second, or a text like 2/s or 100/m")
    if isinstance(value, str):
        match = _RATE.fullmatch(value)
        if match is None:
            raise ValueError(f"{_shown(value)} is not a rate; write a number a second, or like 2/s or 100/m")
        per_second = float(match[1]) / _SECONDS[match[2]]
    else:
        try:
            per_second = float(value)
        except OverflowError:
            per_second = math.inf
    if not 0 < per_second <= MAX_RATE:
        raise ValueError(f"a rate must be above 0 and at most {MAX_RATE:.0f} a second")
    return per_second


def size(text: str) -> int:
    """Return the bytes that `text` names: a whole number with its unit, one of `B KiB MiB GiB TiB`.

    Raises:
        ValueError: no such form.

    >>> size("64KiB")
    65536
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{_shown(text)} is not a size; write it like 512B, 64KiB or 1MiB")
    return int(match[1]) * _BYTES[match[2]]


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
