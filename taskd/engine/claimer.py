"""Claims jobs for all free slots of the node, one statement at a time.

Polling is the promise: a claim at least once a second. Hints (NOTIFY), freed slots and the next known
due time only make it earlier.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping

from taskd.engine.lanes import Lanes
from taskd.engine.patience import Patience
from taskd.engine.slots import Slots
from taskd.errors import BadRow, StoreUnavailable, Unforeseen
from taskd.model.jobtype import TypeInfo
from taskd.obs.metrics import Metrics
from taskd.store import leases
from taskd.store.leases import Claimed, Haul, Lane, Want
from taskd.store.pool import Link, may_be_done

POLL_S = 1.0
GATHER_S = 0.04
"""How long a claim for few jobs waits for more slots while children have plenty in hand."""
STEP_S = 0.5
"""A step back of the database clock from which on it counts; smaller ones are covered by the lanes."""
FORGET_S = 600.0
"""How long a claim without an answer is looked for: its statement may still be waiting in the server."""

log = logging.getLogger("taskd.engine.claimer")


class Claimer:
    """One task, `run`, that claims. The serial numbers of claims are given out here, never twice."""

    def __init__(
        self,
        link: Link,
        infos: Mapping[str, TypeInfo],
        slots: Slots,
        lanes: Lanes,
        metrics: Metrics,
        dice: random.Random,
        *,
        take: Callable[[Iterable[Claimed]], None],
        unsettled: Callable[[], int],
    ) -> None:
        """`take` gets what was claimed; `unsettled` counts verdicts that are not stored yet."""
        self._link = link
        self._slots = slots
        self._lanes = lanes
        self._metrics = metrics
        self._dice = dice
        self._take = take
        self._unsettled = unsettled
        self._patience = Patience(log, "claim failed", link, dice)
        self._apart = 0
        """For so many claims more only one type is asked for: one of them may be what Postgres refuses."""
        self._served = sorted(name for name, info in infos.items() if info.enabled)
        self._serial = 0
        self._node: int | None = None
        self._wake = asyncio.Event()
        self._hungry = False
        """Whether there may be jobs for slots that come free: the last claim got all that it asked for,
        or could not ask for some type."""
        self._discovered_at = -POLL_S
        self._claimed_at = 0.0
        self._clock_ahead_s = -math.inf
        """What the database clock was ahead of ours at the last claim, at least."""
        self._busy = asyncio.Lock()
        self.lost: dict[int, float] = {}
        """Claims of this incarnation whose answer never came, and when that was seen."""

    def serve(self, node: int | None) -> None:
        """Claim for this incarnation from now on; None stops claiming."""
        self._node = node
        if node is not None:
            self.lost.clear()
        self._wake.set()

    async def stopped(self) -> None:
        """Wait until no claim is in flight; `serve(None)` first."""
        async with self._busy:
            pass

    @property
    def answered(self) -> int:
        """The serial number of the last claim of which no answer is awaited any more."""
        return self._serial - self._busy.locked()

    def hint(self, lane: Lane | None = None) -> None:
        """Jobs may be there: look now. A lane that is new is taken in."""
        if lane is not None and lane[0] in self._served:
            self._lanes.add(lane)
        self._wake.set()

    def room(self) -> None:
        """Slots were freed."""
        if self._hungry:
            self._wake.set()

    async def run(self) -> None:
        """Claim for ever; ends by cancellation while it waits."""
        pause_s = 0.0
        while True:
            await self._sleep(pause_s)
            if self._node is None:
                pause_s = POLL_S
                continue
            async with self._busy:
                pause_s = await self._claim(self._node)

    async def _sleep(self, pause_s: float) -> None:
        if pause_s > 0 and not self._wake.is_set():
            waker = asyncio.get_running_loop().call_later(pause_s, self._wake.set)
            await self._wake.wait()
            waker.cancel()
        self._wake.clear()

    async def _claim(self, node: int) -> float:
        """Make one claim and return for how long nothing is known to be due."""
        demands, budgets = self._slots.demands(self._unsettled())
        if not demands:
            self._hungry = True
            return POLL_S
        now = time.monotonic()
        gather_s = self._claimed_at + GATHER_S - now
        if gather_s > 0 and sum(demand.most for demand in demands.values()) < self._slots.held // 4:
            return gather_s  # children have plenty in hand, and a larger claim costs no more
        look = now - self._discovered_at >= POLL_S * 0.9
        turn = self._serial % len(demands)
        order = [*demands][turn:] + [*demands][:turn]  # each type is first in its turn
        if self._apart:
            order = [name for name in order if self._lanes.of([name])[0]][:1] or order[:1]
            demands = {name: demands[name] for name in order}
        lanes, floors = self._lanes.of(order)
        if not lanes and not look:
            return POLL_S
        self._serial += 1
        serial = self._serial
        want = Want(
            lanes=lanes,
            floors=floors,
            demands=demands,
            budgets=budgets,
            served=self._served if look else None,
        )
        try:
            haul = await self._link.run(lambda conn: leases.claim(conn, node=node, claim=serial, want=want))
        except (StoreUnavailable, BadRow, Unforeseen) as error:
            if may_be_done(error):
                self.lost[serial] = now
            elif self._link.connected:
                self._apart = 2 * len(self._served)
            return self._patience.failed(error)
        self._patience.fine()
        self._apart = max(0, self._apart - 1)
        done = time.monotonic()
        if look:
            self._discovered_at = now
        self._slots.measured(done - now, done, demands)
        self._claimed_at = done
        pause_s = self._taken(haul, want)
        if self._apart:
            pause_s = 0.0  # the other types have not been asked for
        if self._stepped_back(haul.at_s, now, done):
            # Jobs stored since then carry times that lie before the floors.
            log.warning("the clock of the database went back")
            self._lanes.forget()
            return 0.0
        return pause_s

    def _stepped_back(self, at_s: float, sent: float, answered: float) -> bool:
        """Whether the database clock lost time against ours since the last claim, by more than it may."""
        before, self._clock_ahead_s = self._clock_ahead_s, at_s - answered
        return at_s - sent < before - STEP_S

    def _taken(self, haul: Haul, want: Want) -> float:
        self._lanes.move(haul.floors)
        for lane in haul.new_lanes:
            self._lanes.add(lane)
        got: dict[str, int] = {}
        for job in haul.jobs:
            got[job.type] = got.get(job.type, 0) + 1
        for type_, count in got.items():
            self._metrics.inc("taskd_claimed_total", type_, by=count)
        if haul.jobs:
            self._take(haul.jobs)
        budgets = list(want.budgets)
        for type_, count in got.items():
            budgets[want.demands[type_].pool] -= count
        self._hungry = len(want.demands) < self._slots.complete or any(
            count
            >= min(
                want.demands[type_].most,
                budgets[want.demands[type_].pool] + count + want.demands[type_].ahead,
            )
            for type_, count in got.items()
        )
        if haul.new_lanes:
            return 0.0
        if haul.due_in_s is not None:
            return max(0.0005, min(haul.due_in_s, self._jittered()))
        return self._jittered()

    def _jittered(self) -> float:
        return POLL_S * self._dice.uniform(0.9, 1.0)

    def outlived(self, now: float) -> None:
        """Forget claims whose statement can't be under way any more."""
        self.lost = {claim: at for claim, at in self.lost.items() if now - at < FORGET_S}
