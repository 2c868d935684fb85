"""Rows of `taskd.audit`: who did what, when and from where. Added and pruned, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import class_row

from taskd.model import payload
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors

Connection = AsyncConnection[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that was done. `detail` is JSON text of an object; it holds no secret."""

    id: int
    at: datetime
    actor: str
    action: str
    target: str | None
    address: str | None
    request_id: str | None
    detail: str


async def append(
    conn: Connection,
    *,
    actor: str,
    action: str,
    target: str | UUID | None = None,
    address: str | None = None,
    request_id: str | None = None,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Add an entry. `actor` is `admin`, `cli:USER` or a client's id, `action` like `key.revoke`.

    Raises:
        StoreUnavailable: no answer came; the entry may be there.
    """
    args = {
        "actor": actor,
        "action": action,
        "target": None if target is None else str(target),
        "address": address,
        "request_id": request_id,
        "detail": payload.encode(detail or {}),
    }
    with store_errors():
        await conn.execute(SQL["append_audit"], args)


async def page(conn: Connection, *, before: int | None = None, limit: int = 100) -> list[Entry]:
    """Return up to `limit` entries, newest first, of those with an id below `before`.

    Raises:
        StoreUnavailable: no answer came.
    """
    with store_errors():
        async with conn.cursor(row_factory=class_row(Entry)) as cur:
            await cur.execute(SQL["list_audit"], {"before": before, "limit": limit})
            return await cur.fetchall()


async def prune(conn: Connection, *, age: timedelta, limit: int = 10_000) -> int:
    """Delete up to `limit` entries older than `age`, the oldest first, and return how many.

    Raises:
        StoreUnavailable: no answer came.
    """
    with store_errors():
        cur = await conn.execute(SQL["prune_audit"], {"age_s": age.total_seconds(), "limit": limit})
        return cur.rowcount
