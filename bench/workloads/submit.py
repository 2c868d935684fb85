"""How fast jobs are taken in: over HTTP one by one and in bulk, by SQL, and while a worker runs them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from bench import load, producers
from bench.system import MAIL, System
from bench.workloads.drain import first_claim, rate

Key = Mapping[str, str]

BODY = f'{{"type":"mail","payload":{MAIL}}}'


def http(run: System, key: Key, count: int, connections: int, body: str = BODY) -> dict[str, float]:
    """Durable submits a second, one job a request; key, rate limit and payload schema are checked."""
    run.clear()
    outcome = load.run(load.Plan(run.port, "/jobs", body, count, connections, key))
    outcome.expect(count)
    _stored(run, count)
    return {
        "jobs": count,
        "connections": connections,
        "per_s": round(outcome.rate),
        "p50_ms": round(outcome.quantile_ms(0.5), 2),
        "p99_ms": round(outcome.quantile_ms(0.99), 2),
        "client_us": round(outcome.client_us, 1),
    }


def large(run: System, key: Key, count: int) -> dict[str, float]:
    """The same with payloads of 64 KiB, 32 connections, and then their drain."""
    text = "x" * (64 * 1024 - len('{"text":""}'))
    found = http(run, key, count, 32, f'{{"type":"noop","payload":{{"text":"{text}"}}}}')
    run.cluster.settle()
    with run.daemon("worker"):
        began = first_claim(run)
        run.empty(60)
    return {**found, "drain_per_s": rate(run, count, began)}


def bulk(run: System, key: Key, count: int, connections: int = 4) -> dict[str, float]:
    """Durable submits a second in requests of a thousand."""
    run.clear()
    body = f'{{"jobs":[{",".join([BODY] * 1000)}]}}'
    outcome = load.run(load.Plan(run.port, "/jobs/bulk", body, count // 1000, connections, key))
    outcome.expect(count // 1000)
    _stored(run, count)
    return {
        "jobs": count,
        "connections": connections,
        "per_s": round(1000 * outcome.rate),
        "p50_ms": round(outcome.quantile_ms(0.5), 1),
    }


def sql(run: System, count: int, connections: int = 32) -> dict[str, float]:
    """Calls of `taskd.submit` a second, each a transaction, without wake."""
    run.clear()
    statement = "select taskd.submit('mail', $1)"
    outcome = producers.run(producers.Plan(run.url, statement, MAIL, count, connections))
    _stored(run, count)
    return {
        "jobs": count,
        "connections": connections,
        "per_s": round(outcome.per_s),
        "client_us": round(outcome.client_us, 1),
    }


def sql_many(run: System, count: int) -> dict[str, float]:
    """Jobs a second by `taskd.submit_many` with a thousand, one connection."""
    run.clear()
    statement = "select job_id from taskd.submit_many($1)"
    jobs = json.dumps([{"type": "mail", "payload": json.loads(MAIL)}] * 1000)
    outcome = producers.run(producers.Plan(run.url, statement, jobs, count // 1000, 1))
    _stored(run, count)
    return {"jobs": count, "per_s": round(1000 * outcome.per_s)}


def together(run: System, key: Key, count: int, connections: int = 32) -> dict[str, float]:
    """Submit one by one over HTTP while a worker runs the jobs; each exactly once."""
    run.clear()
    with run.daemon("worker"):
        running = load.Running(load.Plan(run.port, "/jobs", BODY, count, connections, key))
        began = first_claim(run)
        outcome = running.outcome(120)
        outcome.expect(count)
        run.empty(120)
    return {
        "jobs": count,
        "done_per_s": rate(run, count, began),
        "submit_per_s": round(outcome.rate),
        "p99_ms": round(outcome.quantile_ms(0.99), 2),
        "client_us": round(outcome.client_us, 1),
    }


def _stored(run: System, count: int) -> None:
    stored = run.query("select count(*) from taskd.jobs")[0][0]
    if stored != count:
        raise RuntimeError(f"{stored} of {count} jobs were stored")
