"""Jobs as clients and operators see them: stored, shown, listed, pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from psycopg import Rollback
from psycopg.rows import dict_row

from taskd.model.job import Job, NewJob, Receipt, Run
from taskd.model.state import Cause, State
from taskd.store.pool import Connection
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors

_encode = msgspec.json.Encoder().encode

LAST_ID = UUID(int=2**128 - 1)
"""Above every job id: where a list of the newest jobs starts."""
SCAN = 10_000
"""Rows that one list request reads at most."""


def array(values: Iterable[str | None]) -> str:
    """Return a Postgres array literal of texts.

    Built by hand, because psycopg dumps arrays element by element in Python: this is the hot path.
    """
    parts = [
        "NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for value in values
    ]
    return "{" + ",".join(parts) + "}"


def plain(values: Iterable[object]) -> str:
    """Return an array literal of numbers, ids, words and None.

    A JSON array but for its brackets, and so made without a step of Python for each value.
    """
    return "{" + _encode(list(values))[1:-1].decode() + "}"


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _extra(job: NewJob) -> str | None:
    """Return what few jobs have, as JSON text; None for the others."""
    if not (job.unique_key or job.tags or job.meta or job.trace or job.run_at):
        return None
    extra: dict[str, object] = {}
    if job.unique_key is not None:
        extra["unique_key"] = job.unique_key
        extra["hash"] = (job.body_hash or b"").hex()
        if job.unique_while == "unfinished":
            extra["unfinished"] = True
    if job.tags:
        extra["tags"] = list(job.tags)
    if job.meta is not None:
        extra["meta"] = msgspec.Raw(job.meta.encode())
    if job.trace is not None:
        extra["trace"] = job.trace
    if job.run_at is not None:
        extra["run_at"] = job.run_at
    return _encode(extra).decode()


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(unix_us: int) -> datetime:
    """Return the moment that `unix_us` microseconds of Unix time are, exactly."""
    return _EPOCH + timedelta(microseconds=unix_us)


def due(job: NewJob, at: datetime) -> datetime:
    """Return the `run_at` that a job gets when it is stored at `at`, by the database clock."""
    if job.run_at is not None:
        return max(job.run_at, at)
    return at if job.delay_s is None else at + timedelta(milliseconds=round(job.delay_s * 1000))


class Stored(dict[UUID, Receipt]):
    """What came of an insert: a receipt, by its id, for each job that a unique key decided.

    A job without a receipt was stored under its own id. With one it was not: `id` is the job that holds
    its `unique_key`, a duplicate or a conflict; when the holder vanished just now the receipt has an
    `error`, and the job may be sent again.
    """

    at: datetime
    """What counted as now for all of them, by the database clock."""


async def insert(conn: Connection, jobs: Sequence[NewJob]) -> Stored:
    """Store `jobs` in one transaction, but for those whose unique key another job holds.

    Raises:
        StoreUnavailable: no answer came; the jobs may be stored. Sent again with the same ids they are
            refused as rows that exist, which says that they are.
        BadRow: one of the rows was refused for its content, nothing was stored.
    """
    extras = [_extra(job) for job in jobs]
    args = {
        "ids": plain([job.id for job in jobs]),
        "clients": plain([job.client for job in jobs]),
        "types": array([job.type for job in jobs]),
        "payloads": array([job.payload for job in jobs]),
        "priorities": plain([job.priority for job in jobs]),
        "max_attempts": plain([job.max_attempts for job in jobs]),
        "delays_ms": plain([_ms(job.delay_s) for job in jobs]),
        "timeouts_ms": plain([_ms(job.timeout_s) for job in jobs]),
        "expires_ms": plain([_ms(job.expires_in_s) for job in jobs]),
        "extras": array(extras) if any(extras) else None,
    }
    with store_errors():
        cursor = await conn.execute(SQL["insert_jobs"], args)
        rows = await cursor.fetchall()
    stored = Stored()
    for own, held_by, same, at_us in rows:
        if own is None:
            stored.at = moment(at_us)
        elif held_by is None:
            stored[UUID(own)] = Receipt(id=UUID(own), error="the holder of the unique key has just ended")
        else:
            stored[UUID(own)] = Receipt(id=UUID(held_by), duplicate=bool(same), conflict=not same)
    return stored


async def insert_all(conn: Connection, jobs: Sequence[NewJob]) -> Stored:
    """Do what `insert` does, or nothing at all when a job is in conflict or must be sent again.

    Raises:
        StoreUnavailable, BadRow: as `insert`.
    """
    if not any(job.unique_key for job in jobs):
        return await insert(conn, jobs)
    with store_errors():
        async with conn.transaction() as transaction:
            stored = await insert(conn, jobs)
            if any(receipt.conflict or receipt.error for receipt in stored.values()):
                raise Rollback(transaction)
    return stored


async def notify(conn: Connection, channel: str, lanes: Iterable[tuple[str, int]]) -> None:
    """Hint that jobs of these lanes (type, priority) are there; never in a submit's transaction."""
    with store_errors():
        texts = array(f"{type_} {priority}" for type_, priority in lanes)
        await conn.execute(SQL["notify_lanes"], {"channel": channel, "lanes": texts})


