"""How many requests a rate limit lets through, in whole numbers.

A bucket holds the *debt* of what has passed: every pass adds one token, every microsecond takes some
away, and a request passes while the debt has room for it below `burst`. This is the generic cell rate
algorithm (GCRA, ITU-T I.371) with its theoretical arrival time written as `at` + debt / rate. One token
is `TOKEN` units, and a rate of r millionths of a token a second takes exactly r units a microsecond, so
nothing is ever rounded, whatever the rate: in any window of T seconds at most burst + rate * T pass.

Clocks are arguments. `taskd.take_tokens` in the database does the same sums by the database clock; a
test compares the two step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

TOKEN = 10**12
"""Units of debt in one token; 1 000 000 tokens of burst stay below 2 ** 63."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a key may do: `micro_rate` millionths of a token a second, `burst` tokens at once.

    The configuration has already checked 0 < rate <= 1 000 000 and 1 <= burst <= 1 000 000.
    """

    micro_rate: int
    burst: int

    @classmethod
    def of(cls, rate: float | Decimal, burst: int) -> Limit:
        """Return the limit for `rate` tokens a second, cut to millionths; the slowest is 0.000001."""
        millionths = (Decimal(str(rate)) * 1_000_000).to_integral_value(ROUND_FLOOR)
        return cls(max(1, int(millionths)), burst)


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is stored of a key: its debt in units, as it was at `at_us` (microseconds, Unix time)."""

    debt: int = 0
    at_us: int = 0


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of a `take`. All waits are relative, so no two clocks are ever compared.

    `granted` tokens were taken, `remaining` whole ones are left. After `wait_us` a next request that
    takes as little as this one was content with passes, if nobody else comes first: 0 is at once, None
    is never, because it is more than the burst. After `reset_us` the bucket is full again.
    """

    granted: int
    remaining: int
    wait_us: int | None
    reset_us: int

    @property
    def retry_after_s(self) -> int | None:
        """The wait as `Retry-After` says it: whole seconds, rounded up, at least 1."""
        return None if self.wait_us is None else max(1, -(-self.wait_us // 1_000_000))


def debt_at(bucket: Bucket, limit: Limit, now_us: int) -> int:
    """Return the debt at `now_us`, in units, never below nothing or above the burst.

    A clock that has jumped back makes debt grow, so that it gives nothing away; the bound above is
    what keeps any such jump from locking a key out: one request passes 1 / rate seconds after the
    first one that saw the jump.
    """
    debt = bucket.debt - (now_us - bucket.at_us) * limit.micro_rate
    return min(max(debt, 0), limit.burst * TOKEN)


def take(bucket: Bucket, limit: Limit, now_us: int, want: int = 1, least: int = 1) -> tuple[Bucket, Taken]:
    """Take up to `want` tokens, nothing when fewer than `least` are there; 1 <= least <= want.

    `least` equal to `want` is all or nothing. A refusal leaves the bucket as it was, unless the clock
    has jumped back: then the bucket is counted from the new time on, or it would stay full until the
    clock comes past the old one.
    """
    debt = debt_at(bucket, limit, now_us)
    room = (limit.burst * TOKEN - debt) // TOKEN
    granted = min(want, room) if room >= least else 0
    debt += granted * TOKEN
    if granted or now_us < bucket.at_us:
        bucket = Bucket(debt, now_us)
    over = debt + least * TOKEN - limit.burst * TOKEN
    wait_us = None if least > limit.burst else max(0, -(-over // limit.micro_rate))
    return bucket, Taken(granted, room - granted, wait_us, -(-debt // limit.micro_rate))
