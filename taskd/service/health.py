"""Whether this process can do its work: what `/ready` says. Asked at most once a second, whoever asks."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from taskd.errors import SchemaMismatch, StoreUnavailable
from taskd.service.batch import Reads
from taskd.store import health, nodes

log = logging.getLogger("taskd.service")

EVERY_S = 1.0
WAIT_S = 2.0
"""How long the database may take, in seconds: a probe must not hang with it."""

OK = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """`"ok"` or a sentence for each; `database` and `schema` decide whether `ready`, `workers` informs."""

    ready: bool
    database: str
    schema: str
    workers: str


class Health:
    """The last answer and the question that is under way."""

    def __init__(self, reads: Reads, *, allow_unsafe: bool = False) -> None:
        self._reads = reads
        self._allow_unsafe = allow_unsafe
        self._last: Ready | None = None
        self._asked_at = 0.0
        self._task: asyncio.Task[Ready] | None = None

    async def ready(self) -> Ready:
        """Return how things stand, at most a second old."""
        loop = asyncio.get_running_loop()
        if self._last is None or loop.time() - self._asked_at >= EVERY_S:
            if self._task is None or self._task.done():
                self._asked_at = loop.time()
                self._task = loop.create_task(self._ask(loop.time() + WAIT_S))
            self._last = await asyncio.shield(self._task)
        return self._last

    async def _ask(self, until: float) -> Ready:
        unknown = "not known: the database does not answer"
        try:
            facts = await self._reads.run(nodes.server_facts, until)
        except StoreUnavailable as error:
            return _away(error)
        ready, database = True, OK
        if facts.in_recovery or facts.read_only == "on":
            ready, database = False, "the database is read-only"
        elif facts.numbers_left <= 0:
            ready, database = False, "the database takes no writes: it has run out of transaction numbers"
        elif found := facts.unsafe():
            # Told even where the configuration allows it.
            ready, database = self._allow_unsafe, f"can lose accepted jobs: {'; '.join(found)}"
        try:
            await self._reads.run(health.check_schema, until)
        except SchemaMismatch as error:
            return Ready(ready=False, database=database, schema=str(error), workers="not known: no schema")
        except StoreUnavailable as error:
            return _away(error)
        try:
            live = await self._reads.run(health.live_nodes, until)
        except StoreUnavailable:
            return Ready(ready=ready, database=database, schema=OK, workers=unknown)
        workers = OK if live else "no worker node is live"
        return Ready(ready=ready, database=database, schema=OK, workers=workers)


def _away(error: StoreUnavailable) -> Ready:
    log.warning("the database is not ready", extra={"error": str(error)})
    unknown = "not known: the database does not answer"
    # Not the driver's words: they name hosts, users and paths, and anybody may ask.
    return Ready(ready=False, database="does not answer", schema=unknown, workers=unknown)