def _job(row: Mapping[str, Any]) -> Job:
    runs = msgspec.json.decode(row["history"])
    return Job(
        **{
            **row,
            "status": State(row["status"]),
            "progress": None if row["progress"] is None else msgspec.json.decode(row["progress"]),
            "history": tuple(_run(run) for run in runs),
        }
    )


def _run(entry: dict[str, Any]) -> Run:
    def moment(name: str) -> datetime | None:
        return None if entry[name] is None else datetime.fromisoformat(entry[name])

    ended_at = moment("ended_at")
    assert ended_at is not None
    return Run(
        **{**entry, "started_at": moment("started_at"), "ended_at": ended_at, "cause": Cause(entry["cause"])}
    )


async def get(conn: Connection, job_id: UUID, *, client: UUID | None) -> Job | None:
    """Return a job with its history; None when there is none or it is not `client`'s (None: anybody's)."""
    with store_errors():
        async with conn.cursor(row_factory=dict_row) as cur:
            await cur.execute(SQL["get_job"], {"id": job_id, "client": client})
            row = await cur.fetchone()
    return None if row is None else _job(row)


async def statuses(conn: Connection, job_ids: Sequence[UUID]) -> dict[str, State]:
    """Return the states of jobs by the text of their ids; a job that is gone is `pending` here."""
    with store_errors():
        cursor = await conn.execute(SQL["statuses"], {"ids": plain(job_ids)})
        return {str(job_id): State(status) for job_id, status in await cursor.fetchall()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What a list is narrowed to; None is no condition."""

    type: str | None = None
    status: str | None = None
    tag: str | None = None
    unique_key: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs, newest first, and where the next page starts; None at the end."""

    jobs: tuple[Job, ...]
    before: UUID | None


async def list_(
    conn: Connection, *, client: UUID | None, only: Filter, before: UUID = LAST_ID, limit: int = 50
) -> Page:
    """Return up to `limit` jobs older than `before`, without their histories.

    Reads at most `SCAN` rows: a page may be short or empty and still have a next one.
    """
    args: dict[str, object] = {
        "client": client,
        "before": before,
        "scan": SCAN,
        "most": limit,
        "type": only.type,
        "status": only.status,
        "tag": only.tag,
        "unique_key": only.unique_key,
        "since": only.since,
        "until": only.until,
    }
    with store_errors():
        async with conn.cursor(row_factory=dict_row) as cur:
            await cur.execute(SQL["list_all_jobs" if client is None else "list_jobs"], args)
            jobs = tuple(_job(row) for row in await cur.fetchall())
            if len(jobs) == limit:
                return Page(jobs, jobs[-1].id)
            await cur.execute(SQL["list_end"], args)
            end = await cur.fetchone()
    return Page(jobs, None if end is None else end["id"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long final rows are kept, counted from their end."""

    completed: timedelta = timedelta(days=7)
    failed: timedelta = timedelta(days=30)
    cancelled: timedelta = timedelta(days=7)

    @property
    def shortest(self) -> timedelta:
        """The shortest of them: a row younger than this is never pruned."""
        return min(self.completed, self.failed, self.cancelled)


async def prune(
    conn: Connection, keep: Retention, *, after: UUID, before: UUID, most: int = 1000
) -> tuple[int, UUID | None]:
    """Delete what is over among `most` final rows with ids between `after` and `before`.

    Returns how many were deleted and where the next step starts; None when the walk is at its end.
    """
    args = {
        "completed": keep.completed,
        "failed": keep.failed,
        "cancelled": keep.cancelled,
        "after": after,
        "before": before,
        "most": most,
    }
    with store_errors():
        cursor = await conn.execute(SQL["prune"], args)
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0]), row[1]
