"""How much may wait: of a type (`max_backlog`) and of a client (`max_pending`).

Nobody counts on a request. What waits was counted a moment ago; what this process has let in since is
added to it, and while the sum is below the bound a submit passes on a dictionary look-up. The further
below, the longer the count is believed. When the sum reaches the bound, jobs may have started since: it
is counted anew before anybody is refused, so that fast jobs are never mistaken for a backlog.

A first count may take a second where a million wait. Who comes before its end is let in without it as long
as they are less than a thousandth of the bound, which nobody sets to the last job when it is that large.

Accurate to about a second over all processes and hosts, and to that thousandth for each process that starts.
A count ends at its bound.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar
from uuid import UUID

from taskd.errors import Refused, StoreUnavailable
from taskd.model.job import NewJob
from taskd.service.batch import UNANSWERED, Reads, left_s
from taskd.store import backlog as rows
from taskd.store.pool import Connection

FASTEST = 20_000
"""Jobs a second that all hosts together are thought to store at most: how soon a bound may be met."""
SOONEST_S = 1.0
LATEST_S = 30.0
"""How old a count gets before the next one, in seconds, when the bound is near and when it is far."""
AGAIN_S = 0.2
"""How old a count may be that refuses somebody, in seconds."""
REST = 4
"""The next count waits for this many times as long as one took, so that counts don't fill a connection."""
PATIENCE_S = 5.0
UNCOUNTED = 1000
"""One `UNCOUNTED`th of a bound, rounded down, is let in before the first count has come."""
MOST = 10_000
"""Types, and clients, that are remembered; the one that came first goes."""

K = TypeVar("K")

_NEVER = float("-inf")
_Ask = Callable[[Connection, int], Awaitable[int]]


class _Count:
    """What is known of one type or one client. Owned by its `Backlog`."""

    __slots__ = ("ask", "at", "bound", "counted", "passed", "rest_until", "stored", "task")

    def __init__(self, ask: _Ask) -> None:
        self.ask = ask
        self.bound = 0
        """How far is counted: the highest bound that was asked about."""
        self.counted = 0
        self.at = _NEVER
        """When what `counted` says was asked for, by the loop's clock."""
        self.rest_until = _NEVER
        """Until when `counted` is believed whatever it says."""
        self.passed = 0
        """Submits that were let in since then."""
        self.stored = 0
        """Jobs that were stored since then: more than submits where one brings many."""
        self.task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return self.counted + max(self.passed, self.stored)


class Backlog:
    """The counts of this process. Owned by one event loop."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._types: OrderedDict[str, _Count] = OrderedDict()
        self._clients: OrderedDict[UUID, _Count] = OrderedDict()

    def has_room(self, type_: str, bound: int) -> bool:
        """Admit one job of a type, as `admit_type` does, if nothing need be counted for it; whether it was.

        What nearly every submit comes by, without a step of the event loop.
        """
        count = self._types.get(type_)
        return count is not None and self._pass(count, bound, 1, self._now())

    async def admit_type(self, type_: str, bound: int, until: float, *, jobs: int = 1) -> None:
        """Return when there is room for `jobs` more below `bound`; counts them from then on.

        Raises:
            Refused: `backlog_full`.
            StoreUnavailable: they had to be counted, and there was no answer until `until`.
        """
        count = self._types.get(type_)
        if count is None:
            count = _keep(self._types, type_, partial(_of_type, type_=type_))
        if not await self._admit(count, bound, until, jobs):
            raise _full(f"{bound} jobs of the type {type_} may wait, and there is no room for {jobs} more")

    async def admit_client(self, client: UUID, bound: int, until: float, *, jobs: int = 1) -> None:
        """Return when there is room for `jobs` more below `bound`; counts them from then on.

        Raises:
            Refused: `backlog_full`.
            StoreUnavailable: they had to be counted, and there was no answer until `until`.
        """
        count = self._clients.get(client)
        if count is None:
            count = _keep(self._clients, client, partial(_of_client, client=client))
        if not await self._admit(count, bound, until, jobs):
            raise _full(f"{bound} jobs of this client may wait, and there is no room for {jobs} more")

    def stored(self, jobs: Sequence[NewJob]) -> None:
        """Count what this process has stored just now."""
        types, clients = self._types, self._clients
        for job in jobs:
            if (count := types.get(job.type)) is not None:
                count.stored += 1
            if clients and (count := clients.get(job.client)) is not None:
                count.stored += 1

    async def _admit(self, count: _Count, bound: int, until: float, jobs: int) -> bool:
        now = self._now()
        if bound > count.bound:
            count.bound, count.at = bound, _NEVER
        if self._pass(count, bound, jobs, now):
            return True
        if count.at == _NEVER and max(count.passed, count.stored) + jobs <= bound // UNCOUNTED:
            self._renew(count)
            count.passed += jobs
            return True
        if count.at == _NEVER or (now >= count.rest_until and bound > 0):
            await self._renewed(count, until)
        if bound - count.waiting < jobs:
            return False
        count.passed += jobs
        return True

    def _pass(self, count: _Count, bound: int, jobs: int, now: float) -> bool:
        """Let `jobs` in if a count that goes as far as `bound` says that there is room for them."""
        room = bound - count.waiting
        if count.at == _NEVER or bound > count.bound or room < jobs:
            return False
        if now - count.at >= min(max(room / FASTEST, SOONEST_S), LATEST_S):
            self._renew(count)
        count.passed += jobs
        return True

    def _now(self) -> float:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop.time()

    async def _renewed(self, count: _Count, until: float) -> None:
        """Return when it is counted anew."""
        task = self._renew(count)
        if task is None:
            return
        done, _ = await asyncio.wait({task}, timeout=left_s(until))
        if not done:
            raise StoreUnavailable(UNANSWERED)
        task.result()

    def _renew(self, count: _Count) -> asyncio.Task[None] | None:
        """Return the count that is under way, or begin one; None when it is too soon for another."""
        loop = asyncio.get_running_loop()
        if count.task is None or count.task.done():
            if loop.time() < count.rest_until and count.at != _NEVER:
                return None
            count.task = loop.create_task(self._count(count, count.bound))
            count.task.add_done_callback(_looked_at)
        return count.task

    async def _count(self, count: _Count, bound: int) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        passed, stored = count.passed, count.stored
        try:
            counted = await self._reads.run(lambda conn: count.ask(conn, bound), began + PATIENCE_S)
        except StoreUnavailable:
            count.rest_until = loop.time() + AGAIN_S
            raise
        if bound < count.bound:
            return  # somebody asks about a higher one meanwhile: counted again
        count.counted, count.at = counted, began
        count.passed -= passed
        count.stored -= stored
        count.rest_until = loop.time() + max(AGAIN_S, REST * (loop.time() - began))


def _keep(counts: OrderedDict[K, _Count], what: K, ask: _Ask) -> _Count:
    count = counts[what] = _Count(ask)
    if len(counts) > MOST:
        counts.popitem(last=False)
    return count


async def _of_type(conn: Connection, bound: int, *, type_: str) -> int:
    return await rows.of_type(conn, type_, bound=bound)


async def _of_client(conn: Connection, bound: int, *, client: UUID) -> int:
    return await rows.of_client(conn, client, bound=bound)


def _full(message: str) -> Refused:
    return Refused("backlog_full", message, headers={"Retry-After": "1"})


def _looked_at(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()
