"""Keeps the node's lease, hears hints, and does what comes by once in a while: checks, sweeps, pruning.

All on one connection of its own, so that a slow claim or a long queue of verdicts never delays a
heartbeat. The lease counts from the moment the last answered heartbeat was *sent*, on a clock that goes
on while the machine sleeps.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from taskd.engine.claimer import Claimer
from taskd.engine.lanes import Lanes
from taskd.engine.patience import Patience
from taskd.errors import TaskdError, UnsafeDatabase
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
ANSWER_S = 2.0
"""How long a ping may take when the one before was heard."""
QUIET_S = 0.2
"""How long the heart is still, at most, until its ping was sent."""
USAGE_ALARM = 0.1
"""The share of the server's NOTIFY queue in use from which on it is told: some listener reads nothing."""
LONGEST_S = 5.0
"""How long a statement of the heart may take, at most: less with a short lease."""
PRUNE_S = 60.0
"""How long nothing is pruned after a walk that found nothing, at most: less with a short retention."""
FORGET_S = 3600.0
"""How often rows of ended nodes are looked for."""
PRUNE_BUDGET_S = 0.2
"""Time that one turn spends on pruning, and one on making jobs due again, at most."""
NODE_AGE = timedelta(days=31)
"""Rows of ended nodes are kept for as long as a history may name them."""
_FIRST_ID = UUID(int=0)
_CHORES = (
    "heartbeat",
    "clock",
    "check",
    "sweep",
    "put back",
    "review",
    "expire",
    "prune",
    "vitals",
    "ping",
    "connect",
)

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

    @property
    def answer_s(self) -> float:
        """How long one statement may take.

        What waits on a connection that carries nothing more must end while there is time for a heartbeat
        on a new one: the last was at most `heartbeat_s` ago when it began.
        """
        return min(LONGEST_S, (self.lease_s - self.margin_s - self.heartbeat_s) / 2)


