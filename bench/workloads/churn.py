"""Submit and work without pause for a while: alone, beside an old open transaction, while rows are pruned.

A held snapshot keeps every dead row of the queue in place.
"""

from __future__ import annotations

import threading
import time

import psycopg

from bench.cluster import StatementLog, claim_p99_ms
from bench.system import DATABASE, MAIL, Setup, System
from bench.workloads.drain import fill_due, first_claim, store_ended

AHEAD = 50_000
"""Jobs stored beyond those known to have ended, so that jobs always wait; the count is a second old."""
AFTER = 50_000
"""Jobs that are drained after a held snapshot's churn, due all at once."""


def churn(run: System, seconds: float) -> dict[str, float]:
    """Jobs done a second while others are stored by `submit_many`."""
    run.clear()
    return _churn(run, seconds, Setup())


def pruning(run: System, seconds: float, ended: int) -> dict[str, float]:
    """The same while jobs that ended two hours ago are deleted, of which there are `ended`."""
    run.clear()
    store_ended(run, ended)
    found = _churn(run, seconds, Setup(retention={"completed": "1h"}))
    left = run.query("select count(*) from taskd.outcomes where node is null")[0][0]
    return {**found, "pruned_per_s": round((ended - left) / seconds)}


def held(run: System, seconds: float) -> dict[str, float]:
    """The same under an open REPEATABLE READ transaction, and then a drain under it."""
    run.clear()
    with psycopg.connect(run.url) as holder:
        holder.execute("set transaction isolation level repeatable read")
        holder.execute("select count(*) from taskd.queue")
        found = _churn(run, seconds, Setup(), drain=True)
        holder.rollback()
    return found


def _churn(run: System, seconds: float, setup: Setup, *, drain: bool = False) -> dict[str, float]:
    with StatementLog(run.cluster, DATABASE) as log, run.daemon("worker", setup):
        stop = threading.Event()
        feeder = threading.Thread(target=_feed, args=(run, stop))
        feeder.start()
        try:
            began = first_claim(run)
            time.sleep(seconds)
        finally:
            stop.set()
            feeder.join()
        run.empty(60)
        after = {"drain_per_s": _drain(run)} if drain else {}
    windows: dict[int, float] = dict(
        run.query(
            "select floor(extract(epoch from finished_at - %s) / 10)::int, count(*)::float8 / 10 "
            "from taskd.outcomes where node is not null group by 1",
            began,
        )
    )
    whole = int(seconds // 10)
    return {
        "seconds": seconds,
        "per_s": round(sum(windows.get(n, 0.0) for n in range(whole)) / whole),
        "first_10_s_per_s": round(windows.get(0, 0.0)),
        "last_10_s_per_s": round(windows.get(whole - 1, 0.0)),
        **after,
        "claim_p99_ms": claim_p99_ms(log.statements),
    }


def _drain(run: System) -> float:
    """Drain jobs that are due all at once and return jobs a second from then to the last end."""
    due = fill_due(run, AFTER)
    run.empty(60)
    ended = run.query("select max(finished_at) from taskd.outcomes")[0][0]
    return float(round(AFTER / (ended - due).total_seconds()))


def _feed(run: System, stop: threading.Event) -> None:
    """Keep some jobs waiting until told to stop."""
    job = f'{{"type":"echo","payload":{MAIL}}}'
    many = f"[{','.join([job] * 1000)}]"
    done = (
        b"select pg_stat_get_tuples_inserted('taskd.outcomes'::regclass) "
        b"from (select pg_stat_clear_snapshot()) as fresh"
    )
    with psycopg.connect(run.url, autocommit=True) as conn:
        start = conn.execute(done).fetchall()[0][0]
        sent = 0
        while not stop.is_set():
            if sent - (conn.execute(done).fetchall()[0][0] - start) < AHEAD:
                conn.execute("select count(*) from taskd.submit_many(%s)", [many])
                sent += 1000
            else:
                time.sleep(0.01)
