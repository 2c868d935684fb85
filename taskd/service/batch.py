"""Natural batching: while one statement is in flight, the next batch gathers. Nothing waits on a timer.

Many requests share one statement, so a request costs a fraction of a round trip and of a commit. Each
asker has a moment until which it waits; a statement that takes longer goes on for the others, and is
never cancelled (FACTS M13).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from taskd.errors import OutcomeUnknown, SchemaMismatch, StoreUnavailable
from taskd.store.pool import Connection, Link

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")

LOOK_S = 0.1
"""How often is looked for askers whose time is over, in seconds: they are told at most this much late."""

UNANSWERED = "Postgres did not answer in time; the outcome is unknown"


class Ticket(Generic[Q, A]):
    """One question that waits for its answer until `until`, by the loop's clock. Owned by its `Batches`."""

    __slots__ = ("answer", "question", "tries", "until")

    def __init__(self, question: Q, until: float, answer: asyncio.Future[A]) -> None:
        self.question = question
        self.until = until
        self.answer = answer
        self.tries = 0

    def tell(self, answer: A) -> None:
        """Answer it, unless its asker has gone."""
        if not self.answer.done():
            self.answer.set_result(answer)

    def refuse(self, error: Exception) -> None:
        """Answer it with an error, unless its asker has gone."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Batches(Generic[Q, A]):
    """Gathers questions and hands them to `work`, one batch at a time for each link.

    `work` answers every ticket of its batch; what it leaves open, or all when it raises, is refused.
    """

    def __init__(
        self,
        links: Sequence[Link],
        work: Callable[[Link, list[Ticket[Q, A]]], Awaitable[None]],
        *,
        most: int = 500,
        weigh: Callable[[Q], int] = lambda question: 0,
        most_weight: int = 0,
    ) -> None:
        """A batch holds at most `most` questions, and no more once they weigh `most_weight` together."""
        self._weigh = weigh
        self._most_weight = most_weight
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = list(links)
        self._work = work
        self._most = most
        self._waiting: deque[Ticket[Q, A]] = deque()
        self._open: deque[Ticket[Q, A]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None

    def ask(self, question: Q, until: float) -> asyncio.Future[A]:
        """Return the answer to come; it raises `StoreUnavailable` when there was none until `until`."""
        loop = self._loop
        if loop is None:  # asking for it costs a system call each time
            loop = self._loop = asyncio.get_running_loop()
        ticket: Ticket[Q, A] = Ticket(question, until, loop.create_future())
        self._waiting.append(ticket)
        self._open.append(ticket)
        if self._idle:
            task = loop.create_task(self._serve(self._idle.pop()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._look is None:
            self._look = loop.call_later(LOOK_S, self._look_for_late)
        return ticket.answer

    async def _serve(self, link: Link) -> None:
        try:
            while self._waiting:
                batch: list[Ticket[Q, A]] = []
                weight = 0
                while self._waiting and len(batch) < self._most and weight <= self._most_weight:
                    ticket = self._waiting.popleft()
                    if not ticket.answer.done():  # its asker has gone
                        batch.append(ticket)
                        weight += self._weigh(ticket.question)
                if batch:
                    await self._answer(link, batch)
        finally:
            self._idle.append(link)

    async def _answer(self, link: Link, batch: list[Ticket[Q, A]]) -> None:
        try:
            await self._work(link, batch)
        except Exception as error:  # an edge: a defect must reach the askers, not end the batching
            for ticket in batch:
                ticket.refuse(error)
        for ticket in batch:
            ticket.refuse(StoreUnavailable(UNANSWERED))

    def _look_for_late(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        still: deque[Ticket[Q, A]] = deque()
        for ticket in self._open:
            if not ticket.answer.done() and ticket.until <= now:
                ticket.refuse(StoreUnavailable(UNANSWERED))
            if not ticket.answer.done():
                still.append(ticket)
        self._open = still
        self._look = loop.call_later(LOOK_S, self._look_for_late) if still else None


class Reads:
    """Single statements on one link, each tried again while its time lasts. For what may run twice."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, work: Callable[[Connection], Awaitable[T]], until: float) -> T:
        """Return what `work` returns; it runs in a task of its own, which outlives a cancelled caller.

        Raises:
            StoreUnavailable: no answer until `until`, by the loop's clock.
        """
        return await self._finish(self._tries(work, until), until)

    async def once(self, work: Callable[[Connection], Awaitable[T]], until: float) -> T:
        """The same for what must not be sent twice: tried again only while nothing could be sent."""
        return await self._finish(self._tries(work, until, again=False), until)

    async def _finish(self, tries: Coroutine[Any, Any, T], until: float) -> T:
        task = asyncio.get_running_loop().create_task(tries)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        done, _ = await asyncio.wait({task}, timeout=left_s(until))
        if not done:
            raise StoreUnavailable(UNANSWERED)
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, also when its asker has gone

    async def _tries(
        self, work: Callable[[Connection], Awaitable[T]], until: float, *, again: bool = True
    ) -> T:
        tries = 0
        while True:
            await until_ready(self.link, until)
            tries += 1
            try:
                return await self.link.run(work, deadline_s=max(0.05, left_s(until)))
            except (OutcomeUnknown, SchemaMismatch):
                raise
            except StoreUnavailable as error:
                if not again:
                    raise
                await pause(self.link, tries, until, error)


def left_s(until: float) -> float:
    """Return the seconds from now to `until`, by the loop's clock; never below 0."""
    return max(0.0, until - asyncio.get_running_loop().time())


async def pause(link: Link, tries: int, until: float, error: StoreUnavailable) -> None:
    """Wait before what failed with `error` for the `tries`-th time is sent again.

    A connection that broke has its own pace (`until_ready`). One that holds answered with an error that
    passes by itself: 0.05 s, then twice as long each time, up to 1 s.

    Raises:
        StoreUnavailable: `error` itself, when there is no time left for another try.
    """
    wait_s = min(0.05 * 2.0 ** min(tries - 1, 10), 1.0) if link.connected else link.wait_s
    if wait_s >= left_s(until):
        raise error
    await asyncio.sleep(wait_s)


async def until_ready(link: Link, until: float) -> None:
    """Wait while `link` would refuse at once because its next connect is not due.

    Raises:
        StoreUnavailable: it is not due before `until`.
    """
    while (wait_s := link.wait_s) > 0 and not link.connected:
        if wait_s >= left_s(until):
            raise StoreUnavailable("Postgres is not reachable")
        await asyncio.sleep(wait_s)
