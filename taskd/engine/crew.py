"""The job children of a node: hands them jobs, hears how they ended, kills what overstays.

Children are grouped by pool and isolation. Jobs of `async` types share the pool's fixed children; each
job of a `process` type has a child to itself while it runs; a job that must run alone (its last process
died and nobody could be blamed) goes to the pool's *lone* child, which runs one at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from taskd import wire
from taskd.engine.children import Child, CrewSettings, Group, Kind, Run, resident
from taskd.engine.judge import Judge
from taskd.engine.slots import Slots
from taskd.model import verdict as decide
from taskd.model.jobtype import TypeInfo
from taskd.model.state import Cause
from taskd.process.family import Exit, Family, Member, Spec
from taskd.process.keeper import Keeper
from taskd.store.leases import Claimed

log = logging.getLogger("taskd.engine.crew")

WATCH_S = 0.2
"""How often overstaying runs are looked for."""
IDLE_S = 60.0
"""A spare process child that had nothing to do for this long ends."""
STOP_GRACE_S = 5.0
AGAIN_S = 1.0
"""Pause before a child is started again whose keeper took its last exit for a refusal to work."""
_MUCH = 1 << 62


class Crew:
    """All children of a node. `take` hands jobs in; the judge gives each its verdict."""

    def __init__(
        self,
        settings: CrewSettings,
        family: Family,
        slots: Slots,
        judge: Judge,
        *,
        room: Callable[[], None],
    ) -> None:
        """`room` is called after jobs have ended here: there are slots to fill."""
        self._settings = settings
        self._family = family
        self._slots = slots
        self._judge = judge
        self._room = room
        self._handle = 0
        self._number = 0
        self._draining = False
        self._held_off = False
        self._tried: set[int] = set()
        self._groups: dict[tuple[str, Kind], Group] = {}
        by_pool: dict[tuple[str, Kind], list[str]] = {}
        for name, info in settings.infos.items():
            if info.enabled:
                by_pool.setdefault((info.pool, info.isolation), []).append(name)
                if info.isolation == "async":
                    by_pool.setdefault((info.pool, "lone"), []).append(name)
        for (pool, kind), types in by_pool.items():
            self._groups[pool, kind] = Group(pool, kind, settings.pools[pool], types)

    # -- children ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the fixed children: all async ones, and one of each process group."""
        for group in self._groups.values():
            for _ in range({"async": group.most, "process": 1, "lone": 0}[group.kind]):
                self._add_child(group)

    async def ready(self) -> None:
        """Wait until every child started so far is ready or has died once."""
        first = {child.number for child in self._all()}
        while not first <= self._tried:
            await asyncio.sleep(0.005)

    def _add_child(self, group: Group) -> Child:
        self._number += 1
        number = self._number
        keeper = Keeper(
            self._family,
            lambda: Spec(
                name=f"child {number}",
                argv=self._settings.argv,
                env=self._settings.env,
                pass_fds=self._settings.pass_fds,
                pipe_option="--fd",
            ),
            started=lambda member: self._born(group, number, member),
            ended=lambda member, exit: self._ended(group, number, member, exit),
        )
        child = Child(self.heard, group, number)
        group.children[number] = child
        group.keepers[number] = keeper
        group.tasks[number] = asyncio.get_running_loop().create_task(self._keep(group, number, keeper))
        self._set_up(child)
        return child

    async def _keep(self, group: Group, number: int, keeper: Keeper) -> None:
        await keeper.run()
        # A keeper gives up at exit code 78, which here may come from a job: nothing that a job does may
        # leave the pool without a child.
        while number in group.keepers and not self._draining:
            await asyncio.sleep(AGAIN_S)
            await keeper.run()

    def _set_up(self, child: Child) -> None:
        group = child.group
        types = group.types
        plugins: list[wire.Plugin] = []
        for name in types:
            if self._settings.plugins[name] not in plugins:
                plugins.append(self._settings.plugins[name])
        infos = self._settings.infos
        limits = [infos[name].max_memory for name in types if infos[name].max_memory is not None]
        child.send(
            wire.Setup(
                node=self._settings.node_name,
                child=child.number,
                plugins=plugins,
                types=[
                    wire.TypeSetup(
                        type=name,
                        handler=infos[name].handler,
                        grace_s=infos[name].grace,
                        options=infos[name].options,
                    )
                    for name in types
                ],
                slots=group.slots,
                isolation="process" if group.kind == "process" else "async",
                result_bytes=self._settings.result_bytes,
                error_bytes=self._settings.error_bytes,
                log_lines=self._settings.log_lines,
                max_memory=min((limit for limit in limits if limit is not None), default=None),
            )
        )

    def _born(self, group: Group, number: int, member: Member) -> None:
        child = group.children.get(number)
        if child is None or child.member is not None:
            child = Child(self.heard, group, number)
            group.children[number] = child
            self._set_up(child)
        child.member = member
        assert member.pipe is not None
        task = asyncio.get_running_loop().create_task(self._connect(child, member))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _connect(self, child: Child, member: Member) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: child, sock=member.pipe)

    def _ended(self, group: Group, number: int, member: Member, exit: Exit) -> None:
        child = group.children.pop(number)
        child.last_words()
        child.close()
        self._tried.add(number)
        # The keeper starts the next one; until it is there the group may have no child at all.
        self._open_or_close(group)
        self._judge.bury(child, exit)
        self._room()
        if not child.stopping and not self._draining:
            successor = Child(self.heard, group, number)
            group.children[number] = successor
            self._set_up(successor)
        else:
            group.keepers.pop(number).end()
            group.tasks.pop(number)

    def _open_or_close(self, group: Group) -> None:
        if group.kind == "async":
            there = sum(
                len(child.runs) if child.stopping else group.slots
                for child in group.children.values()
                if child.ready or child.member is not None
            )
            self._slots.set_missing(group.pool, max(0, group.most * group.slots - there))
        if group.kind != "lone":
            is_open = any(child.ready and not child.stopping for child in group.children.values())
            self._slots.set_open(group.pool, group.kind, is_open)

    # -- jobs in ---------------------------------------------------------------------------------------

    def take(self, jobs: Iterable[Claimed]) -> None:
        """Hand claimed jobs to children."""
        touched: set[Child] = set()
        able: dict[tuple[str, Kind], list[Child]] = {}
        """The children of each group that can take a job, looked for once."""
        for job in jobs:
            info = self._settings.infos[job.type]
            self._slots.take(job.type)
            if job.expired:
                self._judge.close(Run(job, info, 0), decide.expired())
                continue
            self._handle += 1
            run = Run(job, info, self._handle)
            shut = self._draining or self._held_off
            child = None if shut else self._choose(info, able, alone=job.alone)
            if child is None:
                self._judge.close(run, decide.put_back(run.case))
                continue
            child.add(run)
            touched.add(child)
        for child in touched:
            child.flush()

    def _choose(
        self, info: TypeInfo, able: dict[tuple[str, Kind], list[Child]], *, alone: bool
    ) -> Child | None:
        kind: Kind = "lone" if alone and info.isolation == "async" else info.isolation
        key = (info.pool, kind)
        group = self._groups[key]
        children = able.get(key)
        if children is None:
            # One that waits for its start may wait for long.
            children = able[key] = [
                child
                for child in group.children.values()
                if not child.stopping and (child.ready or child.member is not None)
            ]
        best: Child | None = None
        for child in children:
            if best is None or len(child.runs) < len(best.runs):
                best = child
        if best is not None and len(best.runs) < group.slots:
            return best
        if kind != "async":
            staying = sum(not child.stopping for child in group.children.values())
            if staying < group.most and (kind == "lone" or best is not None):
                child = self._add_child(group)
                if child.member is not None:
                    children.append(child)
                return child
            if kind == "lone":
                return best
        # No slot is free: fetched ahead, since its type starts quickly. It may wait for its like, and not
        # behind a job that runs for an hour.
        same: Child | None = None
        for child in children:
            if child.of_type[info.name] and (same is None or len(child.runs) < len(same.runs)):
                same = child
        return same

    # -- what children say -----------------------------------------------------------------------------

    def heard(self, child: Child, messages: Sequence[object]) -> None:
        """Take what a child said: one call a read, whatever number of jobs it speaks of."""
        now = time.monotonic()
        ended = False
        for message in messages:
            if type(message) is wire.Completed:
                ended = True
                child.done += len(message.runs)
                self._judge.completed(child.removed(message.runs), message.results, now)
            elif type(message) is wire.Finished:
                run = child.remove(message.run)
                if run is None:
                    continue
                ended = True
                child.done += 1
                if message.outcome == "dropped" and run.asked is None and not child.stopping:
                    self._replace(child)  # it has had enough, and ends when its other jobs have ended
                self._judge.finish(run, message, now)
            elif type(message) is wire.Started:
                for handle in message.runs:
                    run = child.runs.get(handle)
                    if run is not None:
                        run.started_at = now
                        run.deadline = now + run.timeout_s
                        child.started[handle] = run
            else:
                self._heard_other(child, message)
        if ended:
            if not child.runs:
                child.idle_since = now
            most = self._settings.child_max_jobs
            if most is not None and child.done >= most:
                self._replace(child)
            self._room()

    def _heard_other(self, child: Child, message: object) -> None:
        if isinstance(message, wire.Ready):
            child.ready = True
            self._tried.add(child.number)
            child.group.keepers[child.number].healthy()
            self._open_or_close(child.group)
            self._room()
        elif isinstance(message, wire.Broken):
            log.error("child can't work", extra={"child": child.number, "problem": message.problem})
        elif isinstance(message, wire.Log):
            run = child.runs.get(message.run)
            if run is not None:
                extra = {"job_id": run.job.id, "type": run.job.type, "line": message.text}
                log.debug("job wrote", extra=extra)

    # -- what befalls children ---------------------------------------------------------------------------

    async def watch(self) -> None:
        """Ask runs that are over their time to stop, kill them after the grace, end spare children."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for group in self._groups.values():
                spare = len(group.children) - (1 if group.kind == "process" else 0)
                for child in list(group.children.values()):
                    self._watch_child(child, now)
                    idle = child.ready and not child.runs and now - child.idle_since > IDLE_S
                    if group.kind != "async" and spare > 0 and idle and not child.stopping:
                        spare -= 1
                        self._let_go(child)

    def _watch_child(self, child: Child, now: float) -> None:
        late = [run for run in child.started.values() if now >= run.deadline]
        for run in late:
            if run.asked is None:
                run.asked = Cause.TIMEOUT
                child.send(wire.Cancel(run.handle, str(Cause.TIMEOUT)))
            elif now >= run.deadline + run.info.grace and run.killed is None:
                run.killed = run.asked
                log.warning("job overstays; its process is killed", extra={"job_id": run.job.id})
                child.kill()
        if late:
            child.flush()
        self._watch_memory(child)

    def _watch_memory(self, child: Child) -> None:
        """Kill a child over the memory of its jobs' type; replace one over that of a child.

        With several jobs in it nobody knows whose memory it is: each of them runs alone next.
        """
        least = min((run.info.max_memory or _MUCH for run in child.started.values()), default=_MUCH)
        most = self._settings.child_max_memory
        if child.member is None or (least == _MUCH and most is None):
            return
        used = resident(child.member.pid)
        if used > least:
            if len(child.started) == 1:
                next(iter(child.started.values())).killed = Cause.OOM
            log.warning(
                "child takes too much memory; it is killed", extra={"child": child.number, "bytes": used}
            )
            child.kill()
        elif most is not None and used > most:
            self._replace(child)

    def _replace(self, child: Child) -> None:
        """Let a child end its jobs and start another in its place meanwhile; the others go on."""
        if not child.stopping and not self._draining:
            log.info("child is replaced", extra={"child": child.number, "jobs": child.done})
            self._let_go(child)
            # No sooner than a second after the last: a job may wear out each child at once.
            lived_s = time.monotonic() - child.born_at
            asyncio.get_running_loop().call_later(AGAIN_S - lived_s, self._add_again, child.group)

    def _add_again(self, group: Group) -> None:
        if not self._draining:
            self._add_child(group)

    def _let_go(self, child: Child) -> None:
        child.stopping = True
        child.group.keepers[child.number].end()
        child.send(wire.Stop())
        child.flush()
        self._open_or_close(child.group)

    # -- the end -----------------------------------------------------------------------------------------

    def _all(self) -> list[Child]:
        return [child for group in self._groups.values() for child in group.children.values()]

    def stop_taking(self) -> None:
        """Take no more jobs, and have children hand back what they have not started."""
        self._draining = True
        for child in self._all():
            self._let_go(child)
            if child.member is None:  # and now there will be none: nobody else speaks for these jobs
                for handle in list(child.runs):
                    if run := child.remove(handle):
                        self._judge.close(run, decide.put_back(run.case))

    def hold_off(self, on: bool) -> None:
        """While `on`, put back whatever is handed in: the claims of a lease that is lost."""
        self._held_off = on

    @property
    def running(self) -> int:
        """Jobs that children have in hand."""
        return sum(len(child.runs) for child in self._all())

    @property
    def claims(self) -> set[tuple[str, int]]:
        """Job and claim of all that children have in hand."""
        return {(run.job.id, run.job.claim) for child in self._all() for run in child.runs.values()}

    async def finish(self, wait_s: float, hurry: asyncio.Event) -> None:
        """Let running jobs end for `wait_s` seconds (less when `hurry` is set), then stop and kill them."""
        until = time.monotonic() + wait_s
        while self.running and time.monotonic() < until and not hurry.is_set():
            await asyncio.sleep(0.02)
        self.interrupt(Cause.INTERRUPTED)
        until = time.monotonic() + STOP_GRACE_S
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await self.kill(Cause.INTERRUPTED)

    def interrupt(self, cause: Cause) -> None:
        """Ask all started runs to stop because of `cause`."""
        for child in self._all():
            for run in child.started.values():
                if run.asked is None or cause is Cause.LEASE_EXPIRED:
                    run.asked = cause
                    child.send(wire.Cancel(run.handle, str(cause)))
            child.flush()

    async def kill(self, cause: Cause) -> None:
        """Kill all children and wait until every run has its verdict; `cause` is that of the running ones."""
        for child in self._all():
            for run in child.started.values():
                if run.killed is None:
                    run.killed = cause
            if child.runs:
                child.kill()
        while self.running:
            await asyncio.sleep(0.005)

    async def gone(self) -> None:
        """Wait until all children have ended; called when draining."""
        tasks = [task for group in self._groups.values() for task in group.tasks.values()]
        for group in self._groups.values():
            for keeper in group.keepers.values():
                keeper.end()
        for child in self._all():
            if not child.runs:
                child.send(wire.Stop())
                child.flush()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=STOP_GRACE_S)
            for child in self._all():
                child.kill()
            if late:
                await asyncio.wait(late, timeout=STOP_GRACE_S)
