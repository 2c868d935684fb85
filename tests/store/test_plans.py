"""Every statement can be planned, and no hot one reads a table from end to end, however large it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from taskd.store.jobs import LAST_ID, array, plain
from taskd.store.queries import SQL
from tests.postgres import Server, _database

ROWS = 200_000
SCANNED = re.compile(r"Seq Scan on (jobs|queue|outcomes|history|unique_keys|api_keys|key_buckets)\b")
JOINED = re.compile(r"\b(Hash|Merge) (\w+ )?Join\b|\bParallel\b")
NODE = 1

_FILL = f"""
insert into taskd.jobs (id, client, created_at, priority, max_attempts, type, payload, unique_key)
select ('01890000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid,
    ('00000000-0000-7000-8000-' || lpad((i % 10)::text, 12, '0'))::uuid,
    now() - interval '40 days' + i * interval '1 s', i % 3, 3, 't' || i % 20, '{{}}',
    case when i % 4 = 0 then 'k' || i end
from generate_series(1, {ROWS}) as i;
insert into taskd.queue (id, run_at, priority, max_attempts, type, claimed, node, claim, expires_at)
select j.id, j.created_at, j.priority, 3, j.type, n % 50 = 0, case when n % 50 = 0 then {NODE} end,
    case when n % 50 = 0 then 7 end, case when n % 10 = 0 then j.created_at end
from (select j.*, row_number() over () as n from taskd.jobs as j) as j where n % 2 = 0;
insert into taskd.outcomes (id, finished_at, run_at, node, claim, attempts, max_attempts, status)
select j.id, j.created_at, j.created_at, {NODE}, 7, 1, 3, 'completed'
from taskd.jobs as j where not exists (select from taskd.queue as q where q.id = j.id);
insert into taskd.history (job_id, attempt, node, claim, ended_at, cause)
select j.id, 1, {NODE}, 6, j.created_at, 'error' from taskd.jobs as j;
insert into taskd.unique_keys (client, key, job_id, body_hash)
select j.client, j.unique_key, j.id, '' from taskd.jobs as j where j.unique_key is not null;
insert into taskd.api_keys (id, client, name, prefix, public_id, digest, fingerprint, scopes)
select j.id, j.id, 'n', 'tk', 'p' || right(j.id::text, 12), sha256(''), 'fp', '{{}}' from taskd.jobs as j;
insert into taskd.key_buckets (key, debt, at_us) select j.id, 0, 0 from taskd.jobs as j;
insert into taskd.lanes (type, priority) select distinct j.type, j.priority from taskd.jobs as j;
insert into taskd.nodes (name, host, pid, version, lease, lease_until)
values ('n', 'h', 1, '0', '1 h', now() + interval '1 h');
insert into taskd.types (type, info) select 't' || i, '{{}}' from generate_series(0, 19) as i;
insert into taskd.type_limits (type, interval_us, burst, max_running) values ('t3', 1, 1000, 1000);
"""


@pytest.fixture(scope="module")
def big(pg: Server, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a large database, which tells the plan of all that it runs."""
    made = request.getfixturevalue("template")
    with (
        _database(pg, "taskd_test_plans", template=made.template_dbname) as url,
        psycopg.connect(url, autocommit=True) as conn,
    ):
        conn.execute(_FILL.encode())
        conn.execute("vacuum analyze")
        conn.execute(
            """load 'auto_explain'; set auto_explain.log_min_duration = 0; set jit = off;
            set auto_explain.log_nested_statements = on; set client_min_messages = log"""
        )
        yield conn


def waiting(conn: psycopg.Connection[Any], number: int, offset: int = 0) -> list[tuple[UUID, str, int]]:
    """Return some jobs that wait, as id, type and priority."""
    return conn.execute(
        "select id, type, priority from taskd.queue where not claimed order by id limit %s offset %s",
        (number, offset),
    ).fetchall()


def held(conn: psycopg.Connection[Any], number: int) -> list[UUID]:
    """Return some jobs that the node holds."""
    rows = conn.execute("select id from taskd.queue where claimed order by id limit %s", (number,)).fetchall()
    return [row[0] for row in rows]


def plans(conn: psycopg.Connection[Any], name: str, args: Mapping[str, object]) -> tuple[str, int]:
    """Run a statement and take it back; return the plans of all that it ran, and its number of rows."""
    told: list[str] = []

    def listen(notice: psycopg.errors.Diagnostic) -> None:
        told.append(notice.message_primary or "")

    conn.add_notice_handler(listen)
    try:
        with conn.transaction(force_rollback=True):
            cursor = conn.execute(SQL[name].encode(), args)
            rows = len(cursor.fetchall()) if cursor.description else cursor.rowcount
        # The plan of a plain select is told when its portal is dropped, with the transaction's end.
    finally:
        conn.remove_notice_handler(listen)
    text = "\n".join(one for one in told if "plan:" in one)
    assert "Query Text" in text
    return text, rows


def assert_small(text: str) -> None:
    """Assert that these plans get at every row of a large table by an index or a place."""
    bad = [plan for plan in text.split("Query Text:") if SCANNED.search(plan) or JOINED.search(plan)]
    assert not bad, bad[0]


@pytest.mark.parametrize("name", sorted(SQL))
def test_every_statement_can_be_planned(migrated: psycopg.Connection[Any], name: str) -> None:
    text = SQL[name]
    args = dict.fromkeys(re.findall(r"%\((\w+)\)s", text))

    if text.lower().startswith(("select", "insert", "update", "delete", "with")):
        migrated.execute(f"explain {text}".encode(), args)
    else:
        pytest.fail(f"{name} is no statement that can be explained")


@pytest.fixture(scope="module")
def migrated(pg: Server, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Any]]:
    """A connection to an empty, migrated database."""
    made = request.getfixturevalue("template")
    with (
        _database(pg, "taskd_test_planned", template=made.template_dbname) as url,
        psycopg.connect(url, autocommit=True) as conn,
    ):
        yield conn


