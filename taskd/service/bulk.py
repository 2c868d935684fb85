"""Stores many jobs of one request: all of them or none, in one statement of its own.

As in `taskd.service.submitter` nothing is answered before its commit, and what is sent again has the same
ids: when the first try was stored and its answer lost, the second one finds its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from uuid import UUID

from taskd.errors import BadRow, Refused, StoreUnavailable
from taskd.model.job import NewJob, Receipt
from taskd.service.batch import Reads
from taskd.service.submitter import EXISTS, Stored
from taskd.store import jobs as rows
from taskd.store.pool import Connection, Link
from taskd.store.submit import existing

_TIMES = 10
"""How often a bulk is sent because the holder of a unique key ended just then."""


class Bulks:
    """The way of bulks into the table of jobs. `stored` hears of each after its commit."""

    def __init__(self, links: Sequence[Link], *, stored: Stored = lambda jobs: None) -> None:
        """Bulks take turns on `links`, and each waits there for what is in flight."""
        self._stored = stored
        self._links = cycle([Reads(link) for link in links])

    async def put(self, jobs: Sequence[NewJob], until: float) -> dict[UUID, Receipt]:
        """Return, when the commit was reported, a receipt for each job that a unique key decided.

        A job without a receipt was stored. If one receipt tells of a conflict, nothing was.

        Raises:
            StoreUnavailable: no such report until `until`, by the loop's clock; they may be stored.
            OutcomeUnknown: stored, but its replication was given up.
            Refused: `unsupported_value`, Postgres refused a row for its content.
        """
        return await next(self._links).run(_Bulk(jobs, self._stored).store, until)


class _Bulk:
    """One bulk on its way; `store` is called until it returns or its time is over."""

    def __init__(self, jobs: Sequence[NewJob], stored: Stored) -> None:
        self._jobs = jobs
        self._stored = stored
        self._sent = False

    async def store(self, conn: Connection) -> dict[UUID, Receipt]:
        again, self._sent = self._sent, True
        jobs = self._jobs
        for _ in range(_TIMES):
            try:
                receipts = await rows.insert_all(conn, jobs)
            except BadRow as error:
                there = await existing(conn, (job.id for job in jobs)) if _may_be_there(error, again) else {}
                if not there:
                    raise Refused("unsupported_value", f"a job can't be stored: {error}") from error
                jobs = [job for job in jobs if job.id not in there]  # duplicates of other jobs, if any
                if jobs:
                    continue
                receipts = rows.Stored()
            if any(receipt.error for receipt in receipts.values()):
                continue  # a holder has ended just now: its key is free
            decided = {own: receipt for own, receipt in receipts.items() if receipt.id != own}
            if not any(receipt.conflict for receipt in decided.values()):
                self._stored([job for job in self._jobs if job.id not in decided] if decided else self._jobs)
            return decided
        raise StoreUnavailable("the holders of a unique key end faster than they can be seen")


def _may_be_there(error: BadRow, again: bool) -> bool:
    return again and error.sqlstate == EXISTS
