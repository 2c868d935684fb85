"""F20 of the fault plan: the clocks of hosts jump and drift (`make faults`)."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass

import pytest

from tests.faults.rig.checker import read_ledger
from tests.faults.rig.clock import CACHE_S, Clock, library
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import Wire
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

BESIDE_S = 600
"""How far the clock of the second node lies behind that of the first."""
PHASES = ("+0", "+3600", "-3600", "+0", "+315360000", "+0", "+0 x1.02", "+0 x0.98")
"""An hour ahead, an hour behind, ten years ahead, and a drift of 2 % either way; between them it is right."""
KEY_RATE, KEY_BURST = 20, 10
TYPE_RATE, TYPE_BURST = 10, 3
RESOLUTION_S = 0.001
"""Of the comparison of a start by the boot clock with a time of the database."""
_NEGATIVE = re.compile(r'"[a-z_]*(?:_s|_ms|seconds)":\s*-')

# Each claim of a job of the limited type, by the clock that the limiter counts with.
_STARTS = """
create table public.starts (at timestamptz not null);
create function public.note_start() returns trigger language plpgsql as $$
begin
    insert into public.starts values (new.started_at);
    return null;
end $$;
create trigger note_start after update on taskd.queue for each row
    when (new.claimed and not old.claimed and new.type = 'slow_lane')
    execute function public.note_start();
"""


@dataclass
class Asked:
    """What the limiter of one key did in one phase."""

    passed: int
    seconds: float

    @property
    def most(self) -> float:
        """How many may pass."""
        return KEY_BURST + KEY_RATE * self.seconds


async def ask_on(case: System, key: str, seconds: float) -> Asked:
    """Ask far more often than the key may, for so long."""
    headers = {"X-API-Key": key}
    passed = 0
    began = time.monotonic()

    async def client() -> None:
        nonlocal passed
        wire = Wire(case.port)
        while time.monotonic() - began < seconds:
            status, _ = await wire.request("GET", "/jobs?limit=1", headers)
            assert status in (200, 429)
            passed += status == 200
            await asyncio.sleep(0.02)
        wire.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(client())
    return Asked(passed, time.monotonic() - began)


def shown_negative(value: object, path: str = "") -> list[str]:
    """Return where an answer of the API shows a duration below zero."""
    if isinstance(value, dict):
        found = [one for name, member in value.items() for one in shown_negative(member, f"{path}.{name}")]
        for first, last in (("started_at", "finished_at"), ("started_at", "ended_at")):
            if value.get(first) and value.get(last) and value[last] < value[first]:
                found.append(f"{path}: ended before it started")
        if value.get("started_at") and value.get("created_at") and value["started_at"] < value["created_at"]:
            found.append(f"{path}: started before it was made")
        return found
    if isinstance(value, list):
        return [one for member in value for one in shown_negative(member, path)]
    if type(value) in (int, float) and not path.endswith("priority") and value < 0:  # type: ignore[operator]
        return [f"{path} is {value}"]
    return []


async def negatives(case: System, *nodes: str) -> list[str]:
    """Return all durations below zero that the API, the metrics and the logs show."""
    found = []
    for node in nodes:
        figures = await case.figures(node)
        found += [f"{node}: {name} is {value}" for name, value in figures.items() if value < 0]
    wire = Wire(case.port)
    for job_id in list(case.tally.accepted.values())[-300:]:
        status, job = await wire.request("GET", f"/jobs/{job_id}", {"X-API-Key": case.key})
        assert status == 200
        found += shown_negative(job)
    wire.close()
    for name in case.units:
        text = (case.folder / f"{name}.log").read_text(errors="replace")
        found += [line[:200] for line in text.splitlines() if _NEGATIVE.search(line)]
    return found


async def early(case: System) -> tuple[int, float]:
    """Return how many runs started before their job was due, and the earliest by how many seconds.

    A run's start by the boot clock, which nothing falsifies, against what was asked of the database.
    """
    behind = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    due = dict(
        await case.ask(
            "select j.id::text, extract(epoch from j.created_at)::float8 "
            "+ (j.payload::jsonb->>'n')::integer % 3 from taskd.jobs as j where j.type = 'ledger'"
        )
    )
    margins = [
        run.started + behind - due[run.job_id] for run in read_ledger(case.ledger) if run.job_id in due
    ]
    return sum(margin < -RESOLUTION_S for margin in margins), min(margins)


async def test_f20_clock_jumps(durable: Cluster, report: Report) -> None:
    found = library()
    if found is None:
        pytest.skip("libfaketime is not installed (Debian: apt install libfaketime)")
    phase_s = scaled(40, 4)
    limits = f"""\
  slow_lane:
    handler: noop
    rate: {TYPE_RATE}
    rate_burst: {TYPE_BURST}
