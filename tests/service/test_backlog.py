"""How much may wait: bounds hold, fast jobs are no backlog, and what is far below is not counted."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import psycopg
import pytest

from taskd.errors import Refused, StoreUnavailable
from taskd.model.job import NewJob, new_id
from taskd.service import backlog
from taskd.service.backlog import Backlog
from taskd.service.batch import Reads
from taskd.store import backlog as rows
from taskd.store import jobs
from taskd.store.pool import Link, Pace, Target

Connection = psycopg.AsyncConnection[Any]
CLIENT = UUID("00000000-0000-7000-8000-0000000000aa")
OTHER = UUID("00000000-0000-7000-8000-0000000000bb")


class Counting(Link):
    """A link that counts its statements."""

    statements = 0

    async def run(self, work: Any, *, deadline_s: float | None = None) -> Any:
        self.statements += 1
        return await super().run(work, deadline_s=deadline_s)


@pytest.fixture
async def link(database_url: str) -> AsyncIterator[Counting]:
    link = Counting(Target(url=database_url), Pace())
    yield link
    await link.close()


def some(count: int, *, type_: str = "echo", client: UUID = CLIENT) -> list[NewJob]:
    now = int(time.time() * 1000)
    return [
        NewJob(id=new_id(now, os.urandom(10)), client=client, type=type_, payload="{}") for _ in range(count)
    ]


def soon() -> float:
    return asyncio.get_running_loop().time() + 10


async def start(db: Connection, type_: str = "echo") -> None:
    await db.execute("update taskd.queue set claimed = true where type = %s", [type_])


async def test_what_runs_or_has_ended_does_not_wait(db: Connection) -> None:
    await jobs.insert(db, some(5))
    await jobs.insert(db, some(3, type_="mail", client=OTHER))
    await db.execute(
        "update taskd.queue set claimed = true where id = (select min(id::text)::uuid from taskd.queue)"
    )

    assert await rows.of_type(db, "echo", bound=100) == 4
    assert await rows.of_type(db, "mail", bound=100) == 3
    assert await rows.of_client(db, CLIENT, bound=100) == 4
    assert await rows.of_client(db, OTHER, bound=2) == 2
    assert await rows.of_client(db, UUID(int=9), bound=100) == 0


async def test_nobody_waits_in_an_empty_queue(db: Connection) -> None:
    assert await rows.of_client(db, CLIENT, bound=10) == 0
    assert await rows.of_type(db, "echo", bound=10) == 0


async def test_as_many_as_the_bound_are_let_in_however_many_come_at_once(link: Counting) -> None:
    counts = Backlog(Reads(link))

    came = await asyncio.gather(
        *(counts.admit_client(CLIENT, 10, soon()) for _ in range(50)), return_exceptions=True
    )

    assert came.count(None) == 10
    refused = [one for one in came if isinstance(one, Refused)]
    assert len(refused) == 40
    assert (refused[0].error, refused[0].headers) == ("backlog_full", {"Retry-After": "1"})


async def test_jobs_that_have_started_make_room_before_anybody_is_refused(
    link: Counting, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "AGAIN_S", 0.0)
    monkeypatch.setattr(backlog, "REST", 0)
    counts = Backlog(Reads(link))

    for _ in range(30):
        await counts.admit_type("echo", 10, soon())
        new = some(1)
        await jobs.insert(db, new)
        counts.stored(new)
        await start(db)


async def test_a_bulk_counts_as_many_as_it_stores(link: Counting, db: Connection) -> None:
    counts = Backlog(Reads(link))
    await counts.admit_client(CLIENT, 10, soon())
    new = some(10)
    await jobs.insert(db, new)
    counts.stored(new)

    with pytest.raises(Refused):
        await counts.admit_client(CLIENT, 10, soon())
    await counts.admit_client(OTHER, 10, soon())


async def test_a_bound_of_nothing_lets_nothing_in(link: Counting) -> None:
    counts = Backlog(Reads(link))

    for _ in range(3):
        with pytest.raises(Refused):
            await counts.admit_client(CLIENT, 0, soon())


async def test_a_higher_bound_is_counted_anew(link: Counting, db: Connection) -> None:
    counts = Backlog(Reads(link))
    await jobs.insert(db, some(20))
    with pytest.raises(Refused):
        await counts.admit_client(CLIENT, 5, soon())

    for _ in range(10):
        await counts.admit_client(CLIENT, 30, soon())

    with pytest.raises(Refused):
        await counts.admit_client(CLIENT, 30, soon())


async def test_far_below_the_bound_there_is_one_count_for_thousands(link: Counting) -> None:
    counts = Backlog(Reads(link))

    for _ in range(5000):
        await counts.admit_type("echo", 1_000_000, soon())

    assert link.statements == 1


class Held(Link):
    """A link whose statements wait until they are let go."""

    def __init__(self, target: Target) -> None:
        super().__init__(target, Pace())
        self.go = asyncio.Event()

    async def run(self, work: Any, *, deadline_s: float | None = None) -> Any:
        await self.go.wait()
        return await super().run(work, deadline_s=deadline_s)


async def test_a_thousandth_of_a_bound_is_let_in_before_the_first_count_has_come(
    database_url: str, db: Connection
) -> None:
    await jobs.insert(db, some(5000))
    link = Held(Target(url=database_url))
    counts = Backlog(Reads(link))

    for _ in range(5):
        await counts.admit_type("echo", 5000, soon())
    waits = asyncio.create_task(counts.admit_type("echo", 5000, soon()))
    await asyncio.wait({waits}, timeout=0.1)
    assert not waits.done()

    link.go.set()
    with pytest.raises(Refused):
        await waits
    with pytest.raises(Refused):
        await counts.admit_type("echo", 5000, soon())
    await link.close()


async def test_a_bulk_larger_than_a_thousandth_of_the_bound_waits_for_the_first_count(
    link: Counting, db: Connection
) -> None:
    await jobs.insert(db, some(950))
    counts = Backlog(Reads(link))

    with pytest.raises(Refused):
        await counts.admit_type("echo", 1000, soon(), jobs=100)


async def test_without_a_database_the_first_submit_is_told_so() -> None:
    link = Link(Target(url="postgresql://taskd@/none?host=/nowhere"), Pace())
    counts = Backlog(Reads(link))

    with pytest.raises(StoreUnavailable):
        await counts.admit_type("echo", 10, asyncio.get_running_loop().time() + 0.2)
    await link.close()
