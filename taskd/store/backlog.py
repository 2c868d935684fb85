"""How many jobs of a type or of a client wait, counted only as far as a bound needs it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from psycopg import AsyncConnection

from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors

Connection = AsyncConnection[Any]

MOST_READ = 100_000
"""Of a client's newest jobs so many are looked at, or twice the bound if that is more."""
MOST_COUNTED = 5_000_000
"""Where every count ends, so that it never takes longer than a statement may: a higher bound is none."""


async def of_type(conn: Connection, type_: str, *, bound: int) -> int:
    """Return how many jobs of a type wait, `bound` when they are as many or more.

    Raises:
        StoreUnavailable: no answer came.
    """
    return await _count(conn, "count_of_type", {"type": type_, "enough": min(bound, MOST_COUNTED)})


async def of_client(conn: Connection, client: UUID, *, bound: int) -> int:
    """Return how many jobs of a client wait, `bound` when they are as many or more.

    A job that waits while the client's `MOST_READ` next ones have come and gone is not counted.

    Raises:
        StoreUnavailable: no answer came.
    """
    enough = min(bound, MOST_COUNTED)
    args = {"client": client, "enough": enough, "most": min(max(MOST_READ, 2 * bound), MOST_COUNTED)}
    return await _count(conn, "count_of_client", args)


async def _count(conn: Connection, name: str, args: dict[str, object]) -> int:
    with store_errors():
        cursor = await conn.execute(SQL[name], args)
        row = await cursor.fetchone()
    return int(row[0]) if row else 0