def test_claim(big: psycopg.Connection[Any]) -> None:
    lanes = [(f"t{i}", priority) for i in range(20) for priority in (2, 1, 0)]
    args: dict[str, object] = {
        "node": NODE,
        "claim": 99,
        "types": array(type_ for type_, _ in lanes),
        "priorities": plain(priority for _, priority in lanes),
        "wants": plain(500 for _ in lanes),
        "aheads": plain(0 for _ in lanes),
        "pools": plain(1 for _ in lanes),
        "budgets": "{5000}",
        "floor_at": array("-infinity" for _ in lanes),
        "floor_id": plain(UUID(int=0) for _ in lanes),
        "served": [f"t{i}" for i in range(20)],
    }

    text, rows = plans(big, "claim_jobs", args)

    assert rows > 5000
    assert_small(text)


def test_settle_completed(big: psycopg.Connection[Any]) -> None:
    ids = held(big, 1000)
    args: dict[str, object] = {
        "node": NODE,
        "ids": plain(ids),
        "claims": plain(7 for _ in ids),
        "results": array("null" for _ in ids),
        "ran_ms": plain(1 for _ in ids),
    }

    text, _ = plans(big, "settle_completed", args)

    with big.transaction(force_rollback=True):
        missing = big.execute(SQL["settle_completed"].encode(), args).fetchone()
    assert missing == (None,), "none of them"
    assert_small(text)


def test_settle_others(big: psycopg.Connection[Any]) -> None:
    ids = held(big, 1000)
    final = [number % 2 == 0 for number in range(len(ids))]
    nothing = plain(None for _ in ids)
    args: dict[str, object] = {
        "node": NODE,
        "ids": plain(ids),
        "claims": plain(7 for _ in ids),
        "status": plain("failed" if one else None for one in final),
        "delays_ms": plain(0 for _ in ids),
        "counts": plain(True for _ in ids),
        "causes": plain("error" for _ in ids),
        "errors": array("e" for _ in ids),
        "results": nothing,
        "ran_ms": plain(1 for _ in ids),
        "exit_codes": nothing,
        "signals": nothing,
        "cpu_s": nothing,
        "max_rss": nothing,
        "crashes": plain(0 for _ in ids),
        "alone": plain(False for _ in ids),
    }

    text, rows = plans(big, "settle_others", args)

    assert rows == 1000
    assert_small(text)


@pytest.mark.parametrize("keyed", [False, True])
def test_insert_jobs(big: psycopg.Connection[Any], keyed: bool) -> None:
    ids = [uuid4() for _ in range(1000)]
    extras = array(f'{{"unique_key":"k{4 * n}","hash":"00"}}' for n, _ in enumerate(ids))
    args: dict[str, object] = {
        "ids": plain(ids),
        "clients": plain(UUID("00000000-0000-7000-8000-000000000004") for _ in ids),
        "types": array("t1" for _ in ids),
        "payloads": array("{}" for _ in ids),
        "priorities": plain(0 for _ in ids),
        "max_attempts": plain(3 for _ in ids),
        "delays_ms": plain(None for _ in ids),
        "timeouts_ms": plain(None for _ in ids),
        "expires_ms": plain(None for _ in ids),
        "extras": extras if keyed else None,
    }

    text, _ = plans(big, "insert_jobs", args)

    assert_small(text)


def test_floors(big: psycopg.Connection[Any]) -> None:
    lanes = [(f"t{i}", priority) for i in range(20) for priority in (2, 1, 0)]
    args: dict[str, object] = {
        "types": array(type_ for type_, _ in lanes),
        "priorities": plain(priority for _, priority in lanes),
        "from_at": array("-infinity" for _ in lanes),
        "from_id": plain(UUID(int=0) for _ in lanes),
        "to_at": array("infinity" for _ in lanes),
        "to_id": plain(LAST_ID for _ in lanes),
    }

    text, rows = plans(big, "floors", args)

    assert rows > 1
    assert_small(text)


