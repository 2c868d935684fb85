"""Claims and verdicts: who gets which job, and whose word counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from taskd.errors import BadRow
from taskd.model.state import Cause
from taskd.store import jobs, leases, nodes, types
from taskd.store.leases import START, Demand, Lane, Position
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

MAIL: Lane = ("mail", 0)


@pytest.fixture
async def more(database_url: str) -> AsyncIterator[list[Connection]]:
    """Four further connections to the test's database."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                await psycopg.AsyncConnection.connect(database_url, autocommit=True)
            )
            for _ in range(4)
        ]


async def history(db: Connection, job_id: str) -> list[tuple[Any, ...]]:
    cursor = await db.execute(
        "select cause, attempt, claim from taskd.history where job_id = %s order by ended_at, attempt",
        (job_id,),
    )
    return await cursor.fetchall()


# -- claim -----------------------------------------------------------------------------------------------


async def test_the_lane_that_is_named_first_comes_first(db: Connection) -> None:
    node = await add_node(db)
    low = await add(db, priority=-5)
    high = await add(db, priority=100)
    usual = await add(db)

    lanes = [("mail", 100), ("mail", 0), ("mail", -5)]
    haul = await claim(db, node, 1, {"mail": 2}, lanes=lanes)

    assert [job.id for job in haul.jobs] == [high, usual]
    assert await status(db, low) == "pending"


async def test_within_a_lane_due_time_comes_first_then_the_id(db: Connection) -> None:
    node = await add_node(db)
    made = [await add(db) for _ in range(4)]
    same = datetime(2020, 1, 1, tzinfo=UTC)
    await db.execute("update taskd.queue set run_at = %s", (same,))
    await db.execute("update taskd.queue set run_at = '2019-01-01' where id = %s", (made[3],))

    ids = [(await claim_one(db, node, serial)).id for serial in range(1, 5)]

    assert ids == [made[3], made[0], made[1], made[2]]


async def test_a_job_that_is_not_due_is_never_claimed(db: Connection) -> None:
    node = await add_node(db)
    await add(db, delay_s=3600.0)

    haul = await claim(db, node, 1, {"mail": 10})

    assert haul.jobs == []
    assert haul.due_in_s == pytest.approx(3600, abs=30)


async def test_the_next_due_time_is_the_earliest_of_all_lanes(db: Connection) -> None:
    node = await add_node(db)
    await add(db, type="a", delay_s=500.0)
    await add(db, type="b", delay_s=50.0)
    await add(db, type="b", delay_s=5000.0)

    haul = await claim(db, node, 1, {"a": 1, "b": 1})

    assert haul.due_in_s == pytest.approx(50, abs=20)


async def test_a_claim_says_what_a_run_needs(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db, payload='{"to": 1}', priority=3, max_attempts=9, timeout_s=1.5)

    haul = await claim(db, node, 42, {"mail": 1}, lanes=[("mail", 3)])

    [job] = haul.jobs
    assert (job.id, job.type, job.payload, job.priority) == (job_id, "mail", '{"to": 1}', 3)
    assert (job.attempts, job.max_attempts, job.crashes, job.alone) == (0, 9, 0, False)
    assert (job.timeout_ms, job.expired, job.claim) == (1500, False, 42)
    row = await one(db, "select node, claim, claimed from taskd.queue where id = %s", job_id)
    assert row == (node, 42, True)


async def test_budgets_of_pools_and_what_may_be_fetched_ahead(db: Connection) -> None:
    node = await add_node(db)
    for type_ in "abc":
        await jobs.insert(db, [new_job(type=type_) for _ in range(10)])

    demands = {"a": Demand(10, 0, 0), "b": Demand(10, 3, 0), "c": Demand(4, 0, 1)}
    haul = await claim(db, node, 1, {"a": 0, "b": 0, "c": 0}, demands=demands, budgets=[5, 9])

    assert Counter(job.type for job in haul.jobs) == {"a": 5, "b": 3, "c": 4}


async def test_two_claims_at_once_never_take_the_same_job(db: Connection, more: list[Connection]) -> None:
    node = await add_node(db)
    await jobs.insert(db, [new_job() for _ in range(10)])

    async with db.transaction():
        first = await claim(db, node, 1, {"mail": 4})
        second = await claim(more[0], node, 2, {"mail": 10})

    assert (len(first.jobs), len(second.jobs)) == (4, 6)
    assert not {job.id for job in first.jobs} & {job.id for job in second.jobs}


