"""Rows of `taskd.api_keys`: made, found, changed, revoked.

The secret of a key never comes here, only its digest. Whether a key is alive is decided by the clock of
the database, in the same statement that reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import class_row

from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors

Connection = AsyncConnection[Any]

CHANGEABLE = frozenset(
    {"name", "description", "scopes", "types", "rate", "burst", "max_pending", "expires_at"}
)
"""What `change` may set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key to be stored. `client` None makes a client of its own; `types` None means every type.

    `rate` (requests a second), `burst` and `max_pending` None mean the configured default.
    `pepper_version` is 0 when `digest` was made without a pepper.
    """

    id: UUID
    name: str
    prefix: str
    public_id: str
    digest: bytes = field(repr=False)
    fingerprint: str
    scopes: Sequence[str]
    pepper_version: int = 0
    client: UUID | None = None
    description: str | None = None
    types: Sequence[str] | None = None
    rate: Decimal | float | None = None
    burst: int | None = None
    max_pending: int | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """A key as it is stored; `live` means neither revoked nor expired when it was read.

    `rotated_from` is the key that this one was made in place of.
    """

    id: UUID
    client: UUID
    name: str
    description: str | None
    prefix: str
    public_id: str
    digest: bytes = field(repr=False)
    pepper_version: int
    fingerprint: str
    scopes: list[str]
    types: list[str] | None
    rate: Decimal | None
    burst: int | None
    max_pending: int | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    rotated_from: UUID | None
    live: bool


async def create(conn: Connection, key: NewKey) -> StoredKey | None:
    """Store a new key; None when it wants to join a client that does not exist.

    Raises:
        StoreUnavailable: no answer came; the key may be stored, but nobody knows its secret then.
    """
    args = {name: _plain(getattr(key, name)) for name in NewKey.__dataclass_fields__}
    return await _one(conn, "create_key", args)


async def list_all(conn: Connection, *, limit: int = 10_000) -> list[StoredKey]:
    """Return all keys, newest first, revoked and expired ones too, at most `limit`.

    Raises:
        StoreUnavailable: no answer came.
    """
    return await _many(conn, "list_keys", {"limit": limit})


async def get(conn: Connection, key_id: UUID) -> StoredKey | None:
    """Return the key with this id, live or not.

    Raises:
        StoreUnavailable: no answer came.
    """
    return await _one(conn, "get_key", {"id": key_id})


async def find_by_public_id(conn: Connection, public_ids: Collection[str]) -> dict[str, StoredKey]:
    """Return the keys with these public ids, live or not; unknown ids are absent.

    Many at once, because a process looks up all keys that wait in one statement.

    Raises:
        StoreUnavailable: no answer came.
    """
    rows = await _many(conn, "find_keys", {"public_ids": list(public_ids)})
    return {row.public_id: row for row in rows}


async def change(conn: Connection, key_id: UUID, members: Mapping[str, object]) -> StoredKey | None:
    """Set the `members` of a key (names of `CHANGEABLE`), None as well; None when there is no such key.

    Raises:
        StoreUnavailable: no answer came; the change may have been made.
        ValueError: a member that can't be changed.
    """
    if unknown := set(members) - CHANGEABLE:
        raise ValueError(f"can't be changed: {', '.join(sorted(unknown))}")
    args = dict.fromkeys(CHANGEABLE) | {name: _plain(value) for name, value in members.items()}
    return await _one(conn, "change_key", args | {"id": key_id, "members": list(members)})


async def rotate(
    conn: Connection,
    old: UUID,
    *,
    key_id: UUID,
    public_id: str,
    digest: bytes,
    pepper_version: int,
    fingerprint: str,
    overlap: timedelta,
    expires_at: datetime | None = None,
    keep_span: bool = False,
) -> StoredKey | None:
    """Store a new key in place of `old`, which ends after `overlap`; None when `old` is not live.

    The new key has the client, prefix, scopes and limits of the old one, and an expiry of its own:
    `expires_at`, or with `keep_span` as far from now as the old one's was from its making.

    Raises:
        StoreUnavailable: no answer came; the old key may have got its end.
    """
    args = {
        "old": old,
        "id": key_id,
        "public_id": public_id,
        "digest": digest,
        "pepper_version": pepper_version,
        "fingerprint": fingerprint,
        "overlap_s": overlap.total_seconds(),
        "expires_at": expires_at,
        "keep_span": keep_span,
    }
    return await _one(conn, "rotate_key", args)


async def lock(conn: Connection, key_id: UUID) -> StoredKey | None:
    """As `get`, and keep others from changing the key until the transaction ends.

    Raises:
        StoreUnavailable: no answer came.
    """
    return await _one(conn, "lock_key", {"id": key_id})


async def rotation_of(conn: Connection, key_id: UUID) -> list[StoredKey]:
    """Return the live keys that `key_id` was made in place of, or that were made in place of it.

    Raises:
        StoreUnavailable: no answer came.
    """
    return await _many(conn, "rotation_keys", {"id": key_id})


def channel() -> str:
    """Return the channel on which processes hear that a key has changed: its public id."""
    return f"{SQL.schema}_keys"


async def notify(conn: Connection, public_id: str) -> None:
    """Tell all processes, when the transaction commits, that this key has changed.

    Raises:
        StoreUnavailable: no answer came.
    """
    with store_errors():
        await conn.execute(SQL["notify_key"], {"channel": channel(), "public_id": public_id})


async def revoke(conn: Connection, key_id: UUID) -> StoredKey | None:
    """Revoke a key, and return it; again changes nothing. None when there is no such key.

    Raises:
        StoreUnavailable: no answer came; the key may be revoked.
    """
    return await _one(conn, "revoke_key", {"id": key_id})


async def touch_last_used(conn: Connection, key_ids: Collection[UUID]) -> None:
    """Note that these keys were used just now; each is written at most once a minute.

    Raises:
        StoreUnavailable: no answer came. Nothing depends on it.
    """
    with store_errors():
        await conn.execute(SQL["touch_keys"], {"ids": list(key_ids)})


async def _many(conn: Connection, name: str, args: Mapping[str, object]) -> list[StoredKey]:
    with store_errors():
        async with conn.cursor(row_factory=class_row(StoredKey)) as cur:
            await cur.execute(SQL[name], args)
            return await cur.fetchall()


def _plain(value: object) -> object:
    """Return a list for a tuple, which psycopg would send as a row and not as an array."""
    return list(value) if isinstance(value, tuple) else value


async def _one(conn: Connection, name: str, args: Mapping[str, object]) -> StoredKey | None:
    rows = await _many(conn, name, args)
    return rows[0] if rows else None
