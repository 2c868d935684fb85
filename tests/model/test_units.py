"""Durations, rates and sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from taskd.model import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("5s", 5), ("0s", 0), ("1.5s", 1.5), ("10m", 600), ("2h", 7200), ("7d", 604_800)],
)
def test_a_duration_is_a_number_with_its_unit(text: str, seconds: float) -> None:
    assert units.duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("5", id="no unit"),
        pytest.param("s", id="no number"),
        pytest.param("-5s", id="negative"),
        pytest.param("5 s", id="a blank"),
        pytest.param("5s\n", id="a line break"),
        pytest.param("5S", id="a capital"),
        pytest.param("1h30m", id="two units"),
        pytest.param("1e3s", id="an exponent"),
        pytest.param("٣s", id="digits of another script"),
        pytest.param("9" * 5000 + "s", id="more digits than Python reads"),
        pytest.param("99999d", id="centuries"),
    ],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|ten years"):
        units.duration(text)


@pytest.mark.parametrize(
    ("value", "per_second"),
    [(10, 10.0), (0.5, 0.5), ("2/s", 2.0), ("90/m", 1.5), ("36/h", 0.01), ("0.5/s", 0.5), (1_000_000, 1e6)],
)
def test_a_rate_is_a_number_a_second_or_names_its_span(value: Any, per_second: float) -> None:
    assert units.rate(value) == per_second


@pytest.mark.parametrize(
    "value",
    [0, -1, "0/s", "2", "2/x", "/s", "2 / s", True, float("nan"), float("inf"), 10**400, 1_000_001, "2/s\n"],
)
def test_what_is_no_rate_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="rate"):
        units.rate(value)


@pytest.mark.parametrize(
    ("text", "size"), [("512B", 512), ("64KiB", 65_536), ("1MiB", 1 << 20), ("2GiB", 2 << 30)]
)
def test_a_size_is_a_whole_number_with_its_unit(text: str, size: int) -> None:
    assert units.size(text) == size


@pytest.mark.parametrize("text", ["", "1", "1MB", "1.5MiB", "-1B", "1 MiB", "1mib", "1MiB\n"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        units.size(text)
