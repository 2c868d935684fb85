"""Keeps the node's lease, hears hints, and does what comes by once in a while: checks, sweeps, pruning.

All on one connection of its own, so that a slow claim or a long queue of verdicts never delays a
heartbeat. The lease counts from the moment the last answered heartbeat was *sent*, on a clock that goes
on while the machine sleeps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from taskd.engine.claimer import Claimer
from taskd.engine.lanes import Lanes
from taskd.errors import StoreUnavailable, TaskdError
from taskd.model.job import new_id
from taskd.obs.metrics import Metrics
from taskd.store import jobs, leases, nodes, types
from taskd.store.jobs import Retention
from taskd.store.listen import Ears, channel
from taskd.store.pool import Connection, Link

CHECK_S = 1.0
"""How often the floors of lanes are checked while jobs flow."""
WAKE_S = 0.5
"""How long the last try to renew the lease may take when most of the margin has passed unseen."""
PING_S = 10.0
"""How often the node tries whether its own hints reach it."""
PRUNE_BUDGET_S = 0.2
"""Time that one sweep spends on pruning at most."""
NODE_AGE = timedelta(days=31)
"""Rows of ended nodes are kept for as long as a history may name them."""
_FIRST_ID = UUID(int=0)

log = logging.getLogger("taskd.engine.heart")


def boottime() -> float:
    """Return seconds on a clock that no host clock's jump moves and that counts suspended time."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartSettings:
    """Seconds; `lease` is also in the node's row."""

    lease_s: float
    heartbeat_s: float
    sweep_s: float
    retention: Retention

    @property
    def margin_s(self) -> float:
        """How long before the lease's end a node that can't renew it gives up its jobs."""
        return min(3.0, self.lease_s / 6)


