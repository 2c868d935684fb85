"""F14 of the fault plan: hints get lost, and work goes on by the poll (`make faults`)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import Wire
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

NODES = ("one", "two")
POLL_S, SLACK_S = 1.0, 0.5
BACK_S = 15.0
HINTED_S = 0.25
"""An idle node that hears hints starts a job sooner than this; one that polls has one in four later."""
RATE = 8
REVOKED_S = 2.0
UP, LOST = "taskd_listener_up", "taskd_listener_lost_total"
LEASE_S, HEARTBEAT_S, SWEEP_S = 30.0, 3.0, 5.0
"""The defaults: the bounds of the plan are for these."""
WATCH_S = BACK_S + 6.0


@dataclass
class Round:
    """What one fault did. Times count from the fault, in seconds."""

    latencies: list[tuple[float, float]] = field(default_factory=list)
    """When each job was submitted, and how long it waited for its start."""
    lows: dict[str, float] = field(default_factory=dict)
    """For each node when its metrics first showed that hints did not reach it."""
    ups: dict[str, float] = field(default_factory=dict)
    """And when it was seen to be at 1 for good."""

    @property
    def back_s(self) -> float:
        """From when on every job was hinted at."""
        late = [at for at, took in self.latencies if took > HINTED_S]
        return max(late, default=0.0)


async def watch(case: System, since: float, into: Round) -> None:
    """Note what the metrics of the nodes say until cancelled."""
    lost: dict[str, float] = {}
    while True:
        for node in NODES:
            figures = await case.figures(node)
            now = time.time() - since
            count = figures.get(LOST, 0)  # what came and went between two looks
            if not figures[UP] or count > lost.setdefault(node, count):
                into.lows.setdefault(node, now)
            if figures[UP]:
                into.ups.setdefault(node, now)
            else:
                into.ups.pop(node, None)
        await asyncio.sleep(0.05)


async def observe(case: System, since: float) -> Round:
    """Submit jobs one by one to an idle system for `WATCH_S`, and return how it went."""
    seen = Round()
    watching = asyncio.create_task(watch(case, since, seen))
    first = case.tally.next
    async with case.load(
        lambda n: {"type": "ledger", "payload": {"n": n, "ms": 1}}, rate=RATE, seconds=WATCH_S
    ):
        pass
    await case.quiet(10)
    watching.cancel()
    rows = await case.ask(
        f"select extract(epoch from j.created_at)::float8 - {since!r}, "
        "extract(epoch from o.started_at - j.created_at)::float8 "
        "from taskd.jobs as j join taskd.outcomes as o on o.id = j.id "
        f"where (j.payload::jsonb->>'n')::integer >= {first} order by 1"
    )
    seen.latencies = [(float(at), float(took)) for at, took in rows]
    return seen


async def hinted(case: System) -> None:
    """Wait for a state in which both nodes hear hints and have pinged themselves."""
    async with asyncio.timeout(30):
        while not all([(await case.figures(node))[UP] for node in NODES]):
            await asyncio.sleep(0.1)


async def begin(case: System) -> None:
    case.api()
    for node in NODES:
        case.worker(node)
    await case.ready(*NODES)
    await hinted(case)


def judge(case: System, rounds: list[Round]) -> tuple[float, float]:
    """Return the worst start latency and the latest return of the hints."""
    slowest = max(took for one in rounds for _, took in one.latencies)
    back = max(one.back_s for one in rounds)
    print(f"slowest {slowest:.3f} s, back {back:.2f} s, metric {[(one.lows, one.ups) for one in rounds]}")
    assert slowest <= POLL_S + SLACK_S, case.seed
    assert back <= BACK_S
    for one in rounds:
        assert set(one.ups) == set(NODES), "each node says that it hears hints again"
        assert max(one.ups.values()) <= BACK_S
    return slowest, back


async def test_f14_listening_connections_are_terminated(durable: Cluster, report: Report) -> None:
    async with system(durable, lease_s=LEASE_S, heartbeat_s=HEARTBEAT_S, sweep_s=SWEEP_S) as case:
        await begin(case)
        rounds = []
        for _ in range(round(scaled(2, 1))):
            since = time.time()
            ended = await case.ask(
                "select count(*) from (select pg_terminate_backend(pid) from pg_stat_activity "
                f"where datname = '{case.database}' "
                "and application_name similar to 'taskd (heart %|api ears)') as ended"
            )
            assert ended[0][0] == len(NODES) + 2, "each node and each API process listens"
            rounds.append(await observe(case, since))

        findings = await case.check()
        slowest, back = judge(case, rounds)
        assert case.logged("lease lost") == []
        report.add(
            case="F14 terminated listeners",
            load=f"{RATE}/s on two idle nodes",
            faults=f"{len(rounds)} × pg_terminate_backend of every listening connection",
            counts=findings.counts,
            worst=f"start latency {slowest:.2f} s, all jobs hinted at from {back:.2f} s on",
            bound=f"{POLL_S + SLACK_S:g} s, {BACK_S:g} s",
            seed=case.seed,
        )


@pytest.mark.parametrize("way", ["half-open", "deaf"])
async def test_f14_hints_that_never_arrive(durable: Cluster, report: Report, way: str) -> None:
    """The listening connections carry nothing more, nobody is told; or they carry all but hints."""
    async with system(
        durable, through_proxy=True, lease_s=LEASE_S, heartbeat_s=HEARTBEAT_S, sweep_s=SWEEP_S
    ) as case:
        await begin(case)
        assert case.proxy is not None
        rounds: list[Round] = []
        revoked: list[float] = []
        for number in range(round(scaled(3, 1))):
            status, key = await case.admin("POST", "/admin/api-keys", {"name": f"short-lived {number}"})
            assert status == 201
            await asyncio.sleep(case.dice.uniform(0.0, 10.0))  # the ping comes at any moment of the fault
            act = case.proxy.silence if way == "half-open" else case.proxy.deafen
            lost = act("taskd heart ") + act("taskd api ears")
            assert lost == len(NODES) + 2
            since = time.time()
            watching = asyncio.create_task(observe(case, since))
            revoked.append(await _revoke(case, key))
            rounds.append(await watching)

        findings = await case.check()
        slowest, back = judge(case, rounds)
        unseen = [node for one in rounds for node in NODES if node not in one.lows]
        assert unseen == [], "the metric shows that hints did not arrive"
        assert max(revoked) <= REVOKED_S
        assert case.logged("lease lost") == []
        report.add(
            case=f"F14 {way} listeners",
            load=f"{RATE}/s on two idle nodes",
            faults=f"{len(rounds)} × every listening connection "
            + ("carries nothing, no FIN" if way == "half-open" else "loses its notifications"),
            counts=findings.counts,
            worst=f"start latency {slowest:.2f} s, all jobs hinted at from {back:.2f} s on, "
            f"a revoked key dead after {max(revoked):.2f} s",
            bound=f"{POLL_S + SLACK_S:g} s, {BACK_S:g} s, {REVOKED_S:g} s",
            seed=case.seed,
        )


async def _revoke(case: System, key: dict[str, str]) -> float:
    """Revoke a key that all API processes know, and return after how many seconds none takes it any more."""
    mine = {"X-API-Key": key["key"]}
    for _ in range(20):
        assert await _asks(case, mine) == 200
    began = time.monotonic()
    status, answer = await case.admin("DELETE", f"/admin/api-keys/{key['id']}")
    assert status in (200, 204), answer
    last = began
    while time.monotonic() < began + REVOKED_S + 1:
        if await _asks(case, mine) == 200:
            last = time.monotonic()
        await asyncio.sleep(0.02)
    return last - began


async def _asks(case: System, headers: dict[str, str]) -> int:
    wire = Wire(case.port)
    try:
        status, _ = await wire.request("GET", "/jobs?limit=1", headers)
    finally:
        wire.close()
    return status