class Heart:
    """The lease and the chores of one node; `run` is its task, `guard` watches the lease beside it."""

    def __init__(
        self,
        link: Link,
        settings: HeartSettings,
        voice: Link,
        claimer: Claimer,
        lanes: Lanes,
        metrics: Metrics,
        *,
        dice: random.Random,
        info: Callable[[], str],
        lost: Callable[[], Awaitable[None]],
        claims: Callable[[], set[tuple[str, int]]],
        undone: Callable[[leases.Own], None],
    ) -> None:
        """`info` gives what the node's row shows as JSON; `lost` is called when the lease is gone.

        `link` is the heart's own. Pings are sent through `voice`, a connection for other work, as the hints
        of others come: behind a pooler a session hears at best what it says itself.

        `claims` gives job and claim of all that runs here or has a verdict that is not stored; `undone`
        hears of a claim that stands in the queue and is none of these.
        """
        self._link = link
        self._settings = settings
        self._voice = voice
        self._claimer = claimer
        self._lanes = lanes
        self._metrics = metrics
        self._info = info
        self._lost = lost
        self._claims = claims
        self._undone = undone
        self._timeline: str | None = None
        self._other_primary = True
        """The connection is new: it has not been asked which life of the primary it leads to."""
        self._review_from: int | None = None
        """The block of the queue from which on this node's own claims are still to be looked at."""
        self._node: int | None = None
        self._state = "live"
        self._lease_end = 0.0
        self._answered_at = 0.0
        self._reached_since = 0.0
        self._wake = asyncio.Event()
        self._ears = Ears(self._hear, self._wake.set)
        self._link.on_connect = self._connected
        self._link.on_use = self._ears.disarm
        self._overdue = False
        """Whether the last heartbeat saw a node whose lease has ended."""
        self._clock: tuple[datetime, float] | None = None
        """The time by the database clock at the last heartbeat, and when that was heard (boottime)."""
        self._unsure_s = 0.0
        """How much earlier than it was heard that time may have been read: as long as the answer took."""
        self._patience = {
            chore: Patience(log, "Postgres does not take what this node has to say", link, dice)
            for chore in _CHORES
        }
        self._before: datetime | None = None
        """What the database clock would show had it not gone back; None once what was due is so again."""
        self._held: tuple[str, float] | None = None
        """The transaction that a standby or slot holds, and since when it has been seen to (boottime)."""
        self._prune_after = _FIRST_ID
        self._prune_at = 0.0
        self._forget_at = 0.0
        self._ended = asyncio.Event()
        self._ping = ""
        """The last ping that was sent and not heard yet."""
        self._speaking: asyncio.Task[None] | None = None
        """Sends that ping."""
        self._queue_fills = False
        """Whether it was told that the NOTIFY queue fills."""
        self._fresh = False
        """The connection is new, and nobody has tried yet whether hints come through it."""
        self._searching = False
        """A part of the queue is still to be searched for the claims of the dead."""
        self._put_back_from = 0

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
        told = await self._link.run(
            lambda conn: nodes.heartbeat(conn, node=node, state=self._state, info=self._info()),
            deadline_s=deadline_s,
        )
        self._answered(sent_at)
        if told is not None:
            self._told_the_time(told.at, boottime() - sent_at)
        self._overdue = told is not None and told.overdue
        if told is not None and node == self._node:
            self._lease_end = sent_at + self._settings.lease_s
        return told is not None

    def _told_the_time(self, at: datetime, took_s: float) -> None:
        """Notice a jump of the database clock: until all have renewed by the new one, no lease says much."""
        heard = boottime()
        expected, self._clock = self._database_time(heard), (at, heard)
        slack_s, self._unsure_s = self._settings.margin_s + max(took_s, self._unsure_s), took_s
        if expected is not None and abs((at - expected).total_seconds()) > slack_s:
            self._reached_since = heard
            jump_s = round((at - expected).total_seconds(), 3)
            log.warning("the clock of the database has jumped", extra={"seconds": jump_s})
            self._before = max(expected, self._before or expected) if at < expected else None

    def _database_time(self, now: float) -> datetime | None:
        """Return what the database clock says at `now` (boottime), unless it has jumped since it was read."""
        if self._clock is None:
            return None
        at, heard = self._clock
        return at + timedelta(seconds=now - heard)

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
        beat_at = check_at = sweep_at = ping_at = quiet_until = now
        while not self._ended.is_set():
            now = boottime()
            due_at = now if self._fresh else min(beat_at, check_at, sweep_at, ping_at)
            if due_at > now and not self._wake.is_set():
                if not self._link.busy:  # `guard` may have a statement under way
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
            wait_s = 0.0
            if now >= beat_at or forced:
                beat_at = now + self._settings.heartbeat_s
                wait_s = await self._do("heartbeat", self._renew)
                if self._before is not None:
                    await self._do("clock", self._bring_forward)
            if now >= check_at:
                check_at = now + CHECK_S
                await self._do("check", self._check)
                # A transaction left open makes checks read more and more: they stay a tenth of the time.
                check_at = max(check_at, boottime() + 10 * (boottime() - now))
            if now >= sweep_at or self._may_rescue():
                sweep_at = now + self._settings.sweep_s
                await self._do("sweep", self._sweep)
                if self._searching:
                    sweep_at = boottime()
                else:
                    await self._do("put back", self._put_back)
                    await self._do("review", self._review)
                    await self._do("expire", lambda: self._link.run(leases.expire))
                    await self._do("prune", self._prune)
            if now >= ping_at and now < quiet_until and not self._ping:
                ping_at = quiet_until  # the last one was heard
            if now >= ping_at or self._fresh:
                self._fresh = False
                soon = bool(self._metrics.get("taskd_listener_up")) or self._speaking is not None
                await self._do("vitals", self._look_at_server)
                await self._do("ping", self._try_hints)
                # Hints that have ceased are to be back within 15 s; ones that never come are not worth a
                # connect every two seconds.
                ping_at, quiet_until = now + (ANSWER_S if soon else PING_S), now + PING_S
            if not self._link.connected:
                self._deaf()
                wait_s = await self._do("connect", lambda: self._link.run(_nothing)) or wait_s
            if wait_s:
                # Soon again: a lease is at stake, and each try is paced by the link itself.
                beat_at = min(beat_at, boottime() + wait_s)

    async def _do(self, chore: str, work: Callable[[], Awaitable[object]]) -> float:
        """Do one chore; return 0, or the seconds after which it is worth trying again.

        Each stands for itself: one that Postgres refuses keeps no other from being done.
        """
        try:
            await work()
        except UnsafeDatabase:
            raise  # an incarnation that may not begin: nothing here gets better by trying
        except TaskdError as error:
            return self._patience[chore].failed(error, chore=chore)
        self._patience[chore].fine()
        return 0.0

    async def _renew(self) -> None:
        node = self._node
        if not await self.beat(self._settings.answer_s) and node is not None:
            await self._give_up(node)

    async def _bring_forward(self) -> None:
        until = self._before
        assert until is not None
        stop_at = time.monotonic() + PRUNE_BUDGET_S
        while time.monotonic() < stop_at:
            if not await self._link.run(lambda conn: leases.bring_forward(conn, until=until)):
                self._before = None if until == self._before else self._before
                return
            self._claimer.hint()

    async def _connected(self, conn: Connection) -> None:
        """Listen on a new connection; what was sent through the old one is not heard any more."""
        self._deaf()
        self._ping, self._fresh, self._other_primary = "", True, True
        await self._ears.listen(conn)

    def _deaf(self) -> bool:
        """Note that hints do not reach this node; returns whether they did before."""
        before = bool(self._metrics.get("taskd_listener_up"))
        self._metrics.set("taskd_listener_up", to=0)
        if before:
            self._metrics.inc("taskd_listener_lost_total")
        return before

    async def _try_hints(self) -> None:
        """Send a ping through the channel; when the last one never came, listen on a new connection."""
        if self._speaking is not None:
            return  # the last one has not even been sent
        if self._ping:
            if self._deaf():
                log.warning(
                    "hints do not reach this node: it polls. database.listen_url must not be a pooler"
                )
            await self._link.renew()
        if not self._link.connected:
            await self._link.run(_nothing)
        self._fresh = False  # this is the first ping through it
        self._ping = f"ping:{self._node}:{boottime():.3f}"
        self._speaking = asyncio.create_task(self._speak(self._ping), name="ping")
        # Through a pooler a notification reaches a session that is in the middle of a statement: as long as
        # the ping is under way the heart has none. Not for long: a claim that is slow holds up no heartbeat.
        await asyncio.wait({self._speaking}, timeout=QUIET_S)

    async def _speak(self, text: str) -> None:
        try:
            await self._voice.run(lambda conn: nodes.ping(conn, channel=channel(), text=text))
        except TaskdError as error:
            if not self._ended.is_set():
                self._patience["ping"].failed(error, chore="ping")
            if self._ping == text:  # nobody can have heard it, and the ears are not to blame
                self._ping = ""
                self._deaf()
        finally:
            self._speaking = None

    async def _look_at_server(self) -> None:
        vitals = await self._link.run(nodes.vitals)
        self._metrics.set("taskd_notify_queue_usage", to=vitals.notify_usage)
        oldest_s = max(vitals.oldest_snapshot_s, self._held_s(vitals.held_xid))
        self._metrics.set("taskd_oldest_snapshot_seconds", to=oldest_s)
        if vitals.notify_usage < USAGE_ALARM:
            self._queue_fills = False
        elif not self._queue_fills:
            self._queue_fills = True
            log.warning(
                "the server's NOTIFY queue fills: a session that listens stays in its transaction",
                extra={"usage": round(vitals.notify_usage, 3)},
            )

    def _held_s(self, xid: str | None) -> float:
        """Return for how long a standby or slot has been seen to hold this same transaction."""
        now = boottime()
        if xid is None:
            self._held = None
        elif self._held is None or self._held[0] != xid:
            self._held = (xid, now)
        return 0.0 if self._held is None else now - self._held[1]

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
        if self._node is None:
            return
        # Heartbeats say whether there is anybody to rescue; one that is old says nothing.
        unknown = boottime() - self._answered_at > self._settings.sweep_s
        if self._searching or self._may_rescue() or (unknown and self._steady()):
            self._overdue = self._searching = False
            rescued = await self._link.run(self._rescue)
            self._searching = rescued.more
            for node, count in rescued.items():
                self._metrics.inc("taskd_rescued_total", by=count)
                if count or not rescued.more:
                    extra = {"lost": node, "jobs": count}
                    log.warning("node was lost, its jobs are ready again", extra=extra)
            if rescued.failed:
                log.error("jobs of a lost node can't be taken from it", extra={"jobs": rescued.failed})
            if rescued:
                await self._link.run(types.renew_limits)
            if any(rescued.values()):
                self._claimer.hint()

    async def _rescue(self, conn: Connection) -> leases.Rescued:
        within = timedelta(seconds=self._settings.margin_s + self._unsure_s)
        return await leases.rescue_lost(conn, about=self._database_time(boottime()), within=within)

    async def _put_back(self) -> None:
        """Look for what claims took whose answers never came, in a part of the queue."""
        node = self._node
        if node is None or not self._claimer.lost:
            return
        claims = list(self._claimer.lost)
        count, self._put_back_from = await self._link.run(
            lambda conn: leases.put_back_unanswered(conn, node=node, claims=claims, first=self._put_back_from)
        )
        if count:
            self._metrics.inc("taskd_put_back_total", by=count)
            log.warning("jobs of a lost answer put back", extra={"jobs": count})
            self._claimer.hint()
        self._claimer.outlived(time.monotonic())

    async def _review(self) -> None:
        """Find claims of this node that it does not hold, after a failover, in a part of the queue.

        The new primary may not have seen the last verdicts: what they were about still runs, as it says.
        """
        if self._other_primary:
            await self._link.run(self._look_at_timeline)
        node, first = self._node, self._review_from
        if node is None or first is None:
            return
        held, answered = self._claims(), self._claimer.answered
        found, following = await self._link.run(
            lambda conn: leases.own_claims(conn, node=node, answered=answered, first=first)
        )
        held |= self._claims()
        undone = [one for one in found if one[:2] not in held and one.claim not in self._claimer.lost]
        for one in undone:
            self._undone(one)
        if undone:
            log.warning("verdicts were lost by a failover", extra={"jobs": len(undone)})
        self._review_from = following or None

    async def _look_at_timeline(self, conn: Connection) -> None:
        timeline = await nodes.timeline(conn)
        if timeline is None:
            return  # a standby: nothing is decided on it
        if self._timeline not in (None, timeline):
            log.warning("another server is the primary now", extra={"timeline": timeline})
            self._review_from = 0
        self._timeline, self._other_primary = timeline, False

    def _steady(self) -> bool:
        """Whether Postgres was reached for long enough to judge others by their leases."""
        return boottime() - self._reached_since >= 2 * self._settings.sweep_s

    def _may_rescue(self) -> bool:
        return self._overdue and self._node is not None and self._steady()

    async def _prune(self) -> None:
        if boottime() < self._prune_at:
            return
        keep = self._settings.retention
        found = 0
        until = time.monotonic() + PRUNE_BUDGET_S
        now = self._database_time(boottime()) or datetime.now(UTC)
        old, present = _first_id_of(now - keep.shortest), _first_id_of(now)

        async def step(conn: Connection) -> tuple[int, UUID | None]:
            before = old if self._prune_after < old else jobs.LAST_ID
            return await jobs.prune(conn, keep, after=self._prune_after, before=before)

        while time.monotonic() < until:
            last = self._prune_after >= old
            deleted, reached = await self._link.run(step)
            found += deleted
            # What lies between is too young. Ids ahead of the present come from a clock that was wrong once.
            self._prune_after = reached or (_FIRST_ID if last else present)
            if reached is None and last:
                if not found:
                    self._prune_at = boottime() + min(PRUNE_S, keep.shortest.total_seconds() / 20)
                if boottime() >= self._forget_at:
                    self._forget_at = boottime() + FORGET_S
                    await self._link.run(lambda conn: nodes.forget(conn, age=NODE_AGE))
                return


def _first_id_of(at: datetime) -> UUID:
    return new_id(max(0, round(at.timestamp() * 1000)), bytes(10))


async def _nothing(conn: object) -> None:
    """Only makes the link connect, so that hints are heard again."""