_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
_NO_FILTER: dict[str, object] = dict.fromkeys(
    ("type", "status", "tag", "unique_key", "since", "until"), None
) | {"client": UUID("00000000-0000-7000-8000-000000000004"), "before": LAST_ID, "scan": 10_000, "most": 50}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        pytest.param("get_job", {"client": None}, id="get_job"),
        pytest.param("list_jobs", _NO_FILTER, id="list_jobs"),
        pytest.param("list_jobs", _NO_FILTER | {"status": "failed"}, id="list_jobs, nothing found"),
        pytest.param("list_jobs", _NO_FILTER | {"type": "t4", "since": _EPOCH}, id="list_jobs, filters"),
        pytest.param("list_jobs", _NO_FILTER | {"unique_key": "k4"}, id="list_jobs, one key"),
        pytest.param("list_all_jobs", _NO_FILTER, id="list_all_jobs"),
        pytest.param("list_all_jobs", _NO_FILTER | {"status": "failed"}, id="list_all_jobs, nothing found"),
        pytest.param("list_end", _NO_FILTER, id="list_end"),
        pytest.param("list_end", _NO_FILTER | {"client": None}, id="list_end, all"),
        pytest.param("statuses", {}, id="statuses"),
        pytest.param("existing_jobs", {}, id="existing_jobs"),
        pytest.param("settled_by", {"node": NODE}, id="settled_by"),
        pytest.param("expire_jobs", {"most": 1000}, id="expire_jobs"),
        pytest.param("heartbeat", {"node": NODE, "state": "live", "info": "{}"}, id="heartbeat"),
        pytest.param("find_keys", {"public_ids": ["p000000000004"]}, id="find_keys"),
        pytest.param("forget_nodes", {"age": timedelta(days=1)}, id="forget_nodes"),
        pytest.param("known_types", {}, id="known_types"),
    ],
)
def test_statements_on_the_request_path_and_chores(
    big: psycopg.Connection[Any], name: str, args: dict[str, object]
) -> None:
    ids = [job[0] for job in waiting(big, 1000)]
    usual: dict[str, object] = {"id": ids[0], "ids": plain(ids), "claims": plain(7 for _ in ids)}

    text, _ = plans(big, name, usual | args)

    assert_small(text)


def test_count_of_a_type_that_is_a_good_part_of_the_queue(big: psycopg.Connection[Any]) -> None:
    with big.transaction(force_rollback=True):
        big.execute("update taskd.queue set type = 't0' where type in ('t2', 't4', 't6', 't8', 't10')")
        big.execute("analyze taskd.queue")

        text, _ = plans(big, "count_of_type", {"type": "t0", "enough": 1_000_000})

    assert_small(text)


def test_prune(big: psycopg.Connection[Any]) -> None:
    week = timedelta(days=7)
    args: dict[str, object] = {"completed": week, "failed": week, "cancelled": week}

    text, _ = plans(big, "prune", args | {"after": UUID(int=0), "before": LAST_ID, "most": 1000})

    assert_small(text)


@pytest.mark.parametrize("name", ["cancel_jobs", "cancel_requested", "asked_to_cancel"])
def test_cancel(big: psycopg.Connection[Any], name: str) -> None:
    ids = [job[0] for job in waiting(big, 500)] + held(big, 500)
    # As many requests as nobody ever has at a time.
    big.execute("insert into taskd.cancel_requests (id, asked_at) select unnest(%s::uuid[]), now()", (ids,))

    text, _ = plans(big, name, {"ids": plain(ids), "client": None, "node": NODE})

    big.execute("truncate taskd.cancel_requests")
    assert_small(text)


def test_retry(big: psycopg.Connection[Any]) -> None:
    ids = [row[0] for row in big.execute("select id from taskd.outcomes order by id limit 1000").fetchall()]
    args: dict[str, object] = {"ids": plain(ids), "client": None, "run_at": None, "payload": '{"a": 1}'}

    text, rows = plans(big, "retry_jobs", args)

    assert rows == 1000
    assert_small(text)


def test_take_tokens(big: psycopg.Connection[Any]) -> None:
    keys = [job[0] for job in waiting(big, 100)]
    args: dict[str, object] = {
        "keys": plain(keys),
        "wants": plain(1 for _ in keys),
        "least": plain(1 for _ in keys),
        "micro_rates": plain(1_000_000 for _ in keys),
        "bursts": plain(10 for _ in keys),
    }

    text, rows = plans(big, "take_tokens", args)

    assert rows == 100
    assert_small(text)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        pytest.param("rescue_named", {"nodes": [NODE], "cause": "lease_expired", "error": "e"}, id="rescue"),
        pytest.param(
            "put_back_unanswered", {"node": NODE, "claims": [7], "first": 0, "last": 9}, id="put back"
        ),
    ],
)
def test_the_two_that_look_through_the_queue_do_so_in_parts(
    big: psycopg.Connection[Any], name: str, args: dict[str, object]
) -> None:
    # No index names the node: every claim would have to write it.
    text, _ = plans(big, name, args)

    assert len(re.findall(r"Tid Range Scan on queue\b", text)) == 1
    assert not SCANNED.findall(text)
