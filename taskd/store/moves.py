"""Moves that people make: jobs are cancelled, and put back in line after their end.

Which states they lead from and to says `taskd.model.state`; who may ask says the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from taskd.model.state import State
from taskd.store.jobs import plain
from taskd.store.pool import Connection
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors


class Move(NamedTuple):
    """What came of one job: `was` is the state it was found in, not `done` means that it is still there.

    A job that is processing is done with once its cancelling has been asked for; it may complete before its
    node hears of it. `held_by` is the other job that holds its unique key now, and so keeps it from a retry.
    """

    was: State
    done: bool
    held_by: UUID | None = None


async def cancel(conn: Connection, ids: Iterable[UUID], *, client: UUID | None) -> dict[UUID, Move]:
    """Cancel jobs of `client` (None: anybody's); those that run are asked to stop, see `asked`.

    One statement, all of them or none. A job that is not there, or not the client's, is not in the answer.

    Raises:
        StoreUnavailable: no answer came; to ask again is safe.
    """
    args = {"ids": plain(set(ids)), "client": client}
    with store_errors():
        cursor = await conn.execute(SQL["cancel_jobs"], args)
        return {job_id: Move(State(was), done) for job_id, was, done in await cursor.fetchall()}


async def retry(
    conn: Connection,
    ids: Iterable[UUID],
    *,
    client: UUID | None,
    run_at: datetime | None = None,
    payload: str | None = None,
) -> dict[UUID, Move]:
    """Put ended jobs back in line, with all their attempts; each starts at `run_at`, or now.

    `payload` (JSON text) takes the place of theirs; it must be one that the door has checked. Their
    histories say that they were retried and stay. As `cancel` otherwise.

    Raises:
        StoreUnavailable: no answer came; the jobs may be back in line, or have run since.
        BadRow: `payload` can't be stored; nothing was changed.
    """
    args = {"ids": plain(set(ids)), "client": client, "run_at": run_at, "payload": payload}
    with store_errors():
        cursor = await conn.execute(SQL["retry_jobs"], args)
        rows = await cursor.fetchall()
    return {job_id: Move(State(was), done, held_by) for job_id, was, done, held_by in rows}


async def asked(conn: Connection, *, node: int) -> Mapping[str, int]:
    """Return the jobs that `node` holds and that are to be cancelled, with its claim on each."""
    with store_errors():
        cursor = await conn.execute(SQL["asked_to_cancel"], {"node": node})
        return dict(await cursor.fetchall())


async def cancel_requested(conn: Connection) -> int:
    """Cancel what is to be cancelled and waits, since its run ended otherwise; returns how many."""
    with store_errors():
        cursor = await conn.execute(SQL["cancel_requested"])
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])
