"""F16 and F17 of the fault plan: jobs that take memory, files and processes without end (`make faults`)."""

from __future__ import annotations

import asyncio
import resource
import time
from pathlib import Path

import pytest

from tests.faults.rig.cluster import Cluster
from tests.faults.rig.keeper import Resources, resources
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

MAX_MEMORY = 256 << 20
DAEMON_MOST = 300 << 20
"""What a supervisor or an API process may take, as in F25."""
FILES = 100_000
CHILDREN = 5000
GONE_S = 5.0
LATE_S = 1.0
"""How late a heartbeat may be, as in F18."""

LIMITED = f"""\
  hoard:
    max_memory: {MAX_MEMORY >> 20}MiB
    concurrency: 2
  hoard_shared:
    max_memory: {MAX_MEMORY >> 20}MiB
    concurrency: 2
"""


async def begin(case: System) -> None:
    case.api()
    case.worker("one")
    await case.ready("one")


def daemons(case: System) -> dict[str, Resources]:
    """Return what the supervisor and the API processes hold."""
    pids = {"supervisor": case.units["one"].pid}
    pids |= {f"api {place}": child.pid for place, child in enumerate(case.units["api"].children)}
    found = {name: resources(pid) for name, pid in pids.items()}
    return {name: what for name, what in found.items() if what is not None}


