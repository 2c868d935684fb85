"""Wrong keys are counted by address in a window that slides."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from taskd.api.strikes import Strikes, make_table


@pytest.fixture
def table() -> Iterator[int]:
    fd = make_table()
    yield fd
    os.close(fd)


def test_processes_share_one_count(table: int) -> None:
    one, two = Strikes(table), Strikes(table)

    verdicts = [s.count("key", "192.0.2.1", 6, 1000.0).within for s in (one, two) * 4]

    assert verdicts == [True] * 6 + [False] * 2
    assert one.count("key", "192.0.2.2", 6, 1000.0).within
    assert one.count("token", "192.0.2.1", 6, 1000.0).within


def test_no_minute_holds_more_than_the_limit(table: int) -> None:
    strikes = Strikes(table)
    counted = [second for second in range(0, 300) if strikes.count("key", "a", 10, 10_000.0 + second).within]

    for begin in range(300):
        assert sum(begin <= second < begin + 60 for second in counted) <= 10
    assert len(counted) > 30


def test_retry_after_is_true(table: int) -> None:
    strikes = Strikes(table)
    for second in (0.0, 7.0, 31.0):
        assert strikes.count("key", "a", 3, 5003.0 + second).within
    refused = strikes.count("key", "a", 3, 5040.0)

    assert not strikes.count("key", "a", 3, 5040.0 + refused.retry_after_s - 7).within
    assert strikes.count("key", "a", 3, 5040.0 + refused.retry_after_s).within


def test_a_full_table_forgets_and_goes_on(table: int) -> None:
    strikes = Strikes(table)
    for number in range(10_000):
        assert strikes.count("key", f"10.0.{number // 256}.{number % 256}", 1, 9000.0).within