async def test_no_job_is_claimed_twice_by_many_at_once(db: Connection, more: list[Connection]) -> None:
    numbers = [await add_node(db, f"n{index}") for index in range(4)]
    await jobs.insert(db, [new_job() for _ in range(400)])

    async def work(conn: Connection, node: int) -> list[str]:
        got: list[str] = []
        serial = 0
        while haul := (await claim(conn, node, serial := serial + 1, {"mail": 7})).jobs:
            got += [job.id for job in haul]
        return got

    shares = await asyncio.gather(*map(work, more, numbers))

    assert len(set().union(*shares)) == sum(map(len, shares)) == 400


async def test_a_floor_hides_what_lies_before_it(db: Connection) -> None:
    node = await add_node(db)
    made = [await add(db) for _ in range(5)]

    first = await claim(db, node, 1, {"mail": 3})
    second = await claim(db, node, 2, {"mail": 3}, floors=first.floors)
    await db.execute("update taskd.queue set claimed = false")
    hidden = await claim(db, node, 3, {"mail": 9}, floors=second.floors)

    assert [len(first.jobs), len(second.jobs)] == [3, 2]
    assert first.floors[MAIL].id == made[2]
    assert [job.id for job in hidden.jobs] == [made[4]]


async def test_lanes_that_nobody_named_are_told(db: Connection) -> None:
    node = await add_node(db)
    await add(db, type="a")
    await add(db, type="a", priority=5)
    await add(db, type="b")
    await add(db, type="not_mine")

    haul = await claim(db, node, 1, {"a": 1}, served=["a", "b"])

    assert sorted(haul.new_lanes) == [("a", 5), ("b", 0)]


async def test_a_dead_node_claims_nothing(db: Connection) -> None:
    node, other = await add_node(db, "a"), await add_node(db, "b")
    await add(db)
    await end_lease(db, node)
    assert await leases.rescue_lost(db) == {node: 0}

    late = await claim(db, node, 9, {"mail": 1})

    assert late.jobs == []
    assert (await claim_one(db, other, 1)).type == "mail"


async def test_a_rescue_leaves_a_node_alone_that_is_just_claiming(
    db: Connection, more: list[Connection]
) -> None:
    node = await add_node(db)
    job_id = await add(db)
    await end_lease(db, node)

    async with db.transaction():
        await claim(db, node, 1, {"mail": 1})
        assert await leases.rescue_lost(more[0]) == {}

    assert await leases.rescue_lost(more[0]) == {node: 1}
    assert await status(db, job_id) == "pending"


# -- settle ----------------------------------------------------------------------------------------------


async def test_a_completion_is_stored_once_and_for_all(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 1)

    assert await leases.settle_completed(db, node=node, verdicts=[completion(job, '{"a":1}')]) == {job_id}

    row = await one(db, "select status, attempts, result::text from taskd.outcomes where id = %s", job_id)
    assert row == ("completed", 1, '{"a":1}')
    assert await one(db, "select count(*) from taskd.queue") == 0
    assert await history(db, job_id) == []


@pytest.mark.parametrize(
    "wrong",
    [pytest.param({"claim": 99}, id="another claim"), pytest.param({"node": 99}, id="another node")],
)
async def test_only_the_holder_of_the_claim_can_settle(db: Connection, wrong: dict[str, int]) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = (await claim_one(db, node, 1))._replace(claim=wrong.get("claim", 1))
    writer = wrong.get("node", node)

    assert await leases.settle_completed(db, node=writer, verdicts=[completion(job)]) == set()
    assert await leases.settle_others(db, node=writer, verdicts=[settlement(job)]) == set()
    assert await leases.settled_by(db, node=writer, claims={job_id: job.claim}) == set()

    assert await status(db, job_id) == "processing"
    assert await history(db, job_id) == []


async def test_a_late_verdict_changes_nothing_after_the_job_was_claimed_again(db: Connection) -> None:
    first, second = await add_node(db, "a"), await add_node(db, "b")
    job_id = await add(db)
    late = await claim_one(db, first, 1)
    await end_lease(db, first)
    await leases.rescue_lost(db)
    await claim_one(db, second, 1)

    assert await leases.settle_completed(db, node=first, verdicts=[completion(late)]) == set()
    assert await leases.settled_by(db, node=first, claims={job_id: 1}) == set(), "a rescue is no settle"
    assert await status(db, job_id) == "processing"


async def test_a_completion_after_the_lease_ended_is_accepted_while_nobody_has_rescued(
    db: Connection,
) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 1)
    await end_lease(db, node)

    assert await leases.settle_completed(db, node=node, verdicts=[completion(job)]) == {job_id}


