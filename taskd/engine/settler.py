"""Writes verdicts, many at a time, and keeps them until they are stored.

While one statement is in flight the next batch gathers; nothing waits on a timer. A finished job is
held here through any outage of Postgres: its effect has happened, so its verdict is not given up before
it is stored or fenced.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from taskd.engine.offspring import Nursery, Parent
from taskd.errors import BadRow, Refused, StoreUnavailable
from taskd.obs.metrics import Metrics
from taskd.store import leases
from taskd.store.leases import Completion, Settlement
from taskd.store.pool import Link

MOST = 1000
"""Verdicts in one statement."""

_UNSTORABLE = "the error text could not be stored"

V = TypeVar("V", Completion, Settlement)

log = logging.getLogger("taskd.engine.settler")


class Settler:
    """The verdicts that are not stored yet; one task, `run`, writes them."""

    def __init__(
        self,
        link: Link,
        node: Callable[[], int],
        metrics: Metrics,
        nursery: Nursery,
        barren: Callable[[str, Parent, Refused], None],
        *,
        bounded: Collection[str] = (),
        freed: Callable[[], None] = lambda: None,
    ) -> None:
        """`node` is asked for each verdict.

        `barren` is told when the jobs that a job made can't be, and settles it otherwise. `freed` is
        called when runs of `bounded` types were written: others of them may start now.
        """
        self._link = link
        self._node = node
        self._metrics = metrics
        self._bounded = frozenset(bounded)
        self._freed = freed
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
                        lambda conn: self._nursery.settle(conn, node=node, parent=parent)
                    )
                    claim = {} if done else {parent.completion.id: parent.completion.claim}
                    if done or await self._look_up(node, claim):
                        self._settled({(type_, "completed"): 1})
                    return
                except StoreUnavailable:
                    await asyncio.sleep(max(self._link.wait_s, 0.05))
                except BadRow as error:
                    self._barren(type_, parent, Refused(error.code, str(error)))
                    return
                except Refused as error:
                    self._barren(type_, parent, error)
                    return
        finally:
            self._writing = 0

    def _settled(self, counts: Mapping[tuple[str, str], int]) -> None:
        for (type_, status), count in counts.items():
            self._metrics.inc("taskd_settled_total", type_, status, by=count)
        if self._bounded and any(type_ in self._bounded for type_, _ in counts):
            self._freed()

    async def _complete(self, node: int, batch: Sequence[tuple[str, Completion]], again: bool) -> None:
        verdicts = [verdict for _, verdict in batch]
        try:
            done = await self._link.run(
                lambda conn: leases.settle_completed(conn, node=node, verdicts=verdicts)
            )
        except BadRow as error:
            if len(batch) > 1:
                await self._halves(node, batch, self._complete)
                return
            # The effect happened and never runs again; only its result is lost.
            type_, verdict = batch[0]
            if verdict.result is None:
                self._give_up(verdict, error)
                return
            log.warning("result can't be stored", extra={"job_id": verdict.id, "error": str(error)})
            await self._complete(node, [(type_, verdict._replace(result=None))], again)
            return
        if len(done) < len(batch):
            done |= await self._look_up(node, {one.id: one.claim for one in verdicts if one.id not in done})
        self._settled(Counter((type_, "completed") for type_, one in batch if one.id in done))

    async def _settle(self, node: int, batch: Sequence[tuple[str, Settlement]], again: bool) -> None:
        verdicts = [verdict for _, verdict in batch]
        try:
            done = await self._link.run(lambda conn: leases.settle_others(conn, node=node, verdicts=verdicts))
        except BadRow as error:
            if len(batch) > 1:
                await self._halves(node, batch, self._settle)
                return
            type_, verdict = batch[0]
            if verdict.error == _UNSTORABLE:
                self._give_up(verdict, error)
                return
            log.warning("verdict can't be stored as it is", extra={"job_id": verdict.id, "error": str(error)})
            # Whatever a job's process may have said of itself goes; what the verdict is stays.
            plain = verdict._replace(
                result=None, error=_UNSTORABLE, exit_code=None, signal=None, cpu_s=None, max_rss=None
            )
            await self._settle(node, [(type_, plain)], again)
            return
        if len(done) < len(batch):
            # A job that was put back unrun keeps no claim: there is nothing to look up, and nothing lost.
            claims = {one.id: one.claim for one in verdicts if one.id not in done and one.cause is not None}
            if claims:
                done |= await self._look_up(node, claims)
        self._settled(Counter((type_, one.status or "again") for type_, one in batch if one.id in done))

    def _give_up(self, verdict: Completion | Settlement, error: BadRow) -> None:
        # Kept, it would hold up all others; the job is rescued when this node ends.
        log.error("verdict can't be stored at all", extra={"job_id": verdict.id, "error": str(error)})

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

    async def _look_up(self, node: int, claims: dict[str, int]) -> set[str]:
        """Return what an earlier try has stored; the rest is no longer this node's to write."""
        stored = await self._link.run(lambda conn: leases.settled_by(conn, node=node, claims=claims))
        fenced = claims.keys() - stored
        if fenced:
            self._metrics.inc("taskd_fenced_total", by=len(fenced))
            log.warning("late verdicts fenced", extra={"jobs": len(fenced), "job_id": min(fenced)})
        return stored
