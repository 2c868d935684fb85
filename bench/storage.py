"""Measure the storage layouts of the job table against each other, on a PostgreSQL of its own.

One command, `python bench/storage.py [--short]`: starts a throw-away cluster (Unix socket only, fsync
and synchronous_commit on), measures every layout in turn and removes the cluster, also when it fails or is
interrupted. Prints JSON and a markdown table; docs/decisions/0001-storage.md holds what was decided from it.

Layouts
    one-70, one-50  one table with all indexes of the real system, fillfactor 70 and 50
    one-lean        as one-70 without the retention and node indexes, so that the split doesn't win by
                    indexes that it merely leaves out
    split3          jobs (insert only), queue (hot, narrow; row deleted at settle), outcomes (insert only)
    split2          as split3, but the outcome is an update of the jobs row (fillfactor 70)

All layouts claim by the same rule: one lane per (type, priority) and a floor `(run_at, id)` per lane. Floors
advance by the horizon: to where the claims stood at a moment when every transaction then open has ended.

Only ratios between layouts of one run carry over to another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

BINDIR = Path("/usr/lib/postgresql/15/bin")
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "256MB",
    "jit": "off",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "listen_addresses": "",
}
BATCH = 500
PAYLOADS = (150, 1200)  # bytes of JSON text
CLIENTS = [UUID(int=0x0190_0000_0000_7000_8000_0000_0000_0000 + n) for n in range(10)]
UNIQUE_EVERY = 5  # every fifth job carries a unique key
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
NODE = 7
RENEW_S = 0.25  # how often floors try to advance
WINDOW_S = 4.0  # width of the windows in which the held-snapshot rate is taken

Lane = tuple[str, int]
Mark = tuple[datetime, UUID]

# ---------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to store jobs: how the tables are made and the three hot statements."""

    tables: str
    indexes: str
    insert: str
    claim: str
    settle: str
    fill: str
    """Loads `:rows` finished jobs before the indexes are made."""
    names: tuple[str, ...]
    """The tables, for truncate, vacuum and sizes."""


_COLUMNS = "id, client, type, priority, run_at, created_at, payload, tags, unique_key"
_ARRIVING = """
    select v.id, v.client, v.type, v.priority, now(), now(), v.payload::jsonb, '{}'::text[], v.unique_key
    from unnest(%(ids)s::uuid[], %(clients)s::uuid[], %(types)s::text[], %(priorities)s::smallint[],
                %(payloads)s::text[], %(unique_keys)s::text[])
        as v (id, client, type, priority, payload, unique_key)"""

# Within a type the lanes are tried best first: the function scan keeps the order of the arrays, and the
# outer limit stops pulling (and so locking) as soon as the type has what it wants.
_PICKED = """
with picked as materialized (
    select job.tid
    from unnest(%(types)s::text[], %(limits)s::int[]) as want (type, n)
    cross join lateral (
        select head.tid
        from unnest(%(lane_types)s::text[], %(lane_priorities)s::smallint[],
                    %(floor_ats)s::timestamptz[], %(floor_ids)s::uuid[]) as lane (type, priority, at, id)
        cross join lateral (
            select ctid as tid from {table}
            where {waiting}
              and type = lane.type
              and priority = lane.priority
              and (run_at, id) >= (lane.at, lane.id)
              and run_at <= now()
            order by run_at, id
            limit want.n
            for update skip locked
        ) as head
        where lane.type = want.type
        limit want.n
    ) as job
)"""

# uuid v7 look-alikes: 48 bits of milliseconds, spread over the last week, then noise.
_FINISHED = """
    select (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7'
            || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid as id,
           ('01900000-0000-7000-8000-00000000000' || n % 10)::uuid as client,
           't' || n % 20 as type, (n % 5)::smallint as priority, at as run_at, at as created_at,
           jsonb_build_object('to', repeat(md5(n::text), 4), 'n', n) as payload, '{}'::text[] as tags,
           case when n % 5 = 0 then 'old' || n end as unique_key
    from generate_series(1, :rows) as n,
         lateral (select now() - interval '7 days' + n * interval '7 days' / (:rows + 1.0) as at) as t"""

