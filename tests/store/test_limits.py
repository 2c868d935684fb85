"""Tokens taken in the database: the sums of `taskd.model.bucket`, by its clock, over all connections."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import UUID, uuid4

import psycopg
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from taskd.model import bucket
from taskd.model.bucket import TOKEN, Bucket, Limit, Taken
from taskd.store import limits
from taskd.store.limits import Want, take

Connection = psycopg.AsyncConnection[Any]

KEY = UUID(int=1)
SLOW = Limit.of(0.000001, 10)
"""Gives no token back while a test runs."""


async def stored(db: Connection, key: UUID = KEY) -> Bucket | None:
    row = await (
        await db.execute("select debt, at_us from taskd.key_buckets where key = %s", (key,))
    ).fetchone()
    return Bucket(*row) if row else None


async def put(db: Connection, found: Bucket, key: UUID = KEY) -> None:
    await db.execute(
        "insert into taskd.key_buckets (key, debt, at_us) values (%s, %s, %s)"
        " on conflict (key) do update set debt = excluded.debt, at_us = excluded.at_us",
        (key, found.debt, found.at_us),
    )


async def clock_us(db: Connection) -> int:
    row = await (
        await db.execute("select (extract(epoch from clock_timestamp()) * 1000000)::bigint")
    ).fetchone()
    assert row is not None
    return int(row[0])


async def test_a_new_key_has_its_whole_burst(db: Connection) -> None:
    [taken] = await take(db, [Want(KEY, SLOW, want=100)])

    assert (taken.granted, taken.remaining) == (10, 0)


async def test_refused_is_told_how_long_to_wait(db: Connection) -> None:
    limit = Limit.of(0.5, 1)

    first, second = await take(db, [Want(KEY, limit), Want(KEY, limit)])

    assert (first.granted, second.granted) == (1, 0)
    assert second.wait_us is not None
    assert 1_500_000 < second.wait_us <= 2_000_000
    assert second.retry_after_s == 2


async def test_after_the_wait_one_request_passes(db: Connection) -> None:
    limit = Limit.of(0.5, 1)
    await take(db, [Want(KEY, limit)])
    [refused] = await take(db, [Want(KEY, limit)])
    before = await stored(db)
    assert before is not None
    assert refused.wait_us is not None

    await put(db, Bucket(before.debt, before.at_us - refused.wait_us))  # that much time has gone by

    assert [taken.granted for taken in await take(db, [Want(KEY, limit), Want(KEY, limit)])] == [1, 0]


async def test_a_refusal_writes_nothing(db: Connection) -> None:
    await take(db, [Want(KEY, SLOW, want=10)])
    before = await stored(db)

    [refused] = await take(db, [Want(KEY, SLOW)])

    assert refused.granted == 0
    assert await stored(db) == before


async def test_all_or_nothing(db: Connection) -> None:
    await take(db, [Want(KEY, SLOW, want=8)])

    nothing, rest, never = await take(
        db, [Want(KEY, SLOW, 5, 5), Want(KEY, SLOW, 5, 1), Want(KEY, SLOW, 11, 11)]
    )

    assert (nothing.granted, nothing.remaining) == (0, 2)
    assert rest.granted == 2
    assert (never.granted, never.wait_us) == (0, None)


async def test_answers_come_in_the_order_of_the_wants(db: Connection) -> None:
    keys = [UUID(int=number) for number in (5, 1, 4, 2, 3)]

    taken = await take(db, [Want(key, SLOW, want=key.int) for key in keys])

    assert [found.granted for found in taken] == [5, 1, 4, 2, 3]


async def test_no_wants_are_no_work(db: Connection) -> None:
    assert await take(db, []) == []


async def test_a_bucket_of_the_future_locks_nobody_out(db: Connection) -> None:
    limit = Limit.of(100, 10)
    await put(db, Bucket(0, await clock_us(db) + 10 * 365 * 86_400 * 1_000_000))  # the clock has jumped back

    [refused] = await take(db, [Want(KEY, limit)])
    after = await stored(db)

    assert (refused.granted, refused.wait_us) == (0, 10_000)
    assert after is not None
    assert after.at_us <= await clock_us(db)


async def test_a_bucket_of_long_ago_is_full_and_overflows_nothing(db: Connection) -> None:
    highest = Limit(10**12, 10**6)
    await put(db, Bucket(10**18, -(10**15)))

    [taken] = await take(db, [Want(KEY, highest, want=2_000_000)])

    assert (taken.granted, taken.remaining) == (1_000_000, 0)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    micro_rate=st.integers(1, 10**12),
    burst=st.integers(1, 10**6),
    owed=st.fractions(0, 1),
    ago_us=st.integers(-(10**9), 10**9) | st.integers(-1_000, 10**15),
    want=st.integers(1, 10**6),
    least=st.integers(1, 10**6) | st.just(1),
)
async def test_the_database_does_the_same_sums_as_the_model(
    db: Connection, micro_rate: int, burst: int, owed: Any, ago_us: int, want: int, least: int
) -> None:
    limit = Limit(micro_rate, burst)
    before = Bucket(int(owed * burst * TOKEN), await clock_us(db) - ago_us)
    await put(db, before)
    want = max(want, least)

    began, earliest = time.monotonic(), await clock_us(db)
    [taken] = await take(db, [Want(KEY, limit, want, least)])
    latest, took_s = await clock_us(db), time.monotonic() - began
    # A machine whose clock was set meanwhile shows nothing: no order of the three times holds.
    assume(0 <= latest - earliest <= took_s * 1e6 + 1000)
    after = await stored(db)

    assert after is not None
    if after != before:  # then it says at what time it was written
        assert earliest <= after.at_us <= latest
        assert bucket.take(before, limit, after.at_us, want, least) == (after, taken)
    else:
        assert taken.granted == 0
        assert bucket.take(before, limit, earliest, want, least)[1].granted == 0
        soonest = bucket.take(before, limit, latest, least, least)[1].wait_us
        slowest = bucket.take(before, limit, earliest, least, least)[1].wait_us
        if taken.wait_us is None:
            assert least > burst
        else:
            assert soonest is not None
            assert slowest is not None
            assert soonest <= taken.wait_us <= slowest


async def test_many_connections_share_one_bucket_and_never_deadlock(
    db: Connection, database_url: str
) -> None:
    keys = [uuid4() for _ in range(8)]
    fast = Limit.of(200, 50)

    async def hammer(turn: int) -> list[Taken]:
        order = keys[turn:] + keys[:turn]
        if turn % 2:
            order.reverse()
        found: list[Taken] = []
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
            for _ in range(50):
                taken = await take(conn, [Want(key, fast, want=3) for key in order])
                found += [answer for key, answer in zip(order, taken, strict=True) if key == keys[0]]
        return found

    start = await clock_us(db)
    answers = await asyncio.gather(*map(hammer, range(4)))
    elapsed = await clock_us(db) - start

    passed = sum(answer.granted for answers_of_one in answers for answer in answers_of_one)
    assert passed >= 50
    assert passed * TOKEN <= 50 * TOKEN + elapsed * fast.micro_rate


async def test_taking_tokens_does_not_wait_for_fsync(db: Connection) -> None:
    await db.execute("set synchronous_commit = on")

    async with db.transaction():
        await take(db, [Want(KEY, SLOW)])
        inside = await (await db.execute("show synchronous_commit")).fetchone()
    outside = await (await db.execute("show synchronous_commit")).fetchone()

    assert (inside, outside) == (("off",), ("on",))


async def test_buckets_of_keys_that_are_gone_are_forgotten(db: Connection) -> None:
    await take(db, [Want(KEY, SLOW)])

    assert await limits.prune(db) == 1
    assert await stored(db) is None
