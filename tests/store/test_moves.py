"""Cancel and retry by hand: which jobs move, what stays of their past, and who holds their unique keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from taskd.errors import BadRow
from taskd.model.job import Job
from taskd.model.state import Cause, State
from taskd.store import jobs, leases, moves
from taskd.store.moves import Move
from tests.factories import (
    CLIENT,
    OTHER,
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

NOWHERE = UUID(int=7)


@pytest.fixture
async def second(database_url: str) -> AsyncIterator[Connection]:
    """A further connection to the test's database."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        yield conn


async def cancel(db: Connection, *ids: str, client: UUID | None = None) -> dict[str, Move]:
    answer = await moves.cancel(db, [UUID(one) for one in ids], client=client)
    return {str(job_id): move for job_id, move in answer.items()}


async def retry(db: Connection, *ids: str, client: UUID | None = None, **members: Any) -> dict[str, Move]:
    answer = await moves.retry(db, [UUID(one) for one in ids], client=client, **members)
    return {str(job_id): move for job_id, move in answer.items()}


async def shown(db: Connection, job_id: str) -> Job:
    found = await jobs.get(db, UUID(job_id), client=None)
    assert found is not None
    return found


async def past(db: Connection, job_id: str) -> list[tuple[int, Cause]]:
    return [(run.attempt, run.cause) for run in (await shown(db, job_id)).history]


async def ended(db: Connection, way: str, **members: Any) -> str:
    """Make a job that ended this way."""
    node = await add_node(db)
    job_id = await add(db, **members)
    if way == "cancelled":
        await cancel(db, job_id)
        return job_id
    job = await claim_one(db, node, 1)
    if way == "completed":
        await leases.settle_completed(db, node=node, verdicts=[completion(job, '{"a":1}')])
    else:
        await leases.settle_others(db, node=node, verdicts=[settlement(job, status="failed", crashes=3)])
    return job_id


# -- cancel ------------------------------------------------------------------------------------------------


async def test_a_job_that_waits_is_cancelled_at_once(db: Connection) -> None:
    node = await add_node(db)
    due, later = await add(db), await add(db, delay_s=60.0)

    answer = await cancel(db, due, later)

    assert answer == {due: Move(State.PENDING, True), later: Move(State.SCHEDULED, True)}
    assert [await status(db, job_id) for job_id in (due, later)] == ["cancelled", "cancelled"]
    assert (await claim(db, node, 1, {"mail": 9})).jobs == []
    job = await shown(db, due)
    assert (job.attempts, job.started_at, job.error_message) == (0, None, "cancelled while it waited")
    assert await past(db, due) == [(1, Cause.CANCELLED)]


async def test_attempts_that_were_used_up_stay_so_when_a_job_is_cancelled(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    await leases.settle_others(db, node=node, verdicts=[settlement(await claim_one(db, node, 1))])

    await cancel(db, job_id)

    assert (await shown(db, job_id)).attempts == 1
    assert await past(db, job_id) == [(1, Cause.ERROR), (2, Cause.CANCELLED)]


async def test_a_job_that_runs_is_asked_and_its_holder_settles_it(db: Connection) -> None:
    node, other = await add_node(db, "a"), await add_node(db, "b")
    job_id = await add(db)
    job = await claim_one(db, node, 4)

    assert await cancel(db, job_id) == {job_id: Move(State.PROCESSING, True)}
    assert await cancel(db, job_id) == {job_id: Move(State.PROCESSING, True)}, "to ask again is fine"

    assert await status(db, job_id) == "processing"
    assert await moves.asked(db, node=node) == {job_id: 4}
    assert await moves.asked(db, node=other) == {}
    verdict = settlement(job, status="cancelled", cause="cancelled")
    assert await leases.settle_others(db, node=node, verdicts=[verdict]) == {job_id}
    assert await moves.asked(db, node=node) == {}
    assert await past(db, job_id) == [(1, Cause.CANCELLED)]


@pytest.mark.parametrize("way", ["completed", "failed", "cancelled"])
async def test_a_job_that_has_ended_can_not_be_cancelled(db: Connection, way: str) -> None:
    job_id = await ended(db, way)
    before = await shown(db, job_id)

    assert await cancel(db, job_id) == {job_id: Move(State(way), False)}

    assert await shown(db, job_id) == before


async def test_a_run_that_was_asked_to_stop_may_still_complete(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 1)
    await cancel(db, job_id)

    assert await leases.settle_completed(db, node=node, verdicts=[completion(job)]) == {job_id}

    assert await moves.cancel_requested(db) == 0
    assert await status(db, job_id) == "completed"
    assert await one(db, "select count(*) from taskd.cancel_requests") == 0


@pytest.mark.parametrize("end", ["error", "put back", "rescue"])
async def test_a_job_whose_run_ended_before_it_was_asked_is_cancelled_where_it_waits(
    db: Connection, end: str
) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 1)
    await cancel(db, job_id)
    if end == "rescue":
        await end_lease(db, node)
        await leases.rescue_lost(db)
    else:
        verdict = settlement(job) if end == "error" else settlement(job, counts=False, cause=None, error=None)
        await leases.settle_others(db, node=node, verdicts=[verdict])
    assert await status(db, job_id) == "pending"

    assert await moves.cancel_requested(db) == 1

    assert await status(db, job_id) == "cancelled"
    assert await one(db, "select count(*) from taskd.cancel_requests") == 0


