"""Verdicts: stored together, told apart when one is bad, and never given up for want of a database."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from taskd.engine import settler
from taskd.engine.offspring import Nursery, Parent
from taskd.engine.settler import Settler
from taskd.errors import Refused
from taskd.obs.metrics import Metrics
from taskd.store import jobs
from taskd.store.leases import Claimed
from taskd.store.pool import Link, Pace, Target
from tests.factories import (
    Connection,
    add,
    add_node,
    claim,
    claim_one,
    column,
    completion,
    end_lease,
    new_job,
    one,
    publish,
    settlement,
    status,
)


class Desk:
    """A settler with its link, its figures, and what it could not store."""

    def __init__(self, url: str, node: int) -> None:
        self.node = node
        self.metrics = Metrics()
        self.link = Link(Target(url=url, application="settler"), Pace(dice=random.Random(1)))
        self.barren: list[str] = []
        self.freed = 0
        self.settler = Settler(
            self.link,
            lambda: self.node,
            self.metrics,
            Nursery({}, now=lambda: datetime.now(UTC), dice=os.urandom),
            self._barren,
            bounded=["few"],
            freed=self._freed,
        )

    def _barren(self, type_: str, parent: Parent, error: Refused) -> None:
        self.barren.append(f"{type_}: {error}")
        self.settler.settle(type_, settlement(parent.job, error=str(error)))

    def _freed(self) -> None:
        self.freed += 1

    async def settled(self) -> None:
        await asyncio.wait_for(self.settler.settled(), 20)


@pytest.fixture
async def desk(db: Connection, database_url: str) -> AsyncIterator[Desk]:
    made = Desk(database_url, await add_node(db))
    task = asyncio.create_task(made.settler.run())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await made.link.close()


async def taken(db: Connection, desk: Desk, count: int) -> list[Claimed]:
    await jobs.insert(db, [new_job() for _ in range(count)])
    return (await claim(db, desk.node, 1, {"mail": count})).jobs


async def statuses(db: Connection, claimed: list[Claimed]) -> list[str]:
    return [await status(db, job.id) for job in claimed]


async def test_one_bad_result_is_found_and_only_it_is_lost(db: Connection, desk: Desk) -> None:
    claimed = await taken(db, desk, 21)

    for index, job in enumerate(claimed):
        desk.settler.complete("mail", completion(job, "{broken" if index == 13 else '{"n":1}'))
    await desk.settled()

    assert set(await statuses(db, claimed)) == {"completed"}
    lost = await column(db, "select id::text from taskd.outcomes where result is null")
    assert lost == [claimed[13].id]
    assert desk.metrics.get("taskd_settled_total", "mail", "completed") == 21


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param({"error": "a\x00b"}, id="a text that Postgres can't store"),
        pytest.param({"exit_code": 2**40}, id="a number that a job made up"),
        pytest.param({"max_rss": 2**70}, id="another one"),
    ],
)
async def test_one_bad_verdict_is_found_and_stored_without_what_is_bad(
    db: Connection, desk: Desk, bad: dict[str, Any]
) -> None:
    claimed = await taken(db, desk, 9)

    for index, job in enumerate(claimed):
        verdict = settlement(job, status="failed", delay_ms=1, **(bad if index == 4 else {}))
        desk.settler.settle("mail", verdict)
    await desk.settled()

    assert set(await statuses(db, claimed)) == {"failed"}
    errors = await column(db, "select error from taskd.outcomes order by id")
    assert errors.count("it failed") == 8
    assert errors[4] == "the error text could not be stored"


async def test_a_verdict_that_nothing_makes_storable_holds_up_nobody(
    db: Connection, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    claimed = await taken(db, desk, 5)
    await db.execute(f"alter table taskd.outcomes add check (id <> '{claimed[2].id}')".encode())

    with caplog.at_level(logging.ERROR, "taskd"):
        for job in claimed:
            desk.settler.complete("mail", completion(job))
        await desk.settled()

    expected = ["completed", "completed", "processing", "completed", "completed"]
    assert await statuses(db, claimed) == expected
    assert "verdict can't be stored at all" in caplog.text


@pytest.mark.parametrize("sqlstate", ["P0001", "0A000", "23514"])
async def test_a_verdict_that_was_set_aside_is_stored_as_soon_as_it_can_be(
    db: Connection,
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sqlstate: str,
) -> None:
    monkeypatch.setattr(settler, "AGAIN_S", 0.05)
    desk.settler._aside_s = 0.05
    claimed = await taken(db, desk, 8)
    await db.execute(_refuses("taskd.outcomes", f"new.id = '{claimed[5].id}'", sqlstate))

    for job in claimed:
        desk.settler.complete("mail", completion(job, '{"n":1}'))
    await desk.settled()
    assert desk.settler.aside == 1
    assert await statuses(db, claimed) == ["completed"] * 5 + ["processing"] + ["completed"] * 2
    await db.execute("drop trigger refuse on taskd.outcomes")
    while desk.settler.aside or desk.settler.unsettled:
        await asyncio.sleep(0.01)

    assert set(await statuses(db, claimed)) == {"completed"}
    assert await one(db, "select count(*) from taskd.outcomes where result is null") == 0
    assert caplog.text.count("verdict can't be stored at all") == 1, "said once, however often it was tried"


async def test_a_failure_that_nobody_foresaw_is_found_and_loses_only_its_result(
    db: Connection, desk: Desk
) -> None:
    claimed = await taken(db, desk, 6)
    await db.execute(_refuses("taskd.outcomes", "(new.result->>'n')::integer = 4", "P0001"))

    for index, job in enumerate(claimed):
        desk.settler.complete("mail", completion(job, f'{{"n":{index}}}'))
    await desk.settled()

    assert set(await statuses(db, claimed)) == {"completed"}
    lost = await column(db, "select id::text from taskd.outcomes where result is null")
    assert lost == [claimed[4].id]


def _refuses(table: str, condition: str, sqlstate: str) -> bytes:
    return f"""create function taskd.refuse() returns trigger language plpgsql as $$ begin
            if {condition} then raise exception 'planted' using errcode = '{sqlstate}'; end if;
            return new;
        end $$;
        create trigger refuse before insert on {table}
        for each row execute function taskd.refuse()""".encode()


async def test_verdicts_wait_until_the_database_takes_them(db: Connection, desk: Desk) -> None:
    claimed = await taken(db, desk, 3)
    await db.execute(
        """create sequence taskd.tries;
        create function taskd.no_room() returns trigger language plpgsql as $$ begin
            if nextval('taskd.tries') < 4 then raise exception 'full' using errcode = '53100'; end if;
            return new;
        end $$;
        create trigger no_room before insert on taskd.outcomes
        for each row execute function taskd.no_room()"""
    )

    for job in claimed:
        desk.settler.complete("mail", completion(job))
    await desk.settled()

    assert set(await statuses(db, claimed)) == {"completed"}


async def test_an_answer_that_is_lost_makes_no_second_entry_and_no_fence(db: Connection, desk: Desk) -> None:
    claimed = await taken(db, desk, 4)
    # Commits, and says afterwards that it was not replicated: the answer is worth nothing.
    await db.execute(
        """create sequence taskd.tries;
        create function taskd.lose() returns trigger language plpgsql as $$ begin
            if nextval('taskd.tries') = 1 then
                raise warning 'canceling wait for synchronous replication due to user request';
            end if;
            return null;
        end $$;
        create trigger lose after insert on taskd.history for each statement execute function taskd.lose()"""
    )

    for job in claimed:
        desk.settler.settle("mail", settlement(job, delay_ms=60_000))
    await desk.settled()

    assert await one(db, "select count(*) from taskd.history") == 4
    assert await column(db, "select attempts from taskd.queue") == [1] * 4
    assert desk.metrics.get("taskd_fenced_total") == 0
    assert desk.metrics.get("taskd_settled_total", "mail", "again") == 4


async def test_a_late_verdict_is_fenced_and_counted(db: Connection, desk: Desk) -> None:
    job_id = await add(db)
    late = await claim_one(db, desk.node, 1)
    await end_lease(db, desk.node)
    heir = await add_node(db, "heir")
    await db.execute("select taskd.rescue(null, 'lease_expired', 'e')")
    await claim_one(db, heir, 1)

    desk.settler.complete("mail", completion(late))
    await desk.settled()

    assert await status(db, job_id) == "processing"
    assert desk.metrics.get("taskd_fenced_total") == 1
    assert desk.metrics.get("taskd_settled_total", "mail", "completed") == 0


async def test_a_verdict_keeps_the_incarnation_that_it_was_made_in(db: Connection, desk: Desk) -> None:
    [job] = await taken(db, desk, 1)

    desk.settler.complete("mail", completion(job))
    desk.node = await add_node(db, "next")
    await desk.settled()

    assert await status(db, job.id) == "completed"


async def test_whoever_waits_for_a_place_is_told_when_one_is_free(db: Connection, desk: Desk) -> None:
    await add(db, type="few")
    await add(db)
    few = await claim_one(db, desk.node, 1, "few")
    many = await claim_one(db, desk.node, 2)

    desk.settler.complete("mail", completion(many))
    await desk.settled()
    assert desk.freed == 0
    desk.settler.complete("few", completion(few))
    await desk.settled()

    assert desk.freed == 1


async def test_a_wait_shorter_than_a_poll_is_told_to_whoever_claims(db: Connection, desk: Desk) -> None:
    long, short = await taken(db, desk, 2)

    desk.settler.settle("mail", settlement(long, status=None, delay_ms=5000))
    await desk.settled()
    assert desk.freed == 0
    desk.settler.settle("mail", settlement(short, status=None, delay_ms=300))
    await desk.settled()

    assert desk.freed == 1


async def test_what_a_job_submitted_is_stored_with_its_completion(db: Connection, desk: Desk) -> None:
    await publish(db, desk.node, "mail", "letter")
    [job] = await taken(db, desk, 1)

    parent = Parent(completion(job), job, [b'{"type":"letter","payload":{"n":1}}'])
    desk.settler.complete_with_jobs("mail", parent)
    await desk.settled()

    assert await status(db, job.id) == "completed"
    made = await one(db, "select id from taskd.jobs where type = 'letter'")
    child = await jobs.get(db, UUID(str(made)), client=None)
    assert child is not None
    assert (str(child.client), child.status, child.payload) == (job.client, "pending", '{"n":1}')


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"type":"nobody_knows","payload":{}}', id="unknown type"),
        pytest.param(b'{"type":"mail","payload":5}', id="no object"),
    ],
)
async def test_a_job_whose_submits_cannot_be_stored_has_failed(
    db: Connection, desk: Desk, body: bytes
) -> None:
    await publish(db, desk.node, "mail")
    [job] = await taken(db, desk, 1)
    good = b'{"type":"mail","payload":{}}'

    desk.settler.complete_with_jobs("mail", Parent(completion(job), job, [good, body]))
    await desk.settled()

    assert len(desk.barren) == 1
    assert await status(db, job.id) == "pending"
    assert await one(db, "select count(*) from taskd.jobs") == 1


async def test_a_job_that_submits_a_key_which_another_body_holds_has_failed(
    db: Connection, desk: Desk
) -> None:
    await publish(db, desk.node, "mail", "letter")
    first, second, third = await taken(db, desk, 3)

    def letter(n: int) -> bytes:
        return b'{"type":"letter","payload":{"n":%d},"unique_key":"k"}' % n

    desk.settler.complete_with_jobs("mail", Parent(completion(first), first, [letter(1)]))
    await desk.settled()
    desk.settler.complete_with_jobs("mail", Parent(completion(second), second, [letter(1)]))
    await desk.settled()
    desk.settler.complete_with_jobs("mail", Parent(completion(third), third, [letter(2)]))
    await desk.settled()

    assert await statuses(db, [first, second, third]) == ["completed", "completed", "pending"]
    [error] = desk.barren
    holder = await one(db, "select id::text from taskd.jobs where type = 'letter'")
    assert "unique_key 'k'" in error
    assert str(holder) in error


async def test_a_parent_whose_answer_is_lost_has_its_children_once(
    db: Connection, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    await publish(db, desk.node, "mail", "letter")
    [job] = await taken(db, desk, 1)
    await db.execute(
        """create function taskd.lose() returns trigger language plpgsql as $$ begin
            raise warning 'canceling wait for synchronous replication due to user request';
            return null;
        end $$;
        create trigger lose after insert on taskd.outcomes for each statement execute function taskd.lose()"""
    )
    body = b'{"type":"letter","payload":{}}'

    desk.settler.complete_with_jobs("mail", Parent(completion(job), job, [body, body]))
    # Every answer is lost: the insert of no row at the second try is one, too.
    while not await one(db, "select count(*) from taskd.outcomes"):
        pass
    await db.execute("drop trigger lose on taskd.outcomes")
    await desk.settled()

    assert await one(db, "select count(*) from taskd.jobs where type = 'letter'") == 2
    assert desk.metrics.get("taskd_fenced_total") == 0