# Verdicts travel as one jsonb object keyed by id and are looked up, not joined: with `unnest(..) as v` the
# planner expects one row on the other side and may choose a nested loop of 500 x 500 (seen:
# 4 ms became 32 to 58 ms), which would compare plans instead of layouts.


def _one(fillfactor: int, *, lean: bool) -> Layout:
    indexes = """
        alter table jobs add primary key (id);
        create index jobs_claim on jobs (type, priority desc, run_at, id) where status = 1;
        create index jobs_client on jobs (client, id);
        create unique index jobs_unique on jobs (client, unique_key) where unique_key is not null;"""
    if not lean:
        indexes += """
        create index jobs_retention on jobs (finished_at) where status >= 3;
        create index jobs_node on jobs (node) where status = 2;"""
    return Layout(
        tables=f"""
            create table jobs (
                id uuid not null, client uuid not null, type text collate "C" not null,
                priority smallint not null,
                run_at timestamptz not null, status smallint not null default 1,
                attempts smallint not null default 0, max_attempts smallint not null default 3,
                node bigint, claim bigint, created_at timestamptz not null, started_at timestamptz,
                finished_at timestamptz, payload jsonb not null, result jsonb, error text,
                tags text[] not null, unique_key text
            ) with (fillfactor = {fillfactor});""",
        indexes=indexes,
        insert=f"insert into jobs ({_COLUMNS}) {_ARRIVING}",
        claim=_PICKED.format(table="jobs", waiting="status = 1")
        + """
            update jobs set status = 2, attempts = attempts + 1, node = %(node)s, claim = %(claim)s,
                            started_at = now()
            where ctid = any(array(select tid from picked))
            returning id, type, priority, run_at, attempts, started_at, payload::text""",
        # written so that it can't use jobs_node, where dead entries of the node pile up
        settle="""
            update jobs set status = 3, finished_at = now(), result = %(verdicts)s -> id::text -> 'result'
            where id = any(%(ids)s::uuid[])
              and status > 1 and status < 3 and node is not distinct from %(node)s and claim = %(claim)s
            returning id""",
        fill=f"""
            insert into jobs ({_COLUMNS}, status, attempts, node, claim, started_at, finished_at, result)
            select f.*, 3, 1, {NODE}, 1, f.run_at, f.run_at, '{{"ok": true}}' from ({_FINISHED}) as f;""",
        names=("jobs",),
    )


