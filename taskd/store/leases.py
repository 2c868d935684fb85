"""Claims and verdicts: the statements of the daemon's hot paths, many jobs at a time.

Arguments travel as array literals and rows come back as plain tuples: at tens of thousands of jobs a
second each object that is made for a job is felt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from taskd.store.jobs import array, plain
from taskd.store.pool import Connection
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors

Lane = tuple[str, int]
"""A type and a priority: one range of the queue's index."""


class Position(NamedTuple):
    """A place in a lane: the due time and id of a row, as Postgres wrote them."""

    at: str
    id: str


START = Position("-infinity", "00000000-0000-0000-0000-000000000000")
"""Before every row of a lane."""


PART_BLOCKS = 16384
"""Blocks of the queue that are searched for claims in one statement; `taskd.rescue` has the same default."""
_LAST_BLOCK = 2**32 - 2


class Claimed(NamedTuple):
    """One job that a claim took. Times are milliseconds, the payload is JSON text.

    `attempts` counts those used up before this run; `crashes` deaths of a process in which it ran alone;
    `alone` asks for a process with no other job in it; `expired` says it must not be started any more.
    """

    id: str
    type: str
    payload: str
    priority: int
    attempts: int
    max_attempts: int
    crashes: int
    timeout_ms: int | None
    alone: bool
    expired: bool
    client: str
    claim: int


_new = tuple.__new__
"""Makes a named tuple without the two calls of its own constructor."""


@dataclass(frozen=True, slots=True)
class Haul:
    """What one claim statement brought: jobs, the new floors of their lanes, lanes that were not asked
    for and exist, the seconds until something falls due (None: nothing that is known), and the time of
    the claim by the database clock in seconds of Unix time."""

    jobs: list[Claimed]
    floors: dict[Lane, Position]
    new_lanes: list[Lane]
    due_in_s: float | None
    at_s: float


class Demand(NamedTuple):
    """What is wanted of one type: `most` jobs, `ahead` of them beyond the budget of its `pool`."""

    most: int
    ahead: int
    pool: int


@dataclass(frozen=True, slots=True)
class Want:
    """What a claim asks for. Lanes of one type stand side by side, best first.

    `budgets` are the free slots of each pool, counted from 0; below zero when it holds more than it has
    slots. `served`: look for lanes of these types that are not in `lanes`; None does not look.
    """

    lanes: Sequence[Lane]
    floors: Sequence[Position]
    demands: Mapping[str, Demand]
    budgets: Sequence[int]
    served: Sequence[str] | None


async def claim(conn: Connection, *, node: int, claim: int, want: Want) -> Haul:
    """Claim the wanted due jobs of each type for `node`, best priority first.

    `claim` is the serial number of this statement: with the node it is the token that every later
    write to these jobs must carry. One statement for all free slots, so a claim costs one round trip
    however many it fetches.

    Raises:
        StoreUnavailable: no answer came. Jobs may have been claimed all the same: `put_back_unanswered`
            brings them back.
    """
    demands = [want.demands[lane[0]] for lane in want.lanes]
    args = {
        "node": node,
        "claim": claim,
        "types": array(lane[0] for lane in want.lanes),
        "priorities": plain(lane[1] for lane in want.lanes),
        "wants": plain(demand.most for demand in demands),
        "aheads": plain(demand.ahead for demand in demands),
        "pools": plain(demand.pool + 1 for demand in demands),
        "budgets": plain(want.budgets),
        "floor_at": array(floor.at for floor in want.floors),
        "floor_id": plain(floor.id for floor in want.floors),
        "served": None if want.served is None else list(want.served),
    }
    jobs: list[Claimed] = []
    floors: dict[Lane, Position] = {}
    new_lanes: list[Lane] = []
    due_in_s: float | None = None
    at_s = 0.0
    with store_errors():
        cursor = await conn.execute(SQL["claim_jobs"], args)
        rows = await cursor.fetchall()
    for row in rows:
        kind = row[0]
        if kind == "job":
            jobs.append(_new(Claimed, (*row[1:12], claim)))
        elif kind == "lane":
            floors[row[2], row[4]] = Position(row[12].isoformat(), row[1])
        elif kind == "new":
            new_lanes.append((row[2], row[4]))
        else:
            due_in_s = None if row[3] is None else float(row[3])
            at_s = float(row[1])
    return Haul(jobs, floors, new_lanes, due_in_s, at_s)