class Heartbeat:
    """Watches how old the heartbeat of a node gets. Owned by the case; `stop` it."""

    def __init__(self, case: System) -> None:
        self.oldest_s = 0.0
        self._case = case
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            rows = await self._case.ask(
                "select max(extract(epoch from clock_timestamp() - heartbeat_at))::float8 from taskd.nodes "
                "where state = 'live'"
            )
            self.oldest_s = max(self.oldest_s, float(rows[0][0] or 0.0))
            await asyncio.sleep(0.1)

    async def stop(self) -> float:
        """Return the greatest age that was seen, in seconds."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return self.oldest_s


async def test_f16_memory_without_end(durable: Cluster, report: Report) -> None:
    greedy, good = round(scaled(60, 6)), round(scaled(6000, 300))
    async with system(durable, concurrency=32, more=LIMITED) as case:
        await begin(case)
        supervisor, before = case.units["one"].main, daemons(case)
        heartbeat = Heartbeat(case)
        every = good // greedy

        def body(n: int) -> dict[str, object]:
            if n % (every + 1) == 0:
                kind = "hoard_shared" if n // (every + 1) % 2 else "hoard"
                return {"type": kind, "payload": {"n": n}, "max_attempts": 2}
            return {"type": "ledger_sync" if n % 3 == 0 else "ledger", "payload": {"n": n, "ms": 20}}

        async with case.load(body, rate=50, seconds=(greedy + good) / 50):
            pass
        await case.quiet(60 + 10 * greedy)
        oldest_s = await heartbeat.stop()

        findings = await case.check()
        ends = await case.ask(
            "select j.type, h.cause, h.error, max(h.max_rss), count(*) from taskd.history as h "
            "join taskd.jobs as j on j.id = h.job_id group by 1, 2, 3 order by 1, 2"
        )
        others = await case.ask(
            "select o.status, max(o.attempts) from taskd.outcomes as o join taskd.jobs as j on j.id = o.id "
            "where j.type like 'ledger%' group by 1"
        )
        after = daemons(case)
        assert {(kind, cause) for kind, cause, *_ in ends} == {("hoard", "error"), ("hoard_shared", "oom")}
        assert all(error == "MemoryError" for kind, _, error, *_ in ends if kind == "hoard")
        assert sum(row[4] for row in ends) == 2 * greedy
        assert await case.count("taskd.outcomes where status = 'failed'") == greedy
        assert others == [("completed", 1)], "the others were not touched"
        assert case.units["one"].main == supervisor
        assert max(what.rss for what in after.values()) < DAEMON_MOST
        assert oldest_s <= 1.0 + LATE_S
        peak = max(row[3] or 0 for row in ends) >> 20
        grown = max(after[name].rss - before[name].rss for name in before) / (1 << 20)
        report.add(
            case="F16 memory",
            load=f"{good} good jobs at 50/s",
            faults=f"{greedy} jobs that take memory without end, private or shared, max_memory 256 MiB "
            "(no cgroup)",
            counts=findings.counts | {f"{kind} as {cause}": count for kind, cause, _, _, count in ends},
            worst=f"a process of a job took {peak} MiB; supervisor and API grew by {grown:.1f} MiB at most; "
            f"heartbeat at most {oldest_s:.1f} s old",
            bound="the others complete at their first attempt; daemons < 300 MiB; 1 s late",
            seed=case.seed,
        )


async def test_f17_files_without_end(durable: Cluster, report: Report) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        pytest.skip(f"a process may open {soft} files here, so none runs out of them")
    rounds = round(scaled(30, 4))
    async with system(durable, concurrency=16) as case:
        await begin(case)

        def body(n: int) -> dict[str, object]:
            if n % 50 == 0:
                return {"type": "opener", "payload": {"n": n, "files": FILES}, "max_attempts": 1}
            return {"type": "ledger_sync" if n % 3 == 0 else "ledger", "payload": {"n": n, "ms": 20}}

        async with case.load(body, rate=25, seconds=2 * rounds):
            pass
        await case.quiet(60)

        findings = await case.check()
        ends = await case.ask(
            "select distinct j.type, h.cause, h.error like '%Too many open files%' from taskd.history as h "
            "join taskd.jobs as j on j.id = h.job_id"
        )
        recycled = case.logged("child ended", "one")
        assert ends == [("opener", "error", True)]
        assert await case.count("taskd.outcomes where status = 'failed'") == rounds
        assert len(recycled) >= rounds, "each of their processes was replaced"
        report.add(
            case="F17 files",
            load=f"25/s, {2 * rounds} s",
            faults=f"{rounds} jobs that open {FILES} files (limit {soft})",
            counts=findings.counts | {"processes replaced": len(recycled)},
            worst="the others completed at their first attempt",
            bound="the attempt fails, its process is replaced",
            seed=case.seed,
        )


def marked(mark: str) -> list[int]:
    """Return the processes that `breeder` started with this argument and that live."""
    found = []
    wanted = f"/bin/sleep\0{mark}\0".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cmdline").read_bytes() == wanted:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


async def test_f17_processes_without_end(durable: Cluster, report: Report) -> None:
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if most != resource.RLIM_INFINITY and most < CHILDREN + 1000:
        pytest.skip(f"an account may have {most} processes here, and {CHILDREN} and some are needed")
    rounds = round(scaled(5, 1))
    async with system(durable, concurrency=16) as case:
        await begin(case)
        supervisor = case.units["one"].main
        heartbeat = Heartbeat(case)
        gone: list[float] = []
        alive: list[int] = []
        for number in range(rounds):
            mark = f"{900_000 + case.seed % 90_000}.{number}"
            first = case.tally.next

            def body(n: int, mark: str = mark, first: int = first) -> dict[str, object]:
                if n == first:
                    payload = {"n": n, "children": CHILDREN, "mark": mark}
                    return {"type": "breeder", "payload": payload, "max_attempts": 1}
                return {"type": "ledger", "payload": {"n": n, "ms": 20}}

            async with case.load(body, rate=20, seconds=20):
                failed = "taskd.outcomes where status = 'failed'"
                async with asyncio.timeout(60):
                    while await case.count(failed) <= number:
                        alive.append(len(await asyncio.to_thread(marked, mark)))
                        await asyncio.sleep(0.1)
                rows = await case.ask("select max(extract(epoch from ended_at))::float8 from taskd.history")
                ended_at = float(rows[0][0])
                async with asyncio.timeout(30):
                    while await asyncio.to_thread(marked, mark):
                        await asyncio.sleep(0.05)
                gone.append(time.time() - ended_at)
        await case.quiet(30)
        oldest_s = await heartbeat.stop()

        findings = await case.check()
        ends = await case.ask(
            "select j.type, h.cause, h.error like '%are left behind%', count(*) from taskd.history as h "
            "join taskd.jobs as j on j.id = h.job_id group by 1, 2, 3"
        )
        assert ends == [("breeder", "error", True, rounds)]
        assert max(alive) > CHILDREN / 2, "they were there"
        assert max(gone) <= GONE_S
        assert case.units["one"].main == supervisor
        assert case.logged("lease lost") == []
        assert oldest_s <= 1.0 + LATE_S
        report.add(
            case="F17 processes",
            load="20/s beside them",
            faults=f"{rounds} jobs that leave {CHILDREN} processes behind, half of them in sessions of "
            "their own",
            counts=findings.counts,
            worst=f"all gone {max(gone):.2f} s after the attempt; heartbeat at most {oldest_s:.1f} s old",
            bound=f"{GONE_S:g} s; 1 s late",
            seed=case.seed,
        )
