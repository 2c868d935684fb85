"""A server that refuses everybody's work is away for a while; it says nothing of anybody's row."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import psycopg
import pytest

from taskd.embedded import EmbeddedPG
from taskd.errors import StoreUnavailable
from taskd.store import nodes
from taskd.store.pool import Connection, Link, Pace, Target, may_be_done
from tests.postgres import FAST, running_server

FILL = "select pg_notify('full', rpad(g::text, 7900, 'x')) from generate_series(1, 1) as g"


@pytest.fixture
def small() -> Iterator[EmbeddedPG]:
    """A server whose NOTIFY queue holds half a megabyte."""
    with running_server(FAST) as server:
        with psycopg.connect(server.url()) as conn:
            if conn.info.server_version < 170000:
                pytest.skip("the NOTIFY queue can be made small from PostgreSQL 17 on")
        server.stop()
        again = EmbeddedPG(server.home, settings=(*FAST, "max_notify_queue_pages=64"), bindir=server.bindir)
        with again:
            yield again


async def fill(conn: Connection) -> None:
    for _ in range(1000):
        await conn.execute(FILL)


async def add(conn: Connection) -> None:
    # Asking for the usage is what frees pages that everybody has read (`asyncQueueAdvanceTail`).
    await conn.execute("select pg_notification_queue_usage()")
    await conn.execute(FILL)


async def number(conn: Connection) -> object:
    cursor = await conn.execute("select pg_backend_pid()")
    return await cursor.fetchone()


async def test_a_full_notify_queue_is_the_servers_trouble_and_passes(small: EmbeddedPG) -> None:
    link = Link(Target(url=small.url()), Pace(dice=random.Random(1)))
    async with await psycopg.AsyncConnection.connect(small.url()) as listener:
        await listener.execute("listen anything")
        await listener.commit()
        await listener.execute("select 1")  # and stays in its transaction
        first = await link.run(number)
        with pytest.raises(StoreUnavailable, match="54000") as caught:
            await link.run(fill)
        assert not may_be_done(caught.value)
        assert await link.run(number) == first, "the connection is fine"
        with pytest.raises(StoreUnavailable, match="54000"):
            await link.run(lambda conn: nodes.ping(conn, channel="full", text="x" * 7900))
        assert (await link.run(nodes.vitals)).notify_usage > 0.9, "told when no NOTIFY gets in any more"
        await listener.rollback()

        async with asyncio.timeout(10):
            while True:  # the listener's server takes them in
                try:
                    await link.run(add)
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.02)
    await link.close()
