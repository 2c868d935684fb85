"""Tokens of the rate limits of API keys, taken for many keys in one statement.

The sums are those of `taskd.model.bucket`; they run in the database, by its clock, so that all API
processes of all hosts share one bucket a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg import AsyncConnection

from taskd.model.bucket import Limit, Taken
from taskd.store.jobs import plain
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors

Connection = AsyncConnection[Any]


@dataclass(frozen=True, slots=True)
class Want:
    """Up to `want` tokens for the key, none when fewer than `least` are there; 1 <= least <= want."""

    key: UUID
    limit: Limit
    want: int = 1
    least: int = 1


async def take(conn: Connection, wants: Sequence[Want]) -> list[Taken]:
    """Take tokens, and return what came of each of `wants`, in their order. A key may stand in several.

    `conn` must be in autocommit mode: the statement is a transaction that does not wait for fsync, and
    nothing that must last may share it.

    Raises:
        StoreUnavailable: no answer came. Tokens may be gone; they come back with time.
    """
    args = {
        "keys": plain(want.key for want in wants),
        "wants": plain(want.want for want in wants),
        "least": plain(want.least for want in wants),
        "micro_rates": plain(want.limit.micro_rate for want in wants),
        "bursts": plain(want.limit.burst for want in wants),
    }
    with store_errors():
        cur = await conn.execute(SQL["take_tokens"], args)
        rows = await cur.fetchall()
    # In Python: the function works through the keys in its own order.
    return [Taken(*row[1:]) for row in sorted(rows)]


async def prune(conn: Connection) -> int:
    """Forget the buckets of keys that can't be used any more, and return how many.

    Raises:
        StoreUnavailable: no answer came.
    """
    with store_errors():
        cur = await conn.execute(SQL["prune_buckets"])
        return cur.rowcount