class Completion(NamedTuple):
    """A job that completed; `result` is JSON text or None."""

    id: str
    claim: int
    result: str | None
    ran_ms: int


class Settlement(NamedTuple):
    """Any other verdict. `status` is final, or None for a job that waits again for `delay_ms`.

    `cause` None leaves no trace in the history. `ran_ms` None: the job never started.
    """

    id: str
    claim: int
    status: str | None
    delay_ms: int
    counts: bool
    cause: str | None
    error: str | None
    result: str | None
    ran_ms: int | None
    exit_code: int | None
    signal: int | None
    cpu_s: float | None
    max_rss: int | None
    crashes: int
    alone: bool


async def settle_completed(conn: Connection, *, node: int, verdicts: Sequence[Completion]) -> set[str]:
    """Write completions and return the ids that were settled; the rest carried a claim that is over.

    Raises:
        StoreUnavailable: no answer came; sent again, what was stored then matches nothing: see
            `settled_by`.
        BadRow: a result can't be stored; nothing was written.
    """
    ids, claims, results, ran_ms = zip(*verdicts, strict=True)
    args = {
        "node": node,
        "ids": plain(ids),
        "claims": plain(claims),
        "results": array(results),
        "ran_ms": plain(ran_ms),
    }
    with store_errors():
        cursor = await conn.execute(SQL["settle_completed"], args)
        row = await cursor.fetchone()
    assert row is not None
    return set(ids if row[0] is None else row[0])


async def settle_others(conn: Connection, *, node: int, verdicts: Sequence[Settlement]) -> set[str]:
    """Write all other verdicts; as `settle_completed`."""
    column = dict(zip(Settlement._fields, zip(*verdicts, strict=True), strict=True))
    args = {
        "node": node,
        "ids": plain(column["id"]),
        "claims": plain(column["claim"]),
        "status": plain(column["status"]),
        "delays_ms": plain(column["delay_ms"]),
        "counts": plain(column["counts"]),
        "causes": plain(column["cause"]),
        "errors": array(column["error"]),
        "results": array(column["result"]),
        "ran_ms": plain(column["ran_ms"]),
        "exit_codes": plain(column["exit_code"]),
        "signals": plain(column["signal"]),
        "cpu_s": plain(column["cpu_s"]),
        "max_rss": plain(column["max_rss"]),
        "crashes": plain(column["crashes"]),
        "alone": plain(column["alone"]),
    }
    with store_errors():
        cursor = await conn.execute(SQL["settle_others"], args)
        return {row[0] for row in await cursor.fetchall()}


async def settled_by(conn: Connection, *, node: int, claims: Mapping[str, int]) -> set[str]:
    """Return which of these jobs (id to claim) were settled by that claim after all."""
    args = {"node": node, "ids": plain(claims), "claims": plain(claims.values())}
    with store_errors():
        cursor = await conn.execute(SQL["settled_by"], args)
        return {row[0] for row in await cursor.fetchall()}


async def put_back_unanswered(
    conn: Connection, *, node: int, claims: Iterable[int], first: int = 0, blocks: int = PART_BLOCKS
) -> tuple[int, int]:
    """Put back what claims took whose answer was lost, as far as it is in a part of the queue.

    Returns how many jobs that were, and from which block on to look next; 0 when this was the last part.
    """
    args = {"node": node, "claims": list(claims), "first": first, "last": min(first + blocks, _LAST_BLOCK)}
    with store_errors():
        cursor = await conn.execute(SQL["put_back_unanswered"], args)
        row = await cursor.fetchone()
    assert row is not None
    count, size = row
    return int(count), 0 if first + blocks >= size else first + blocks


class Own(NamedTuple):
    """A claim that stands in the queue as this node's."""

    id: str
    claim: int
    type: str
    attempts: int
    max_attempts: int
    crashes: int
    alone: bool


