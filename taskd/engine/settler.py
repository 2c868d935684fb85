"""Writes verdicts, many at a time, and keeps them until they are stored.

While one statement is in flight the next batch gathers; nothing waits on a timer. A finished job is
held here through any outage of Postgres: its effect has happened, so its verdict is not given up before
it is stored or fenced.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from taskd.engine.offspring import Nursery, Parent
from taskd.errors import BadRow, Refused, StoreUnavailable
from taskd.obs.metrics import Metrics
from taskd.store import leases
from taskd.store.leases import Completion, Settlement
from taskd.store.pool import Link

MOST = 1000
"""Verdicts in one statement."""

V = TypeVar("V", Completion, Settlement)

log = logging.getLogger("taskd.engine.settler")


class Settler:
    """The verdicts that are not stored yet; one task, `run`, writes them."""

    def __init__(
        self,
        link: Link,
        node: Callable[[], int],
        metrics: Metrics,
        limited: Sequence[str],
        nursery: Nursery,
        barren: Callable[[str, Parent, Refused], None],
    ) -> None:
        """`limited` types have their running jobs counted in the database; `node` is asked for each verdict.

        `barren` is told when the jobs that a job made can't be, and settles it otherwise.
        """
        self._link = link
        self._node = node
        self._metrics = metrics
        self._limited = limited
        self._nursery = nursery
        self._barren = barren
        self._parents: deque[tuple[int, str, Parent]] = deque()
        self._completions: deque[tuple[int, str, Completion]] = deque()
        self._others: deque[tuple[int, str, Settlement]] = deque()
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._writing = 0

    @property
    def unsettled(self) -> int:
        """Verdicts that are not stored yet."""
        return len(self._completions) + len(self._others) + len(self._parents) + self._writing

    def complete(self, type_: str, completion: Completion) -> None:
        """A job completed; its claim is this node's present incarnation's."""
        self._completions.append((self._node(), type_, completion))
        self._wake.set()

    def complete_with_jobs(self, type_: str, parent: Parent) -> None:
        """A job completed that made further jobs: both are stored, or neither."""
        self._parents.append((self._node(), type_, parent))
        self._wake.set()

    def settle(self, type_: str, settlement: Settlement) -> None:
        """Any other verdict."""
        self._others.append((self._node(), type_, settlement))
        self._wake.set()

    async def settled(self) -> None:
        """Wait until everything that was handed in is stored or fenced."""
        while self.unsettled:
            self._empty.clear()
            await self._empty.wait()

    async def run(self) -> None:
        """Write verdicts for ever; ends only by cancellation, which the owner does when all is settled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._completions or self._others or self._parents:
                if self._completions:
                    await self._write(self._completions, self._complete)
                if self._others:
                    await self._write(self._others, self._settle)
                if self._parents:
                    await self._write_parent()
            self._empty.set()

    async def _write(
        self,
        queue: deque[tuple[int, str, V]],
        store: Callable[[int, Sequence[tuple[str, V]], bool], asyncio.Future[None] | object],
    ) -> None:
        node = queue[0][0]
        batch: list[tuple[str, V]] = []
        while queue and len(batch) < MOST and queue[0][0] == node:
            _, type_, verdict = queue.popleft()
            batch.append((type_, verdict))
        batch.sort(key=lambda one: one[1].id)  # two nodes that touch the same rows lock them in one order
        self._writing = len(batch)
        again = False
        try:
            while True:
                try:
                    await store(node, batch, again)  # type: ignore[misc]
                    return
                except StoreUnavailable as error:
                    if not again:
                        log.warning(
                            "verdicts wait for Postgres", extra={"jobs": len(batch), "error": str(error)}
                        )
                    again = True
                    await asyncio.sleep(max(self._link.wait_s, 0.05))
        finally:
            self._writing = 0

    async def _write_parent(self) -> None:
        node, type_, parent = self._parents.popleft()
        self._writing = 1
        try:
            while True:
                try:
                    done = await self._link.run(
                        lambda conn: self._nursery.settle(
                            conn, node=node, parent=parent, limited=self._limited
                        )
                    )
                    break
                except StoreUnavailable:
                    await asyncio.sleep(max(self._link.wait_s, 0.05))
                except BadRow as error:
                    self._barren(type_, parent, Refused(error.code, str(error)))
                    return
                except Refused as error:
                    self._barren(type_, parent, error)
                    return
            self._metrics.inc("taskd_settled_total", type_, "completed")
            if not done:
                await self._look_up(node, {parent.completion.id: parent.completion.claim})
        finally:
            self._writing = 0

    async def _complete(self, node: int, batch: Sequence[tuple[str, Completion]], again: bool) -> None:
        verdicts = [verdict for _, verdict in batch]
        try:
            done = await self._link.run(
                lambda conn: leases.settle_completed(
                    conn, node=node, verdicts=verdicts, limited=self._limited
                )
            )
        except BadRow as error:
            if len(batch) > 1:
                await self._halves(node, batch, self._complete)
                return
            # The effect happened and never runs again; only its result is lost.
            type_, verdict = batch[0]
            log.warning("result can't be stored", extra={"job_id": verdict.id, "error": str(error)})
            await self._complete(node, [(type_, verdict._replace(result=None))], again)
            return
        for type_, count in Counter(type_ for type_, _ in batch).items():
            self._metrics.inc("taskd_settled_total", type_, "completed", by=count)
        if len(done) < len(batch):
            await self._look_up(node, {one.id: one.claim for one in verdicts if one.id not in done})

    async def _settle(self, node: int, batch: Sequence[tuple[str, Settlement]], again: bool) -> None:
        verdicts = [verdict for _, verdict in batch]
        try:
            done = await self._link.run(
                lambda conn: leases.settle_others(conn, node=node, verdicts=verdicts, limited=self._limited)
            )
        except BadRow as error:
            if len(batch) > 1:
                await self._halves(node, batch, self._settle)
                return
            type_, verdict = batch[0]
            log.warning("error text can't be stored", extra={"job_id": verdict.id, "error": str(error)})
            plain = verdict._replace(result=None, error="the error text could not be stored")
            await self._settle(node, [(type_, plain)], again)
            return
        for type_, verdict in batch:
            self._metrics.inc("taskd_settled_total", type_, verdict.status or "again")
        if len(done) < len(batch):
            # A job that was put back unrun keeps no claim: there is nothing to look up, and nothing lost.
            claims = {one.id: one.claim for one in verdicts if one.id not in done and one.cause is not None}
            if claims:
                await self._look_up(node, claims)

    async def _halves(
        self,
        node: int,
        batch: Sequence[tuple[str, V]],
        store: Callable[[int, Sequence[tuple[str, V]], bool], object],
    ) -> None:
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            while True:
                try:
                    await store(node, half, True)  # type: ignore[misc]
                    break
                except StoreUnavailable:
                    await asyncio.sleep(max(self._link.wait_s, 0.05))

    async def _look_up(self, node: int, claims: dict[str, int]) -> None:
        """Tell what an earlier try has stored from what is no longer this node's to write."""
        stored = await self._link.run(lambda conn: leases.settled_by(conn, node=node, claims=claims))
        fenced = claims.keys() - stored
        if fenced:
            self._metrics.inc("taskd_fenced_total", by=len(fenced))
            log.warning("late verdicts fenced", extra={"jobs": len(fenced), "job_id": min(fenced)})
