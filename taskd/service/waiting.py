"""Those who wait for the end of a job: one statement looks for all of them at once.

Polling, and no NOTIFY for each job: what it costs does not grow with the jobs that finish, only with how
often is looked, and that slows down the longer everybody has waited.
"""

from __future__ import annotations

import asyncio
from functools import partial
from uuid import UUID

from taskd.errors import StoreUnavailable
from taskd.service.batch import Reads
from taskd.store import jobs as rows

MOST = 1024
"""Waiters at once in one process; a further one is not held back, its answer comes at once."""


class Waiting:
    """The waiters of this process by job. Owned by one event loop; looks only while somebody waits."""

    def __init__(self, reads: Reads, *, most: int = MOST) -> None:
        self._reads = reads
        self._most = most
        self._waiters: dict[UUID, set[asyncio.Future[None]]] = {}
        self._count = 0
        self._newest = 0.0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    async def wait(self, job_id: UUID, wait_s: float) -> None:
        """Return when the job is finished or gone, or `wait_s` is over, or `end` was called."""
        if self._ended or wait_s <= 0 or self._count >= self._most:
            return
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.setdefault(job_id, set()).add(waiter)
        self._count += 1
        self._newest = loop.time()
        self._changed.set()
        if self._task is None:
            self._task = loop.create_task(self._look())
        timer = loop.call_later(wait_s, _release, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._count -= 1
            waiters = self._waiters.get(job_id)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._waiters[job_id]

    def end(self) -> None:
        """Let all waiters go, and further ones not wait: the process drains."""
        self._ended = True
        for waiters in list(self._waiters.values()):
            for waiter in waiters:
                _release(waiter)

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiters:
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), self._pause_s(loop.time()))
                    await asyncio.sleep(_FIRST_S)  # what comes together is looked for together
                except TimeoutError:
                    pass
                asked = list(self._waiters)
                if not asked:
                    break
                try:
                    states = await self._reads.run(partial(rows.statuses, job_ids=asked), loop.time() + 5.0)
                except StoreUnavailable:
                    await asyncio.sleep(_LAST_S)
                    continue
                for job_id in asked:
                    state = states.get(str(job_id))
                    if state is None or state.final:
                        for waiter in self._waiters.get(job_id, ()):
                            _release(waiter)
        finally:
            self._task = None

    def _pause_s(self, now: float) -> float:
        """Return how long to the next look: a tenth of what the newest waiter has waited, within bounds."""
        return min(max((now - self._newest) / 10, _FIRST_S), _LAST_S)


_FIRST_S = 0.02
_LAST_S = 0.25


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