@pytest.mark.parametrize(
    "verdict",
    [
        pytest.param({"status": "failed"}, id="failed"),
        pytest.param({"status": "cancelled", "cause": "cancelled"}, id="cancelled"),
        pytest.param({"delay_ms": 9000}, id="waits for its retry"),
        pytest.param({"counts": False, "cause": "interrupted"}, id="interrupted"),
    ],
)
async def test_a_settle_that_is_sent_again_is_known_as_stored(
    db: Connection, verdict: dict[str, Any]
) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 7)
    sent = settlement(job, **verdict)
    assert await leases.settle_others(db, node=node, verdicts=[sent]) == {job_id}

    assert await leases.settle_others(db, node=node, verdicts=[sent]) == set()

    assert await leases.settled_by(db, node=node, claims={job_id: 7}) == {job_id}
    assert len(await history(db, job_id)) == 1


async def test_it_is_known_even_after_the_job_ran_again_elsewhere(db: Connection) -> None:
    node, other = await add_node(db, "a"), await add_node(db, "b")
    job_id = await add(db)
    await leases.settle_others(db, node=node, verdicts=[settlement(await claim_one(db, node, 7))])
    await claim_one(db, other, 1)

    assert await leases.settled_by(db, node=node, claims={job_id: 7}) == {job_id}


async def test_a_retry_waits_keeps_its_claim_and_counts(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 3)

    await leases.settle_others(
        db, node=node, verdicts=[settlement(job, delay_ms=60_000, crashes=1, alone=True)]
    )

    row = await one(
        db,
        """select attempts, claimed, node, claim, crashes, alone, error, run_at > clock_timestamp()
        from taskd.queue where id = %s""",
        job_id,
    )
    assert row == (1, False, node, 3, 1, True, "it failed", True)
    assert await status(db, job_id) == "scheduled"
    assert await history(db, job_id) == [("error", 1, 3)]


async def test_a_put_back_leaves_no_trace_and_no_claim(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 3)
    verdict = settlement(job, counts=False, cause=None, error=None, ran_ms=None)

    await leases.settle_others(db, node=node, verdicts=[verdict])

    row = await one(
        db, "select attempts, claimed, node, claim, started_at, error from taskd.queue where id = %s", job_id
    )
    assert row == (0, False, None, None, None, None)
    assert await history(db, job_id) == []
    again = await claim_one(db, node, 4)
    assert (again.id, again.attempts) == (job_id, 0)


