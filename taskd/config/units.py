"""Durations, sizes and rates as people write them in YAML, and back.

A bare number never says its unit, so it is refused; so are sums ("1h30m") and fractions of a unit: each
value has one spelling that everybody reads the same way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from typing import NewType

Size = NewType("Size", int)
"""A number of bytes."""

DURATION = "a duration: a whole number and its unit (ms, s, m, h, d), such as 30s"
SIZE = "a size: a whole number and its unit (B, KiB, MiB, GiB), such as 64KiB"
RATE = 'a rate: a number of starts or requests a second such as 10 or 0.5, or "2/s", "100/m", "1000/h"'

MAX_RATE = 1_000_000
"""A second."""

_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SECONDS = {"s": 1, "m": 60, "h": 3600}

_DURATION = re.compile(r"([0-9]{1,15})(ms|s|m|h|d)")
_SIZE = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB)")
_RATE = re.compile(r"(-?[0-9]{1,15}(?:\.[0-9]{1,9})?)(?:/(s|m|h))?")
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?")
_NEGATIVE = re.compile(r"-[0-9]+(ms|s|m|h|d|B|KiB|MiB|GiB)")


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a second, exact: "100/m" is five thirds and no float near it."""

    per_second: Fraction
    text: str = field(compare=False)
    """As the file says it."""

    def __float__(self) -> float:
        return float(self.per_second)

    def __str__(self) -> str:
        return self.text


def duration(text: str) -> timedelta:
    """Return the time span that `text` says.

    Raises:
        ValueError: `text` is no duration; the message says what one is.

    >>> duration("250ms")
    datetime.timedelta(microseconds=250000)
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(_refusal(text, DURATION))
    try:
        return timedelta(milliseconds=int(match[1]) * _MILLISECONDS[match[2]])
    except OverflowError:
        raise ValueError(f"must be {DURATION}; this one is longer than any clock runs") from None


def size(text: str) -> Size:
    """Return the number of bytes that `text` says.

    Raises:
        ValueError: `text` is no size; the message says what one is.

    >>> size("64KiB")
    65536
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(_refusal(text, SIZE))
    return Size(int(match[1]) * _BYTES[match[2]])


def rate(text: str) -> Rate:
    """Return the rate that `text` says: above 0, at most a million a second.

    Raises:
        ValueError: `text` is no rate, or one out of range; the message says what one is.

    >>> rate("100/m").per_second
    Fraction(5, 3)
    """
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"must be {RATE}")
    per_second = Fraction(match[1]) / _SECONDS[match[2] or "s"]
    if not 0 < per_second <= MAX_RATE:
        raise ValueError(f"must be greater than 0 and at most {MAX_RATE} a second (above 0 to {MAX_RATE})")
    return Rate(per_second, text)


def show_duration(span: timedelta) -> str:
    """Return `span` in the largest unit that leaves no rest.

    >>> show_duration(timedelta(minutes=90))
    '90m'
    """
    milliseconds = span // timedelta(milliseconds=1)
    return _show(milliseconds, _MILLISECONDS, zero="0s")


def show_size(count: int) -> str:
    """Return `count` bytes in the largest unit that leaves no rest.

    >>> show_size(1048576)
    '1MiB'
    """
    return _show(count, _BYTES, zero="0B")


def _show(count: int, units: dict[str, int], *, zero: str) -> str:
    for unit, factor in reversed(units.items()):
        if count and count % factor == 0:
            return f"{count // factor}{unit}"
    return zero


def _refusal(text: str, wanted: str) -> str:
    if _NUMBER.fullmatch(text):
        return f"must be {wanted}; a bare number does not say its unit"
    if _NEGATIVE.fullmatch(text):
        return f"must be {wanted}, and not negative (zero or greater than 0)"
    return f"must be {wanted}"
