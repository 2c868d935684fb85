"""Jobs as they are stored, shown, listed and pruned."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from taskd.errors import BadRow
from taskd.model.job import Receipt
from taskd.model.state import Cause, State
from taskd.store import jobs, leases
from taskd.store.jobs import LAST_ID, Filter, Retention
from tests.factories import (
    CLIENT,
    OTHER,
    Connection,
    add,
    add_node,
    claim_one,
    column,
    completion,
    new_job,
    one,
    settlement,
    status,
)

FIRST_ID = UUID(int=0)
HASH, ANOTHER = b"\x01" * 32, b"\x02" * 32


def keyed(key: str = "k", *, body: bytes = HASH, **members: Any) -> Any:
    return new_job(unique_key=key, body_hash=body, **members)


async def fails(conn: Connection, serial: int = 1) -> str:
    """Have one waiting job fail for good, and return its id."""
    node = await add_node(conn)
    job = await claim_one(conn, node, serial)
    await leases.settle_others(conn, node=node, verdicts=[settlement(job, status="failed")])
    return job.id


# -- insert ----------------------------------------------------------------------------------------------


async def test_a_job_without_wishes_is_due_at_once(db: Connection) -> None:
    job_id = await add(db, max_attempts=5, priority=7)

    row = await one(
        db,
        """select q.priority, q.attempts, q.max_attempts, q.claimed, q.expires_at, j.timeout_ms,
            q.run_at <= clock_timestamp() and q.run_at > clock_timestamp() - interval '10 s'
        from taskd.queue as q join taskd.jobs as j using (id) where id = %s""",
        job_id,
    )
    assert row == (7, 0, 5, False, None, None, True)
    assert await status(db, job_id) == "pending"


async def test_a_time_in_the_past_becomes_now(db: Connection) -> None:
    before = datetime.now(UTC)

    job_id = await add(db, run_at=datetime(2001, 1, 1, tzinfo=UTC))

    assert await one(db, "select run_at from taskd.queue where id = %s", job_id) >= before


async def test_a_delay_counts_from_the_insert_by_the_database_clock(db: Connection) -> None:
    job_id = await add(db, delay_s=90.5, expires_in_s=100.0, timeout_s=2.5)

    row = await one(
        db,
        """select q.run_at - j.created_at, q.expires_at - j.created_at, j.timeout_ms
        from taskd.queue as q join taskd.jobs as j using (id) where id = %s""",
        job_id,
    )
    assert row == (timedelta(seconds=90.5), timedelta(seconds=100), 2500)
    assert await status(db, job_id) == "scheduled"


async def test_a_time_ahead_is_kept(db: Connection) -> None:
    ahead = datetime(2199, 1, 1, tzinfo=UTC)

    job_id = await add(db, run_at=ahead)

    assert await one(db, "select run_at from taskd.queue where id = %s", job_id) == ahead


async def test_one_bad_row_stores_nothing(db: Connection) -> None:
    with pytest.raises(BadRow) as caught:
        await jobs.insert(db, [new_job(), new_job(payload="{"), new_job()])

    assert caught.value.sqlstate.startswith("22")
    assert await one(db, "select count(*) from taskd.jobs") == 0


async def test_the_same_ids_sent_again_say_that_they_are_stored(db: Connection) -> None:
    batch = [new_job(), new_job()]
    await jobs.insert(db, batch)

    with pytest.raises(BadRow) as caught:
        await jobs.insert(db, batch)

    assert caught.value.sqlstate == "23505"


@pytest.mark.parametrize("text", ['{"a":"\\"\\\\ {},\'"}', '{"ü":"NULL"}', "{}"])
async def test_payloads_come_back_as_they_were_sent(db: Connection, text: str) -> None:
    job_id = await add(db, payload=text)

    assert await one(db, "select payload::text from taskd.jobs where id = %s", job_id) == text


# -- unique keys -----------------------------------------------------------------------------------------


async def test_the_same_key_and_body_is_the_first_job_again(db: Connection) -> None:
    first, second = keyed(), keyed()
    await jobs.insert(db, [first])

    receipts = await jobs.insert(db, [second])

    assert receipts == {second.id: Receipt(id=first.id, duplicate=True)}
    assert await one(db, "select count(*) from taskd.queue") == 1


async def test_the_same_key_with_another_body_is_a_conflict(db: Connection) -> None:
    first, second = keyed(), keyed(body=ANOTHER)
    await jobs.insert(db, [first])

    receipts = await jobs.insert(db, [second])

    assert receipts == {second.id: Receipt(id=first.id, conflict=True)}


async def test_a_key_belongs_to_one_client(db: Connection) -> None:
    assert await jobs.insert(db, [keyed()]) == {}
    assert await jobs.insert(db, [keyed(client=OTHER)]) == {}


async def test_a_batch_with_one_key_twice_stores_it_once(db: Connection) -> None:
    first, again, other, plain = keyed(), keyed(), keyed(body=ANOTHER), new_job()

    receipts = await jobs.insert(db, [first, again, plain, other])

    assert receipts == {
        again.id: Receipt(id=first.id, duplicate=True),
        other.id: Receipt(id=first.id, conflict=True),
    }
    assert set(await column(db, "select id from taskd.queue")) == {first.id, plain.id}


async def test_two_connections_with_one_key_make_one_job(db: Connection, database_url: str) -> None:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        mine, theirs = keyed(), keyed()
        async with db.transaction():
            await jobs.insert(db, [mine])
            waits = asyncio.create_task(jobs.insert(other, [theirs]))
            await blocked(db, other)

        receipts = await waits

    assert receipts == {theirs.id: Receipt(id=mine.id, duplicate=True)}


async def test_a_key_is_free_when_its_first_insert_was_taken_back(db: Connection, database_url: str) -> None:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        theirs = keyed()
        async with db.transaction(force_rollback=True):
            await jobs.insert(db, [keyed()])
            waits = asyncio.create_task(jobs.insert(other, [theirs]))
            await blocked(db, other)

        assert await waits == {}


async def blocked(db: Connection, other: Connection) -> None:
    """Return once `other` waits for a lock."""
    while not await one(db, "select cardinality(pg_blocking_pids(%s)) > 0", other.info.backend_pid):
        pass


@pytest.mark.parametrize(
    ("mode", "free"),
    [pytest.param("unfinished", True, id="free"), pytest.param("retained", False, id="kept")],
)
async def test_a_key_after_its_job_has_ended(db: Connection, mode: str, free: bool) -> None:
    node = await add_node(db)
    await jobs.insert(db, [keyed(unique_while=mode)])
    job = await claim_one(db, node, 1)
    await leases.settle_completed(db, node=node, verdicts=[completion(job)])

    receipts = await jobs.insert(db, [keyed()])

    assert (receipts == {}) == free


async def test_a_key_that_holds_while_unfinished_holds_through_a_retry(db: Connection) -> None:
    node = await add_node(db)
    await jobs.insert(db, [keyed(unique_while="unfinished")])
    job = await claim_one(db, node, 1)
    await leases.settle_others(db, node=node, verdicts=[settlement(job)])

    assert len(await jobs.insert(db, [keyed()])) == 1


async def test_a_failure_frees_a_key_too(db: Connection) -> None:
    await jobs.insert(db, [keyed(unique_while="unfinished")])
    await fails(db)

    assert await jobs.insert(db, [keyed()]) == {}


async def test_sent_again_with_the_same_id_a_keyed_job_is_its_own_duplicate(db: Connection) -> None:
    job = keyed()
    await jobs.insert(db, [job])

    assert await jobs.insert(db, [job]) == {job.id: Receipt(id=job.id, duplicate=True)}


# -- show and list ---------------------------------------------------------------------------------------


async def test_a_job_is_shown_with_its_history(db: Connection) -> None:
    node = await add_node(db, "worker-a")
    job_id = await add(db, tags=("a", "b"), meta='{"m": 1}', unique_key="k", body_hash=HASH)
    job = await claim_one(db, node, 5)
    verdict = settlement(job, cause="crashed", exit_code=3, cpu_s=0.5, max_rss=1024, delay_ms=60_000)
    await leases.settle_others(db, node=node, verdicts=[verdict])

    shown = await jobs.get(db, UUID(job_id), client=CLIENT)

    assert shown is not None
    assert (shown.status, shown.attempts, shown.error_message) == (State.SCHEDULED, 1, "it failed")
    assert (shown.tags, shown.meta, shown.unique_key) == (["a", "b"], '{"m": 1}', "k")
    [run] = shown.history
    assert (run.attempt, run.claim, run.node, run.cause) == (1, f"{node}:5", "worker-a", Cause.CRASHED)
    assert (run.exit_code, run.cpu_s, run.max_rss) == (3, 0.5, 1024)
    assert run.started_at is not None
    assert run.started_at <= run.ended_at


async def test_a_running_job_counts_the_attempt_that_is_under_way(db: Connection) -> None:
    job_id = await add(db)
    await claim_one(db, await add_node(db), 1)

    shown = await jobs.get(db, UUID(job_id), client=None)

    assert shown is not None
    assert (shown.status, shown.attempts) == (State.PROCESSING, 1)
    assert shown.started_at is not None


async def test_nobody_sees_the_job_of_another_client(db: Connection) -> None:
    job_id = UUID(await add(db))

    assert await jobs.get(db, job_id, client=OTHER) is None
    assert (await jobs.list_(db, client=OTHER, only=Filter())).jobs == ()


async def test_the_view_has_the_members_of_the_http_answer(db: Connection) -> None:
    await add(db)
    cursor = await db.execute("select * from taskd.job_view")
    assert cursor.description is not None

    assert {member.name for member in cursor.description} >= {
        "id",
        "type",
        "payload",
        "status",
        "attempts",
        "max_attempts",
        "created_at",
        "scheduled_at",
        "error_message",
        "result",
        "progress",
        "priority",
        "started_at",
        "finished_at",
        "unique_key",
        "tags",
        "meta",
        "history",
        "waiting_for",
        "client",
    }


async def test_the_view_and_get_agree(db: Connection) -> None:
    for members in ({}, {"delay_s": 60.0}, {"tags": ("t",)}):
        await add(db, **members)
    node = await add_node(db)
    done = await claim_one(db, node, 1)
    await leases.settle_completed(db, node=node, verdicts=[completion(done, '{"r":1}')])

    for job_id in await column(db, "select id from taskd.jobs"):
        shown = await jobs.get(db, job_id, client=None)
        assert shown is not None
        row = await one(
            db,
            """select status, attempts, max_attempts, run_at, finished_at, tags, error_message, result
            from taskd.job_view where id = %s""",
            job_id,
        )
        told = (shown.status, shown.attempts, shown.max_attempts, shown.run_at, shown.finished_at)
        assert row[:5] == told
        assert row[5:7] == (shown.tags, shown.error_message)
        assert (row[7] is None) == (shown.result is None)


async def test_statuses_of_many_at_once(db: Connection) -> None:
    waits, runs = UUID(await add(db)), UUID(await add(db, type="other"))
    node = await add_node(db)
    await claim_one(db, node, 1, "other")

    found = await jobs.statuses(db, [waits, runs, FIRST_ID])

    assert found == {str(waits): "pending", str(runs): "processing", str(FIRST_ID): "pending"}


@pytest.fixture
async def some(db: Connection) -> list[UUID]:
    """Five jobs, oldest first: two plain, one tagged, one of another type, one that failed."""
    made = [
        await add(db, type="early"),
        await add(db, type="early"),
        await add(db, tags=("x",), unique_key="k", body_hash=HASH, type="early"),
        await add(db, type="other"),
        await add(db),
    ]
    assert await fails(db) == made[-1]
    return [UUID(job_id) for job_id in made]


@pytest.mark.parametrize(
    ("only", "places"),
    [
        pytest.param(Filter(), [4, 3, 2, 1, 0], id="all, newest first"),
        pytest.param(Filter(status="failed"), [4], id="status"),
        pytest.param(Filter(status="pending", type="early"), [2, 1, 0], id="two at once"),
        pytest.param(Filter(tag="x"), [2], id="tag"),
        pytest.param(Filter(unique_key="k"), [2], id="unique key"),
        pytest.param(Filter(type="other"), [3], id="type"),
        pytest.param(Filter(since=datetime(2999, 1, 1, tzinfo=UTC)), [], id="since"),
        pytest.param(Filter(until=datetime(2001, 1, 1, tzinfo=UTC)), [], id="until"),
    ],
)
async def test_lists_are_narrowed(db: Connection, some: list[UUID], only: Filter, places: list[int]) -> None:
    # Operators don't look by key: it is a client's own.
    for client in (CLIENT, None) if only.unique_key is None else (CLIENT,):
        page = await jobs.list_(db, client=client, only=only)

        assert [job.id for job in page.jobs] == [some[place] for place in places]
        assert page.before is None


async def test_pages_follow_each_other_without_gap_or_repeat(db: Connection, some: list[UUID]) -> None:
    seen: list[UUID] = []
    before: UUID | None = LAST_ID
    while before is not None:
        page = await jobs.list_(db, client=CLIENT, only=Filter(), before=before, limit=2)
        seen += [job.id for job in page.jobs]
        before = page.before

    assert seen == some[::-1]


async def test_a_list_reads_a_bounded_number_of_rows_and_hands_back_a_cursor(
    db: Connection, some: list[UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SCAN", 2)

    first = await jobs.list_(db, client=CLIENT, only=Filter(tag="x"))
    assert (first.jobs, first.before) == ((), some[3])
    second = await jobs.list_(db, client=CLIENT, only=Filter(tag="x"), before=some[3])
    assert [job.id for job in second.jobs] == [some[2]]
    assert second.before == some[1]
    third = await jobs.list_(db, client=CLIENT, only=Filter(tag="x"), before=some[1])
    assert (third.jobs, third.before) == ((), None)


# -- prune -----------------------------------------------------------------------------------------------


async def ended(db: Connection, how: str, *, days: float, **members: Any) -> str:
    """Make a job that ended so many days ago."""
    node = await add_node(db)
    job_id = await add(db, type=f"t{await one(db, 'select count(*) from taskd.jobs')}", **members)
    job = await claim_one(db, node, 1, await one(db, "select type from taskd.jobs where id = %s", job_id))
    cause = None if how == "completed" else "error"
    verdict = settlement(job, status=how, cause=cause)
    assert await leases.settle_others(db, node=node, verdicts=[verdict]) == {job_id}
    await db.execute(
        "update taskd.outcomes set finished_at = finished_at - %s * interval '1 day' where id = %s",
        (days, job_id),
    )
    await db.execute(
        "update taskd.jobs set created_at = created_at - %s * interval '1 day' where id = %s", (days, job_id)
    )
    return job_id


async def prune_all(db: Connection, keep: Retention, *, most: int = 1000) -> int:
    """Walk to the end and return how many were pruned; a walk that does not end fails the test."""
    pruned, after = 0, FIRST_ID
    for _ in range(50):
        count, reached = await jobs.prune(db, keep, after=after, before=LAST_ID, most=most)
        pruned += count
        if reached is None:
            return pruned
        assert reached > after
        after = reached
    raise AssertionError("the walk does not end")


async def test_each_status_is_kept_for_its_own_time(db: Connection) -> None:
    for how, days in [("completed", 8), ("failed", 29), ("cancelled", 6), ("failed", 31), ("cancelled", 8)]:
        await ended(db, how, days=days)

    assert await prune_all(db, Retention()) == 3

    left = await column(db, "select status from taskd.outcomes order by status")
    assert left == ["cancelled", "failed"]
    assert await one(db, "select count(*) from taskd.jobs") == 2
    assert await one(db, "select count(*) from taskd.history") == 2


@pytest.mark.parametrize("most", [1, 2, 3, 1000])
async def test_the_walk_ends_and_comes_by_every_row(db: Connection, most: int) -> None:
    for days in (9, 1, 9, 9, 1):
        await ended(db, "completed", days=days)

    assert await prune_all(db, Retention(), most=most) == 3


async def test_a_unique_key_is_kept_for_a_day_whatever_retention_says(db: Connection) -> None:
    short = Retention(completed=timedelta(seconds=1))
    await ended(db, "completed", days=0.5, unique_key="k", body_hash=HASH)
    await ended(db, "completed", days=1.1, unique_key="gone", body_hash=HASH)

    assert await prune_all(db, short) == 1

    assert await column(db, "select key from taskd.unique_keys") == ["k"]
    assert len(await jobs.insert(db, [keyed("k"), keyed("gone")])) == 1


async def test_what_waits_or_runs_is_never_pruned(db: Connection) -> None:
    await add(db)
    await claim_one(db, await add_node(db), 1)
    await add(db)

    assert await prune_all(db, Retention(completed=timedelta(0), failed=timedelta(0))) == 0


async def test_a_job_that_is_retried_by_hand_at_that_moment_keeps_everything(
    db: Connection, database_url: str
) -> None:
    job_id = await ended(db, "failed", days=40)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        async with db.transaction():
            await db.execute("delete from taskd.outcomes where id = %s", (job_id,))
            await db.execute(
                """insert into taskd.queue (id, run_at, priority, max_attempts, type)
                select id, taskd.moment(), priority, max_attempts, type from taskd.jobs where id = %s""",
                (job_id,),
            )
            walk = asyncio.create_task(prune_all(other, Retention()))
            await blocked(db, other)
        assert await walk == 0

    assert await status(db, job_id) == "pending"
    assert await one(db, "select count(*) from taskd.history where job_id = %s", job_id) == 1
