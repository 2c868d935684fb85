"""Rows for tests: jobs, nodes and claims, made by the functions that make them in earnest."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg

from taskd.model.job import NewJob, new_id
from taskd.model.jobtype import TypeInfo
from taskd.store import jobs, leases, nodes, types
from taskd.store.leases import START, Claimed, Completion, Demand, Haul, Lane, Position, Settlement, Want

Connection = psycopg.AsyncConnection[Any]

CLIENT = UUID("00000000-0000-7000-8000-0000000000aa")
OTHER = UUID("00000000-0000-7000-8000-0000000000bb")

_numbers = itertools.count(1)


def new_job(**members: Any) -> NewJob:
    """Return a job of type `mail`; its id is above those made before it."""
    number = next(_numbers)
    usual: dict[str, Any] = {
        "id": new_id(1_700_000_000_000 + number, number.to_bytes(10, "big")),
        "client": CLIENT,
        "type": "mail",
        "payload": "{}",
    }
    return NewJob(**(usual | members))


async def add(db: Connection, **members: Any) -> str:
    """Store one job and return its id as text."""
    job = new_job(**members)
    assert await jobs.insert(db, [job]) == {}
    return str(job.id)


async def add_node(db: Connection, name: str = "n1", *, lease_s: float = 30.0) -> int:
    """Register a node and return its number."""
    lease = timedelta(seconds=lease_s)
    return await nodes.register(db, name=name, host="h", pid=1, version="0", lease=lease, info="{}")


async def end_lease(db: Connection, node: int) -> None:
    """Have the lease of `node` end a second ago."""
    await db.execute(
        "update taskd.nodes set lease_until = clock_timestamp() - interval '1 s' where id = %s", (node,)
    )


async def publish(db: Connection, node: int | None, *names: str, **members: Any) -> None:
    """Publish job types that share `members`."""
    infos = [TypeInfo(name=name, handler=name, plugin="test", **members) for name in names]
    await types.publish(db, infos, node=node)


def want(
    most: Mapping[str, int],
    *,
    lanes: Sequence[Lane] | None = None,
    floors: Mapping[Lane, Position] | None = None,
    budgets: Sequence[int] = (1000,),
    demands: Mapping[str, Demand] | None = None,
    served: Sequence[str] | None = None,
) -> Want:
    """Ask for up to `most[type]` jobs of each type, by default of priority 0 and from the lanes' start."""
    asked = list(lanes) if lanes is not None else [(type_, 0) for type_ in most]
    return Want(
        lanes=asked,
        floors=[(floors or {}).get(lane, START) for lane in asked],
        demands=demands or {type_: Demand(count, 0, 0) for type_, count in most.items()},
        budgets=list(budgets),
        served=served,
    )


async def claim(db: Connection, node: int, serial: int, most: Mapping[str, int], **members: Any) -> Haul:
    """Claim as `want` says."""
    return await leases.claim(db, node=node, claim=serial, want=want(most, **members))


async def claim_one(db: Connection, node: int, serial: int, type_: str = "mail") -> Claimed:
    """Claim exactly one job."""
    haul = await claim(db, node, serial, {type_: 1})
    [job] = haul.jobs
    return job


def completion(job: Claimed, result: str | None = "null", **members: Any) -> Completion:
    """Return the verdict that `job` completed."""
    return Completion(job.id, job.claim, result, 1)._replace(**members)


def settlement(job: Claimed, **members: Any) -> Settlement:
    """Return a verdict that has `job` wait again at once, its attempt counted."""
    usual = Settlement(
        id=job.id,
        claim=job.claim,
        status=None,
        delay_ms=0,
        counts=True,
        cause="error",
        error="it failed",
        result=None,
        ran_ms=1,
        exit_code=None,
        signal=None,
        cpu_s=None,
        max_rss=None,
        crashes=0,
        alone=False,
    )
    return usual._replace(**members)


async def one(db: Connection, query: str, *args: Any) -> Any:
    """Return the one row of a query; a single column as its value."""
    cursor = await db.execute(query.encode(), args)
    rows = await cursor.fetchall()
    assert len(rows) == 1, rows
    return rows[0][0] if len(rows[0]) == 1 else rows[0]


async def column(db: Connection, query: str, *args: Any) -> list[Any]:
    """Return the first column of a query's rows."""
    cursor = await db.execute(query.encode(), args)
    return [row[0] for row in await cursor.fetchall()]


async def status(db: Connection, job_id: str) -> str:
    """Return the status of a job as `taskd.job_view` shows it."""
    return str(await one(db, "select status from taskd.job_view where id = %s", job_id))
