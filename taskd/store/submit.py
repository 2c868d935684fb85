"""What a submit asks of the database beside the insert itself."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from taskd.store.jobs import plain
from taskd.store.pool import Connection
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors


async def existing(conn: Connection, job_ids: Iterable[UUID]) -> set[UUID]:
    """Return which of these jobs are stored.

    Raises:
        StoreUnavailable: no answer came.
    """
    with store_errors():
        cursor = await conn.execute(SQL["existing_jobs"], {"ids": plain(job_ids)})
        return {UUID(row[0]) for row in await cursor.fetchall()}
