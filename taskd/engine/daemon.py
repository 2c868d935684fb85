"""One worker node from start to end: registers, publishes its types, runs, drains, says good-bye."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from taskd import __version__
from taskd.engine.children import CrewSettings, PoolSettings
from taskd.engine.claimer import Claimer
from taskd.engine.crew import Crew
from taskd.engine.heart import Heart, HeartSettings, boottime
from taskd.engine.judge import Judge
from taskd.engine.lanes import Lanes
from taskd.engine.offspring import Nursery
from taskd.engine.patience import Patience
from taskd.engine.settler import Settler
from taskd.engine.slots import Slots
from taskd.errors import BadRow, StoreUnavailable, Unforeseen, UnsafeDatabase
from taskd.model.state import Cause
from taskd.obs.exporter import Exporter
from taskd.obs.metrics import Metrics
from taskd.process.family import Family
from taskd.process.predecessor import FamilyLock
from taskd.process.sdnotify import Notifier
from taskd.process.signals import Signals
from taskd.registry import Registry
from taskd.store import leases, migrate, nodes, types
from taskd.store.jobs import Retention
from taskd.store.pool import Connection, Link, Pace, Target

log = logging.getLogger("taskd.engine.daemon")

QUIET_S = 5.0
"""How long a drained node waits for Postgres to take its last verdicts before it says so once more."""
BIRTH_S = 5.0
"""How long the database may take to make this node an incarnation, the rescue of an earlier one included."""
RESCUE_S = 3.0
"""How long a start looks for the jobs of an earlier one; in a queue of many millions sweeps go on."""
END_S = 8.0
"""How long after `drain_s` a node without Postgres gives up its last verdicts; it is gone within 10 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSettings:
    """All that a node is told; nobody below sees the configuration itself. Times are seconds."""

    node_name: str
    url: str
    listen_url: str
    schema: str
    allow_unsafe: bool
    registry: Registry
    pools: Mapping[str, PoolSettings]
    lease_s: float
    heartbeat_s: float
    sweep_s: float
    drain_s: float
    max_crashes: int
    child_max_jobs: int | None = None
    child_max_memory: int | None = None
    retention: Retention
    result_bytes: int
    error_bytes: int
    log_lines: int
    child_argv: Sequence[str]
    child_env: Mapping[str, str]
    metrics: tuple[str, int] | None = None
    """Host and port on which Prometheus finds this node's figures; None serves none."""
    family_lock: FamilyLock | None = None
    """Inherited by all children; None leaves the jobs of an earlier start to their lease."""
    predecessor: str = ""
    """What the lock's last holder wrote: its incarnation and process id; nothing of it lives any more."""


