"""The rate limit's arithmetic: never too much, never a lock-out, and waits that are true."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.model.bucket import TOKEN, Bucket, Limit, Taken, debt_at, take

NOW = 1_764_000_000_000_000  # some day in 2025, in microseconds

limits = st.builds(Limit, st.integers(1, 10**12), st.integers(1, 10**6)) | st.builds(
    Limit, st.integers(100_000, 100_000_000), st.integers(1, 20)
)
steps = st.lists(
    st.tuples(st.integers(0, 2_000_000) | st.integers(0, 10**15), st.integers(1, 30)), min_size=1, max_size=40
)


@given(limits, steps)
def test_in_any_window_at_most_burst_and_rate_times_its_length_pass(
    limit: Limit, steps: list[tuple[int, int]]
) -> None:
    bucket, now, passed = Bucket(), NOW, []
    for pause, want in steps:
        now += pause
        bucket, taken = take(bucket, limit, now, want)
        passed.append((now, taken.granted))

    for first in range(len(passed)):
        total = 0
        for at, granted in passed[first:]:
            total += granted
            assert total * TOKEN <= limit.burst * TOKEN + (at - passed[first][0]) * limit.micro_rate


@given(limits, st.integers(1, 50))
def test_who_stays_below_the_rate_is_never_refused(limit: Limit, requests: int) -> None:
    bucket, now = Bucket(), NOW
    pause = -(-TOKEN // limit.micro_rate)
    for _ in range(requests):
        bucket, taken = take(bucket, limit, now)
        assert taken.granted == 1
        now += pause


@given(limits, steps, st.integers(1, 5))
def test_the_wait_is_true_to_the_microsecond(limit: Limit, steps: list[tuple[int, int]], least: int) -> None:
    bucket, now = Bucket(), NOW
    for pause, want in steps:
        now += pause
        bucket, taken = take(bucket, limit, now, max(want, least), least)

    if least > limit.burst:
        assert taken.wait_us is None
    else:
        assert taken.wait_us is not None
        assert take(bucket, limit, now + taken.wait_us, least, least)[1].granted == least
        if taken.wait_us > 0:
            assert take(bucket, limit, now + taken.wait_us - 1, least, least)[1].granted == 0


@given(limits, steps)
def test_after_the_reset_the_bucket_is_full(limit: Limit, steps: list[tuple[int, int]]) -> None:
    bucket, now = Bucket(), NOW
    for pause, want in steps:
        now += pause
        bucket, taken = take(bucket, limit, now, want)

    assert take(bucket, limit, now + taken.reset_us, limit.burst)[1].granted == limit.burst


@given(limits, steps, st.integers(1, 10**16))
def test_a_jump_back_of_the_clock_locks_nobody_out(
    limit: Limit, steps: list[tuple[int, int]], jump: int
) -> None:
    bucket, now = Bucket(), NOW
    for pause, want in steps:
        now += pause
        bucket, _ = take(bucket, limit, now, want)

    now -= jump
    bucket, first = take(bucket, limit, now)
    assert first.granted or (first.wait_us is not None and first.wait_us <= -(-TOKEN // limit.micro_rate))
    assert take(bucket, limit, now + (first.wait_us or 0))[1].granted or first.granted


def test_a_small_step_back_and_forth_gives_nothing_away() -> None:
    limit = Limit.of(1_000, 100)
    bucket, _ = take(Bucket(), limit, NOW, 100)

    for _ in range(1_000):
        bucket, back = take(bucket, limit, NOW - 500)
        bucket, again = take(bucket, limit, NOW)
        assert (back.granted, again.granted) == (0, 0)


def test_a_jump_ahead_gives_one_burst_at_most() -> None:
    limit = Limit.of(50, 100)
    bucket, _ = take(Bucket(), limit, NOW, 100)

    assert take(bucket, limit, NOW + 10**16, 1_000)[1].granted == 100


def test_fewer_than_least_is_nothing() -> None:
    limit = Limit.of(1, 10)
    bucket, _ = take(Bucket(), limit, NOW, 8)

    same, taken = take(bucket, limit, NOW, 5, 5)

    assert same == bucket
    assert taken == Taken(granted=0, remaining=2, wait_us=3_000_000, reset_us=8_000_000)
    assert take(bucket, limit, NOW, 5, 1)[1].granted == 2


def test_more_than_the_burst_never_passes() -> None:
    taken = take(Bucket(), Limit.of(1, 10), NOW, 11, 11)[1]

    assert (taken.granted, taken.wait_us, taken.retry_after_s) == (0, None, None)


@pytest.mark.parametrize(
    ("wait_us", "seconds"),
    [
        pytest.param(0, 1, id="at least one second"),
        pytest.param(1_000_000, 1, id="a whole second"),
        pytest.param(1_000_001, 2, id="rounded up, or it would be a lie"),
        pytest.param(None, None, id="never"),
    ],
)
def test_retry_after_is_whole_seconds(wait_us: int | None, seconds: int | None) -> None:
    assert Taken(0, 0, wait_us, 0).retry_after_s == seconds


@pytest.mark.parametrize(
    ("rate", "micro_rate"),
    [
        pytest.param(50, 50_000_000, id="whole"),
        pytest.param(0.1, 100_000, id="a float as it is written, not as it is stored"),
        pytest.param(Decimal("0.3333333333"), 333_333, id="cut, never above the rate"),
        pytest.param(1_000_000, 10**12, id="highest"),
        pytest.param(1e-9, 1, id="slower than can be told"),
    ],
)
def test_a_rate_is_counted_in_millionths(rate: float | Decimal, micro_rate: int) -> None:
    assert Limit.of(rate, 1).micro_rate == micro_rate


def test_an_odd_rate_is_exact_over_a_day() -> None:
    limit = Limit.of(999_999, 1)
    bucket = Bucket(debt=TOKEN, at_us=NOW)

    assert debt_at(Bucket(TOKEN, NOW), limit, NOW + 1) == TOKEN - 999_999_000_000
    assert take(bucket, limit, NOW + 2)[1].granted == 1


def test_a_lower_burst_holds_at_once() -> None:
    bucket, _ = take(Bucket(), Limit.of(1, 100), NOW, 100)

    taken = take(bucket, Limit.of(1, 5), NOW)[1]

    assert (taken.granted, taken.wait_us) == (0, 1_000_000)
