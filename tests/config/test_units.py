"""Durations, sizes and rates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.config import units


@pytest.mark.parametrize(
    ("text", "span"),
    [
        pytest.param("250ms", timedelta(milliseconds=250), id="milliseconds"),
        pytest.param("5s", timedelta(seconds=5), id="seconds"),
        pytest.param("10m", timedelta(minutes=10), id="m is minutes, not months"),
        pytest.param("2h", timedelta(hours=2), id="hours"),
        pytest.param("7d", timedelta(days=7), id="days"),
        pytest.param("0s", timedelta(0), id="zero is a duration"),
    ],
)
def test_a_duration_is_a_number_and_its_unit(text: str, span: timedelta) -> None:
    assert units.duration(text) == span


@pytest.mark.parametrize("text", ["", "s", "5 s", "5S", "5sec", "1h30m", "1.5h", "-5s", "+5s", "5s\n", "٥s"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration"):
        units.duration(text)


@pytest.mark.parametrize("text", ["5", "0", "5.0", "-5"])
def test_a_bare_number_does_not_say_its_unit(text: str) -> None:
    with pytest.raises(ValueError, match="a bare number does not say its unit"):
        units.duration(text)
    with pytest.raises(ValueError, match="a bare number does not say its unit"):
        units.size(text)


def test_a_duration_beyond_the_calendar_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than any clock runs"):
        units.duration("999999999999999d")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        pytest.param("0B", 0, id="zero is a size"),
        pytest.param("64KiB", 65_536, id="kibibytes"),
        pytest.param("1MiB", 1_048_576, id="mebibytes"),
        pytest.param("2GiB", 2_147_483_648, id="gibibytes"),
    ],
)
def test_a_size_is_a_number_and_its_unit(text: str, count: int) -> None:
    assert units.size(text) == count


@pytest.mark.parametrize("text", ["1MB", "1kb", "1K", "64kib", "1 MiB", "-1MiB", "MiB"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        units.size(text)


@pytest.mark.parametrize(
    ("text", "per_second"),
    [
        pytest.param("10", Fraction(10), id="a bare number is a second"),
        pytest.param("0.5", Fraction(1, 2), id="fractions"),
        pytest.param("2/s", Fraction(2), id="a second"),
        pytest.param("100/m", Fraction(5, 3), id="a minute, exact"),
        pytest.param("1/h", Fraction(1, 3600), id="an hour"),
        pytest.param("1000000", Fraction(1_000_000), id="the most"),
    ],
)
def test_a_rate_is_exact(text: str, per_second: Fraction) -> None:
    rate = units.rate(text)

    assert rate.per_second == per_second
    assert str(rate) == text


@pytest.mark.parametrize("text", ["0", "-1", "0/s", "1000001", "60000001/m", "0.000"])
def test_a_rate_is_above_zero_and_at_most_a_million_a_second(text: str) -> None:
    with pytest.raises(ValueError, match="greater than 0 and at most 1000000 a second"):
        units.rate(text)


@pytest.mark.parametrize("text", ["", "fast", "10/d", "10/", "/s", "1e3", "10 /s", "1/2s"])
def test_anything_else_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="must be a rate"):
        units.rate(text)


@given(st.integers(min_value=0, max_value=10**14))
def test_what_is_shown_is_read_back(number: int) -> None:
    span = timedelta(milliseconds=number)

    assert units.duration(units.show_duration(span)) == span
    assert units.size(units.show_size(number)) == number


@given(st.text(max_size=20))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    readers: list[Callable[[str], object]] = [units.duration, units.size, units.rate]
    for reader in readers:
        with contextlib.suppress(ValueError):
            reader(text)
