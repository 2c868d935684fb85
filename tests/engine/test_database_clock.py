"""The clock of the database jumps, as at a failover to a server whose clock is another.

Nothing is lost by it: nobody is rescued who lives, nobody stays lost, and what was due is due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from taskd.engine.children import PoolSettings
from taskd.model.job import new_id
from taskd.model.state import Cause
from taskd.store import leases
from taskd.store.jobs import Retention
from tests.engine.node import appears, eventually, running
from tests.factories import Connection, add, add_node, claim, column, one

AHEAD_S = 300
YEARS_S = 10 * 365 * 86_400


@pytest.fixture
async def clock(db: Connection, database_url: str) -> Callable[[float], Awaitable[None]]:
    """Set how many seconds the clock that taskd's statements read is ahead of the server's.

    It stands in the search path before the server's own, for connections that are made from now on.
    """
    await db.execute(
        """create table public.clock as select interval '0' as ahead;
        create function public.clock_timestamp() returns timestamptz language sql volatile
            as 'select pg_catalog.clock_timestamp() + ahead from public.clock';
        create function public.now() returns timestamptz language sql stable
            as 'select pg_catalog.now() + ahead from public.clock'"""
    )
    name = await one(db, "select current_database()")
    await db.execute(f"alter database {name} set search_path = public, pg_catalog".encode())
    await db.execute("set search_path = public, pg_catalog")

    async def set_(seconds: float) -> None:
        await db.execute("update public.clock set ahead = %s * interval '1 s'", (seconds,))

    return set_


def payload(**members: object) -> str:
    return msgspec.json.encode(members).decode()


def logged(caplog: pytest.LogCaptureFixture, text: str, *, times: int = 1) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return caplog.text.count(text) >= times

    return check


@pytest.mark.parametrize("jump_s", [AHEAD_S, -AHEAD_S])
async def test_no_node_that_lives_is_rescued_when_the_clock_jumps(
    database_url: str,
    clock: Callable[[float], Awaitable[None]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    jump_s: float,
) -> None:
    quick: dict[str, Any] = {"heartbeat_s": 0.5, "sweep_s": 0.5}
    async with (
        running(database_url, node_name="first", **quick) as first,
        running(database_url, node_name="second", **quick) as second,
    ):
        ids = [await first.add("gate", payload(path=str(tmp_path / "go"))) for _ in range(4)]
        await appears(tmp_path / "go.started", lines=4)
        numbers = first.number, second.number
        for node in (first, second):
            await eventually(_steady(node.daemon._heart._steady))

        await clock(jump_s)
        await eventually(logged(caplog, "the clock of the database has jumped", times=2))
        for node in (first, second):
            await eventually(_steady(node.daemon._heart._steady))
        await asyncio.sleep(1.0)  # two sweeps that may judge
        (tmp_path / "go").touch()
        done = [await first.until(job_id) for job_id in ids]

        assert (first.number, second.number) == numbers
    assert [(job.status, job.attempts, job.history) for job in done] == [("completed", 1, ())] * 4


def _steady(steady: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return steady()

    return check


async def test_a_rescue_by_a_clock_that_has_just_jumped_does_nothing(
    db: Connection, clock: Callable[[float], Awaitable[None]]
) -> None:
    node = await add_node(db, "lives", lease_s=30)
    await add(db)
    await claim(db, node, 1, {"mail": 1})
    about = await one(db, "select clock_timestamp()")

    await clock(AHEAD_S)

    assert await leases.rescue_lost(db, about=about) == {}
    assert await leases.rescue_lost(db) == {node: 1}, "without knowing the time, it would"


async def test_who_died_before_the_clock_went_back_is_rescued_a_lease_later(
    database_url: str, db: Connection, clock: Callable[[float], Awaitable[None]]
) -> None:
    dead = await add_node(db, "dead", lease_s=2)
    lost = await add(db, type="echo")
    await claim(db, dead, 1, {"echo": 1})

    await clock(-AHEAD_S)
    async with running(database_url, heartbeat_s=0.5, sweep_s=0.5) as node:
        job = await node.until(UUID(lost), within_s=10)

    assert (job.status, job.attempts) == ("completed", 2)
    assert [run.cause for run in job.history] == [Cause.LEASE_EXPIRED]


async def test_a_job_with_an_id_of_years_ahead_is_pruned_once_its_time_is_over(
    database_url: str, db: Connection
) -> None:
    ahead = round((time.time() + YEARS_S) * 1000)
    await add(db, type="echo", id=new_id(ahead, bytes(10)))
    await add(db, type="echo")
    waits = await add(db, id=new_id(ahead, bytes([1] * 10)), delay_s=3600)
    at_once = Retention(completed=timedelta(), failed=timedelta(), cancelled=timedelta())

    async def pruned() -> bool:
        return await column(db, "select id::text from taskd.jobs") == [waits]

    async with running(database_url, sweep_s=0.1, retention=at_once):
        await eventually(pruned, within_s=10)


async def test_jobs_that_were_due_when_the_clock_went_back_are_due_again(
    database_url: str, db: Connection, clock: Callable[[float], Awaitable[None]], tmp_path: Path
) -> None:
    pools = {"default": PoolSettings(processes=1, concurrency=1)}
    async with running(database_url, pools=pools, heartbeat_s=0.5) as node:
        first = await node.add("gate", payload(path=str(tmp_path / "go")))
        await appears(tmp_path / "go.started")
        waits = await add(db, type="echo")
        later = await add(db, type="echo", delay_s=AHEAD_S)

        await clock(-AHEAD_S)
        (tmp_path / "go").touch()
        await node.until(first)
        await node.until(UUID(waits), within_s=10)

        assert (await node.job(UUID(later))).status == "scheduled"
