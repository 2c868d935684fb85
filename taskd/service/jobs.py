"""What one may do with jobs: submit one or many, show one, wait for it, list one's own."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import msgspec

from taskd.errors import FieldProblem, Refused
from taskd.model.job import Job, NewJob, Receipt, new_id, new_ids
from taskd.model.state import State
from taskd.model.submit import Submit, new_job
from taskd.service.batch import Reads
from taskd.service.bulk import Bulks
from taskd.service.submitter import Submitter
from taskd.service.types import KnownTypes, Offered
from taskd.service.waiting import Waiting
from taskd.store import jobs as rows

log = logging.getLogger("taskd.service")

NO_WORKER = "no_worker"
"""The warning of a job whose type no live node serves: it waits until one comes."""
_STRETCH = 200
"""Jobs of a bulk that are looked at in one go: about a millisecond."""


class Submitted(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the client of a submit learns. `run_at` is when the job is due."""

    id: UUID
    status: State
    run_at: datetime
    duplicate: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bulk:
    """What the client of a bulk learns: for each job, in order, its id and whether it was there before."""

    ids: Sequence[UUID]
    duplicates: Sequence[bool]
    warnings: tuple[str, ...] = ()


class Jobs:
    """The jobs of clients. Holds what one API process shares between its requests."""

    def __init__(
        self,
        *,
        types: KnownTypes,
        submitter: Submitter,
        bulks: Bulks,
        reads: Reads,
        waiting: Waiting,
        now: Callable[[], datetime],
        dice: Callable[[int], bytes],
    ) -> None:
        """`now` is the wall clock in UTC, `dice(n)` gives n random bytes."""
        self.types = types
        self.waiting = waiting
        self._submitter = submitter
        self._bulks = bulks
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

        `only` are the types that the client may use, None is all; `until` is by the loop's clock. The members
        of `ask.payload` are let go once they are checked: parsed, a payload takes several times its text.

        Raises:
            Refused: `forbidden`, `unknown_type`, `not_ready`, `invalid_payload`, `invalid_field`,
                `unsupported_value`, or `conflict` when another body holds the unique key.
            StoreUnavailable: no answer until then; the job may be stored.
        """
        _check_allowed(ask.type, only)
        offered = self.types.known(ask.type)
        if offered is None or not self.types.has_room(offered):
            offered = await self.types.get(ask.type, until)
        offered.check(ask.payload)
        now = self._now()
        job_id = new_id(_ms(now), self._dice(10))
        job = new_job(ask, offered.info, payload, id=job_id, client=client, trace=trace)
        ask.payload.clear()  # its text is enough while it waits for the commit
        receipt = await self._submitter.put(job, until)
        warnings = () if offered.served else (NO_WORKER,)
        if receipt.conflict:
            raise _conflict(receipt)
        if receipt.duplicate:
            return await self._first(receipt.id, client, now, until, warnings)
        assert receipt.run_at is not None  # it was stored
        return Submitted(id=receipt.id, status=receipt.status, run_at=receipt.run_at, warnings=warnings)

    async def submit_bulk(
        self,
        asks: Sequence[Submit],
        payloads: Sequence[str],
        *,
        client: UUID,
        only: Collection[str] | None,
        until: float,
    ) -> Bulk:
        """Store the jobs that `asks` describe, all or none; `payloads` are the JSON texts of their payloads.

        Raises:
            Refused: as for `submit`; the first job that can't be stored is named, like `jobs[3].payload.to`.
            StoreUnavailable: no answer until then; the jobs may be stored.
        """
        now = self._now()
        ids = new_ids(_ms(now), self._dice(10), len(asks))
        types: dict[str, Offered] = {}
        jobs: list[NewJob] = []
        for place, (ask, payload, job_id) in enumerate(zip(asks, payloads, ids, strict=True)):
            if place % _STRETCH == _STRETCH - 1:
                await asyncio.sleep(0)  # other requests have their turn
            path = f"jobs[{place}]."
            offered = types.get(ask.type)
            if offered is None:
                _check_allowed(ask.type, only, path)
                offered = types[ask.type] = await self.types.find(ask.type, until, path)
            offered.check(ask.payload, path)
            jobs.append(new_job(ask, offered.info, payload, id=job_id, client=client, path=path))
        for name, count in Counter(ask.type for ask in asks).items():
            await self.types.admit(types[name], until, jobs=count)
        receipts = await self._bulks.put(jobs, until)
        warnings = () if all(offered.served for offered in types.values()) else (NO_WORKER,)
        if not receipts:  # no unique key decided anything
            return Bulk(ids=ids, duplicates=[False] * len(ids), warnings=warnings)
        for place, job in enumerate(jobs):
            if (receipt := receipts.get(job.id)) is not None and receipt.conflict:
                raise _conflict(receipt, f"jobs[{place}].")
        return Bulk(
            ids=[receipts[job_id].id if job_id in receipts else job_id for job_id in ids],
            duplicates=[job_id in receipts for job_id in ids],
            warnings=warnings,
        )

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
        await self.types.awake(until)  # `secrets` must be those of now
        return await self._reads.run(
            lambda conn: rows.list_(conn, client=client, only=only, before=before, limit=limit), until
        )

    def secrets(self, type_: str) -> tuple[str, ...]:
        """Return the payload members of a type that lists mask."""
        return self.types.secrets(type_)

    async def _first(
        self, job_id: UUID, client: UUID, now: datetime, until: float, warnings: tuple[str, ...]
    ) -> Submitted:
        """Return what a second submit with a unique key learns of the first one's job."""
        job = await self._reads.run(lambda conn: rows.get(conn, job_id, client=client), until)
        if job is None:  # erased between the two statements
            return Submitted(id=job_id, status=State.PENDING, run_at=now, duplicate=True, warnings=warnings)
        return Submitted(id=job_id, status=job.status, run_at=job.run_at, duplicate=True, warnings=warnings)


def _ms(now: datetime) -> int:
    return int(now.timestamp() * 1000)


def _check_allowed(type_: str, only: Collection[str] | None, path: str = "") -> None:
    if only is not None and type_ not in only:
        raise Refused.field("forbidden", f"{path}type", "is not one of the types that this key may use")


def _conflict(receipt: Receipt, path: str = "") -> Refused:
    return Refused(
        "conflict",
        f"{path}unique_key: another job with this key was submitted with another body: {receipt.id}",
        fields=[FieldProblem(f"{path}unique_key", "is held by a job with another body")],
        extra={"job_id": str(receipt.id)},
    )
