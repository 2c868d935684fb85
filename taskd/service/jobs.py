"""What one may do with jobs: submit one, show it, wait for it, list one's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from taskd.errors import FieldProblem, Refused
from taskd.model.job import Job, NewJob, new_id
from taskd.model.state import State
from taskd.model.submit import Submit
from taskd.service.batch import Reads
from taskd.service.submitter import Submitter
from taskd.service.types import KnownTypes, Offered
from taskd.service.waiting import Waiting
from taskd.store import jobs as rows

log = logging.getLogger("taskd.service")

NO_WORKER = "no_worker"
"""The warning of a job whose type no live node serves: it waits until one comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What the client of a submit learns. `run_at` is when the job is due."""

    id: UUID
    status: State
    run_at: datetime
    duplicate: bool = False
    warnings: tuple[str, ...] = ()


class Jobs:
    """The jobs of clients. Holds what one API process shares between its requests."""

    def __init__(
        self,
        *,
        types: KnownTypes,
        submitter: Submitter,
        reads: Reads,
        waiting: Waiting,
        now: Callable[[], datetime],
        dice: Callable[[int], bytes],
    ) -> None:
        """`now` is the wall clock in UTC, `dice(n)` gives n random bytes."""
        self.types = types
        self.waiting = waiting
        self._submitter = submitter
        self._reads = reads
        self._now = now
        self._dice = dice

    async def submit(
        self,
        ask: Submit,
        payload: str,
        *,
        client: UUID,
        only: Collection[str] | None,
        until: float,
        trace: str | None = None,
    ) -> Submitted:
        """Store the job that `ask` describes; `payload` is the JSON text of its payload.

        `only` are the types that the client may use, None is all; `until` is by the loop's clock.

        Raises:
            Refused: `forbidden`, `unknown_type`, `not_ready`, `invalid_payload`, `invalid_field`,
                `unsupported_value`, or `conflict` when another body holds the unique key.
            StoreUnavailable: no answer until then; the job may be stored.
        """
        if only is not None and ask.type not in only:
            raise Refused.field("forbidden", "type", "is not one of the types that this key may use")
        offered = await self.types.get(ask.type, until)
        offered.check(ask.payload)
        now = self._now()
        job = self._new(ask, payload, offered, client, now, trace)
        receipt = await self._submitter.put(job, until)
        warnings = () if offered.served else (NO_WORKER,)
        if receipt.conflict:
            raise Refused(
                "conflict",
                f"unique_key: another job with this key was submitted with another body: {receipt.id}",
                fields=[FieldProblem("unique_key", "is held by a job with another body")],
                extra={"job_id": str(receipt.id)},
            )
        if receipt.duplicate:
            return await self._first(receipt.id, client, now, until, warnings)
        run_at = _due(ask, now)
        status = State.SCHEDULED if run_at > now else State.PENDING
        return Submitted(id=receipt.id, status=status, run_at=run_at, warnings=warnings)

    async def show(self, job_id: UUID, *, client: UUID, only: Collection[str] | None, until: float) -> Job:
        """Return a job of `client` with its history.

        Raises:
            Refused: `not_found`, also for the job of another client and for a type that is not in `only`.
            StoreUnavailable: no answer until `until`.
        """
        job = await self._reads.run(lambda conn: rows.get(conn, job_id, client=client), until)
        if job is None or (only is not None and job.type not in only):
            raise Refused("not_found", "there is no such job")
        return job

    async def list_(
        self, *, client: UUID, only: rows.Filter, before: UUID, limit: int, until: float
    ) -> rows.Page:
        """Return up to `limit` jobs of `client` older than `before`, newest first.

        Raises:
            StoreUnavailable: no answer until `until`.
        """
        return await self._reads.run(
            lambda conn: rows.list_(conn, client=client, only=only, before=before, limit=limit), until
        )

    def secrets(self, type_: str) -> tuple[str, ...]:
        """Return the payload members of a type that lists mask."""
        return self.types.secrets(type_)

    def _new(
        self, ask: Submit, payload: str, offered: Offered, client: UUID, now: datetime, trace: str | None
    ) -> NewJob:
        info = offered.info
        if ask.timeout_s is not None and ask.timeout_s > info.timeout:
            raise Refused.field(
                "invalid_field", "timeout", f"must be at most {info.timeout:g}, that of the type"
            )
        return NewJob(
            id=new_id(int(now.timestamp() * 1000), self._dice(10)),
            client=client,
            type=ask.type,
            payload=payload,
            priority=info.priority if ask.priority is None else ask.priority,
            run_at=ask.run_at,
            delay_s=ask.delay_s,
            max_attempts=info.retry.max_attempts if ask.max_attempts is None else ask.max_attempts,
            timeout_s=ask.timeout_s,
            expires_in_s=ask.expires_in_s,
            unique_key=ask.unique_key,
            unique_while=ask.unique_while,
            body_hash=ask.body_hash,
            tags=ask.tags,
            meta=ask.meta,
            trace=trace,
        )

    async def _first(
        self, job_id: UUID, client: UUID, now: datetime, until: float, warnings: tuple[str, ...]
    ) -> Submitted:
        """Return what a second submit with a unique key learns of the first one's job."""
        job = await self._reads.run(lambda conn: rows.get(conn, job_id, client=client), until)
        if job is None:  # erased between the two statements
            return Submitted(id=job_id, status=State.PENDING, run_at=now, duplicate=True, warnings=warnings)
        return Submitted(id=job_id, status=job.status, run_at=job.run_at, duplicate=True, warnings=warnings)


def _due(ask: Submit, now: datetime) -> datetime:
    if ask.run_at is not None:
        return max(ask.run_at, now)
    return now + timedelta(milliseconds=round(ask.delay_s * 1000)) if ask.delay_s else now