async def test_a_job_that_is_claimed_again_first_is_asked_again(db: Connection) -> None:
    node, other = await add_node(db, "a"), await add_node(db, "b")
    job_id = await add(db)
    job = await claim_one(db, node, 1)
    await cancel(db, job_id)
    await leases.settle_others(db, node=node, verdicts=[settlement(job)])
    await claim_one(db, other, 9)

    assert await moves.asked(db, node=other) == {job_id: 9}
    assert await moves.cancel_requested(db) == 0
    assert await moves.asked(db, node=other) == {job_id: 9}


async def test_a_client_cancels_and_retries_its_own_jobs_only(db: Connection) -> None:
    mine, foreign = await add(db), await add(db, client=OTHER)

    assert await cancel(db, mine, foreign, str(NOWHERE), client=CLIENT) == {mine: Move(State.PENDING, True)}
    assert await status(db, foreign) == "pending"
    assert set(await cancel(db, foreign)) == {foreign}, "who asks for nobody's may have all"
    assert set(await retry(db, mine, foreign, str(NOWHERE), client=CLIENT)) == {mine}
    assert [await status(db, job_id) for job_id in (mine, foreign)] == ["pending", "cancelled"]


async def test_nobody_can_drop_the_request_of_another_client(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    await claim_one(db, node, 1)
    await cancel(db, job_id, client=CLIENT)

    assert await cancel(db, job_id, client=OTHER) == {}
    assert await retry(db, job_id, client=OTHER) == {}

    assert await moves.asked(db, node=node) == {job_id: 1}


async def test_a_cancelled_job_frees_a_key_that_it_held_until_its_end(db: Connection) -> None:
    held = {"unique_key": "k", "body_hash": b"1"}
    await cancel(db, await add(db, **held, unique_while="unfinished"))
    await cancel(db, await add(db, **held, unique_while="retained"))

    again = new_job(**held)
    assert (await jobs.insert(db, [again]))[again.id].duplicate


async def test_a_claim_passes_by_what_is_being_cancelled(db: Connection, second: Connection) -> None:
    node = await add_node(db)
    job_id, next_id = await add(db), await add(db)

    async with db.transaction():
        await cancel(db, job_id)
        haul = await claim(second, node, 1, {"mail": 9})

    assert [job.id for job in haul.jobs] == [next_id]


async def test_a_cancel_that_waits_for_a_claim_asks_its_holder(db: Connection, second: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)

    async with db.transaction():
        await claim_one(db, node, 3)
        waits = asyncio.create_task(cancel(second, job_id))
        await _blocked(db, second)

    assert await waits == {job_id: Move(State.PROCESSING, True)}
    assert await moves.asked(db, node=node) == {job_id: 3}


async def test_a_cancel_that_waits_for_a_settle_finds_the_job_ended(
    db: Connection, second: Connection
) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 1)

    async with db.transaction():
        await leases.settle_completed(db, node=node, verdicts=[completion(job)])
        waits = asyncio.create_task(cancel(second, job_id))
        await _blocked(db, second)

    assert await waits == {job_id: Move(State.COMPLETED, False)}
    assert await one(db, "select count(*) from taskd.cancel_requests") == 0


