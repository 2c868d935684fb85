"""One way into the table: shared statements, no second row, and an answer only after the commit."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest

from taskd.errors import OutcomeUnknown, Refused, StoreUnavailable
from taskd.model.job import NewJob, Receipt, new_id
from taskd.service.submitter import Hints, Submitter
from taskd.store.pool import Connection, Link, Pace, Target

CLIENT = UUID("00000000-0000-7000-8000-0000000000aa")
OTHER = UUID("00000000-0000-7000-8000-0000000000bb")


class Losing(Link):
    """A link whose next answers are lost after the commit, as a cut connection loses them."""

    def __init__(self, url: str) -> None:
        super().__init__(Target(url=url), Pace())
        self.lose = 0
        self.refuse: Exception | None = None
        self.statements = 0

    async def run(self, work: Any, *, deadline_s: float | None = None) -> Any:
        self.statements += 1
        if self.refuse is not None:
            raise self.refuse
        answer = await super().run(work, deadline_s=deadline_s)
        if self.lose:
            self.lose -= 1
            await self.close()
            raise StoreUnavailable("the answer was lost")
        return answer


def job(
    payload: str = "{}", *, client: UUID = CLIENT, key: str | None = None, body: bytes = b"one"
) -> NewJob:
    return NewJob(
        id=new_id(int(time.time() * 1000), os.urandom(10)),
        client=client,
        type="echo",
        payload=payload,
        unique_key=key,
        body_hash=None if key is None else body,
    )


@asynccontextmanager
async def submitter(url: str, **options: Any) -> AsyncIterator[tuple[Submitter, Losing]]:
    link = Losing(url)
    try:
        yield Submitter([link], **options), link
    finally:
        await link.close()


def until(seconds: float = 5.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def put(door: Submitter, jobs: Sequence[NewJob], seconds: float = 5.0) -> list[Receipt | BaseException]:
    return await asyncio.gather(*(door.put(one, until(seconds)) for one in jobs), return_exceptions=True)


async def ids(db: Connection) -> set[UUID]:
    cursor = await db.execute("select id from taskd.jobs")
    return {row[0] for row in await cursor.fetchall()}


async def test_concurrent_submits_share_statements(database_url: str, db: psycopg.AsyncConnection) -> None:
    jobs = [job() for _ in range(200)]
    async with submitter(database_url) as (door, link):
        receipts = await put(door, jobs)

    assert [receipt.id for receipt in receipts] == [one.id for one in jobs]  # type: ignore[union-attr]
    assert await ids(db) == {one.id for one in jobs}
    assert link.statements <= 3


async def test_same_key_and_body_give_the_first_id(database_url: str, db: psycopg.AsyncConnection) -> None:
    first, second = job(key="k"), job(key="k")
    async with submitter(database_url) as (door, _):
        [one, two] = await put(door, [first, second])
        [three] = await put(door, [job(key="k")])

    stored = await ids(db)
    assert len(stored) == 1
    assert {one.id, two.id, three.id} == stored  # type: ignore[union-attr]
    assert three.duplicate  # type: ignore[union-attr]


async def test_same_key_and_another_body_conflict(database_url: str, db: psycopg.AsyncConnection) -> None:
    async with submitter(database_url) as (door, _):
        [first] = await put(door, [job(key="k")])
        [second] = await put(door, [job(key="k", body=b"two")])
        [foreign] = await put(door, [job(key="k", client=OTHER, body=b"two")])

    assert second.conflict  # type: ignore[union-attr]
    assert second.id == first.id  # type: ignore[union-attr]
    assert not foreign.conflict  # type: ignore[union-attr]
    assert len(await ids(db)) == 2


@pytest.mark.parametrize("lost", [pytest.param(1, id="one answer"), pytest.param(3, id="three in a row")])
async def test_a_lost_answer_makes_no_second_row(
    database_url: str, db: psycopg.AsyncConnection, lost: int
) -> None:
    jobs = [*(job() for _ in range(20)), job(key="k"), job(key="l")]
    async with submitter(database_url) as (door, link):
        link.lose = lost
        receipts = await put(door, jobs)

    assert [receipt.id for receipt in receipts] == [one.id for one in jobs]  # type: ignore[union-attr]
    assert not any(receipt.duplicate for receipt in receipts)  # type: ignore[union-attr]
    assert await ids(db) == {one.id for one in jobs}


async def test_a_bad_row_is_refused_alone(database_url: str, db: psycopg.AsyncConnection) -> None:
    jobs = [job() for _ in range(40)]
    jobs[17] = job(payload='{"v": }')
    async with submitter(database_url) as (door, _):
        receipts = await put(door, jobs)

    refused = [receipt for receipt in receipts if isinstance(receipt, BaseException)]
    assert len(refused) == 1
    assert isinstance(receipts[17], Refused)
    assert receipts[17].error == "unsupported_value"
    assert await ids(db) == {one.id for one in jobs} - {jobs[17].id}


async def test_an_unknown_outcome_is_told_at_once(database_url: str) -> None:
    async with submitter(database_url) as (door, link):
        link.refuse = OutcomeUnknown("replication was given up")
        [answer] = await put(door, [job()])

    assert isinstance(answer, OutcomeUnknown)
    assert link.statements == 1


async def test_an_outage_is_waited_for_until_the_time_is_over(database_url: str) -> None:
    async with submitter("postgresql://taskd@/none?host=/nowhere") as (door, _):
        began = time.monotonic()
        answers = await put(door, [job() for _ in range(3)], seconds=0.5)

    assert all(isinstance(answer, StoreUnavailable) for answer in answers)
    assert time.monotonic() - began < 2


async def test_stored_is_told_after_the_commit(database_url: str, db: psycopg.AsyncConnection) -> None:
    told: list[NewJob] = []
    async with submitter(database_url, stored=told.extend) as (door, _):
        jobs = [job(), job(key="k"), job(key="k")]
        await put(door, jobs)

    assert {one.id for one in told} == await ids(db)


async def test_what_is_due_before_a_poll_is_hinted_at_and_what_is_due_later_is_not(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    """A node polls every second, and a job that is due sooner would wait for that."""
    now = datetime.now(UTC)
    waits: dict[str, dict[str, Any]] = {
        "now": {},
        "short": {"delay_s": 0.3},
        "soon": {"run_at": now + timedelta(seconds=0.5)},
        "past": {"run_at": now - timedelta(days=1)},
        "long": {"delay_s": 5.0},
        "later": {"run_at": now + timedelta(seconds=60)},
    }
    await db.execute("listen taskd")
    link = Link(Target(url=database_url), Pace())
    hints = Hints(link)

    hints.tell([msgspec.structs.replace(job(), type=type_, **members) for type_, members in waits.items()])

    told = {note.payload.split()[0] async for note in db.notifies(timeout=5, stop_after=4)}
    assert told == {"now", "short", "soon", "past"}
    await link.close()
