"""PostgreSQL alone, as a yardstick for the same run: a plain one-table queue, and plain INSERTs.

What any queue on this machine could reach at most if its rows had no history, limits or keys. On libpq
and prepared. `drain` claims 500 rows with one UPDATE and settles them with another.
"""

from __future__ import annotations

import json
import threading
import time

import psycopg
from psycopg import pq

from bench import producers
from bench.cluster import Cluster
from bench.system import MAIL

DATABASE = "raw"
BATCH = 500

_TABLE = (
    "drop table if exists queue",
    "create table queue (id bigserial primary key, type text not null, payload jsonb not null, "
    "status text not null default 'pending', attempts integer not null default 0, "
    "run_at timestamptz not null default now(), created_at timestamptz not null default now(), "
    "started_at timestamptz, finished_at timestamptz, result jsonb)",
    "create index on queue (run_at, id) where status = 'pending'",
)
_CLAIM = (
    "update queue set status = 'processing', attempts = attempts + 1, started_at = now() "
    "where ctid = any(array(select ctid from queue where status = 'pending' and run_at <= now() "
    f"order by run_at, id limit {BATCH} for update skip locked)) returning id, type, payload"
)
_SETTLE = (
    "update queue set status = 'completed', finished_at = now(), result = 'null' where id = any($1::bigint[])"
)
_INSERT = "insert into queue (type, payload) values ('mail', $1)"
_ARRAY = (
    "insert into queue (type, payload) "
    "select e->>'type', e->'payload' from jsonb_array_elements($1::jsonb) as e"
)


def drain(cluster: Cluster, count: int, clients: int) -> dict[str, float]:
    """Rows claimed and settled a second by so many clients, and the CPU that a row cost."""
    url = _table(cluster)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            "insert into queue (type, payload) select 'mail', %s from generate_series(1, %s)",
            [MAIL, count],
        )
        conn.execute("vacuum analyze queue")
    cluster.settle()
    own, server = time.process_time(), cluster.cpu_s()
    started = time.perf_counter()
    done: list[int] = []
    threads = [threading.Thread(target=_work, args=(url, done)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if sum(done) != count:
        raise RuntimeError(f"{sum(done)} of {count} rows were settled")
    own, server = time.process_time() - own, cluster.cpu_s() - server
    cluster.drop(DATABASE)
    return {
        "jobs": count,
        "per_s": round(count / seconds),
        "worker_cpu_us_per_job": round(1e6 * own / count, 1),
        "server_cpu_us_per_job": round(1e6 * server / count, 1),
    }


def submit(cluster: Cluster, count: int, connections: int = 32) -> dict[str, float]:
    """INSERTs of one row a second, each a transaction, over many connections."""
    url = _table(cluster)
    outcome = producers.run(producers.Plan(url, _INSERT, MAIL, count, connections))
    cluster.drop(DATABASE)
    return {
        "jobs": count,
        "connections": connections,
        "per_s": round(outcome.per_s),
        "client_us": round(outcome.client_us, 1),
    }


def bulk(cluster: Cluster, count: int) -> dict[str, float]:
    """Rows a second by INSERTs of a thousand, and by COPY."""
    url = _table(cluster)
    many = json.dumps([{"type": "mail", "payload": json.loads(MAIL)}] * 1000)
    outcome = producers.run(producers.Plan(url, _ARRAY, many, count // 1000, 1))
    text = f"mail\t{MAIL}\n".encode() * 1000
    with psycopg.connect(url, autocommit=True) as conn:
        started = time.perf_counter()
        with conn.cursor() as cursor, cursor.copy("copy queue (type, payload) from stdin") as copy:
            for _ in range(count // 1000):
                copy.write(text)
        copied_s = time.perf_counter() - started
    cluster.drop(DATABASE)
    return {"jobs": count, "per_s": round(outcome.per_s * 1000), "copy_per_s": round(count / copied_s)}


def _table(cluster: Cluster) -> str:
    url = cluster.fresh(DATABASE)
    with psycopg.connect(url, autocommit=True) as conn:
        for statement in _TABLE:
            conn.execute(statement.encode())
    cluster.settle()
    return url


def _work(url: str, done: list[int]) -> None:
    """Claim and settle until nothing is left; append how many it were."""
    conn = pq.PGconn.connect(url.encode())
    conn.prepare(b"claim", _CLAIM.encode())
    conn.prepare(b"settle", _SETTLE.encode())
    mine = 0
    while True:
        claimed = conn.exec_prepared(b"claim", [])
        if claimed.status != pq.ExecStatus.TUPLES_OK:
            raise RuntimeError(claimed.error_message.decode(errors="replace"))
        if not claimed.ntuples:
            break
        ids = b",".join(claimed.get_value(row, 0) or b"" for row in range(claimed.ntuples))
        settled = conn.exec_prepared(b"settle", [b"{%b}" % ids])
        if settled.status != pq.ExecStatus.COMMAND_OK:
            raise RuntimeError(settled.error_message.decode(errors="replace"))
        mine += settled.command_tuples or 0
    conn.finish()
    done.append(mine)
