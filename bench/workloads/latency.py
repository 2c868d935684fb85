"""From a submit to the start of the handler, by one clock that the client and the handler read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping

import psycopg
from psycopg import pq

from bench import load
from bench.system import System

Key = Mapping[str, str]

_BODY = f'{{"type":"stamp","payload":{{"n":"{load.NUMBER}"}}}}'
PAUSE_S = 0.03
"""Between two jobs on an idle queue."""


def sql(run: System, count: int) -> dict[str, float]:
    """Idle queue, `taskd.submit(..., wake => true)`: from before the call to the handler."""
    run.clear()
    statement = b"select taskd.submit('stamp', $1, wake => true)"
    sent = []
    with run.daemon("worker"):
        time.sleep(1)
        conn = pq.PGconn.connect(run.url.encode())
        conn.prepare(b"s", statement)
        for number in range(count):
            time.sleep(PAUSE_S)
            payload = json.dumps({"n": load.NUMBER % number}).encode()
            sent.append(time.monotonic())
            result = conn.exec_prepared(b"s", [payload])
            if result.status != pq.ExecStatus.TUPLES_OK:
                raise RuntimeError(result.error_message.decode(errors="replace"))
        conn.finish()
        run.empty(10)
    return _waits(run, sent)


def http(run: System, key: Key, count: int) -> dict[str, float]:
    """Idle queue, `POST /jobs`: from when the request was sent to the handler."""
    run.clear()
    with run.daemon("worker"):
        time.sleep(1)
        plan = load.Plan(run.port, "/jobs", _BODY, count, 1, key, rate=1 / PAUSE_S)
        outcome = load.run(plan, 30 + 2 * count * PAUSE_S)
        outcome.expect(count)
        run.empty(10)
    found = _waits(run, outcome.sent)
    return {**found, "answer_p50_ms": round(outcome.quantile_ms(0.5), 2)}


def loaded(run: System, key: Key, per_s: float, seconds: float) -> dict[str, float]:
    """Over HTTP with 32 connections at a steady pace, every job a stamp."""
    run.clear()
    with run.daemon("worker"):
        time.sleep(1)
        plan = load.Plan(run.port, "/jobs", _BODY, int(per_s * seconds), 32, key, rate=per_s)
        outcome = load.run(plan, seconds * 2 + 60)
        outcome.expect(plan.count)
        run.empty(30)
    found = _waits(run, outcome.sent)
    return {**found, "offered_per_s": round(per_s), "answer_p99_ms": round(outcome.quantile_ms(0.99), 2)}


def steady(run: System, key: Key, per_s: float, seconds: float) -> dict[str, float]:
    """The same for minutes: the latency of the first of them and of the last, and what the tables grew to."""
    run.clear()
    with run.daemon("worker"):
        time.sleep(1)
        plan = load.Plan(run.port, "/jobs", _BODY, int(per_s * seconds), 32, key, rate=per_s)
        running = load.Running(plan)
        sizes: list[tuple[float, dict[str, float]]] = []
        stop = threading.Event()
        watch = threading.Thread(target=_watch, args=(run, sizes, stop))
        watch.start()
        try:
            outcome = running.outcome(seconds * 2 + 60)
        finally:
            stop.set()
            watch.join()
        outcome.expect(plan.count)
        run.empty(30)
    part = min(0.5, 60 / seconds)
    share = len(sizes) // 2
    grown = max(size["queue_mib"] for _, size in sizes[share:]) if sizes else 0.0
    before = max(size["queue_mib"] for _, size in sizes[:share]) if share else 0.0
    return {
        "seconds": seconds,
        "offered_per_s": round(per_s),
        **_waits(run, outcome.sent),
        **{f"first_{name}": value for name, value in _waits(run, outcome.sent, 0.0, part).items()},
        **{f"last_{name}": value for name, value in _waits(run, outcome.sent, 1 - part, 1.0).items()},
        "queue_first_half_mib": round(before, 1),
        "queue_last_half_mib": round(grown, 1),
        **{name: round(value, 1) for name, value in _sizes(run).items()},
    }


def scheduled(run: System, count: int) -> dict[str, float]:
    """How much later than its `run_at` the handler of a scheduled job starts, on an idle node."""
    run.clear()
    with run.daemon("worker"):
        with psycopg.connect(run.url, autocommit=True) as conn:
            # what the database's clock and ours differ by is one number, for they are of one machine
            before = time.monotonic()
            epoch = float(conn.execute("select extract(epoch from clock_timestamp())").fetchall()[0][0])
            offset = (before + time.monotonic()) / 2 - epoch
            due = []
            for number in range(count):
                at = epoch + 2 + number * 0.0173
                due.append(at + offset)
                payload = json.dumps({"n": load.NUMBER % number})
                conn.execute("select taskd.submit('stamp', %s, run_at => to_timestamp(%s))", [payload, at])
        run.empty(60)
    return _waits(run, due)


def _waits(run: System, sent: object, first: float = 0.0, last: float = 1.0) -> dict[str, float]:
    times: list[float] = list(sent)  # type: ignore[call-overload]
    started: dict[int, float] = {}
    for line in run.stamps.read_text().splitlines():
        number, at = line.split()
        started.setdefault(int(number), int(at) / 1e9)
    if len(started) != len(times):
        raise RuntimeError(f"{len(started)} of {len(times)} handlers started")
    chosen = range(int(first * len(times)), int(last * len(times)))
    waits = sorted(1000 * (started[number] - times[number]) for number in chosen)
    return {
        "jobs": len(waits),
        "p50_ms": round(waits[len(waits) // 2], 2),
        "p99_ms": round(waits[int(0.99 * len(waits))], 2),
        "max_ms": round(waits[-1], 2),
    }


def _sizes(run: System) -> dict[str, float]:
    return {
        f"{name}_mib": float(size) / 2**20
        for name, size in run.query(
            "select c.relname, pg_total_relation_size(c.oid) from pg_class as c "
            "where c.oid in ('taskd.jobs'::regclass, 'taskd.queue'::regclass, 'taskd.outcomes'::regclass)"
        )
    }


def _watch(run: System, sizes: list[tuple[float, dict[str, float]]], stop: threading.Event) -> None:
    while not stop.wait(5):
        sizes.append((time.monotonic(), _sizes(run)))
