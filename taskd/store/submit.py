"""What a submit asks of the database beside the insert itself."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from uuid import UUID

from taskd.store.jobs import moment, plain
from taskd.store.pool import Connection
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors


async def existing(conn: Connection, job_ids: Iterable[UUID]) -> dict[UUID, datetime]:
    """Return those of these jobs that are stored, each with the time that counted as now for it.

    Raises:
        StoreUnavailable: no answer came.
    """
    with store_errors():
        cursor = await conn.execute(SQL["existing_jobs"], {"ids": plain(job_ids)})
        return {UUID(job_id): moment(at_us) for job_id, at_us in await cursor.fetchall()}