async def _blocked(db: Connection, other: Connection) -> None:
    """Return once `other` waits for a lock that `db` holds."""
    until = asyncio.get_running_loop().time() + 10
    while not await one(db, "select cardinality(pg_blocking_pids(%s)) > 0", other.info.backend_pid):
        assert asyncio.get_running_loop().time() < until


# -- retry -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["completed", "failed", "cancelled"])
async def test_an_ended_job_is_back_in_line_with_all_its_attempts(db: Connection, way: str) -> None:
    job_id = await ended(db, way, priority=0, max_attempts=1, timeout_s=2.0, tags=["a"])
    node = await add_node(db)

    assert await retry(db, job_id) == {job_id: Move(State(way), True)}

    job = await shown(db, job_id)
    assert (job.status, job.attempts, job.max_attempts) == ("pending", 0, 1)
    assert (job.error_message, job.result, job.started_at, job.finished_at) == (None, None, None, None)
    row = await one(db, "select crashes, alone, node, claim, expires_at from taskd.queue")
    assert row == (0, False, None, None, None)
    again = await claim_one(db, node, 1)
    assert (again.id, again.attempts, again.timeout_ms) == (job_id, 0, 2000)


async def test_the_past_stays_and_says_that_somebody_put_the_job_back(db: Connection) -> None:
    job_id = await ended(db, "failed")
    await retry(db, job_id)
    await cancel(db, job_id)
    await retry(db, job_id)

    assert await past(db, job_id) == [
        (1, Cause.ERROR),
        (1, Cause.RETRIED),
        (1, Cause.CANCELLED),
        (0, Cause.RETRIED),
    ]
    assert (await shown(db, job_id)).history[1].error == "put back in line by hand; it was failed"


async def test_a_job_that_has_not_ended_can_not_be_retried(db: Connection) -> None:
    node = await add_node(db)
    running = await add(db)
    await claim_one(db, node, 1)
    due, later = await add(db), await add(db, delay_s=60.0)

    answer = await retry(db, running, due, later)

    assert {job_id: move.was for job_id, move in answer.items()} == {
        running: State.PROCESSING,
        due: State.PENDING,
        later: State.SCHEDULED,
    }
    assert not any(move.done for move in answer.values())
    assert await past(db, due) == []


async def test_a_retry_may_bring_another_payload_and_a_later_time(db: Connection) -> None:
    job_id = await ended(db, "failed", payload='{"to": 1}')
    ahead = datetime(2199, 1, 1, tzinfo=UTC)

    await retry(db, job_id, run_at=ahead, payload='{"to": 2}')

    job = await shown(db, job_id)
    assert (job.status, job.run_at, job.payload) == ("scheduled", ahead, '{"to": 2}')


async def test_a_time_that_has_passed_is_now(db: Connection) -> None:
    job_id = await ended(db, "failed")
    before = datetime.now(UTC) - timedelta(seconds=1)

    await retry(db, job_id, run_at=datetime(2001, 1, 1, tzinfo=UTC))

    assert (await shown(db, job_id)).run_at > before


async def test_a_payload_that_can_not_be_stored_changes_nothing(db: Connection) -> None:
    job_id = await ended(db, "failed")
    before = await shown(db, job_id)

    with pytest.raises(BadRow):
        await retry(db, job_id, payload="{broken")

    assert await shown(db, job_id) == before


async def test_an_expired_job_does_not_expire_again(db: Connection) -> None:
    job_id = await add(db, expires_in_s=0.001)
    await one(db, "select pg_sleep(0.002)")
    await leases.expire(db)

    await retry(db, job_id)

    assert await leases.expire(db) == 0
    assert await status(db, job_id) == "pending"


async def test_a_retry_takes_back_the_key_that_was_free_since_the_end(db: Connection) -> None:
    held = {"unique_key": "k", "body_hash": b"1", "unique_while": "unfinished"}
    job_id = await ended(db, "failed", **held)
    await retry(db, job_id)
    same, other = new_job(**held), new_job(**held | {"body_hash": b"2"})

    receipts = await jobs.insert(db, [same, other])

    assert receipts[same.id].id == receipts[other.id].id == UUID(job_id)
    assert (receipts[same.id].duplicate, receipts[other.id].conflict) == (True, True)
    await cancel(db, job_id)
    assert await jobs.insert(db, [same]) == {}, "and it is free again at the next end"