class Daemon:
    """Builds the parts of a node and joins them; `run` is its life."""

    def __init__(
        self,
        settings: DaemonSettings,
        signals: Signals,
        notifier: Notifier,
        *,
        dice: random.Random,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """`ready` is called once the node can run jobs."""
        self._settings = settings
        self._signals = signals
        self._notifier = notifier
        self._ready = ready
        self._metrics = Metrics()
        self._node = 0
        infos = {name: info for name, info in settings.registry.infos.items() if info.enabled}
        self._infos = infos
        pace = Pace(dice=dice)
        target = Target(url=settings.url, application=f"taskd worker {settings.node_name}")
        direct = Target(url=settings.listen_url, application=f"taskd heart {settings.node_name}")
        self._claim_link = Link(target, pace)
        self._settle_link = Link(target, pace)
        beats = HeartSettings(
            lease_s=settings.lease_s,
            heartbeat_s=settings.heartbeat_s,
            sweep_s=settings.sweep_s,
            retention=settings.retention,
        )
        self._heart_link = Link(direct, pace, deadline_s=beats.answer_s)
        self._family = Family(log, metrics=self._metrics)
        self._lanes = Lanes()
        self._slots = Slots(infos.values(), {name: pool.concurrency for name, pool in settings.pools.items()})
        self._settler = Settler(
            self._settle_link,
            lambda: self._node,
            self._metrics,
            Nursery(infos, now=lambda: datetime.now(UTC), dice=os.urandom),
            lambda type_, parent, error: self._judge.barren(type_, parent, error),
            bounded=[name for name, info in infos.items() if info.max_running is not None],
            freed=lambda: self._claimer.hint(),
            written=lambda: self._claimer.room(),
            dice=dice,
        )
        self._judge = Judge(infos, self._slots, self._settler, dice, max_crashes=settings.max_crashes)
        self._crew = Crew(
            CrewSettings(
                node_name=settings.node_name,
                infos=infos,
                pools=settings.pools,
                plugins=settings.registry.plugins,
                argv=settings.child_argv,
                env=settings.child_env,
                pass_fds=() if settings.family_lock is None else (settings.family_lock.fd,),
                result_bytes=settings.result_bytes,
                error_bytes=settings.error_bytes,
                log_lines=settings.log_lines,
                child_max_jobs=settings.child_max_jobs,
                child_max_memory=settings.child_max_memory,
            ),
            self._family,
            self._slots,
            self._judge,
            room=lambda: self._claimer.room(),
        )
        self._claimer = Claimer(
            self._claim_link,
            infos,
            self._slots,
            self._lanes,
            self._metrics,
            dice,
            take=self._crew.take,
            unsettled=lambda: self._settler.unsettled + self._settler.aside,
        )
        self._heart = Heart(
            self._heart_link,
            beats,
            self._claim_link,
            self._claimer,
            self._lanes,
            self._metrics,
            dice=dice,
            info=self._info,
            lost=self._lost,
            claims=lambda: self._crew.claims | self._settler.claims,
            undone=self._judge.undone,
        )
        self._patience = Patience(log, "node waits for the database", self._heart_link, dice)
        self._end_by = math.inf
        """When a drain is over, come what may; monotonic seconds."""

        self._exporter = None
        if settings.metrics is not None:
            self._exporter = Exporter(*settings.metrics, self._metrics.render)

    async def run(self) -> None:
        """Live until the first TERM or INT, then drain.

        Raises:
            UnsafeDatabase: the server's settings can lose accepted jobs and `allow_unsafe` is false.
        """
        if self._exporter is not None:
            await self._exporter.start()
        # Before the children: while their interpreters start nothing else goes fast, and jobs of an earlier
        # start wait for this.
        if not await self._born():
            return
        self._crew.start()
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("claimer", self._claimer.run()),
                ("settler", self._settler.run()),
                ("heart", self._heart.run()),
                ("guard", self._heart.guard()),
                ("crew", self._crew.watch()),
                ("watchdog", self._watchdog()),
            )
        ]
        draining = asyncio.create_task(self._signals.draining.wait(), name="draining")
        ready = asyncio.create_task(self._crew.ready(), name="ready")
        try:
            # A child that never gets ready must not make us deaf to signals.
            ended, _ = await asyncio.wait([ready, draining, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if ended == {ready}:
                self._notifier.ready(f"node {self._node}, {len(self._infos)} job types")
                log.info("node is ready", extra={"node": self._node, "types": len(self._infos)})
                self._ready()
                ended, _ = await asyncio.wait([draining, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in ended - {draining, ready}:
                task.result()  # a part that ended is a defect: say which, and let the unit start us again
            await self._drain()
        finally:
            # Heart and guard may be in the middle of a statement, which must not be cancelled.
            self._heart.end()
            beating = [task for task in tasks if task.get_name() in ("heart", "guard")]
            await asyncio.wait(beating, timeout=min(6.0, self._left_s()))
            # Nor may what claimer and settler have in flight: it ends with its socket.
            for link in (self._claim_link, self._settle_link, self._heart_link):
                link.abort()
            await asyncio.sleep(0.05)
            for task in [ready, draining, *tasks]:
                task.cancel()
            await asyncio.gather(ready, draining, *tasks, return_exceptions=True)
            await self._family.kill()
            if self._exporter is not None:
                await self._exporter.stop()
            for link in (self._claim_link, self._settle_link, self._heart_link):
                await link.close()

    # -- incarnations --------------------------------------------------------------------------------------

    async def _born(self) -> bool:
        """Become a new incarnation as soon as the database lets us; False when asked to end before."""
        while not self._signals.draining.is_set():
            sent_at = boottime()
            try:
                node = await self._heart_link.run(self._register, deadline_s=BIRTH_S)
            except UnsafeDatabase:
                raise
            except (StoreUnavailable, BadRow, Unforeseen) as error:
                await self._pause(self._patience.failed(error))
                continue
            self._patience.fine()
            self._node = node
            self._heart.serve(node, sent_at)
            if not self._signals.draining.is_set():
                self._claimer.serve(node)
            return True
        return False

    async def _register(self, conn: Connection) -> int:
        await migrate.check_on(conn, schema=self._settings.schema)
        unsafe = (await nodes.server_facts(conn)).unsafe()
        if unsafe and not self._settings.allow_unsafe:
            raise UnsafeDatabase(
                f"the database would lose accepted jobs: {'; '.join(unsafe)}. "
                "Or set database.allow_unsafe: true if that is what you want."
            )
        await self._rescue_predecessor(conn)
        node = await nodes.register(
            conn,
            name=self._settings.node_name,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            lease=timedelta(seconds=self._settings.lease_s),
            info=self._info(),
        )
        await types.publish(conn, list(self._infos.values()), node=node)
        if self._settings.family_lock is not None:
            self._settings.family_lock.write(f"{node} {os.getpid()}")  # before it can claim anything
        return node

    async def _rescue_predecessor(self, conn: Connection) -> None:
        """Take the jobs of an earlier start on this host, of which nothing is left alive."""
        match = re.fullmatch(r"(\d+) (\d+)", self._settings.predecessor)
        if match is None or self._node:
            return
        node, pid = int(match[1]), int(match[2])
        host = socket.gethostname()
        if await nodes.known(conn, node=node, name=self._settings.node_name, host=host, pid=pid):
            error = "its node was killed and has started again"
            cause, until = str(Cause.LEASE_EXPIRED), time.monotonic() + RESCUE_S
            rescued = await leases.rescue_named(conn, nodes=[node], cause=cause, error=error)
            count = sum(rescued.values())
            while rescued.more and time.monotonic() < until:
                rescued = await leases.rescue_named(conn, nodes=[node], cause=cause, error=error)
                count += sum(rescued.values())
            self._metrics.inc("taskd_rescued_total", by=count)
            log.warning("jobs of an earlier start are ready again", extra={"lost": node, "jobs": count})

    async def _lost(self) -> None:
        """The lease is gone: give up the jobs at once, then start again as a new incarnation."""
        self._claimer.serve(None)
        self._crew.hold_off(True)  # what the claim in flight brings is the old incarnation's, too
        self._crew.interrupt(Cause.LEASE_EXPIRED)
        await self._crew.kill(Cause.LEASE_EXPIRED)
        await self._claimer.stopped()
        self._crew.hold_off(False)
        self._lanes.forget()
        if await self._born():
            log.info("node goes on as a new incarnation", extra={"node": self._node})

    def _info(self) -> str:
        return json.dumps({"held": self._slots.held, "unsettled": self._settler.unsettled})

    # -- the end -------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        self._notifier.stopping("draining")
        self._notifier.extend(self._settings.drain_s + 30)
        log.info("draining", extra={"held": self._slots.held})
        self._claimer.serve(None)
        self._crew.stop_taking()
        self._heart.drain()
        self._end_by = time.monotonic() + self._settings.drain_s + END_S
        await self._crew.finish(self._settings.drain_s, self._signals.quick)
        gone = asyncio.create_task(self._crew.gone(), name="gone")
        await self._last_verdicts()
        self._heart.end()
        if self._settler.unsettled or self._settler.aside:
            # No good-bye: others may take these jobs when the lease has ended, and not before.
            extra = {"jobs": self._settler.unsettled + self._settler.aside}
            log.error("verdicts could not be stored; their jobs run again", extra=extra)
        else:
            await self._say_good_bye()
        await asyncio.wait({gone}, timeout=self._left_s())
        log.info("node has ended", extra={"node": self._node})

    async def _last_verdicts(self) -> None:
        """Wait until all is stored, for as long as a drain may last; a second signal makes it short."""
        stored = asyncio.create_task(self._all_stored(), name="stored")
        waited = False
        while not stored.done() and self._left_s() > 0 and not (waited and self._signals.quick.is_set()):
            if waited:
                extra = {"unsettled": self._settler.unsettled, "seconds": round(self._left_s())}
                log.warning("verdicts wait for Postgres; a second signal gives them up", extra=extra)
            await asyncio.wait({stored}, timeout=min(QUIET_S, self._left_s()))
            waited = True
        stored.cancel()

    async def _all_stored(self) -> None:
        await self._claimer.stopped()  # what a last claim brings is put back
        await self._settler.settled()

    async def _say_good_bye(self) -> None:
        node, lost = self._node, list(self._claimer.lost)
        bye = asyncio.create_task(
            self._settle_link.run(lambda conn: nodes.end(conn, node=node, lost=lost)), name="good-bye"
        )
        # Not cancelled: it may be in the middle of a statement, which ends with its socket.
        bye.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({bye}, timeout=self._left_s())
        error = bye.exception() if bye.done() else "no answer"
        if error is not None:
            log.warning("could not say good-bye; the lease ends by itself", extra={"error": str(error)})

    def _left_s(self) -> float:
        return max(0.0, self._end_by - time.monotonic())

    async def _watchdog(self) -> None:
        every_s = (self._notifier.watchdog_s or 20.0) / 2
        while True:
            self._notifier.watchdog()
            await asyncio.sleep(every_s)

    async def _pause(self, wait_s: float) -> None:
        try:
            await asyncio.wait_for(self._signals.draining.wait(), wait_s)
        except TimeoutError:
            return
