"""Jobs that a job made with `ctx.submit()`: stored in the transaction of its completion, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from taskd.errors import Refused, StoreUnavailable
from taskd.model import payload
from taskd.model.job import NewJob, new_id
from taskd.model.jobtype import TypeInfo
from taskd.model.submit import new_job, read_submit
from taskd.store import jobs, leases, types
from taskd.store.leases import Claimed, Completion
from taskd.store.pool import Connection


@dataclass(frozen=True, slots=True)
class Parent:
    """A completion with what it brings along: submit bodies as JSON text, for its own client."""

    completion: Completion
    job: Claimed
    bodies: Sequence[bytes]


class Nursery:
    """Makes jobs of submit bodies; the defaults come from this node's types, else from the published ones."""

    def __init__(
        self, infos: Mapping[str, TypeInfo], *, now: Callable[[], datetime], dice: Callable[[int], bytes]
    ) -> None:
        self._infos = infos
        self._now = now
        self._dice = dice

    async def settle(self, conn: Connection, *, node: int, parent: Parent) -> bool:
        """Store the completion and its jobs in one transaction; False when the claim is over.

        Raises:
            Refused: a job can't be made (unknown type, a timeout longer than its type's, a unique key that
                another body holds); nothing was stored, and the run has failed.
            StoreUnavailable: no answer came, or the holder of a unique key ended just now: to be tried again.
        """
        made = await self._make(conn, parent)
        async with conn.transaction():
            done = await leases.settle_completed(conn, node=node, verdicts=[parent.completion])
            if done:
                _all_held(made, await jobs.insert(conn, made))
        return bool(done)

    async def _make(self, conn: Connection, parent: Parent) -> list[NewJob]:
        now = self._now()
        client = UUID(parent.job.client)
        published: dict[str, TypeInfo] | None = None
        made = []
        for body in parent.bodies:
            members = payload.parse(body)
            ask = read_submit(members, now=now)
            info = self._infos.get(ask.type)
            if info is None:
                if published is None:
                    published = {
                        one.info.name: one.info for one in await types.known(conn) if not one.retired
                    }
                info = published.get(ask.type)
            if info is None:
                raise Refused.field(
                    "unknown_type", "type", f"no node has ever served the job type {ask.type}"
                )
            text = payload.payload_text(body, members["payload"])
            job_id = new_id(int(now.timestamp() * 1000), self._dice(10))
            made.append(new_job(ask, info, text, id=job_id, client=client))
        return made


def _all_held(made: Sequence[NewJob], stored: jobs.Stored) -> None:
    """Raise unless each of `made` is stored, by itself or as the same job under its unique key before."""
    for index, job in enumerate(made):
        receipt = stored.get(job.id)
        if receipt is None or receipt.duplicate:
            continue
        if receipt.error:
            raise StoreUnavailable(receipt.error)
        text = f"unique_key {job.unique_key!r} is held by job {receipt.id}, whose body is another"
        raise Refused("conflict", f"submit {index + 1} of {len(made)}: {text}")
