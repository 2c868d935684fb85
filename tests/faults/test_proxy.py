"""The proxy does to a connection what its modes say: else the cases behind it prove nothing."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator

import psycopg
import pytest

from tests.faults.rig.cluster import Cluster
from tests.faults.rig.proxy import Proxy, proxy

DELAY_S = 0.1


@pytest.fixture
async def between(durable: Cluster) -> AsyncIterator[Proxy]:
    async with proxy(durable.socket, random.Random(1)) as made:
        yield made


async def connect(between: Proxy) -> psycopg.AsyncConnection:
    url = f"postgresql://taskd@127.0.0.1:{between.port}/postgres?sslmode=disable&gssencmode=disable"
    return await psycopg.AsyncConnection.connect(url, autocommit=True)


async def test_pass_carries_answers(between: Proxy) -> None:
    async with await connect(between) as conn:
        cursor = await conn.execute("select %s::integer", [42])
        assert await cursor.fetchone() == (42,)
    assert between.connects == 1


async def test_delay_comes_on_top_each_way(between: Proxy) -> None:
    async with await connect(between) as conn:
        between.delay(DELAY_S)
        began = time.monotonic()
        await conn.execute("select 1")
        assert time.monotonic() - began >= 2 * DELAY_S
        between.pass_()


async def test_cut_after_commit_breaks_the_connection_and_the_row_is_there(
    between: Proxy, durable: Cluster
) -> None:
    durable.query("postgres", "create table cut_test (n integer)")
    async with await connect(between) as conn:
        between.cut_after_commit("insert into cut_test")
        with pytest.raises(psycopg.OperationalError):
            await conn.execute("insert into cut_test values (%s)", [1])

    assert durable.query("postgres", "select n from cut_test") == [(1,)]
    assert between.cuts == 1
    durable.query("postgres", "drop table cut_test")


async def test_reset_breaks_every_connection(between: Proxy) -> None:
    async with await connect(between) as conn:
        between.reset_all()
        with pytest.raises(psycopg.OperationalError):
            await conn.execute("select 1")
