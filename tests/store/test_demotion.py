"""A server that was demoted under its connections is left by all of them, also by those that only listen."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import psycopg
import pytest

from taskd.errors import StoreUnavailable
from taskd.service.keyring import listen
from taskd.store import pool
from taskd.store.pool import Connection, Link, NotConnected, Pace, Target
from tests.factories import one


def sends(statement: str) -> Callable[[Connection], Awaitable[object]]:
    async def work(conn: Connection) -> object:
        cursor = await conn.execute(statement.encode())
        return (await cursor.fetchone() or (None,))[0] if cursor.description else None

    return work


PID = sends("select pg_backend_pid()")
DEMOTE = sends("set default_transaction_read_only = on")


async def pid(link: Link) -> int:
    """Return the process id of the link's server, as soon as a connect is allowed."""
    async with asyncio.timeout(10):
        while True:
            try:
                return int(str(await link.run(PID)))
            except NotConnected:
                await asyncio.sleep(max(link.wait_s, 0.05))


async def gone(db: psycopg.AsyncConnection, number: int) -> None:
    async with asyncio.timeout(10):
        while await one(db, "select count(*) from pg_stat_activity where pid = %s", number):
            await asyncio.sleep(0.02)


@pytest.fixture
def pace() -> Pace:
    return Pace(dice=random.Random(1))


async def test_once_one_link_sees_the_demotion_the_idle_ones_are_closed_and_made_anew(
    database_url: str, pace: Pace, db: psycopg.AsyncConnection
) -> None:
    writes, reads = (Link(Target(url=database_url), pace) for _ in range(2))
    idle, _ = await pid(reads), await pid(writes)

    await writes.run(DEMOTE)
    assert not reads.connected
    await gone(db, idle)

    assert await pid(reads) != idle
    await reads.close()
    await writes.close()


async def test_a_refused_write_tells_the_others_too(database_url: str, pace: Pace) -> None:
    writes, reads = (Link(Target(url=database_url), pace) for _ in range(2))
    idle = await pid(reads)
    with pytest.raises(StoreUnavailable):
        await writes.run(
            sends("do $$ begin raise exception 'told to' using errcode = '25006'; end $$"),
        )

    assert not reads.connected
    assert await pid(reads) != idle
    await reads.close()


async def test_a_link_that_listens_does_so_on_a_new_connection(
    database_url: str, pace: Pace, db: psycopg.AsyncConnection
) -> None:
    listening = (
        "select coalesce(min(pid), 0) from pg_stat_activity "
        "where application_name = 'ears' and query = 'select 1'"
    )
    ears = Link(Target(url=database_url, application="ears"), pace)
    writes = Link(Target(url=database_url), pace)
    task = asyncio.create_task(listen(ears, lambda text: None))
    async with asyncio.timeout(10):
        while not (first := await one(db, listening)):
            await asyncio.sleep(0.02)

        await writes.run(DEMOTE)
        while await one(db, listening) in (0, first):
            await asyncio.sleep(0.02)

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await ears.close()
    await writes.close()


async def test_links_to_another_server_stay(database_url: str, pace: Pace) -> None:
    here, elsewhere = (
        Link(Target(url=database_url), pace),
        Link(Target(url=f"{database_url}&port=5432"), pace),
    )
    there = await pid(elsewhere)
    await here.run(DEMOTE)

    assert await pid(elsewhere) == there
    await here.close()
    await elsewhere.close()


async def test_a_server_that_takes_no_writes_from_the_start_is_tried_again_after_a_while(
    database_url: str, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(url=f"{database_url}&options=-c%20default_transaction_read_only%3Don")
    link, other = Link(target, pace), Link(target, pace)
    first = await pid(link)
    assert await pid(link) == first
    there = await pid(other)

    monkeypatch.setattr(pool, "READ_ONLY_AGE_S", 0.0)
    assert await pid(link) == first
    assert await pid(link) != first
    monkeypatch.undo()
    assert await pid(other) == there
    await link.close()
    await other.close()
