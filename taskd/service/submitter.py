"""Stores jobs: many requests share one INSERT and one commit, and none is answered before it.

A request whose answer was lost is sent again with the same ids, so that it can't be stored twice: what
the first try stored is found by its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from operator import attrgetter
from uuid import UUID

from taskd.errors import BadRow, OutcomeUnknown, Refused, SchemaMismatch, StoreUnavailable
from taskd.model.job import NewJob, Receipt
from taskd.model.state import State
from taskd.service.batch import Batches, Ticket, pause, until_ready
from taskd.store import jobs as rows
from taskd.store.listen import channel
from taskd.store.pool import Link
from taskd.store.submit import existing

Lane = tuple[str, int]
Stored = Callable[[Sequence[NewJob]], None]

MOST = 500
"""Jobs in one statement: larger ones take no more a second, and their askers wait longer."""

MOST_BYTES = 1 << 20
"""Payload in one statement, about: it is copied some times on its way, and large ones gain nothing."""

SOON_S = 1.0
"""A job that is due sooner than this is due before the next poll of a node, which has to know when."""

EXISTS = "23505"
"""A unique index has the row already; of those that an insert meets, only that of the ids tells so."""

_by_id = attrgetter("question.id.int")


def _length(job: NewJob) -> int:
    return len(job.payload)


JobTicket = Ticket[NewJob, Receipt]


class Submitter:
    """The one way into the table of jobs of this process. `stored` hears of each batch after its commit."""

    def __init__(
        self, links: Sequence[Link], *, stored: Stored = lambda jobs: None, most: int = MOST
    ) -> None:
        """One statement is in flight for each of `links`."""
        self._stored = stored
        self._batches: Batches[NewJob, Receipt] = Batches(
            links, self._store, most=most, weigh=_length, most_weight=MOST_BYTES
        )

    def put(self, job: NewJob, until: float) -> asyncio.Future[Receipt]:
        """Return the receipt to come, for when the commit that stored `job` was reported.

        Or when another job holds its unique key. `until` is by the loop's clock.

        Raises:
            StoreUnavailable: no such report until then; the job may be stored.
            OutcomeUnknown: stored, but its replication was given up.
            Refused: `unsupported_value`, Postgres refused this row for its content.
        """
        return self._batches.ask(job, until)

    async def _store(self, link: Link, batch: list[JobTicket]) -> None:
        batch.sort(key=_by_id)  # rows of concurrent statements in one order: no deadlocks
        while batch:
            until = max(ticket.until for ticket in batch)
            try:
                await until_ready(link, until)
                batch = await self._try(link, batch, until)
            except (OutcomeUnknown, SchemaMismatch) as error:
                for ticket in batch:
                    ticket.refuse(error)
                return
            except StoreUnavailable as error:
                batch = [ticket for ticket in batch if not ticket.answer.done()]
                if not batch:
                    return
                try:
                    await pause(link, max(ticket.tries for ticket in batch), until, error)
                except StoreUnavailable:
                    for ticket in batch:
                        ticket.refuse(error)
                    return

    async def _try(self, link: Link, batch: list[JobTicket], until: float) -> list[JobTicket]:
        """Send `batch` once, answer what is decided by it, and return what must be sent again."""
        jobs = [ticket.question for ticket in batch]
        again = any(ticket.tries for ticket in batch)
        for ticket in batch:
            ticket.tries += 1
        deadline_s = max(0.05, until - asyncio.get_running_loop().time())
        try:
            receipts = await link.run(lambda conn: rows.insert(conn, jobs), deadline_s=deadline_s)
        except BadRow as error:
            if (
                again
                and error.sqlstate == EXISTS
                and (rest := await self._found(link, batch, deadline_s)) != batch
            ):
                return rest
            await self._bisect(link, batch, until, error)
            return []
        own = [ticket for ticket in batch if _is_own(receipts, ticket.question.id)] if receipts else []
        if own:  # a first try has stored them, and its answer was lost
            await self._found(link, own, deadline_s)
            batch = [ticket for ticket in batch if not _is_own(receipts, ticket.question.id)]
        return self._tell(batch, receipts)

    def _tell(self, batch: list[JobTicket], receipts: rows.Stored) -> list[JobTicket]:
        stored = [ticket.question for ticket in batch if not receipts or ticket.question.id not in receipts]
        if stored:  # before anybody is answered: a hint is on its way while the answers are written
            self._stored(stored)
        again: list[JobTicket] = []
        for ticket in batch:
            job = ticket.question
            receipt = receipts.get(job.id) if receipts else None
            if receipt is None:
                ticket.tell(_receipt(job, receipts.at))
            elif receipt.error is not None:
                again.append(ticket)  # the holder of its unique key has ended just now: the key is free
            else:
                ticket.tell(receipt)
        return again

    async def _found(self, link: Link, batch: list[JobTicket], deadline_s: float) -> list[JobTicket]:
        """Answer those that an earlier try has stored and return the others."""
        ids = [ticket.question.id for ticket in batch]
        there = await link.run(lambda conn: existing(conn, ids), deadline_s=deadline_s)
        found = [ticket.question for ticket in batch if ticket.question.id in there]
        for ticket in batch:
            if ticket.question.id in there:
                ticket.tell(_receipt(ticket.question, there[ticket.question.id]))
        if found:
            self._stored(found)
        return [ticket for ticket in batch if ticket.question.id not in there] if found else batch

    async def _bisect(self, link: Link, batch: list[JobTicket], until: float, error: BadRow) -> None:
        """Find the rows that Postgres refuses; the others are stored without them."""
        if len(batch) == 1:
            batch[0].refuse(Refused("unsupported_value", f"the job can't be stored: {error}"))
            return
        middle = len(batch) // 2
        await self._store(link, batch[:middle])
        await self._store(link, batch[middle:])


def _receipt(job: NewJob, at: datetime) -> Receipt:
    """Return what a job became that was stored at `at`, by the database clock."""
    run_at = rows.due(job, at)
    return Receipt(id=job.id, status=State.SCHEDULED if run_at > at else State.PENDING, run_at=run_at)


def _is_own(receipts: rows.Stored, job_id: UUID) -> bool:
    receipt = receipts.get(job_id)
    return receipt is not None and receipt.id == job_id and receipt.error is None


class Hints:
    """Tells nodes which lanes have new jobs: the first at once, then at most once a lane in `every_s`.

    Off the submit path and on another connection, because NOTIFY takes one lock for the whole server at
    commit (FACTS M10). Polling is the promise: a hint that can't be sent is dropped.
    """

    def __init__(self, link: Link, *, every_s: float = 0.01) -> None:
        self._link = link
        self._every_s = every_s
        self._next: dict[Lane, float] = {}
        self._waiting: set[Lane] = set()
        self._task: asyncio.Task[None] | None = None

    def tell(self, jobs: Sequence[NewJob]) -> None:
        """Hint at the lanes of those of `jobs` that are due now or before the next poll of a node."""
        for job in jobs:
            # `run_at` is compared with the clock of this host: what is wrong with that costs a poll at most.
            if job.run_at is None:
                wait_s = job.delay_s or 0.0
            else:
                wait_s = (job.run_at - datetime.now(UTC)).total_seconds()
            if wait_s < SOON_S:
                self._waiting.add((job.type, job.priority))
        if self._waiting and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._waiting:
                now = asyncio.get_running_loop().time()
                due = {lane for lane in self._waiting if self._next.get(lane, 0.0) <= now}
                if not due:
                    await asyncio.sleep(min(self._next[lane] for lane in self._waiting) - now)
                    continue
                self._waiting -= due
                self._next.update(dict.fromkeys(due, now + self._every_s))
                await self._link.run(partial(rows.notify, channel=channel(), lanes=due))
        except StoreUnavailable:
            self._waiting.clear()
        finally:
            self._task = None