async def own_claims(
    conn: Connection, *, node: int, answered: int, first: int = 0, blocks: int = PART_BLOCKS
) -> tuple[list[Own], int]:
    """Return what `node` runs by the word of the database, of its claims up to `answered`.

    Looks through a part of the queue; returns from which block on to look next, 0 after the last part.
    """
    args = {"node": node, "answered": answered, "first": first, "last": min(first + blocks, _LAST_BLOCK)}
    with store_errors():
        cursor = await conn.execute(SQL["own_claims"], args)
        rows = await cursor.fetchall()
    found = [Own(*row[1:]) for row in rows if row[1] is not None]
    return found, 0 if first + blocks >= int(rows[0][0]) else first + blocks


class Rescued(dict[int, int]):
    """How many jobs were taken from which dead node."""

    failed: int = 0
    """Claims that could not be taken away; they are tried again in a later round."""
    more: bool = False
    """Whether a part of the queue is still to be searched: ask again."""


async def rescue_lost(
    conn: Connection, *, about: datetime | None = None, within: timedelta = timedelta(seconds=1)
) -> Rescued:
    """Take claims of all nodes whose lease has ended, of a part of the queue, until there is no `more`.

    `about` is what the database clock should say now: when it does not, by more than `within`, it has
    jumped, and nothing is done.
    """
    args = {"error": "its node was lost: the lease ended", "about": about, "within": within}
    with store_errors():
        cursor = await conn.execute(SQL["rescue_lost"], args)
        return _rescued(await cursor.fetchall())


async def rescue_named(conn: Connection, *, nodes: Sequence[int], cause: str, error: str) -> Rescued:
    """Take claims of these nodes, whose processes are known to be gone; as `rescue_lost`."""
    with store_errors():
        args = {"nodes": list(nodes), "cause": cause, "error": error}
        cursor = await conn.execute(SQL["rescue_named"], args)
        return _rescued(await cursor.fetchall())


def _rescued(rows: Sequence[tuple[Any, ...]]) -> Rescued:
    rescued = Rescued((node, jobs) for node, jobs, _, _ in rows)
    rescued.failed = max((failed for _, _, failed, _ in rows), default=0)
    rescued.more = any(more for _, _, _, more in rows)
    return rescued


async def bring_forward(conn: Connection, *, until: datetime, most: int = 1000) -> int:
    """Make jobs due again that were due before the clock went back; returns how many.

    `until` is what it showed before. At most `most` of each lane; ask again until there are none.
    """
    with store_errors():
        cursor = await conn.execute(SQL["bring_forward"], {"until": until, "most": most})
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def expire(conn: Connection, *, most: int = 1000) -> int:
    """Fail waiting jobs that were not started in time; returns how many."""
    with store_errors():
        cursor = await conn.execute(SQL["expire_jobs"], {"most": most})
        return len(await cursor.fetchall())


@dataclass(frozen=True, slots=True)
class Horizon:
    """The numbers of the transactions that were under way at a moment, by the database clock."""

    running: frozenset[int]
    at: datetime


async def unclaimed(
    conn: Connection, spans: Mapping[Lane, tuple[Position, Position]]
) -> tuple[dict[Lane, Position], Horizon]:
    """Return the first unclaimed row within each lane's span, and the horizon of this look."""
    order = list(spans)
    args = {
        "types": array(lane[0] for lane in order),
        "priorities": plain(lane[1] for lane in order),
        "from_at": array(spans[lane][0].at for lane in order),
        "from_id": plain(spans[lane][0].id for lane in order),
        "to_at": array(spans[lane][1].at for lane in order),
        "to_id": plain(spans[lane][1].id for lane in order),
    }
    found: dict[Lane, Position] = {}
    horizon: Horizon | None = None
    with store_errors():
        cursor = await conn.execute(SQL["floors"], args)
        for index, at, job_id, running, moment in await cursor.fetchall():
            if index:
                found[order[index - 1]] = Position(at.isoformat(), str(job_id))
            else:
                horizon = Horizon(frozenset(running), moment)
    assert horizon is not None
    return found, horizon
