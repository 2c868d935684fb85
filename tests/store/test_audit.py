"""The audit log: what is added is read back newest first, and goes by age alone."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg

from taskd.store import audit

Connection = psycopg.AsyncConnection[Any]


async def test_an_entry_is_read_back_whole(db: Connection) -> None:
    await audit.append(
        db,
        actor="admin",
        action="key.revoke",
        target=UUID(int=7),
        address="192.0.2.1",
        request_id="r1",
        detail={"name": "shop\n"},
    )

    [entry] = await audit.page(db)

    assert (entry.actor, entry.action, entry.target) == ("admin", "key.revoke", str(UUID(int=7)))
    assert (entry.address, entry.request_id) == ("192.0.2.1", "r1")
    assert json.loads(entry.detail) == {"name": "shop\n"}


async def test_pages_go_back_in_time(db: Connection) -> None:
    for number in range(5):
        await audit.append(db, actor="admin", action=f"a{number}")

    first = await audit.page(db, limit=2)
    second = await audit.page(db, limit=10, before=first[-1].id)

    assert [entry.action for entry in first + second] == ["a4", "a3", "a2", "a1", "a0"]


async def test_old_entries_are_pruned_oldest_first(db: Connection) -> None:
    for number in range(4):
        await audit.append(db, actor="admin", action=f"a{number}")
    await db.execute("update taskd.audit set at = at - interval '2 days' where action <> 'a3'")

    assert await audit.prune(db, age=timedelta(days=1), limit=2) == 2
    assert [entry.action for entry in await audit.page(db)] == ["a3", "a2"]
    assert await audit.prune(db, age=timedelta(days=1)) == 1
    assert await audit.prune(db, age=timedelta(days=1)) == 0