def _split(*, outcomes: bool) -> Layout:
    ended = (
        ""
        if outcomes
        else """,
                status smallint, attempts smallint, node bigint, claim bigint, started_at timestamptz,
                finished_at timestamptz, result jsonb, error text"""
    )
    tables = f"""
            create table jobs (
                id uuid not null, client uuid not null, type text collate "C" not null,
                priority smallint not null,
                run_at timestamptz not null, max_attempts smallint not null default 3,
                created_at timestamptz not null, payload jsonb not null, tags text[] not null, unique_key text
                {ended}
            ) with (fillfactor = {100 if outcomes else 70});
            create table queue (
                id uuid not null, type text collate "C" not null,
                priority smallint not null,
                run_at timestamptz not null, claimed boolean not null default false,
                attempts smallint not null default 0, node bigint, claim bigint, started_at timestamptz
            ) with (fillfactor = 50);"""
    indexes = """
        alter table jobs add primary key (id);
        create index jobs_client on jobs (client, id);
        create unique index jobs_unique on jobs (client, unique_key) where unique_key is not null;
        alter table queue add primary key (id);
        create index queue_lane on queue (type, priority, run_at, id);"""
    gone = """
            with gone as (
                delete from queue
                where id = any(%(ids)s::uuid[]) and claimed and node = %(node)s and claim = %(claim)s
                returning id, attempts, started_at
            )"""  # split2 gets attempts and started_at back from the client: no join there either
    if outcomes:
        tables += """
            create table outcomes (
                id uuid not null, status smallint not null, attempts smallint not null, node bigint,
                claim bigint, started_at timestamptz, finished_at timestamptz not null,
                result jsonb, error text
            );"""
        indexes += "alter table outcomes add primary key (id);"
        settle = f"""{gone}
            insert into outcomes (id, status, attempts, node, claim, started_at, finished_at, result)
            select id, 3, attempts, %(node)s, %(claim)s, started_at, now(),
                   %(verdicts)s -> id::text -> 'result'
            from gone
            order by id
            returning id"""
        fill = f"""
            insert into jobs ({_COLUMNS}) {_FINISHED};
            insert into outcomes (id, status, attempts, node, claim, started_at, finished_at, result)
            select id, 3, 1, {NODE}, 1, run_at, run_at, '{{"ok": true}}' from jobs order by id;"""
    else:
        settle = f"""{gone}
            update jobs set status = 3, attempts = (%(verdicts)s -> id::text ->> 'attempts')::smallint,
                            node = %(node)s, claim = %(claim)s,
                            started_at = (%(verdicts)s -> id::text ->> 'started_at')::timestamptz,
                            finished_at = now(), result = %(verdicts)s -> id::text -> 'result'
            where id = any(array(select id from gone))
            returning id"""
        fill = f"""
            insert into jobs ({_COLUMNS}, status, attempts, node, claim, started_at, finished_at, result)
            select f.*, 3, 1, {NODE}, 1, f.run_at, f.run_at, '{{"ok": true}}' from ({_FINISHED}) as f;"""
    return Layout(
        tables=tables,
        indexes=indexes,
        insert=f"""
            with arriving as materialized ({_ARRIVING}),
                 kept as (insert into jobs ({_COLUMNS})
                          select * from arriving as a ({_COLUMNS}))
            insert into queue (id, type, priority, run_at)
            select id, type, priority, run_at from arriving as a ({_COLUMNS})""",
        claim=_PICKED.format(table="queue", waiting="not claimed")
        + """, taken as (
                update queue set claimed = true, attempts = attempts + 1, node = %(node)s, claim = %(claim)s,
                                 started_at = now()
                where ctid = any(array(select tid from picked))
                returning id, type, priority, run_at, attempts, started_at
            )
            select id, type, priority, run_at, attempts, started_at,
                   (select payload::text from jobs where jobs.id = taken.id)  -- a join could turn into n x n
            from taken""",
        settle=settle,
        fill=fill,
        names=("jobs", "queue", "outcomes") if outcomes else ("jobs", "queue"),
    )


LAYOUTS: Mapping[str, Layout] = {
    "one-70": _one(70, lean=False),
    "one-50": _one(50, lean=False),
    "one-lean": _one(70, lean=True),
    "split3": _split(outcomes=True),
    "split2": _split(outcomes=False),
}

# -------------------------------------------------------------------------------- the queue, driven


class Floors:
    """Where each lane's scan may start; owned by the one claiming loop of a measurement."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.floor: dict[Lane, Mark] = dict.fromkeys(lanes, (EARLIEST, UUID(int=0)))
        self._last = dict(self.floor)
        self._waiting: tuple[int, dict[Lane, Mark]] | None = None
        self._next_s = 0.0

    def claimed(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Note the claimed rows (id, type, priority, run_at, ..)."""
        last = self._last
        for row in rows:
            lane, mark = (row[1], row[2]), (row[3], row[0])
            if mark > last[lane]:
                last[lane] = mark

    def renew(self, conn: psycopg.Connection) -> None:
        """Advance by the horizon, at most every `RENEW_S`.

        A mark seen when the next transaction id was X becomes the floor once every id below X has ended:
        whoever might still have committed a row below the mark has by then done so. Enough for a benchmark
        with one claimer, not for the product: rows that another claim held locked and then rolled back
        stay behind.
        """
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + RENEW_S
        row = conn.execute(
            "select pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmax(s)::text::bigint"
            " from pg_current_snapshot() as s"
        ).fetchone()
        assert row is not None
        if self._waiting is not None:
            seen, marks = self._waiting
            if row[0] < seen:
                return
            self.floor = marks
        self._waiting = (row[1], dict(self._last))