async def test_a_job_whose_key_another_one_holds_by_now_stays_ended(db: Connection) -> None:
    held = {"unique_key": "k", "body_hash": b"1", "unique_while": "unfinished"}
    first = await ended(db, "failed", **held)
    free = await ended(db, "failed")
    holder = await add(db, **held)

    answer = await retry(db, first, free)

    assert answer == {first: Move(State.FAILED, False, UUID(holder)), free: Move(State.FAILED, True)}
    assert await status(db, first) == "failed"
    assert await past(db, first) == [(1, Cause.ERROR)]


async def test_of_two_ended_jobs_with_one_key_one_is_put_back(db: Connection) -> None:
    held = {"unique_key": "k", "body_hash": b"1", "unique_while": "unfinished"}
    both = [await ended(db, "failed", **held) for _ in range(2)]

    answer = await retry(db, *both)

    assert [move.done for _, move in sorted(answer.items())] == [True, False]
    assert {move.held_by for move in answer.values()} == {None, UUID(min(both))}


async def test_a_key_that_a_job_keeps_as_long_as_its_row_needs_no_taking(db: Connection) -> None:
    job_id = await ended(db, "completed", unique_key="k", body_hash=b"1")

    assert (await retry(db, job_id))[job_id].done

    assert await column(db, "select job_id::text from taskd.unique_keys") == [job_id]
    assert await one(db, "select keyed from taskd.queue") is False


async def test_a_request_to_cancel_an_earlier_life_does_not_reach_the_next(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 1)
    await cancel(db, job_id)
    await leases.settle_completed(db, node=node, verdicts=[completion(job)])

    await retry(db, job_id)

    assert await moves.cancel_requested(db) == 0
    await claim_one(db, node, 2)
    assert await moves.asked(db, node=node) == {}


@pytest.mark.parametrize("way", ["completed", "failed"])
async def test_a_late_settle_of_an_earlier_life_is_known_and_changes_nothing(
    db: Connection, way: str
) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 1)
    failure = settlement(job, status="failed")

    async def settle() -> set[str]:
        if way == "completed":
            return await leases.settle_completed(db, node=node, verdicts=[completion(job)])
        return await leases.settle_others(db, node=node, verdicts=[failure])

    assert await settle() == {job_id}
    await retry(db, job_id)
    await claim_one(db, node, 2)

    assert await settle() == set()

    assert await leases.settled_by(db, node=node, claims={job_id: 1}) == {job_id}
    assert await status(db, job_id) == "processing"


async def test_two_retries_at_once_put_a_job_back_once(db: Connection, second: Connection) -> None:
    job_id = await ended(db, "failed")

    async with db.transaction():
        first = await retry(db, job_id)
        waits = asyncio.create_task(retry(second, job_id))
        await _blocked(db, second)

    assert first[job_id].done
    assert await waits == {job_id: Move(State.PENDING, False)}
    assert (await past(db, job_id)).count((1, Cause.RETRIED)) == 1


async def test_a_retry_in_the_moment_of_pruning_keeps_everything_or_nothing(
    db: Connection, second: Connection
) -> None:
    job_id = await ended(db, "failed")
    keep = jobs.Retention(completed=timedelta(), failed=timedelta(), cancelled=timedelta())

    async with db.transaction():
        await retry(db, job_id)
        waits = asyncio.create_task(jobs.prune(second, keep, after=UUID(int=0), before=jobs.LAST_ID))
        await _blocked(db, second)

    assert (await waits)[0] == 0
    assert await past(db, job_id) == [(1, Cause.ERROR), (1, Cause.RETRIED)]


async def test_a_batch_moves_each_job_its_own_way(db: Connection) -> None:
    node = await add_node(db)
    await publish(db, node, "mail", max_running=50)
    made = [await add(db) for _ in range(300)]
    taken = [job.id for job in (await claim(db, node, 1, {"mail": 100})).jobs]

    answer = await cancel(db, *made, *made)

    assert len(answer) == 300
    assert sum(move.was is State.PROCESSING for move in answer.values()) == len(taken) == 50
    assert set(await moves.asked(db, node=node)) == set(taken)
    assert await one(db, "select count(*) from taskd.outcomes where status = 'cancelled'") == 250
    assert sum(move.done for move in (await retry(db, *made)).values()) == 250