"""
    async with system(durable, lease_s=30, heartbeat_s=3, sweep_s=5, concurrency=32, more=limits) as case:
        clocks = {name: Clock(case.folder, name, found) for name in ("api", "one", "two")}
        clocks["two"].set(f"-{BESIDE_S}")
        case.api(env=clocks["api"].env)
        case.worker("one", env=clocks["one"].env)
        case.worker("two", env=clocks["two"].env)
        await case.ready("one", "two")
        await case.ask(_STARTS)
        nodes = await case.ask("select array_agg(id order by id) from taskd.nodes")
        limit = {"rate": KEY_RATE, "burst": KEY_BURST}
        status, key = await case.admin("POST", "/admin/api-keys", {"name": "slow", "rate_limit": limit})
        assert status == 201, key
        asked: dict[str, Asked] = {}
        wrong: list[str] = []

        def body(n: int) -> dict[str, object]:
            if n % 4 == 3:
                return {"type": "slow_lane", "payload": {"n": n}}
            return {
                "type": "ledger",
                "payload": {"n": n, "ms": 20, "fails": int(n % 20 == 0)},
                "delay": n % 3,
            }

        for number, offset in enumerate(PHASES):
            seconds, _, speed = offset.partition(" ")
            clocks["api"].set(offset)
            clocks["one"].set(offset)
            clocks["two"].set(f"{int(seconds) - BESIDE_S:+d} {speed}".strip())
            load = case.load(body, rate=30, seconds=phase_s + 2 * CACHE_S)
            async with load:
                asked[f"{number} {offset}"] = await ask_on(case, key["key"], phase_s + 2 * CACHE_S)
            wrong += await negatives(case, "one", "two")
        await case.quiet(120)
        wrong += await negatives(case, "one", "two")

        findings = await case.check()
        early_runs, earliest_s = await early(case)
        rescues = await case.count("taskd.history where cause = 'lease_expired'")
        starts = [
            float(at)
            for (at,) in await case.ask("select extract(epoch from at)::float8 from public.starts order by 1")
        ]
        over = max(
            (last - first + 1) - (TYPE_BURST + TYPE_RATE * (starts[last] - starts[first]))
            for first in range(len(starts))
            for last in range(first, min(first + 200, len(starts)))
        )
        false = await skews(case)
        shares = {phase: f"{one.passed}/{one.most:.0f}" for phase, one in asked.items()}
        print(f"{json.dumps(shares)} type over by {over:.3f}, earliest {earliest_s:.3f} s, skew {false}")
        assert min(ahead for _, ahead in false.values()) > 300_000_000, "the clocks were false"
        assert max(behind for behind, _ in false.values()) < -3500
        assert false["nodes"][0] < -BESIDE_S - 3500
        assert early_runs == 0
        assert rescues == 0
        assert case.logged("lease lost") == []
        assert await case.ask("select array_agg(id order by id) from taskd.nodes") == nodes
        assert [phase for phase, one in asked.items() if one.passed > one.most] == []
        assert [phase for phase, one in asked.items() if one.passed < KEY_RATE * one.seconds * 0.8] == []
        assert over <= 0
        assert wrong == []
        report.add(
            case="F20 clock jumps",
            load=f"30/s, a key of {KEY_RATE}/s, a type of {TYPE_RATE}/s, {phase_s:g} s a clock",
            faults=f"API and two nodes {BESIDE_S // 60} min apart by libfaketime: {', '.join(PHASES)}",
            counts=findings.counts | {"early starts": early_runs, "false rescues": rescues},
            worst=f"a job started {earliest_s * 1000:.1f} ms after it was due at the soonest; "
            f"the key passed {max(one.passed / one.most for one in asked.values()):.0%} of what it may",
            bound="0 early, 0 rescues, burst + rate × T, no negative duration",
            seed=case.seed,
        )


async def skews(case: System) -> dict[str, tuple[float, float]]:
    """Return how far behind and ahead the clocks were, in seconds, by what their processes wrote down.

    The API dates the ids of jobs, job processes the lines of their ledger.
    """
    true = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    rows = await case.ask("select id::text, extract(epoch from created_at)::float8 from taskd.jobs")
    found = {
        "api": [int(job_id.replace("-", "")[:12], 16) / 1000 - float(made) for job_id, made in rows],
        "nodes": [run.started_at - run.started - true for run in read_ledger(case.ledger)],
    }
    return {name: (min(values), max(values)) for name, values in found.items()}
