"""F25 and F26 of the fault plan: hostile clients in numbers, and what is too large (`make faults`)."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import Counter

import pytest

from tests.faults.rig.cluster import Cluster
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system
from tests.security.crowd import Crowd, forget_peak, open_files, peak, post, rss, submit_for

pytestmark = pytest.mark.fault

MIB = 1 << 20
CLOSED_S = 15.0
P99_S = 0.250
RSS_MOST = 300_000_000
EACH_MOST = 2_000_000
ROW_MOST = round(1.2 * MIB)
RESULT_MOST, ERROR_MOST = 64 << 10, 8 << 10
WATCH_S = CLOSED_S + 2.0


async def test_f25_hostile_clients(durable: Cluster, report: Report) -> None:
    drippers, idle = round(scaled(2000, 200)), round(scaled(10_000, 1000))
    readers = round(scaled(200, 50))
    async with system(durable) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        with open_files(2 * drippers + idle + readers + 500):
            hostile = Crowd(case.port, case.key)
            # The normal client is there first: at the very limit of connections it is the newcomers who wait.
            normal = asyncio.create_task(
                submit_for(case.port, case.key, b'{"type":"noop","payload":{}}', WATCH_S)
            )
            hostile.gather(drippers=drippers, idle=idle, readers=readers)
            took = await normal
            memory = max(rss(child.pid) for child in case.units["api"].children)
            closed = list(hostile.lasted)
            await hostile.close()

        p99_s = statistics.quantiles(took, n=100)[98]
        refusals = [head for head in hostile.heads if head[9:12] in (b"429", b"503")]
        print(f"p99 {p99_s:.3f} s of {len(took)}, {len(closed)} closed, {memory} bytes, {hostile.answers}")
        assert len(closed) == 2 * drippers, "all drippers are closed"
        assert max(closed) <= CLOSED_S
        assert hostile.answers <= {b"HTTP/1.1 408 ", b"HTTP/1.1 503 ", b""}
        assert all(b"retry-after:" in head.lower() for head in refusals)
        assert p99_s < P99_S
        assert memory < RSS_MOST
        report.add(
            case="F25 hostile clients",
            load=f"one client that submits {len(took) / WATCH_S:.0f}/s, 2 API processes",
            faults=f"{drippers} drip heads, {drippers} bodies, {idle} idle connections, {readers} never read",
            counts={"drippers closed": len(closed)},
            worst=f"p99 {p99_s * 1000:.0f} ms, last dripper closed after {max(closed):.1f} s, "
            f"{memory / 1e6:.0f} MB in one API process",
            bound=f"{P99_S * 1000:g} ms, {CLOSED_S:g} s, 300 MB",
            seed=case.seed,
        )


async def flood(case: System, count: int, length: int, body: bytes) -> tuple[Counter[tuple[int, str]], float]:
    """Post so often at once; returns the answers, and by how much the API grew at its peak for each."""
    processes = [child.pid for child in case.units["api"].children]
    before = sum(map(rss, processes))
    for pid in processes:
        forget_peak(pid)
    answers = await asyncio.gather(*(post(case.port, case.key, length, body) for _ in range(count)))
    grown = sum(map(peak, processes)) - before
    return Counter(answers), grown / count


async def test_f26_sizes(durable: Cluster, report: Report) -> None:
    rounds = round(scaled(5, 1))
    huge, large = 10_000_000, MIB - 100
    wrapping = len(json.dumps({"type": "noop", "payload": {"n": 0, "v": ""}}))
    body = json.dumps({"type": "sponge", "payload": {"n": 0, "v": "x" * (large - wrapping - 4)}}).encode()
    async with system(durable, concurrency=8) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        for _ in range(20):  # each process has done all of it once: what is loaded then is no growth
            await post(case.port, case.key, len(body), body)
        refused: Counter[tuple[int, str]] = Counter()
        taken: Counter[tuple[int, str]] = Counter()
        grown: dict[str, float] = {"10 MB": 0.0, "1 MiB": 0.0}
        for _ in range(rounds):
            # Of each only what may be on its way when the refusal comes: nobody reads it.
            answers, each = await flood(case, 200, huge, b"x" * 1000)
            refused += answers
            grown["10 MB"] = max(grown["10 MB"], each)
            answers, each = await flood(case, 50, len(body), body)
            taken += answers
            grown["1 MiB"] = max(grown["1 MiB"], each)

        await case.quiet(60)
        supervisor = case.units["one"].pid
        for what, size in (("result", 50_000_000), ("error", 50_000_000), ("line", 5_000_000)):
            forget_peak(supervisor)
            before = rss(supervisor)
            ask = {"type": "bulky", "payload": {"n": 0, "what": what, "size": size}, "max_attempts": 1}
            status, answer = await case.request("POST", "/jobs", ask, key=True)
            assert status == 200, answer
            await case.quiet(60)
            grown[what] = peak(supervisor) - before

        print(f"{refused} {taken} {grown}")
        ended = await case.ask(
            "select j.payload::jsonb->>'what', o.status, octet_length(o.result::text), octet_length(o.error) "
            "from taskd.jobs as j join taskd.outcomes as o on o.id = j.id where j.type = 'bulky' order by 1"
        )
        rows = await case.ask(
            "select max(octet_length(j.*::text)), max(octet_length(o.*::text)), max(pg_column_size(j.*)) "
            "from taskd.jobs as j join taskd.outcomes as o on o.id = j.id"
        )
        history = await case.ask("select max(octet_length(h.*::text)) from taskd.history as h")
        widest = max(size or 0 for size in (*rows[0], *history[0]))
        assert set(refused) == {(413, "too_large")}
        assert {status for status, _ in taken} <= {200, 503}
        assert taken[200, ""] > 0
        assert max(grown.values()) <= EACH_MOST, grown
        assert ended[0][:2] == ("error", "failed")
        assert 0 < ended[0][3] <= ERROR_MOST
        assert ended[1] == ("line", "completed", 4, None)
        assert ended[2][1] == "completed"
        assert (ended[2][2] or 0) <= 4, "a result that is too large is null"
        assert widest <= ROW_MOST
        assert len(case.units["one"].children) >= 2
        report.add(
            case="F26 sizes",
            load=f"{rounds} × 200 bodies of 10 MB at once, 50 of 1 MiB at once",
            faults="a result of 50 MB, an error of 50 MB, a line of 5 MB",
            counts={"refused with 413": refused.total(), "1 MiB stored": taken[200, ""]},
            worst=f"an API grew by {grown['10 MB'] / 1e6:.2f} MB for each of 10 MB, "
            f"{grown['1 MiB'] / 1e6:.2f} MB for each of 1 MiB; a supervisor by "
            f"{max(grown[what] for what in ('result', 'error', 'line')) / 1e6:.2f} MB; "
            f"widest row {widest / MIB:.2f} MiB",
            bound="2 MB each, 1.2 MiB",
            seed=case.seed,
        )