async def test_uncounted_runs_carry_the_number_of_the_next_one(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    for serial, cause in enumerate(["error", "interrupted", "snoozed", "error"], start=1):
        job = await claim_one(db, node, serial)
        counts = Cause(cause).counts
        await leases.settle_others(db, node=node, verdicts=[settlement(job, cause=cause, counts=counts)])

    runs = [("error", 1, 1), ("interrupted", 2, 2), ("snoozed", 2, 3), ("error", 2, 4)]
    assert await history(db, job_id) == runs


async def test_no_verdict_can_put_a_job_before_now(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    job = await claim_one(db, node, 1)
    before = await one(db, "select clock_timestamp()")

    await leases.settle_others(db, node=node, verdicts=[settlement(job, delay_ms=-86_400_000)])

    assert await one(db, "select run_at from taskd.queue where id = %s", job_id) >= before


async def test_a_job_that_never_started_shows_no_start(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db, expires_in_s=0.001)
    await one(db, "select pg_sleep(0.002)")
    job = await claim_one(db, node, 1)
    assert job.expired

    verdict = settlement(job, status="failed", cause="expired", counts=False, ran_ms=None)
    await leases.settle_others(db, node=node, verdicts=[verdict])

    shown = await jobs.get(db, UUID(job_id), client=None)
    assert shown is not None
    assert (shown.attempts, shown.started_at, shown.history[0].started_at) == (0, None, None)


@pytest.mark.parametrize("final", [True, False], ids=["completed", "failed"])
@pytest.mark.parametrize("emptied", [True, False], ids=["an emptied queue", "a queue without claims"])
async def test_a_settle_reads_its_own_rows_alone_whatever_the_statistics_say(
    db: Connection, final: bool, emptied: bool
) -> None:
    node = await add_node(db)
    await jobs.insert(db, [new_job() for _ in range(8000)])
    if emptied:
        await db.execute("vacuum (truncate false) taskd.queue")
        await db.execute("delete from taskd.queue")
        await db.execute("vacuum (truncate false, analyze) taskd.queue")
        await jobs.insert(db, [new_job() for _ in range(8000)])
    else:
        await db.execute("vacuum analyze taskd.queue")
    haul = await claim(db, node, 1, {"mail": 500})

    async def read() -> int:
        counts = "select idx_tup_fetch + seq_tup_read from pg_stat_xact_user_tables where relname = 'queue'"
        return int(await one(db, counts))

    async with db.transaction():
        before = await read()
        if final:
            await leases.settle_completed(db, node=node, verdicts=[completion(job) for job in haul.jobs])
        else:
            await leases.settle_others(db, node=node, verdicts=[settlement(job) for job in haul.jobs])
        after = await read()

    assert len(haul.jobs) == 500
    assert after - before <= 3 * 500


async def test_a_mixed_batch_settles_each_row_its_own_way(db: Connection) -> None:
    node = await add_node(db)
    await jobs.insert(db, [new_job() for _ in range(6)])
    taken = (await claim(db, node, 1, {"mail": 6})).jobs
    ways: Sequence[dict[str, Any]] = [
        {"status": "failed"},
        {"delay_ms": 60_000},
        {"status": "cancelled"},
        {"counts": False, "cause": "snoozed"},
        {"claim": 99},
        {"counts": False, "cause": None},
    ]

    verdicts = [settlement(job, **way) for job, way in zip(taken, ways, strict=True)]
    done = await leases.settle_others(db, node=node, verdicts=verdicts)

    assert done == {job.id for index, job in enumerate(taken) if index != 4}
    states = [await status(db, job.id) for job in taken]
    assert states == ["failed", "scheduled", "cancelled", "pending", "processing", "pending"]


async def test_one_result_that_cannot_be_stored_refuses_the_batch_whole(db: Connection) -> None:
    node = await add_node(db)
    await jobs.insert(db, [new_job(), new_job()])
    first, second = (await claim(db, node, 1, {"mail": 2})).jobs

    with pytest.raises(BadRow):
        await leases.settle_completed(
            db, node=node, verdicts=[completion(first), completion(second, "{broken")]
        )

    assert await one(db, "select count(*) from taskd.outcomes") == 0


# -- rescue, put back, expire ----------------------------------------------------------------------------


async def test_the_jobs_of_a_dead_node_are_ready_again_with_their_attempt_counted(db: Connection) -> None:
    dead, alive = await add_node(db, "dead"), await add_node(db, "alive")
    lost = await add(db)
    await claim_one(db, dead, 1)
    kept = await add(db)
    await claim_one(db, alive, 1)
    await end_lease(db, dead)

    assert await leases.rescue_lost(db) == {dead: 1}

    row = await one(
        db, "select attempts, node, claim, run_at <= clock_timestamp() from taskd.queue where id = %s", lost
    )
    assert row == (1, None, None, True)
    assert await history(db, lost) == [("lease_expired", 1, 1)]
    assert await status(db, kept) == "processing"


async def test_a_node_is_rescued_once_and_never_lives_again(db: Connection) -> None:
    node = await add_node(db)
    await end_lease(db, node)
    await leases.rescue_lost(db)

    assert await leases.rescue_lost(db) == {}
    assert not await nodes.heartbeat(db, node=node, state="live", info="{}")


async def test_two_rescuers_at_once_rescue_once(db: Connection, more: list[Connection]) -> None:
    dead = [await add_node(db, f"n{index}") for index in range(6)]
    await jobs.insert(db, [new_job() for _ in range(12)])
    for node in dead:
        await claim(db, node, 1, {"mail": 2})
        await end_lease(db, node)

    found = await asyncio.gather(*map(leases.rescue_lost, more))

    assert sum((Counter(one) for one in found), Counter()) == dict.fromkeys(dead, 2)
    assert await one(db, "select count(*) from taskd.history") == 12


async def test_after_its_last_attempt_a_rescued_job_has_failed(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db, max_attempts=1, unique_key="k", body_hash=b"x" * 32, unique_while="unfinished")
    await claim_one(db, node, 1)
    await end_lease(db, node)

    await leases.rescue_lost(db)

    shown = await jobs.get(db, UUID(job_id), client=None)
    assert shown is not None
    assert (shown.status, shown.attempts, shown.max_attempts) == ("failed", 1, 1)
    assert shown.error_message == "its node was lost: the lease ended"
    assert [run.cause for run in shown.history] == ["lease_expired"]
    assert await one(db, "select count(*) from taskd.unique_keys") == 0


async def test_what_must_not_run_twice_fails_at_a_rescue(db: Connection) -> None:
    node = await add_node(db)
    await publish(db, node, "mail", restartable=False)
    job_id = await add(db)
    await claim_one(db, node, 1)
    await end_lease(db, node)

    await leases.rescue_lost(db)

    shown = await jobs.get(db, UUID(job_id), client=None)
    assert shown is not None
    assert shown.status == "failed"
    assert shown.error_message == "outcome unknown: its node was lost: the lease ended"


async def test_named_nodes_are_rescued_whatever_their_lease(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    await claim_one(db, node, 1)

    assert await leases.rescue_named(db, nodes=[node], cause="interrupted", error="restarted") == {node: 1}

    assert await status(db, job_id) == "pending"


async def rows(db: Connection, statement: str) -> list[tuple[Any, ...]]:
    return await (await db.execute(statement.encode())).fetchall()


PART = "select dead, jobs, failed, more from taskd.rescue(null, 'lease_expired', 'e', p_blocks => 1)"


async def spread(db: Connection, *nodes_: int) -> list[str]:
    """Claim jobs for these nodes in turn, all over a queue of several blocks; return their ids."""
    await jobs.insert(db, [new_job() for _ in range(300)])
    ids = []
    for number in range(30):
        node = nodes_[number % len(nodes_)]
        haul = await claim(db, node, number + 1, {"mail": 10})
        ids += [job.id for job in haul.jobs]
    assert await one(db, "select pg_relation_size('taskd.queue') / 8192") > 4
    return ids


async def parts(db: Connection) -> list[list[tuple[int, int, int, bool]]]:
    """Rescue a block at a time until the whole queue was searched."""
    found: list[list[tuple[int, int, int, bool]]] = []
    while not found or any(more for *_, more in found[-1]):
        found.append([tuple(row) for row in await rows(db, PART)])
    return found


async def test_a_large_queue_is_searched_in_parts_and_nothing_is_left(db: Connection) -> None:
    dead, alive = await add_node(db, "dead"), await add_node(db, "alive")
    await spread(db, dead, alive)
    await end_lease(db, dead)

    found = await parts(db)

    assert len(found) > 4
    assert sum(row[1] for part in found for row in part) == 150
    assert await column(db, "select distinct node from taskd.queue where claimed") == [alive]
    assert await one(db, "select search_from from taskd.nodes where id = %s", dead) is None
    assert await leases.rescue_lost(db) == {}
    ended = "select count(distinct h.ended_at) from taskd.history as h join taskd.nodes as n using (ended_at)"
    assert await one(db, ended) == 1, "all at the moment at which the node was marked dead: no settle"


async def test_a_search_that_was_left_is_gone_on_with_by_anybody(
    db: Connection, more: list[Connection]
) -> None:
    first, second = await add_node(db, "first"), await add_node(db, "second")
    await spread(db, first, second)
    await end_lease(db, first)
    assert (await rows(db, PART))[0][3], "there is more"

    await end_lease(db, second)  # and another dies before it is over
    found = await parts(more[0])

    assert {row[0] for part in found for row in part} == {first, second}
    assert await one(db, "select count(*) from taskd.queue where claimed") == 0
    assert await one(db, "select count(*) from taskd.history") == 300


async def test_a_queue_that_was_rewritten_meanwhile_is_searched_from_its_start(db: Connection) -> None:
    dead = await add_node(db)
    await spread(db, dead)
    await end_lease(db, dead)
    await rows(db, PART)
    await rows(db, PART)

    await db.execute("delete from taskd.queue where not claimed")
    await db.execute("vacuum full taskd.queue")
    await parts(db)

    assert await one(db, "select count(*) from taskd.queue where claimed") == 0


async def test_a_claim_that_cannot_be_taken_away_is_tried_in_the_next_round(db: Connection) -> None:
    dead = await add_node(db)
    ids = await spread(db, dead)
    await end_lease(db, dead)
    await db.execute(
        f"""create function taskd.refuse() returns trigger language plpgsql as $$ begin
            raise exception 'planted';
        end $$;
        create trigger refuse before update on taskd.queue for each row
        when (old.id = '{ids[7]}') execute function taskd.refuse()""".encode()
    )

    found = await parts(db)
    assert sum(row[1] for part in found for row in part) == 299
    assert max(row[2] for part in found for row in part) == 1
    assert await column(db, "select id::text from taskd.queue where claimed") == [ids[7]]
    await db.execute("drop trigger refuse on taskd.queue")
    await parts(db)

    assert await one(db, "select count(*) from taskd.queue where claimed") == 0


async def test_a_node_whose_jobs_are_still_looked_for_is_not_forgotten(db: Connection) -> None:
    dead = await add_node(db)
    await spread(db, dead)
    await end_lease(db, dead)
    await rows(db, PART)

    await nodes.forget(db, age=timedelta(seconds=-1))
    assert [node.id for node in await nodes.list_(db)] == [dead]
    beat = await nodes.heartbeat(db, node=await add_node(db, "other"), state="live", info="{}")

    assert beat is not None
    assert beat.overdue, "whoever beats is told that somebody is to be rescued"


async def test_lost_answers_are_looked_for_in_parts(db: Connection) -> None:
    node = await add_node(db)
    await spread(db, node)
    first = 0
    counts: list[int] = []

    while not counts or first:
        count, first = await leases.put_back_unanswered(
            db, node=node, claims=range(1, 31), first=first, blocks=1
        )
        counts.append(count)

    assert len(counts) > 4
    assert sum(counts) == 300
    assert await one(db, "select count(*) from taskd.queue where claimed") == 0


async def test_a_node_is_told_in_parts_what_it_runs_by_the_word_of_the_database(db: Connection) -> None:
    node = await add_node(db)
    await spread(db, node)
    wanted = await one(db, "select count(*) from taskd.queue where claimed and claim <= 20")
    first = 0
    parts: list[list[leases.Own]] = []

    while not parts or first:
        found, first = await leases.own_claims(db, node=node, answered=20, first=first, blocks=1)
        parts.append(found)

    assert len(parts) > 4
    assert sum(map(len, parts)) == wanted > 0
    assert {own.claim for part in parts for own in part} <= set(range(1, 21))
    assert await leases.own_claims(db, node=node + 1, answered=20) == ([], 0)


async def test_what_a_lost_answer_took_is_put_back_unrun(db: Connection) -> None:
    node, other = await add_node(db, "a"), await add_node(db, "b")
    await jobs.insert(db, [new_job() for _ in range(3)])
    lost = await claim_one(db, node, 1)
    known = await claim_one(db, node, 2)
    others = await claim_one(db, other, 1)

    assert await leases.put_back_unanswered(db, node=node, claims=[1, 5]) == (1, 0)

    row = await one(db, "select claimed, claim, attempts, started_at from taskd.queue where id = %s", lost.id)
    assert row == (False, None, 0, None)
    assert [await status(db, job.id) for job in (known, others)] == ["processing", "processing"]


async def test_a_node_that_says_good_bye_puts_its_lost_answers_back(db: Connection) -> None:
    node = await add_node(db)
    job_id = await add(db)
    await claim_one(db, node, 4)

    assert await nodes.end(db, node=node, lost=[4]) == 1

    assert await status(db, job_id) == "pending"
    assert await one(db, "select state from taskd.nodes where id = %s", node) == "gone"
    assert (await claim(db, node, 5, {"mail": 1})).jobs == []


async def test_a_job_that_was_not_started_in_time_has_failed(db: Connection) -> None:
    late = await add(db, expires_in_s=0.001, unique_key="k", body_hash=b"x", unique_while="unfinished")
    scheduled = await add(db, expires_in_s=0.001, delay_s=60.0)
    kept = await add(db, expires_in_s=60.0)
    await one(db, "select pg_sleep(0.002)")

    assert await leases.expire(db) == 2

    shown = await jobs.get(db, UUID(late), client=None)
    assert shown is not None
    assert (shown.status, shown.error_message) == ("failed", "not started in time")
    assert [(run.cause, run.attempt) for run in shown.history] == [("expired", 1)]
    assert [await status(db, job_id) for job_id in (scheduled, kept)] == ["failed", "pending"]
    assert await one(db, "select count(*) from taskd.unique_keys") == 0


async def test_expiry_goes_in_steps(db: Connection) -> None:
    for _ in range(3):
        await add(db, expires_in_s=0.001)
    await one(db, "select pg_sleep(0.002)")

    assert [await leases.expire(db, most=2) for _ in range(3)] == [2, 1, 0]


async def test_a_job_that_was_started_in_time_does_not_expire_while_it_waits_for_its_retry(
    db: Connection,
) -> None:
    node = await add_node(db)
    job_id = await add(db, expires_in_s=0.5)
    job = await claim_one(db, node, 1)
    await leases.settle_others(db, node=node, verdicts=[settlement(job, delay_ms=1000)])
    await one(db, "select pg_sleep(0.5)")

    assert await leases.expire(db) == 0
    assert await status(db, job_id) == "scheduled"


async def test_a_job_that_was_handed_back_unrun_still_expires(db: Connection) -> None:
    node = await add_node(db)
    await add(db, expires_in_s=0.3)
    job = await claim_one(db, node, 1)
    verdict = settlement(job, counts=False, cause=None, ran_ms=None)
    await leases.settle_others(db, node=node, verdicts=[verdict])
    await one(db, "select pg_sleep(0.3)")

    assert await leases.expire(db) == 1


# -- limits ----------------------------------------------------------------------------------------------


async def test_max_running_is_exact_for_many_claimers_at_once(db: Connection, more: list[Connection]) -> None:
    numbers = [await add_node(db, f"n{index}") for index in range(4)]
    await publish(db, numbers[0], "mail", max_running=5)
    await jobs.insert(db, [new_job() for _ in range(80)])
    finished: list[str] = []
    peak = 0

    async def work(conn: Connection, node: int) -> None:
        nonlocal peak
        serial = 0
        while len(finished) < 80:
            taken = (await claim(conn, node, serial := serial + 1, {"mail": 4})).jobs
            peak = max(peak, await one(conn, "select count(*) from taskd.queue where claimed"))
            if taken:
                done = await leases.settle_completed(
                    conn, node=node, verdicts=[completion(job) for job in taken]
                )
                finished.extend(done)

    await asyncio.gather(*map(work, more, numbers))

    assert peak <= 5
    assert len(set(finished)) == 80
    assert sum(await column(db, "select jobs from taskd.running")) == 0


async def test_every_way_to_end_frees_a_place(db: Connection) -> None:
    node, other = await add_node(db, "a"), await add_node(db, "b")
    await publish(db, node, "mail", max_running=1)
    await publish(db, other, "mail", max_running=1)
    await jobs.insert(db, [new_job(max_attempts=9) for _ in range(2)])

    async def free(serial: int) -> bool:
        taken = (await claim(db, node, serial, {"mail": 1})).jobs
        assert (await claim(db, other, serial, {"mail": 1})).jobs == []
        return len(taken) == 1

    async def settle(serial: int, **members: Any) -> None:
        job = (await column(db, "select id::text from taskd.queue where claimed"))[0]
        verdict = settlement(_Held(job, serial), **members)  # type: ignore[arg-type]
        await leases.settle_others(db, node=node, verdicts=[verdict])

    assert await free(1)
    await settle(1, cause=None, counts=False)
    assert await free(2)
    await settle(2)
    assert await free(3)
    await leases.put_back_unanswered(db, node=node, claims=[3])
    assert await free(4)
    await settle(4, status="failed")
    assert await free(5)
    await end_lease(db, node)
    await leases.rescue_lost(db)
    assert len((await claim(db, other, 9, {"mail": 1})).jobs) == 1


class _Held:
    def __init__(self, job_id: str, claim: int) -> None:
        self.id, self.claim = job_id, claim


async def test_a_limit_that_comes_and_goes_while_jobs_run_leaves_no_count_behind(db: Connection) -> None:
    node = await add_node(db)
    await jobs.insert(db, [new_job() for _ in range(3)])
    before = await claim_one(db, node, 1)
    await publish(db, node, "mail", max_running=1)
    during = await claim_one(db, node, 2)
    await publish(db, node, "mail")

    await leases.settle_completed(db, node=node, verdicts=[completion(before), completion(during)])
    await publish(db, node, "mail", max_running=1)

    assert len((await claim(db, node, 3, {"mail": 5})).jobs) == 1


async def test_a_limit_that_another_node_has_holds_here_too(db: Connection) -> None:
    strict, easy = await add_node(db, "strict"), await add_node(db, "easy")
    await publish(db, strict, "mail", max_running=2)
    await publish(db, easy, "mail")
    await jobs.insert(db, [new_job() for _ in range(9)])

    haul = await claim(db, easy, 1, {"mail": 9}, demands={"mail": Demand(9, 9, 0)}, budgets=[0])
    assert haul.jobs == [], "what is limited is never fetched ahead"
    haul = await claim(db, easy, 2, {"mail": 9})

    assert len(haul.jobs) == 2


async def test_a_busy_limit_skips_the_type_and_no_other(db: Connection, more: list[Connection]) -> None:
    node = await add_node(db)
    await publish(db, node, "mail", max_running=5)
    await add(db)
    await add(db, type="other")

    async with db.transaction():
        await db.execute("select from taskd.type_limits for update")
        haul = await claim(more[0], node, 1, {"mail": 1, "other": 1})

    assert [job.type for job in haul.jobs] == ["other"]
    assert await one(db, "select count(*) from taskd.history") == 0


@pytest.mark.parametrize(
    ("rate", "burst"), [pytest.param(200.0, 10, id="burst 10"), pytest.param(100.0, None, id="burst 1")]
)
async def test_a_rate_holds_in_every_window(
    db: Connection, more: list[Connection], rate: float, burst: int | None
) -> None:
    numbers = [await add_node(db, f"n{index}") for index in range(4)]
    await publish(db, numbers[0], "mail", rate=rate, rate_burst=burst)
    total = 60
    await jobs.insert(db, [new_job() for _ in range(total)])
    taken = 0

    async def work(conn: Connection, node: int) -> None:
        nonlocal taken
        serial = 0
        while taken < total:
            haul = await claim(conn, node, serial := serial + 1, {"mail": 20})
            taken += len(haul.jobs)

    await asyncio.gather(*map(work, more, numbers))

    starts = await column(db, "select extract(epoch from started_at)::float8 from taskd.queue order by 1")
    assert len(starts) == total
    for index, first in enumerate(starts):
        for count, last in enumerate(starts[index:], start=1):
            # The bucket counts whole microseconds.
            assert count <= (burst or 1) + rate * (last - first + 2e-6), (index, count)
    assert starts[-1] - starts[0] < 2 * total / rate, "a type below its rate is not refused"


async def test_a_used_up_rate_says_when_it_goes_on(db: Connection) -> None:
    node = await add_node(db)
    await publish(db, node, "mail", rate=0.5)
    await jobs.insert(db, [new_job(), new_job()])

    first = await claim(db, node, 1, {"mail": 2})
    second = await claim(db, node, 2, {"mail": 2})

    assert (len(first.jobs), len(second.jobs)) == (1, 0)
    assert second.due_in_s == pytest.approx(2.0, abs=0.5)


async def test_a_clock_that_jumped_back_does_not_lock_a_type_out(db: Connection) -> None:
    node = await add_node(db)
    await publish(db, node, "mail", rate=10.0, rate_burst=1)
    await add(db)
    await db.execute("update taskd.type_limits set tat = tat + 86400000000 + 2000000000000000")

    haul = await claim(db, node, 1, {"mail": 1})

    assert haul.jobs or haul.due_in_s == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize(
    ("published", "limits"),
    [
        pytest.param([{"rate": 10.0}, {"rate": 2.0}], (500_000, 1, None), id="the lower rate"),
        pytest.param([{"rate": 3.0}], (333_334, 1, None), id="rounded so that it is never faster"),
        pytest.param(
            [{"rate": 1.0, "rate_burst": 5}, {"rate": 1.0, "rate_burst": 3}], (10**6, 3, None), id="burst"
        ),
        pytest.param([{"max_running": 7}, {"max_running": 3}], (None, 1, 3), id="fewer at once"),
        pytest.param([{"rate": 1.0}, {"max_running": 3}], (10**6, 1, 3), id="one limit each"),
        pytest.param([{"max_running": 3}, {}], (None, 1, 3), id="one node has none"),
    ],
)
async def test_the_strictest_of_the_live_nodes_decides(
    db: Connection, published: list[dict[str, Any]], limits: tuple[Any, ...]
) -> None:
    for index, members in enumerate(published):
        await publish(db, await add_node(db, f"n{index}"), "mail", **members)

    row = await one(db, "select interval_us, burst, max_running from taskd.type_limits where type = 'mail'")
    assert row == limits


@pytest.mark.parametrize("how", ["good-bye", "rescue"])
async def test_the_limit_of_a_node_that_is_gone_holds_no_longer(db: Connection, how: str) -> None:
    strict, easy = await add_node(db, "strict"), await add_node(db, "easy")
    await publish(db, strict, "mail", max_running=1)
    await publish(db, easy, "mail")

    if how == "good-bye":
        await nodes.end(db, node=strict)
    else:
        await end_lease(db, strict)
        await leases.rescue_lost(db)
        await types.renew_limits(db)

    assert await one(db, "select count(*) from taskd.type_limits") == 0


# -- floors ----------------------------------------------------------------------------------------------


async def spans(db: Connection, node: int) -> dict[Lane, tuple[Position, Position]]:
    """Claim all that is there and return the span from the start to the floor."""
    haul = await claim(db, node, 1000, {"mail": 1000})
    return {lane: (START, floor) for lane, floor in haul.floors.items()}


async def test_a_row_that_is_committed_late_is_found_before_the_floor(
    db: Connection, more: list[Connection]
) -> None:
    node = await add_node(db)
    async with more[0].transaction():
        late = await add(more[0])
        await add(db)
        span = await spans(db, node)
        found, horizon = await leases.unclaimed(db, span)
        assert (found, len(horizon.running)) == ({}, 1)

    found, after = await leases.unclaimed(db, span)

    assert {lane: position.id for lane, position in found.items()} == {MAIL: late}
    assert not horizon.running & after.running


async def test_a_row_that_an_aborted_claim_held_is_found(db: Connection, more: list[Connection]) -> None:
    node = await add_node(db)
    held, last = await add(db), await add(db)
    async with more[0].transaction(force_rollback=True):
        await claim_one(more[0], node, 1)
        span = await spans(db, node)
        assert span[MAIL][1].id == last

    found, _ = await leases.unclaimed(db, span)

    assert found[MAIL].id == held


async def test_the_horizon_comes_before_the_look(db: Connection, more: list[Connection]) -> None:
    # Whoever is not in the horizon and commits later has a time after it.
    await db.execute("select pg_current_xact_id()")
    _, horizon = await leases.unclaimed(db, {})

    job_id = await add(more[0])

    assert await one(db, "select run_at from taskd.queue where id = %s", job_id) >= horizon.at


async def test_a_transaction_has_its_number_before_it_reads_the_clock(db: Connection) -> None:
    async with db.transaction():
        await one(db, "select taskd.moment()")
        assert await one(db, "select pg_current_xact_id_if_assigned() is not null")


async def test_a_claim_tells_the_time_of_the_database(db: Connection) -> None:
    before = await one(db, "select extract(epoch from clock_timestamp())::float8")

    haul = await claim(db, await add_node(db), 1, {"mail": 1})

    assert before <= haul.at_s <= await one(db, "select extract(epoch from clock_timestamp())::float8")
