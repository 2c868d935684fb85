"""How long a failed job waits: the curves, their caps, and the dice."""

from __future__ import annotations

import random
from typing import Literal

import pytest

from taskd.model.backoff import ceiling_s, wait_s
from taskd.model.jobtype import Retry


@pytest.mark.parametrize(
    ("backoff", "attempt", "seconds"),
    [
        pytest.param("fixed", 1, 2.0, id="fixed"),
        pytest.param("fixed", 50, 2.0, id="fixed, later"),
        pytest.param("linear", 1, 2.0, id="linear begins with base"),
        pytest.param("linear", 4, 8.0, id="linear"),
        pytest.param("linear", 10_000, 3600.0, id="linear, capped"),
        pytest.param("exponential", 1, 2.0, id="exponential begins with base"),
        pytest.param("exponential", 2, 4.0, id="exponential doubles"),
        pytest.param("exponential", 11, 2048.0, id="below the cap"),
        pytest.param("exponential", 12, 3600.0, id="at the cap"),
        pytest.param("exponential", 100, 3600.0, id="the most attempts there are"),
        pytest.param("exponential", 10_000, 3600.0, id="no float overflow"),
    ],
)
def test_ceiling(backoff: Literal["fixed", "linear", "exponential"], attempt: int, seconds: float) -> None:
    assert ceiling_s(Retry(backoff=backoff), attempt) == seconds


@pytest.mark.parametrize(
    ("attempt", "seconds"),
    [
        pytest.param(1, 1.0, id="the first"),
        pytest.param(2, 60.0, id="the second"),
        pytest.param(3, 3600.0, id="never above the cap"),
        pytest.param(9, 3600.0, id="the last repeats"),
    ],
)
def test_a_list_of_delays_replaces_the_curve(attempt: int, seconds: float) -> None:
    assert ceiling_s(Retry(delays=(1.0, 60.0, 9999.0)), attempt) == seconds


def test_a_fixed_wait_is_capped_too() -> None:
    assert ceiling_s(Retry(backoff="fixed", backoff_base=50.0, backoff_cap=10.0), 1) == 10.0


def test_full_jitter_draws_between_nothing_and_the_curve() -> None:
    dice = random.Random(7)

    drawn = [wait_s(Retry(), 3, dice) for _ in range(2000)]

    assert all(0.0 <= wait <= 8.0 for wait in drawn)
    assert min(drawn) < 0.1
    assert max(drawn) > 7.9
    assert sum(drawn) / len(drawn) == pytest.approx(4.0, abs=0.2)


def test_the_same_dice_draw_the_same_wait() -> None:
    assert wait_s(Retry(), 3, random.Random(7)) == wait_s(Retry(), 3, random.Random(7))


@pytest.mark.parametrize("retry", [Retry(jitter="none"), Retry(delays=(2.0,))])
def test_what_has_no_jitter_is_the_curve_itself(retry: Retry) -> None:
    assert wait_s(retry, 1, random.Random(7)) == 2.0
