"""What taskd costs when there is nothing to do, and how fast it starts."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from bench.cluster import StatementLog
from bench.procs import cpu_s, family, pss_mib
from bench.system import DATABASE, ROOT, Setup, System

PLAIN = Setup(handlers=False)
"""What is there after an installation: `echo`, and nothing that needs a process of its own."""


def idle(run: System, seconds: float) -> dict[str, float]:
    """CPU, transactions, memory and connections of an API process, a supervisor and two children."""
    run.clear()
    with (
        StatementLog(run.cluster, DATABASE) as log,
        run.daemon("api", PLAIN) as api,
        run.daemon("worker", PLAIN) as worker,
    ):
        time.sleep(5)  # until all that belongs to the start is done
        pids = family(worker.pid) + family(api.pid)
        before, first = cpu_s(pids), len(_transactions(log))
        store = run.cluster.cpu_s()
        time.sleep(seconds)
        used, transactions = cpu_s(pids) - before, len(_transactions(log)) - first
        stored = run.cluster.cpu_s() - store
        connections = run.query("select count(*) from pg_stat_activity where application_name like 'taskd%%'")
        memory = pss_mib(pids)
    return {
        "cpu_percent": round(100 * used / seconds, 2),
        "store_cpu_percent": round(100 * stored / seconds, 2),
        "transactions_per_s": round(transactions / seconds, 2),
        "pss_mib": round(memory, 1),
        "processes": len(pids),
        "connections": connections[0][0],
    }


def _transactions(log: StatementLog) -> set[tuple[str, str]]:
    """Return the transactions of taskd in the log so far: by virtual number, which each has one of."""
    return {(one.application, one.transaction) for one in log.read() if one.application.startswith("taskd")}


def start(run: System) -> dict[str, float]:
    """How long `taskd --help` takes, and `taskd up` until it is ready, with a database that exists."""
    run.clear()
    helps = []
    for _ in range(10):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "taskd", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True
        )
        helps.append(1000 * (time.perf_counter() - started))
    ready = []
    for _ in range(3):
        started = time.perf_counter()
        with run.daemon("up", PLAIN):
            ready.append(1000 * (time.perf_counter() - started))
    return {"help_ms": round(statistics.median(helps)), "ready_ms": round(statistics.median(ready))}
