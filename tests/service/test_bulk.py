"""Bulks on their way into the table: once, also when an answer is lost, and all of them or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import psycopg
import pytest

from taskd.errors import OutcomeUnknown, Refused
from taskd.model.job import NewJob
from taskd.service.bulk import Bulks
from tests.service.test_submitter import Losing, ids, job, until


@asynccontextmanager
async def bulks(url: str, told: list[NewJob] | None = None) -> AsyncIterator[tuple[Bulks, Losing]]:
    link = Losing(url)
    try:
        yield Bulks([link], stored=told.extend if told is not None else lambda jobs: None), link
    finally:
        await link.close()


async def test_a_bulk_is_one_statement_and_its_jobs_are_told_after_it(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    jobs, told = [job() for _ in range(1000)], list[NewJob]()
    async with bulks(database_url, told) as (door, link):
        assert await door.put(jobs, until()) == {}

    assert link.statements == 1
    assert told == jobs
    assert await ids(db) == {one.id for one in jobs}


@pytest.mark.parametrize("lost", [1, 2])
async def test_a_lost_answer_makes_no_second_row_and_duplicates_stay_duplicates(
    database_url: str, db: psycopg.AsyncConnection, lost: int
) -> None:
    first = job(key="held")
    plain = [job() for _ in range(20)]
    keyed = [job(key=f"k{n}") for n in range(5)]
    again, twice = job(key="held"), job(key="k0")
    async with bulks(database_url) as (door, link):
        await door.put([first], until())
        link.lose = lost
        receipts = await door.put([*plain, *keyed, again, twice], until())

    assert {own: receipt.id for own, receipt in receipts.items()} == {
        again.id: first.id,
        twice.id: keyed[0].id,
    }
    assert all(receipt.duplicate for receipt in receipts.values())
    assert await ids(db) == {one.id for one in [first, *plain, *keyed]}


async def test_a_lost_answer_of_a_bulk_of_keys_alone_is_found(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    jobs = [job(key=f"k{n}") for n in range(5)]
    async with bulks(database_url) as (door, link):
        link.lose = 1
        assert await door.put(jobs, until()) == {}

    assert await ids(db) == {one.id for one in jobs}


async def test_a_conflict_stores_and_tells_nothing(database_url: str, db: psycopg.AsyncConnection) -> None:
    held, other, told = job(key="k"), job(key="k", body=b"two"), list[NewJob]()
    async with bulks(database_url, told) as (door, _):
        await door.put([held], until())
        receipts = await door.put([job(), job(key="new"), other], until())

    assert (receipts[other.id].conflict, receipts[other.id].id) == (True, held.id)
    assert await ids(db) == {held.id}
    assert told == [held]


async def test_a_row_that_postgres_refuses_refuses_all(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    async with bulks(database_url) as (door, _):
        with pytest.raises(Refused) as refused:
            await door.put([job(), job(payload='{"v": }')], until())

    assert refused.value.error == "unsupported_value"
    assert await ids(db) == set[UUID]()


async def test_an_unknown_outcome_is_told_at_once(database_url: str) -> None:
    async with bulks(database_url) as (door, link):
        link.refuse = OutcomeUnknown("replication was given up")
        with pytest.raises(OutcomeUnknown):
            await door.put([job()], until())

    assert link.statements == 1


async def test_bulks_and_single_jobs_share_a_connection(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    sets = [[job() for _ in range(50)] for _ in range(6)]
    async with bulks(database_url) as (door, _):
        await asyncio.gather(*(door.put(jobs, until()) for jobs in sets))

    assert len(await ids(db)) == 300
