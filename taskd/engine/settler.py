"""Writes verdicts, many at a time, and keeps them until they are stored.

While one statement is in flight the next batch gathers; nothing waits on a timer. A finished job is
held here through any outage of Postgres: its effect has happened, so its verdict is not given up before
it is stored or fenced.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from taskd.engine.offspring import Nursery, Parent
from taskd.engine.patience import Patience
from taskd.errors import BadRow, Refused, StoreUnavailable, Unforeseen
from taskd.obs.metrics import Metrics
from taskd.store import leases
from taskd.store.leases import Completion, Settlement
from taskd.store.pool import Link

MOST = 1000
"""Verdicts in one statement."""

AGAIN_S, LONGEST_S = 1.0, 60.0
"""How soon a verdict that can't be stored is tried again at first, and how seldom at last."""

SOON_MS = 1000
"""A job that waits again for less than this is due before the claimer's next poll."""

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
        written: Callable[[], None] = lambda: None,
        dice: random.Random | None = None,
    ) -> None:
        """`node` is asked for each verdict.

        `barren` is told when the jobs that a job made can't be, and settles it otherwise. `freed` is
        called when runs of `bounded` types were written, for others of them may start now, and when
        jobs were that wait for less than a poll. `written` is called after every batch: a node that
        holds all that it may goes on claiming then.
        """
        self._link = link
        self._node = node
        self._metrics = metrics
        self._bounded = frozenset(bounded)
        self._freed = freed
        self._written = written
        self._nursery = nursery
        self._barren = barren
        self._parents: deque[tuple[int, str, Parent]] = deque()
        self._completions: deque[tuple[int, str, Completion]] = deque()
        self._others: deque[tuple[int, str, Settlement]] = deque()
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._writing = 0
        self._patience = Patience(log, "verdicts wait for Postgres", link, dice or random.Random())
        self._refused = Patience(
            log, "verdict can't be stored at all", link, dice or random.Random(), level=logging.ERROR
        )
        self._aside: list[tuple[tuple[str, int], Callable[[], None]]] = []
        """Job and claim of a verdict that could not be stored, not even alone, and what hands it in again."""
        self._in_hand: Sequence[Completion | Settlement] = ()
        """Those that are being written."""
        self._aside_s = AGAIN_S
        self._aside_timer: asyncio.TimerHandle | None = None

    @property
    def unsettled(self) -> int:
        """Verdicts that are not stored yet, but for those set aside."""
        return len(self._completions) + len(self._others) + len(self._parents) + self._writing

    @property
    def aside(self) -> int:
        """Verdicts that Postgres refused even alone; they are tried again, ever more seldom."""
        return len(self._aside)

    @property
    def claims(self) -> set[tuple[str, int]]:
        """Job and claim of all verdicts that are not stored yet."""
        waiting: list[Completion | Settlement] = [
            verdict for queue in (self._completions, self._others) for _, _, verdict in queue
        ]
        waiting += [parent.completion for _, _, parent in self._parents]
        return {(one.id, one.claim) for one in (*waiting, *self._in_hand)} | {key for key, _ in self._aside}

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
            if not self._aside:
                self._aside_s = AGAIN_S
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
        self._writing, self._in_hand = len(batch), [verdict for _, verdict in batch]
        again = False
        try:
            while True:
                try:
                    await store(node, batch, again)  # type: ignore[misc]
                    self._patience.fine()
                    return
                except (StoreUnavailable, BadRow, Unforeseen) as error:
                    again = True
                    await asyncio.sleep(self._patience.failed(error, jobs=len(batch)))
        finally:
            self._writing, self._in_hand = 0, ()
            self._written()

    async def _write_parent(self) -> None:
        node, type_, parent = self._parents.popleft()
        self._writing, self._in_hand = 1, [parent.completion]
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
                except StoreUnavailable as error:
                    await asyncio.sleep(self._patience.failed(error, jobs=1))
                except (BadRow, Unforeseen) as error:
                    self._barren(type_, parent, Refused(error.code, str(error)))
                    return
                except Refused as error:
                    self._barren(type_, parent, error)
                    return
        finally:
            self._writing, self._in_hand = 0, ()
            self._written()

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
        except (BadRow, Unforeseen) as error:
            if len(batch) > 1:
                await self._halves(node, batch, self._complete)
                return
            # The effect happened and never runs again; only its result is lost.
            type_, verdict = batch[0]
            try:
                bare = verdict._replace(result=None)
                done = await self._link.run(
                    lambda conn: leases.settle_completed(conn, node=node, verdicts=[bare])
                )
            except (BadRow, Unforeseen) as worse:
                self._set_aside(verdict, worse, lambda: self._completions.append((node, type_, verdict)))
                return
            log.warning("result can't be stored", extra={"job_id": verdict.id, "error": str(error)})
        if len(done) < len(batch):
            done |= await self._look_up(node, {one.id: one.claim for one in verdicts if one.id not in done})
        self._settled(Counter((type_, "completed") for type_, one in batch if one.id in done))

    async def _settle(self, node: int, batch: Sequence[tuple[str, Settlement]], again: bool) -> None:
        verdicts = [verdict for _, verdict in batch]
        try:
            done = await self._link.run(lambda conn: leases.settle_others(conn, node=node, verdicts=verdicts))
        except (BadRow, Unforeseen) as error:
            if len(batch) > 1:
                await self._halves(node, batch, self._settle)
                return
            type_, verdict = batch[0]
            # Whatever a job's process may have said of itself goes; what the verdict is stays.
            plain = verdict._replace(
                result=None, error=_UNSTORABLE, exit_code=None, signal=None, cpu_s=None, max_rss=None
            )
            try:
                done = await self._link.run(
                    lambda conn: leases.settle_others(conn, node=node, verdicts=[plain])
                )
            except (BadRow, Unforeseen) as worse:
                self._set_aside(verdict, worse, lambda: self._others.append((node, type_, verdict)))
                return
            log.warning("verdict can't be stored as it is", extra={"job_id": verdict.id, "error": str(error)})
        if len(done) < len(batch):
            # A job that was put back unrun keeps no claim: there is nothing to look up, and nothing lost.
            claims = {one.id: one.claim for one in verdicts if one.id not in done and one.cause is not None}
            if claims:
                done |= await self._look_up(node, claims)
        self._settled(Counter((type_, one.status or "again") for type_, one in batch if one.id in done))
        if any(one.status is None and one.cause is not None and one.delay_ms < SOON_MS for one in verdicts):
            self._freed()  # due before the next poll: the claimer has to know when

    def _set_aside(
        self, verdict: Completion | Settlement, error: BadRow | Unforeseen, again: Callable[[], None]
    ) -> None:
        """Keep a verdict where it holds up no other; when nothing works before this node ends, its job is
        rescued."""
        self._refused.failed(error, job_id=verdict.id)
        self._aside.append(((verdict.id, verdict.claim), again))
        if self._aside_timer is None:
            self._aside_timer = asyncio.get_running_loop().call_later(self._aside_s, self._take_up)
            self._aside_s = min(LONGEST_S, 2 * self._aside_s)

    def _take_up(self) -> None:
        """Hand in once more what was set aside."""
        self._aside_timer = None
        aside, self._aside = self._aside, []
        for _, again in aside:
            again()
        self._wake.set()

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
                except (StoreUnavailable, BadRow, Unforeseen) as error:
                    await asyncio.sleep(self._patience.failed(error, jobs=len(half)))

    async def _look_up(self, node: int, claims: dict[str, int]) -> set[str]:
        """Return what an earlier try has stored; the rest is no longer this node's to write."""
        stored = await self._link.run(lambda conn: leases.settled_by(conn, node=node, claims=claims))
        fenced = claims.keys() - stored
        if fenced:
            self._metrics.inc("taskd_fenced_total", by=len(fenced))
            log.warning("late verdicts fenced", extra={"jobs": len(fenced), "job_id": min(fenced)})
        return stored
