"""The modes of the proxy that slow a connection down or end one of its ways."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import psycopg
import pytest

from tests.faults.rig.cluster import Cluster
from tests.faults.rig.keeper import until
from tests.faults.rig.proxy import Proxy, proxy

BYTES = 40_000
BYTES_A_SECOND = 100_000


@pytest.fixture
async def between(durable: Cluster) -> AsyncIterator[Proxy]:
    async with proxy(durable.socket, random.Random(1)) as made:
        yield made


async def connect(between: Proxy, name: str) -> psycopg.AsyncConnection:
    url = f"postgresql://taskd@127.0.0.1:{between.port}/postgres?sslmode=disable&gssencmode=disable"
    return await psycopg.AsyncConnection.connect(url, autocommit=True, application_name=name)


def backends(durable: Cluster, name: str) -> int:
    rows = durable.query(
        "postgres", "select count(*) from pg_stat_activity where application_name = %(n)s", n=name
    )
    return int(rows[0][0])


@pytest.mark.parametrize("up", [True, False], ids=["to the server", "to the client"])
async def test_throttle_carries_so_many_bytes_a_second(between: Proxy, up: bool) -> None:
    async with await connect(between, "throttled") as conn:
        between.throttle(BYTES_A_SECOND)
        began = time.monotonic()
        if up:
            await conn.execute("select length(%s)", ["x" * BYTES])
        else:
            await conn.execute("select repeat('x', %s)", [BYTES])
        took_s = time.monotonic() - began
        between.pass_()

        began = time.monotonic()
        await conn.execute("select repeat('x', %s)", [BYTES])
        unthrottled_s = time.monotonic() - began

    assert took_s >= BYTES / BYTES_A_SECOND
    assert unthrottled_s < BYTES / BYTES_A_SECOND


async def test_throttle_is_for_each_connection(between: Proxy) -> None:
    async with await connect(between, "one") as one, await connect(between, "two") as two:
        between.throttle(BYTES_A_SECOND)
        began = time.monotonic()
        await asyncio.gather(
            one.execute("select repeat('x', %s)", [BYTES]), two.execute("select repeat('x', %s)", [BYTES])
        )
        took_s = time.monotonic() - began
        between.pass_()

    assert BYTES / BYTES_A_SECOND <= took_s < 2 * BYTES / BYTES_A_SECOND


async def test_half_close_ends_the_idle_session_and_the_client_gets_to_know(
    between: Proxy, durable: Cluster
) -> None:
    conn = await connect(between, "half closed, idle")
    async with conn:
        await conn.execute("select 1")
        between.half_close_all()
        await until(lambda: not backends(durable, "half closed, idle"), 10, "the server ends the session")
        with pytest.raises(psycopg.OperationalError):
            await conn.execute("select 1")


async def test_half_close_lets_the_statement_that_is_under_way_answer(
    between: Proxy, durable: Cluster
) -> None:
    async with await connect(between, "half closed, busy") as conn:
        statement = asyncio.create_task(conn.execute("select pg_sleep(0.5), 42"))
        await until(
            lambda: durable.query("postgres", "select 1 from pg_stat_activity where wait_event = 'PgSleep'"),
            10,
            "the statement runs",
        )
        between.half_close_all()

        cursor = await statement
        row = await cursor.fetchone()
        assert row is not None
        assert row[1] == 42
        await until(lambda: not backends(durable, "half closed, busy"), 10, "the server ends the session")


async def test_after_a_half_close_a_new_connection_works(between: Proxy) -> None:
    first = await connect(between, "first")
    async with first:
        between.half_close_all()
        async with await connect(between, "second") as second:
            cursor = await second.execute("select 42")
            assert await cursor.fetchone() == (42,)
