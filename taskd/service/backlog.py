"""How much may wait: of a type (`max_backlog`) and of a client (`max_pending`).

Nobody counts on a request. What waits was counted a moment ago; what this process has stored since is
added to it, and while the sum is below the bound a submit passes on a dictionary look-up. The further
below, the longer the count is believed. When the sum reaches the bound, jobs may have started since: it
is counted anew before anybody is refused, so that fast jobs are never mistaken for a backlog.

Accurate to about a second over all processes and hosts. The count ends at the bound.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import partial
from uuid import UUID

from taskd.errors import Refused, StoreUnavailable
from taskd.model.job import NewJob
from taskd.service.batch import Reads
from taskd.store import backlog as rows

FASTEST = 20_000
"""Jobs a second that all hosts together are thought to store at most: how soon a bound may be met."""
SOONEST_S = 1.0
LATEST_S = 30.0
"""How old a count gets before the next one, in seconds, if the bound is near and if it is far."""
AGAIN_S = 0.2
"""How old a count may be that refuses somebody, in seconds."""
REST = 4
"""A count waits for this many times as long as the one before took, so that it can't fill its connection."""
MOST = 10_000
"""Types and clients that are remembered; the one unused for longest goes."""


class _Count:
    """What is known of one type or one client."""

    __slots__ = ("at", "bound", "counted", "mark", "rest_until", "stored", "task")

    def __init__(self) -> None:
        self.bound = 0
        """The bound that it was counted up to."""
        self.counted = 0
        self.at = float("-inf")
        """When the count was asked for."""
        self.stored = 0
        """Jobs that this process has stored since it began to count."""
        self.mark = 0
        """`stored` when the count was asked for."""
        self.rest_until = float("-inf")
        self.task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return self.counted + self.stored - self.mark


class Backlog:
    """The counts of this process. Owned by one event loop."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._counts: OrderedDict[Hashable, _Count] = OrderedDict()

    async def admit_type(self, type_: str, bound: int, until: float) -> None:
        """Return when fewer than `bound` jobs of the type wait.

        Raises:
            Refused: `backlog_full`.
            StoreUnavailable: they had to be counted, and there was no answer until `until`.
        """
        if not await self._below(type_, bound, until):
            raise _full(f"{bound} jobs of the type {type_} wait already")

    async def admit_client(self, client: UUID, bound: int, until: float) -> None:
        """Return when fewer than `bound` jobs of the client wait.

        Raises:
            Refused: `backlog_full`.
            StoreUnavailable: they had to be counted, and there was no answer until `until`.
        """
        if not await self._below(client, bound, until):
            raise _full(f"{bound} jobs of this client wait already, as many as this key may have waiting")

    def stored(self, jobs: Sequence[NewJob]) -> None:
        """Add what this process has stored just now."""
        counts = self._counts
        for job in jobs:
            if (count := counts.get(job.type)) is not None:
                count.stored += 1
            if (count := counts.get(job.client)) is not None:
                count.stored += 1

    async def _below(self, what: Hashable, bound: int, until: float) -> bool:
        count = self._counts.get(what)
        if count is None:
            count = self._counts[what] = _Count()
            if len(self._counts) > MOST:
                self._counts.popitem(last=False)
        now = asyncio.get_running_loop().time()
        # A count that ended at a smaller bound says nothing about this one.
        known = count.counted < count.bound or count.bound >= bound
        room = bound - count.waiting
        if known and room > 0:
            if now - count.at >= min(max(room / FASTEST, SOONEST_S), LATEST_S) and now >= count.rest_until:
                self._count(what, count, bound, now)
                self._counts.move_to_end(what)
                if count.at == float("-inf"):
                    await self._wait(count, until)
                    return bound > count.waiting
            return True
        if now < count.rest_until and known:
            return False
        if count.task is None or count.task.done():
            self._count(what, count, bound, now)
        await self._wait(count, until)
        return bound > count.waiting

    def _count(self, what: Hashable, count: _Count, bound: int, now: float) -> None:
        if count.task is not None and not count.task.done():
            return
        count.task = asyncio.get_running_loop().create_task(self._ask(what, count, bound, now))

    async def _ask(self, what: Hashable, count: _Count, bound: int, now: float) -> None: ...

    async def _wait(self, count: _Count, until: float) -> None: ...


def _full(message: str) -> Refused:
    return Refused("backlog_full", message, headers={"Retry-After": "1"})