@dataclass(slots=True, kw_only=True)
class Driver:
    """One connection that submits, claims and settles in statements of `BATCH` jobs."""

    conn: psycopg.Connection
    layout: Layout
    lanes: Sequence[Lane]
    payload: str
    floors: Floors = field(init=False)
    claim_no: int = 0
    claim_s: list[float] = field(default_factory=list)
    """Duration of each claim statement, as the client saw it."""

    def __post_init__(self) -> None:
        self.floors = Floors(self.lanes)

    def batch(self) -> dict[str, object]:
        """Make one batch of jobs, spread evenly over the lanes."""
        lanes = [self.lanes[n % len(self.lanes)] for n in range(BATCH)]
        ids = new_ids(BATCH)
        return {
            "ids": ids,
            "clients": [CLIENTS[n % len(CLIENTS)] for n in range(BATCH)],
            "types": [lane[0] for lane in lanes],
            "priorities": [lane[1] for lane in lanes],
            "payloads": [self.payload] * BATCH,
            "unique_keys": [i.hex if n % UNIQUE_EVERY == 0 else None for n, i in enumerate(ids)],
        }

    def insert(self, batch: Mapping[str, object]) -> float:
        """Store one batch; return the seconds it took."""
        begin = time.perf_counter()
        self.conn.execute(self.layout.insert, batch)
        return time.perf_counter() - begin

    def claim_and_settle(self) -> tuple[int, float]:
        """Claim up to `BATCH` jobs and settle them; return how many and the seconds of both statements."""
        self.floors.renew(self.conn)
        self.claim_no += 1
        token = {"node": NODE, "claim": self.claim_no}
        types = list(dict.fromkeys(lane[0] for lane in self.lanes))
        floor = self.floors.floor
        args = token | {
            "types": types,
            "limits": [BATCH // len(types)] * len(types),
            "lane_types": [lane[0] for lane in floor],
            "lane_priorities": [lane[1] for lane in floor],
            "floor_ats": [mark[0] for mark in floor.values()],
            "floor_ids": [mark[1] for mark in floor.values()],
        }

        begin = time.perf_counter()
        rows = self.conn.execute(self.layout.claim, args).fetchall()
        spent = time.perf_counter() - begin
        self.claim_s.append(spent)
        if not rows:
            return 0, spent
        self.floors.claimed(rows)
        ids = sorted(row[0] for row in rows)
        verdicts = Jsonb(
            {
                str(row[0]): {"result": {"ok": True}, "attempts": row[4], "started_at": row[5].isoformat()}
                for row in rows
            }
        )
        if any(row[6] is None for row in rows):
            raise RuntimeError("a claim came without its payload")

        begin = time.perf_counter()
        settled = self.conn.execute(self.layout.settle, token | {"ids": ids, "verdicts": verdicts}).fetchall()
        spent += time.perf_counter() - begin
        if len(settled) != len(rows):
            raise RuntimeError(f"claimed {len(rows)} jobs but settled {len(settled)}")
        return len(rows), spent


def new_ids(count: int) -> list[UUID]:
    """Return ascending version 7 UUIDs."""
    now_ms = time.time_ns() // 1_000_000
    head = now_ms << 80 | 0x7 << 76 | 0x8 << 60
    noise = sorted(secrets.randbits(72) for _ in range(count))
    return [UUID(int=head | (bits >> 60) << 64 | bits & ((1 << 60) - 1)) for bits in noise]


def json_of(size: int) -> str:
    """Return a JSON object of `size` bytes that hardly compresses, so that TOAST does not flatter anybody."""
    return json.dumps({"to": secrets.token_hex(size)[: size - 10]})


# ---------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured. The defaults take about ten minutes on two cores."""

    rounds: int = 3
    jobs: int = 40_000
    """Jobs a throughput measurement inserts, claims and settles."""
    finished: int = 1_000_000
    held_points_s: tuple[float, ...] = (0.0, 20.0, 40.0, 60.0)
    writer_points_s: tuple[float, ...] = (0.0, 20.0)
    held_backlog: int = 20_000


SHORT = Plan(
    rounds=1,
    jobs=5_000,
    finished=50_000,
    held_points_s=(0.0, 4.0),
    writer_points_s=(0.0, 4.0),
    held_backlog=5_000,
)


def throughput(server: Server, name: str, schema: str, payload: int, jobs: int) -> dict[str, float]:
    """Insert `jobs`, then claim and settle them all, one lane, one connection."""
    layout = LAYOUTS[name]
    with server.connect(schema) as conn:
        if schema.endswith("_0"):
            conn.execute("truncate " + ", ".join(layout.names))
        for table in layout.names:
            conn.execute(f"vacuum analyze {table}")
        conn.execute("checkpoint")
        driver = Driver(conn=conn, layout=layout, lanes=[("t1", 0)], payload=json_of(payload))
        before = wal_bytes(conn)
        insert_s = sum(driver.insert(driver.batch()) for _ in range(jobs // BATCH))
        done, work_s = 0, 0.0
        while done < jobs:
            count, spent = driver.claim_and_settle()
            if not count:
                raise RuntimeError(f"{schema}: {jobs - done} jobs were not found by the claim")
            done += count
            work_s += spent
        wal = wal_bytes(conn) - before
        return {
            "insert_per_s": jobs / insert_s,
            "work_per_s": jobs / work_s,
            "wal_per_job": wal / jobs,
            "mib": size_mib(conn, schema),
            "hot_percent": hot_percent(conn, schema),
        }


def held(server: Server, name: str, plan: Plan, *, writer: bool) -> dict[str, float]:
    """Work 20 types x 5 priorities while another session keeps a transaction open.

    It is a REPEATABLE READ reader, which keeps the dead rows but lets the floors advance; or, with `writer`,
    a transaction that has an id, at which the floors stand still too.

    Inserts and work alternate on one connection, so producers are exactly as fast as consumers; the rate
    counts the time of claim and settle alone.
    """
    layout = LAYOUTS[name]
    schema = f"{name.replace('-', '_')}_held"
    make(server, layout, schema, finished=0)
    points = plan.writer_points_s if writer else plan.held_points_s
    lanes = [(f"t{t}", p) for t in range(20) for p in (4, 3, 2, 1, 0)]
    result: dict[str, float] = {}
    with server.connect(schema) as conn, server.connect(schema) as reader:
        conn.execute("checkpoint")
        driver = Driver(conn=conn, layout=layout, lanes=lanes, payload=json_of(PAYLOADS[0]))
        for _ in range(plan.held_backlog // BATCH):
            driver.insert(driver.batch())
        reader.execute("begin isolation level repeatable read")
        reader.execute("select count(*) from jobs")
        if writer:
            reader.execute("select pg_current_xact_id()")
        windows = {point: [0.0, 0.0, 0.0] for point in points}
        done = 0
        whole, own = busy_s(), backend_cpu_s(conn) + time.process_time()
        start = time.monotonic()
        while (at := time.monotonic() - start) < points[-1] + WINDOW_S:
            driver.insert(driver.batch())
            cpu = backend_cpu_s(conn)
            count, spent = driver.claim_and_settle()
            cpu = backend_cpu_s(conn) - cpu
            done += count
            for point, window in windows.items():
                if point <= at < point + WINDOW_S:
                    window[0] += count
                    window[1] += spent
                    window[2] += cpu
        for point, (jobs, spent, cpu) in windows.items():
            result[f"at_{point:.0f}s"] = jobs / spent if spent else 0.0
            result[f"cpu_us_at_{point:.0f}s"] = 1e6 * cpu / jobs if jobs else 0.0
        elapsed = time.monotonic() - start
        own = backend_cpu_s(conn) + time.process_time() - own
        result["others_cores"] = (busy_s() - whole - own) / elapsed
        result["worst_claim_ms"] = 1000 * max(driver.claim_s)
        tail = sorted(driver.claim_s[-200:])
        result["last_claims_p99_ms"] = 1000 * tail[int(len(tail) * 0.99) - 1]
        result["jobs"] = done
        result["mib"] = size_mib(conn, schema)
        reader.execute("rollback")
        conn.execute(f"drop schema {schema} cascade")
    return result


def raw(server: Server, jobs: int) -> float:
    """Return jobs/s of the least there is: two updates of 500 rows by primary key on a bare table."""
    with server.connect("public") as conn:
        conn.execute("drop table if exists bare")
        conn.execute(
            "create table bare (id bigint primary key, status smallint not null) with (fillfactor = 50)"
        )
        conn.execute("insert into bare select n, 1 from generate_series(1, %s) as n", [jobs])
        conn.execute("vacuum analyze bare")
        conn.execute("checkpoint")
        begin = time.perf_counter()
        for first in range(1, jobs + 1, BATCH):
            ids = list(range(first, first + BATCH))
            for status in (2, 3):
                conn.execute(
                    "update bare set status = %s where id = any(%s::bigint[]) returning id", [status, ids]
                ).fetchall()
        return jobs / (time.perf_counter() - begin)


def make(server: Server, layout: Layout, schema: str, *, finished: int) -> None:
    """Create `layout` in a schema of its own with so many finished jobs."""
    with server.connect("public") as conn:
        conn.execute(f"create schema {schema}")
    with server.connect(schema) as conn:
        conn.execute(layout.tables)
        if finished:
            conn.execute("set synchronous_commit = off")
            conn.execute(layout.fill.replace(":rows", str(finished)))
        conn.execute(layout.indexes)
        for table in layout.names:
            conn.execute(f"vacuum (freeze, analyze) {table}")


def backend_cpu_s(conn: psycopg.Connection) -> float:
    """Return the CPU seconds of the server process behind `conn`, which neighbours hardly change."""
    return int(Path(f"/proc/{conn.info.backend_pid}/schedstat").read_text().split()[0]) / 1e9


def busy_s() -> float:
    """Return the CPU seconds that all processes of the machine together have used."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wal_bytes(conn: psycopg.Connection) -> int:
    """Return the position of the write-ahead log in bytes."""
    row = conn.execute("select (pg_current_wal_insert_lsn() - '0/0')::bigint").fetchone()
    assert row is not None
    return int(row[0])


def hot_percent(conn: psycopg.Connection, schema: str) -> float:
    """Return how many of all updates in `schema` so far touched no index, in percent."""
    conn.execute("select pg_stat_force_next_flush()")
    row = conn.execute(
        "select 100.0 * sum(n_tup_hot_upd) / greatest(sum(n_tup_upd), 1) from pg_stat_user_tables"
        " where schemaname = %s",
        [schema],
    ).fetchone()
    assert row is not None
    return float(row[0])


def size_mib(conn: psycopg.Connection, schema: str) -> float:
    """Return the size of all tables of `schema` with their indexes, in MiB."""
    row = conn.execute(
        "select sum(pg_total_relation_size(c.oid)) / 1048576.0 from pg_class as c"
        " where c.relkind = 'r' and c.relnamespace = %s::regnamespace",
        [schema],
    ).fetchone()
    assert row is not None
    return float(row[0])


# ---------------------------------------------------------------------------------------------- the cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running throw-away PostgreSQL."""

    socket_dir: Path

    def connect(self, schema: str) -> psycopg.Connection:
        """Return an autocommit connection with `schema` as its search path."""
        return psycopg.connect(
            host=str(self.socket_dir),
            user="bench",
            dbname="postgres",
            autocommit=True,
            options=f"-c search_path={schema}",
        )


@contextmanager
def cluster() -> Iterator[Server]:
    """Run a cluster in a temporary folder; it is stopped and removed whatever happens."""
    root = Path(tempfile.mkdtemp(prefix="taskd-storage-"))
    root.chmod(0o755)
    data = root / "data"
    data.mkdir(mode=0o700)
    who: dict[str, Any] = {}
    if os.geteuid() == 0:  # postgres refuses root
        owner = pwd.getpwnam("postgres")
        os.chown(data, owner.pw_uid, owner.pw_gid)
        who = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    server: subprocess.Popen[bytes] | None = None
    try:
        subprocess.run(
            [BINDIR / "initdb", "-D", data, "-U", "bench", "-A", "trust", "-E", "UTF8", "--locale=C"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=root,
            **who,
        )
        settings = [f"-c{key}={value}" for key, value in SETTINGS.items()]
        with (root / "log").open("wb") as log:
            server = subprocess.Popen(
                [BINDIR / "postgres", "-D", data, "-k", data, *settings],
                stdout=log,
                stderr=log,
                cwd=root,
                **who,
            )
        subprocess.run([BINDIR / "pg_isready", "-q", "-h", data, "-t", "1"], check=False)
        deadline = time.monotonic() + 30
        while True:
            try:
                Server(socket_dir=data).connect("public").close()
                break
            except psycopg.OperationalError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit((root / "log").read_text()) from None
                time.sleep(0.1)
        yield Server(socket_dir=data)
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # fast shutdown
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.send_signal(signal.SIGQUIT)
                server.wait()
        shutil.rmtree(root, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- the run


def measure(server: Server, plan: Plan) -> dict[str, Any]:
    """Run everything; layouts are interleaved, and each round starts with another one."""
    names = list(LAYOUTS)
    for name in names:
        for finished in (0, plan.finished):
            begin = time.monotonic()
            schema = f"{name.replace('-', '_')}_{finished}"
            make(server, LAYOUTS[name], schema, finished=finished)
            note(f"made {schema} in {time.monotonic() - begin:.0f} s")
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    raws: list[float] = []
    for number in range(plan.rounds):
        raws.append(raw(server, plan.jobs))
        note(f"round {number + 1}: raw {raws[-1]:.0f}/s")
        order = names[number % len(names) :] + names[: number % len(names)]
        for finished in (0, plan.finished):
            for payload in PAYLOADS:
                for name in order:
                    schema = f"{name.replace('-', '_')}_{finished}"
                    got = throughput(server, name, schema, payload, plan.jobs)
                    note(f"round {number + 1}: {schema} {payload} B: " + figures(got))
                    for key, value in got.items():
                        samples[name].setdefault(f"{key}/{payload}/{finished}", []).append(value)
    snapshot: dict[str, dict[str, float]] = {}
    for name in names:
        snapshot[name] = held(server, name, plan, writer=False)
        note(f"held snapshot: {name}: " + figures(snapshot[name]))
    writing: dict[str, dict[str, float]] = {}
    for name in ("one-70", "split3"):
        writing[name] = held(server, name, plan, writer=True)
        note(f"open writer: {name}: " + figures(writing[name]))
    return {
        "raw_per_s": raws,
        "samples": samples,
        "medians": {
            name: {key: statistics.median(values) for key, values in by_key.items()}
            for name, by_key in samples.items()
        },
        "held_snapshot": snapshot,
        "open_writer": writing,
    }


def figures(got: Mapping[str, float]) -> str:
    """Return figures on one line."""
    return ", ".join(f"{key} {value:.1f}" for key, value in got.items())


def note(text: str) -> None:
    """Tell how far the run is, on stderr, so that stdout stays JSON and table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def table(result: Mapping[str, Any], plan: Plan) -> str:
    """Return the medians as a markdown table, one column a layout."""
    names = list(LAYOUTS)
    rows: list[tuple[str, list[str]]] = []
    labels = {
        "insert_per_s": "insert, rows/s",
        "work_per_s": "claim + settle, jobs/s",
        "wal_per_job": "WAL, bytes/job",
        "mib": "tables + indexes after, MiB",
        "hot_percent": "HOT updates, %",
    }
    for key, label in labels.items():
        for payload in PAYLOADS:
            for finished in (0, plan.finished):
                values = [result["medians"][name][f"{key}/{payload}/{finished}"] for name in names]
                rows.append((f"{label} ({payload} B, {finished:,} finished)", [f"{v:,.0f}" for v in values]))
    for key in result["held_snapshot"][names[0]]:
        values = [result["held_snapshot"][name][key] for name in names]
        rows.append((f"held snapshot: {key}", [f"{v:,.1f}" if "ms" in key else f"{v:,.0f}" for v in values]))
    for key in result["open_writer"]["split3"]:
        values = [result["open_writer"].get(name, {}).get(key) for name in names]
        rows.append(
            (
                f"open writer: {key}",
                ["" if v is None else f"{v:,.1f}" if "ms" in key else f"{v:,.0f}" for v in values],
            )
        )
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(values) + " |" for label, values in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure, print JSON, then the table."""
    parser = argparse.ArgumentParser(description="Measure the storage layouts of the job table.")
    parser.add_argument(
        "--short", action="store_true", help="a smoke run of about a minute; no figures to quote"
    )
    plan = SHORT if parser.parse_args().short else Plan()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is removed
    with cluster() as server:
        result = measure(server, plan)
    print(json.dumps(result, indent=1))
    print()
    print(
        f"raw: {statistics.median(result['raw_per_s']):,.0f} jobs/s (two updates by primary key, bare table)"
    )
    print()
    print(table(result, plan))


if __name__ == "__main__":
    main()