class Heart:
    """The lease and the chores of one node; `run` is its task, `guard` watches the lease beside it."""

    def __init__(
        self,
        link: Link,
        settings: HeartSettings,
        claimer: Claimer,
        lanes: Lanes,
        metrics: Metrics,
        *,
        info: Callable[[], str],
        lost: Callable[[], Awaitable[None]],
    ) -> None:
        """`info` gives what the node's row shows as JSON; `lost` is called when the lease is gone."""
        self._link = link
        self._settings = settings
        self._claimer = claimer
        self._lanes = lanes
        self._metrics = metrics
        self._info = info
        self._lost = lost
        self._node: int | None = None
        self._state = "live"
        self._lease_end = 0.0
        self._answered_at = 0.0
        self._reached_since = 0.0
        self._wake = asyncio.Event()
        self._ears = Ears(self._hear, self._wake.set)
        self._link.on_connect = self._ears.listen
        self._link.on_use = self._ears.disarm
        self._prune_after = _FIRST_ID
        self._ended = asyncio.Event()
        self._ping = ""
        """The last ping that was sent and not heard yet."""

    def end(self) -> None:
        """Make `run` and `guard` return once the statement that they are in has ended."""
        self._ended.set()
        self._wake.set()

    def serve(self, node: int, sent_at: float) -> None:
        """Keep this incarnation's lease; it was registered by a statement sent at `sent_at` (boottime)."""
        self._node = node
        self._answered(sent_at)
        self._lease_end = sent_at + self._settings.lease_s

    def drain(self) -> None:
        """Tell others that this node takes no more jobs, with the next heartbeat, which is now."""
        self._state = "draining"
        self._wake.set()

    def _answered(self, sent_at: float) -> None:
        now = boottime()
        if now - self._answered_at > 2 * self._settings.heartbeat_s:
            self._reached_since = now
        self._answered_at = now

    async def beat(self, deadline_s: float) -> bool:
        """Renew the lease once; False when it is no longer ours.

        Raises:
            StoreUnavailable: no answer within `deadline_s`.
        """
        node = self._node
        if node is None:
            return True
        sent_at = boottime()
        alive = await self._link.run(
            lambda conn: nodes.heartbeat(conn, node=node, state=self._state, info=self._info()),
            deadline_s=deadline_s,
        )
        self._answered(sent_at)
        if alive and node == self._node:
            self._lease_end = sent_at + self._settings.lease_s
        return alive

    async def guard(self) -> None:
        """Watch the lease: at the margin one more try, then the jobs are given up."""
        margin_s = self._settings.margin_s
        while not self._ended.is_set():
            left_s = self._lease_end - boottime()
            if self._node is None or left_s > margin_s:
                await asyncio.sleep(0.1 if self._node is None else min(0.25, left_s - margin_s))
                continue
            node = self._node
            if not await self._last_try(left_s - margin_s / 2):
                await self._give_up(node)

    async def _last_try(self, wait_s: float) -> bool:
        """Try to renew the lease for `wait_s`; what is left of the margin is for killing the jobs."""
        # A node that stood still and wakes up past the margin tries as well: as long as nobody has rescued
        # its jobs they go on, and are not run twice. Only then: else the lease might end before the jobs.
        if wait_s < self._settings.margin_s / 4:
            wait_s = WAKE_S
        attempt = asyncio.ensure_future(self.beat(wait_s))
        # Not cancelled, and not waited for either: it may queue behind a statement or a connect of `run`.
        attempt.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({attempt}, timeout=wait_s)
        if attempt.done() and attempt.exception() is None:
            return attempt.result()
        return self._lease_end - boottime() > self._settings.margin_s

    async def _give_up(self, node: int) -> None:
        if self._node != node or self._ended.is_set():
            return  # `run` and `guard` may both see it, and only one of them acts; or it said good-bye
        log.error("lease lost; its jobs are stopped", extra={"node": node})
        self._node = None
        await self._lost()

    async def run(self) -> None:
        """Beat, check and sweep until `end`, and hear hints between."""
        now = boottime()
        beat_at = check_at = sweep_at = ping_at = now
        while not self._ended.is_set():
            now = boottime()
            due_at = min(beat_at, check_at, sweep_at, ping_at)
            if due_at > now and not self._wake.is_set():
                self._ears.arm()
                timer = asyncio.get_running_loop().call_later(due_at - now, self._wake.set)
                await self._wake.wait()
                timer.cancel()
                self._ears.disarm()
            if self._ended.is_set():
                return
            forced = self._wake.is_set() and self._state == "draining"
            self._wake.clear()
            now = boottime()
            try:
                if now >= beat_at or forced:
                    beat_at = now + self._settings.heartbeat_s
                    node = self._node
                    if not await self.beat(5.0) and node is not None:
                        await self._give_up(node)
                if now >= check_at:
                    check_at = now + CHECK_S
                    await self._check()
                    # A transaction left open makes checks read more and more: they stay a tenth of the time.
                    check_at = max(check_at, boottime() + 10 * (boottime() - now))
                if now >= sweep_at:
                    sweep_at = now + self._settings.sweep_s
                    await self._sweep()
                if now >= ping_at:
                    ping_at = now + PING_S
                    await self._try_hints()
                if not self._link.connected:
                    await self._link.run(_nothing)
            except StoreUnavailable as error:
                if self._link.failures == 1:
                    log.warning("Postgres does not answer", extra={"error": str(error)})
                # Soon again: a lease is at stake, and each try is paced by the link itself.
                beat_at = min(beat_at, boottime() + max(self._link.wait_s, 0.1))
            except TaskdError as error:
                log.error("chore failed", extra={"error": str(error)})

    async def _try_hints(self) -> None:
        """Send a ping through the channel; when the last one never came, listen on a new connection."""
        if self._ping:
            if self._metrics.get("taskd_listener_up"):
                log.warning(
                    "hints do not reach this node: it polls. database.listen_url must not be a pooler"
                )
            self._metrics.set("taskd_listener_up", to=0)
            await self._link.close()
        self._ping = f"ping:{self._node}:{boottime():.3f}"
        await self._link.run(lambda conn: nodes.ping(conn, channel=channel(), text=self._ping))
        vitals = await self._link.run(nodes.vitals)
        self._metrics.set("taskd_notify_queue_usage", to=vitals.notify_usage)
        self._metrics.set("taskd_oldest_snapshot_seconds", to=vitals.oldest_snapshot_s)

    def _hear(self, text: str) -> None:
        if text.startswith("ping:"):
            if text == self._ping:
                self._ping = ""
                self._metrics.set("taskd_listener_up", to=1)
            return
        type_, _, priority = text.partition(" ")
        lane = (type_, int(priority)) if priority.lstrip("-").isdigit() else None
        self._claimer.hint(lane)

    async def _check(self) -> None:
        if self._lanes.idle:
            return
        spans = self._lanes.spans()
        found, horizon = await self._link.run(lambda conn: leases.unclaimed(conn, spans))
        if self._lanes.checked(found, horizon):
            self._claimer.hint()

    async def _sweep(self) -> None:
        now = boottime()
        if self._node is None:
            return
        if now - self._reached_since >= 2 * self._settings.sweep_s:
            rescued = await self._link.run(leases.rescue_lost)
            for node, count in rescued.items():
                self._metrics.inc("taskd_rescued_total", by=count)
                log.warning("node was lost, its jobs are ready again", extra={"lost": node, "jobs": count})
            if rescued:
                await self._link.run(types.renew_limits)
            if any(rescued.values()):
                self._claimer.hint()
        if self._claimer.lost:
            claims = list(self._claimer.lost)
            node_id = self._node
            count = await self._link.run(
                lambda conn: leases.put_back_unanswered(conn, node=node_id, claims=claims)
            )
            if count:
                self._metrics.inc("taskd_put_back_total", by=count)
                log.warning("jobs of a lost answer put back", extra={"jobs": count})
                self._claimer.hint()
            self._claimer.outlived(time.monotonic())
        await self._link.run(leases.expire)
        await self._prune()

    async def _prune(self) -> None:
        keep = self._settings.retention
        until = time.monotonic() + PRUNE_BUDGET_S
        oldest_ms = round((time.time() - keep.shortest.total_seconds()) * 1000)
        before = new_id(max(0, oldest_ms), bytes(10))

        async def step(conn: Connection) -> UUID | None:
            _, reached = await jobs.prune(conn, keep, after=self._prune_after, before=before)
            return reached

        while time.monotonic() < until:
            reached = await self._link.run(step)
            self._prune_after = _FIRST_ID if reached is None else reached
            if reached is None:
                await self._link.run(lambda conn: nodes.forget(conn, age=NODE_AGE))
                return


async def _nothing(conn: object) -> None:
    """Only makes the link connect, so that hints are heard again."""
