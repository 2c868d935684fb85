"""API keys as operators see them: made, shown, changed, rotated, revoked, and who did it.

A secret leaves this module once, in the answer to `create` or `rotate`. What is stored is its digest.
Whatever changes a key stands in the audit log and is told to all processes, in one transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from taskd.errors import Refused
from taskd.model import apikey
from taskd.model.job import new_id
from taskd.service.batch import Reads
from taskd.service.keyask import KeyAsk, RotateAsk
from taskd.store import audit
from taskd.store import keys as rows
from taskd.store.keys import NewKey, StoredKey
from taskd.store.pool import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who asks for something that the audit log tells."""

    name: str
    address: str | None = None
    request_id: str | None = None


class Keys:
    """The keys as an operator sees them."""

    def __init__(
        self,
        reads: Reads,
        *,
        pepper: bytes | None,
        now: Callable[[], datetime],
        dice: Callable[[int], bytes],
    ) -> None:
        """`now` is the wall clock in UTC; `dice(n)` gives n random bytes fit for secrets."""
        self._reads = reads
        self._pepper = pepper
        self._now = now
        self._dice = dice

    async def create(self, ask: KeyAsk, actor: Actor, until: float) -> tuple[StoredKey, str]:
        """Make a key; return it and its text, which nobody can be shown again.

        Raises:
            Refused: `invalid_field`, there is no such client.
            StoreUnavailable: no answer until `until`.
        """
        made, digest = self._make(ask.prefix)
        new = NewKey(
            id=self._id(),
            name=ask.name,
            prefix=ask.prefix,
            public_id=made.public_id,
            digest=digest,
            pepper_version=self._pepper_version,
            fingerprint=apikey.fingerprint(digest),
            client=ask.client,
            description=ask.description,
            scopes=ask.scopes,
            types=ask.types,
            rate=ask.rate,
            burst=ask.burst,
            max_pending=ask.max_pending,
            expires_at=ask.expires_at,
        )

        async def work(conn: Connection) -> StoredKey | None:
            async with conn.transaction():
                stored = await rows.create(conn, new)
                if stored is not None:
                    await _note(conn, actor, "key.create", stored)
            return stored

        stored = await self._reads.once(work, until)
        if stored is None:
            raise Refused.field(
                "invalid_field", "client", "is no client: it is the id of a client's first key"
            )
        return stored, made.text.decode("ascii")

    async def list_(self, until: float) -> Sequence[StoredKey]:
        """Return all keys, newest first.

        Raises:
            StoreUnavailable: no answer until `until`.
        """
        return await self._reads.run(rows.list_all, until)

    async def get(self, key_id: UUID, until: float) -> StoredKey:
        """Return one key, live or not.

        Raises:
            Refused: `not_found`.
            StoreUnavailable: no answer until `until`.
        """
        return _there(await self._reads.run(lambda conn: rows.get(conn, key_id), until))

    async def change(
        self, key_id: UUID, members: Mapping[str, object], actor: Actor, until: float
    ) -> StoredKey:
        """Set the `members` of a key, as `keyask.read_change` returns them, and return it.

        Raises:
            Refused: `not_found`, or `conflict` for a revoked key.
            StoreUnavailable: no answer until `until`; the key may be changed.
        """

        async def work(conn: Connection, old: StoredKey) -> StoredKey | None:
            if old.revoked_at is not None:
                raise Refused("conflict", "this key is revoked")
            changes = {
                name: [_plain(getattr(old, name)), _plain(value)]
                for name, value in members.items()
                if not _same(getattr(old, name), value)
            }
            if not changes:
                return old
            stored = await rows.change(conn, key_id, members)
            await _note(conn, actor, "key.change", old, changes=changes)
            await rows.notify(conn, old.public_id)
            return stored

        return await self._on_key(key_id, work, until)

    async def rotate(
        self, key_id: UUID, ask: RotateAsk, actor: Actor, until: float
    ) -> tuple[StoredKey, str, StoredKey]:
        """Make a key in place of another one, which ends when the overlap is over.

        Return the new key, its text, which nobody can be shown again, and the old key as it is now.

        Raises:
            Refused: `not_found`, or `conflict` when the key is not live or the rotation before is not over:
                two keys at most are live in place of one.
            StoreUnavailable: no answer until `until`; the new key may be there, and nobody knows its text.
        """
        new_key_id = self._id()
        text = ""
        rotated: StoredKey | None = None

        async def work(conn: Connection, old: StoredKey) -> StoredKey | None:
            nonlocal text, rotated
            if not old.live:
                raise Refused("conflict", "this key is revoked or expired: make a new one")
            for other in await rows.rotation_of(conn, key_id):
                raise Refused(
                    "conflict",
                    f"the rotation before is not over: {other.id} is live too; revoke one of both, or wait",
                )
            made, digest = self._make(old.prefix)
            text = made.text.decode("ascii")
            stored = await rows.rotate(
                conn,
                key_id,
                key_id=new_key_id,
                public_id=made.public_id,
                digest=digest,
                pepper_version=self._pepper_version,
                fingerprint=apikey.fingerprint(digest),
                overlap=ask.overlap,
                expires_at=ask.expires_at,
                keep_span=ask.keep_span,
            )
            if stored is None:
                raise Refused("conflict", "this key has expired just now: make a new one")
            rotated = await rows.get(conn, key_id)
            await _note(
                conn,
                actor,
                "key.rotate",
                old,
                new_key=str(stored.id),
                overlap_s=ask.overlap.total_seconds(),
            )
            await rows.notify(conn, old.public_id)
            return stored

        stored = await self._on_key(key_id, work, until, once=True)
        assert rotated is not None
        return stored, text, rotated

    async def revoke(self, key_id: UUID, actor: Actor, until: float) -> StoredKey:
        """Revoke a key; again changes nothing.

        Raises:
            Refused: `not_found`.
            StoreUnavailable: no answer until `until`; the key may be revoked.
        """

        async def work(conn: Connection, old: StoredKey) -> StoredKey | None:
            if old.revoked_at is not None:
                return old
            stored = await rows.revoke(conn, key_id)
            await _note(conn, actor, "key.revoke", old)
            await rows.notify(conn, old.public_id)
            return stored

        return await self._on_key(key_id, work, until)

    async def _on_key(
        self,
        key_id: UUID,
        work: Callable[[Connection, StoredKey], Awaitable[StoredKey | None]],
        until: float,
        *,
        once: bool = False,
    ) -> StoredKey:
        """Return what `work` makes of a key, in a transaction in which nobody else changes it."""

        async def locked(conn: Connection) -> StoredKey | None:
            async with conn.transaction():
                return await work(conn, _there(await rows.lock(conn, key_id)))

        run = self._reads.once if once else self._reads.run
        return _there(await run(locked, until))

    def _id(self) -> UUID:
        return new_id(int(self._now().timestamp() * 1000), self._dice(10))

    def _make(self, prefix: str) -> tuple[apikey.ApiKey, bytes]:
        """Return a new key and its digest."""
        made = apikey.make(prefix, self._dice(apikey.DICE_BYTES))
        return made, apikey.digest(made.text, self._pepper)

    @property
    def _pepper_version(self) -> int:
        return 0 if self._pepper is None else 1


def _plain(value: object) -> object:
    """Return a member of a key as JSON says it."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    return list(value) if isinstance(value, tuple) else value


def _same(old: object, new: object) -> bool:
    return old == new if isinstance(new, datetime) else _plain(old) == _plain(new)


def _there(stored: StoredKey | None) -> StoredKey:
    if stored is None:
        raise Refused("not_found", "there is no such key")
    return stored


async def _note(conn: Connection, actor: Actor, action: str, key: StoredKey, **more: Any) -> None:
    await audit.append(
        conn,
        actor=actor.name,
        action=action,
        target=key.id,
        address=actor.address,
        request_id=actor.request_id,
        detail={"name": key.name, "public_id": key.public_id, "client": str(key.client), **more},
    )
