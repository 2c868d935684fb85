"""API keys as the door recognises them: looked up many at a time, believed for a moment.

What a process believes for up to 2 s would be enough for the promise; on top of it each change is told
to all processes at once (`listen`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from uuid import UUID

from taskd.errors import StoreUnavailable
from taskd.model import apikey
from taskd.model.bucket import Limit
from taskd.service.batch import Batches, Reads, Ticket, pause, until_ready
from taskd.store import keys as rows
from taskd.store.keys import StoredKey
from taskd.store.listen import Ears
from taskd.store.pool import Connection, Link

log = logging.getLogger("taskd.service")

FOUND_S = 1.5
"""How long a key that was found is believed, counted from the sending of the question, in seconds.

With the answer's way to the client it stays below the 2 s in which a revoked key must stop working.
"""
ABSENT_S = 1.0
"""How long an id that was not found is believed to be absent."""
MOST_ABSENT = 10_000
MOST_FOUND = 100_000
USED_S = 60.0
"""How often one key's last use is written at most."""
FLUSH_S = 2.0

_NOBODY = bytes(32)
"""Stands for the digest of a key that does not exist: it costs the same comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A live key, as far as a request needs it. `types` None means every type."""

    id: UUID
    public_id: str
    client: UUID
    scopes: frozenset[str]
    types: frozenset[str] | None
    limit: Limit
    max_pending: int | None = None
    """Jobs of its client that may wait; None is any number."""
    digest: bytes = field(repr=False)
    peppered: bool


class KeyRing:
    """The keys that this process has seen lately, by public id. Owned by one event loop.

    All keys that wait are looked up in one statement.
    """

    def __init__(self, link: Link, reads: Reads, *, pepper: bytes | None, default: Limit) -> None:
        """`default` is the rate limit of a key that has none of its own."""
        self._pepper = pepper
        self._default = default
        self._reads = reads
        self._found: OrderedDict[str, tuple[Key, float]] = OrderedDict()
        self._absent: OrderedDict[str, float] = OrderedDict()
        self._changed: set[str] = set()
        """Keys that changed while a question is in flight: its answer may be older than the change."""
        self._batches: Batches[str, Key | None] = Batches([link], self._load)
        self._used: dict[UUID, float] = {}
        self._to_write: set[UUID] = set()

    async def check(self, text: bytes, until: float) -> Key | None:
        """Return the live key whose text this is, or None; `until` is by the loop's clock.

        Raises:
            StoreUnavailable: nobody could be asked until then.
        """
        parsed = apikey.parse(text)
        if parsed is None:
            return None
        now = asyncio.get_running_loop().time()
        entry = self._found.get(parsed.public_id)
        if entry is not None and entry[1] > now:
            key: Key | None = entry[0]
        elif self._absent.get(parsed.public_id, 0.0) > now:
            key = None
        else:
            key = await self._batches.ask(parsed.public_id, until)
        digest = _NOBODY if key is None else key.digest
        pepper = self._pepper if key is None or key.peppered else None
        if key is None or (key.peppered and pepper is None):
            apikey.matches(text, digest, pepper)  # as long as for a key that is there
            return None
        if not apikey.matches(text, digest, pepper):
            return None
        self._note_use(key, now)
        return key

    def still(self, key: Key, now: float) -> bool:
        """Whether `key`, an answer of `check`, would be its answer again, at `now` by the loop's clock.

        For one who has the very bytes that were compared then, as a connection whose head comes again: the
        ring believes in the same key as long as it is the same object, and has not looked it up again.
        """
        entry = self._found.get(key.public_id)
        if entry is None or entry[0] is not key or entry[1] <= now:
            return False
        self._note_use(key, now)
        return True

    def _note_use(self, key: Key, now: float) -> None:
        if self._used.get(key.id, 0.0) <= now:
            self._used[key.id] = now + USED_S
            self._to_write.add(key.id)

    def forget(self, public_id: str) -> None:
        """Look the key up again at its next use: it has changed."""
        self._found.pop(public_id, None)
        self._absent.pop(public_id, None)
        self._changed.add(public_id)

    async def run(self) -> None:
        """Write the last uses, off the request path, until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            now = asyncio.get_running_loop().time()
            self._used = {key: next_at for key, next_at in self._used.items() if next_at > now}
            ids, self._to_write = self._to_write, set()
            if ids:
                with suppress(StoreUnavailable):  # nothing depends on it
                    await self._reads.run(partial(rows.touch_last_used, key_ids=ids), now + 5.0)

    async def _load(self, link: Link, batch: list[Ticket[str, Key | None]]) -> None:
        ids = {ticket.question for ticket in batch}
        until = max(ticket.until for ticket in batch)
        loop = asyncio.get_running_loop()
        while True:
            try:
                await until_ready(link, until)
                for ticket in batch:
                    ticket.tries += 1
                sent_at = loop.time()
                self._changed.clear()
                found = await link.run(
                    lambda conn: rows.find_by_public_id(conn, ids), deadline_s=max(0.05, until - sent_at)
                )
                break
            except StoreUnavailable as error:
                batch = [ticket for ticket in batch if not ticket.answer.done()]
                if not batch:
                    return
                await pause(link, batch[0].tries, until, error)
        for public_id in ids:
            self._keep(public_id, found.get(public_id), sent_at)
        for ticket in batch:
            entry = self._found.get(ticket.question)
            ticket.tell(None if entry is None else entry[0])
        for public_id in ids & self._changed:
            self.forget(public_id)

    def _keep(self, public_id: str, stored: StoredKey | None, sent_at: float) -> None:
        self._found.pop(public_id, None)
        self._absent.pop(public_id, None)
        if stored is not None and stored.live:
            self._found[public_id] = (_key(stored, self._default), sent_at + FOUND_S)
            if len(self._found) > MOST_FOUND:
                self._found.popitem(last=False)
        else:
            self._absent[public_id] = sent_at + ABSENT_S
            if len(self._absent) > MOST_ABSENT:
                self._absent.popitem(last=False)


LOOK_S = 30.0
"""How often is looked whether the connection that listens still lives, in seconds."""


async def listen(link: Link, hear: Callable[[str], None]) -> None:
    """Call `hear` with the public id of each key that changes, until cancelled; `link` serves nothing else.

    A hint that is lost, as during an outage, costs what the ring believes and nothing more.
    """
    broken = asyncio.Event()
    ears = Ears(hear, broken.set, rows.channel)
    link.on_connect = ears.listen
    link.on_use = ears.disarm
    try:
        while True:
            broken.clear()
            try:
                await link.run(_look)
            except StoreUnavailable:
                await asyncio.sleep(max(link.wait_s, 0.1))
                continue
            ears.arm()
            with suppress(TimeoutError):
                await asyncio.wait_for(broken.wait(), LOOK_S)
    finally:
        ears.disarm()


async def _look(conn: Connection) -> None:
    await conn.execute("select 1")


def limit_of(rate: Decimal | float | None, burst: int | None, default: Limit) -> Limit:
    """Return the rate limit of a key whose own figures may be None: the default's then."""
    limit = default if rate is None else Limit.of(rate, default.burst)
    return limit if burst is None else Limit(limit.micro_rate, burst)


def _key(stored: StoredKey, default: Limit) -> Key:
    return Key(
        id=stored.id,
        public_id=stored.public_id,
        client=stored.client,
        scopes=frozenset(stored.scopes),
        types=None if stored.types is None else frozenset(stored.types),
        max_pending=stored.max_pending,
        limit=limit_of(stored.rate, stored.burst, default),
        digest=stored.digest,
        peppered=stored.pepper_version > 0,
    )
