"""The database roles: each does its work with the rights it has, and is refused everything else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from taskd.errors import StoreUnavailable
from taskd.model.bucket import Limit
from taskd.model.job import NewJob
from taskd.model.jobtype import TypeInfo
from taskd.store import (
    audit,
    backlog,
    health,
    jobs,
    keys,
    leases,
    limits,
    migrate,
    moves,
    nodes,
    roles,
    submit,
    types,
)
from taskd.store.jobs import Filter, Retention
from taskd.store.keys import NewKey
from taskd.store.leases import START, Completion, Demand, Settlement
from taskd.store.queries import SQL
from tests.postgres import Server

Connection = psycopg.AsyncConnection[Any]

LIMITED = (roles.API, roles.WORKER, roles.SUBMIT, roles.READ_ONLY)
"""All roles but the owner."""
ROLES = [roles.OWNER, *LIMITED]
LEASE = timedelta(seconds=30)
FIRST = UUID(int=0)
PLAIN = TypeInfo(name="plain", handler="plain", plugin="test")
BOUND = TypeInfo(name="bound", handler="bound", plugin="test", rate=1000.0, rate_burst=100, max_running=10)


# -- the database ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(pg: Server, template: Any) -> Iterator[str]:
    """The URL of a migrated database with the roles; tests leave no rows in it."""
    name = f"{template.dbname}_roles"
    source = template.template_dbname
    with psycopg.connect(pg.url(pg.maintenance_dbname), autocommit=True) as conn:
        conn.execute(f'drop database if exists "{name}"')
        conn.execute(f'create database "{name}" template "{source}"')
        try:
            roles.apply(pg.url(name))
            yield pg.url(name)
        finally:
            conn.execute(f'drop database "{name}" with (force)')


@pytest.fixture
async def conn(url: str) -> AsyncIterator[Connection]:
    """A superuser's connection in a transaction that is rolled back."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        yield connection
        await connection.rollback()


async def become(conn: Connection, role: str) -> None:
    await conn.execute(f"set local role {role}")


@asynccontextmanager
async def acting(conn: Connection, role: str) -> AsyncIterator[Connection]:
    """Be `role` for a while; what it did stays in the transaction."""
    await become(conn, role)
    yield conn
    await conn.execute("set local role none")


async def rows(conn: Connection, query: str) -> list[tuple[Any, ...]]:
    return await (await conn.execute(query)).fetchall()


async def denied(conn: Connection, statement: str) -> bool:
    """Run `statement`, undo it, and return whether it was refused for want of a right."""
    try:
        async with conn.transaction(force_rollback=True):
            await conn.execute(statement)
    except InsufficientPrivilege:
        return True
    except psycopg.Error:
        return False  # rights are looked at first: it got past them
    return False


# -- every statement of the package, and who runs it -------------------------------------------------------

Work = Callable[[Connection], Awaitable[object]]


def job(**more: Any) -> NewJob:
    return NewJob(**{"id": uuid4(), "client": FIRST, "type": "plain", "payload": "{}", **more})


def new_key() -> NewKey:
    return NewKey(
        id=uuid4(),
        name="shop",
        prefix="tk",
        public_id=uuid4().hex[:12],
        digest=bytes(32),
        fingerprint="fp_0",
        scopes=["jobs:read"],
    )


def raw(name: str, **args: object) -> Work:
    """The statement itself, where the function of the store that has it runs others before it."""
    return lambda conn: conn.execute(SQL[name], args)


async def rotate(conn: Connection, old: UUID = FIRST) -> object:
    return await keys.rotate(
        conn,
        old,
        key_id=uuid4(),
        public_id=uuid4().hex[:12],
        digest=bytes(32),
        pepper_version=0,
        fingerprint="fp_0",
        overlap=timedelta(),
    )


def settlement(job_id: str, claim: int, status: str | None, cause: str | None = "error") -> Settlement:
    return Settlement(job_id, claim, status, 0, True, cause, "no", None, 5, None, None, None, None, 0, False)


def lanes(*demanded: str) -> leases.Want:
    return leases.Want(
        lanes=[(name, 0) for name in demanded],
        floors=[START] * len(demanded),
        demands={name: Demand(10, 0, 0) for name in demanded},
        budgets=[20],
        served=list(demanded),
    )


def listing(**more: object) -> dict[str, object]:
    empty = dict.fromkeys(("client", "type", "status", "tag", "unique_key", "since", "until"))
    return {**empty, "before": jobs.LAST_ID, "scan": 10, "most": 10, **more}


LATER = (datetime.now(UTC) + timedelta(days=1)).isoformat()
END = leases.Position(LATER, str(jobs.LAST_ID))
KEEP = Retention(completed=timedelta(), failed=timedelta(), cancelled=timedelta())
NOBODY_ELSE: frozenset[str] = frozenset()
API = frozenset({roles.API})
WORKER = frozenset({roles.WORKER})
BOTH = API | WORKER
READERS = API | {roles.READ_ONLY}
ALL_READERS = BOTH | {roles.READ_ONLY}
EVERYBODY = frozenset(LIMITED)

STATEMENTS: Mapping[str, tuple[frozenset[str], Work]] = {
    # audit: taken by the two that write it, shown to people, pruned by the owner alone
    "append_audit": (BOTH, lambda conn: audit.append(conn, actor="admin", action="test")),
    "list_audit": (frozenset({roles.API, roles.READ_ONLY}), audit.page),
    "prune_audit": (NOBODY_ELSE, lambda conn: audit.prune(conn, age=timedelta())),
    # backlog
    "count_of_type": (API, lambda conn: backlog.of_type(conn, "echo", bound=1)),
    "count_of_client": (ALL_READERS, lambda conn: backlog.of_client(conn, FIRST, bound=1)),
    # health
    "applied_migrations": (ALL_READERS, health.check_schema),
    "live_nodes": (ALL_READERS, health.live_nodes),
    "server_facts": (EVERYBODY, nodes.server_facts),
    # jobs
    "insert_jobs": (BOTH, lambda conn: jobs.insert(conn, [job()])),
    "notify_lanes": (EVERYBODY, lambda conn: jobs.notify(conn, "taskd", [("plain", 0)])),
    "get_job": (READERS, lambda conn: jobs.get(conn, FIRST, client=None)),
    "statuses": (ALL_READERS, lambda conn: jobs.statuses(conn, [FIRST])),
    "list_jobs": (ALL_READERS, raw("list_jobs", **listing(client=FIRST))),
    "list_all_jobs": (ALL_READERS, raw("list_all_jobs", **listing())),
    "list_end": (ALL_READERS, raw("list_end", **listing())),
    "prune": (WORKER, lambda conn: jobs.prune(conn, KEEP, after=FIRST, before=jobs.LAST_ID)),
    "existing_jobs": (ALL_READERS, lambda conn: submit.existing(conn, [FIRST])),
    # keys
    "create_key": (API, lambda conn: keys.create(conn, new_key())),
    "list_keys": (API, keys.list_all),
    "get_key": (API, lambda conn: keys.get(conn, FIRST)),
    "find_keys": (API, lambda conn: keys.find_by_public_id(conn, ["none"])),
    "change_key": (API, lambda conn: keys.change(conn, FIRST, {"name": "other"})),
    "lock_key": (API, lambda conn: keys.lock(conn, FIRST)),
    "rotation_keys": (API, lambda conn: keys.rotation_of(conn, FIRST)),
    "rotate_key": (API, rotate),
    "revoke_key": (API, lambda conn: keys.revoke(conn, FIRST)),
    "touch_keys": (API, lambda conn: keys.touch_last_used(conn, [FIRST])),
    "notify_key": (EVERYBODY, lambda conn: keys.notify(conn, "none")),
    # limits
    "take_tokens": (API, lambda conn: limits.take(conn, [limits.Want(FIRST, Limit.of(1, 1))])),
    "prune_buckets": (NOBODY_ELSE, limits.prune),
    # leases
    "claim_jobs": (WORKER, lambda conn: leases.claim(conn, node=1, claim=1, want=lanes("plain"))),
    "settle_completed": (
        WORKER,
        lambda conn: leases.settle_completed(conn, node=1, verdicts=[Completion(str(FIRST), 1, None, 1)]),
    ),
    "settle_others": (
        WORKER,
        lambda conn: leases.settle_others(conn, node=1, verdicts=[settlement(str(FIRST), 1, None)]),
    ),
    "settled_by": (ALL_READERS, lambda conn: leases.settled_by(conn, node=1, claims={str(FIRST): 1})),
    "put_back_unanswered": (WORKER, lambda conn: leases.put_back_unanswered(conn, node=1, claims=[1])),
    "own_claims": (ALL_READERS, lambda conn: leases.own_claims(conn, node=1, answered=1)),
    "rescue_lost": (WORKER, leases.rescue_lost),
    "bring_forward": (WORKER, lambda conn: leases.bring_forward(conn, until=datetime.now(UTC))),
    "rescue_named": (
        WORKER,
        lambda conn: leases.rescue_named(conn, nodes=[1], cause="crashed", error="gone"),
    ),
    "expire_jobs": (WORKER, leases.expire),
    "floors": (WORKER, lambda conn: leases.unclaimed(conn, {("plain", 0): (START, END)})),
    # moves: the API makes them by functions with the owner's rights, and workers carry out what was asked
    "cancel_jobs": (BOTH, lambda conn: moves.cancel(conn, [FIRST], client=None)),
    "retry_jobs": (API, lambda conn: moves.retry(conn, [FIRST], client=None)),
    "asked_to_cancel": (ALL_READERS, lambda conn: moves.asked(conn, node=1)),
    "cancel_requested": (BOTH, moves.cancel_requested),
    # nodes
    "register_node": (
        WORKER,
        lambda conn: nodes.register(conn, name="n", host="h", pid=1, version="0", lease=LEASE, info="{}"),
    ),
    "heartbeat": (WORKER, lambda conn: nodes.heartbeat(conn, node=1, state="live", info="{}")),
    "ping": (EVERYBODY, lambda conn: nodes.ping(conn, channel="none", text="ping")),
    "vitals": (EVERYBODY, nodes.vitals),
    "timeline": (EVERYBODY, nodes.timeline),
    "known_node": (ALL_READERS, lambda conn: nodes.known(conn, node=1, name="n", host="h", pid=1)),
    "node_ended": (WORKER, raw("node_ended", node=1)),
    "forget_nodes": (WORKER, lambda conn: nodes.forget(conn, age=timedelta())),
    "list_nodes": (ALL_READERS, nodes.list_),
    # types
    "publish_types": (WORKER, lambda conn: types.publish(conn, [PLAIN], node=None)),
    "withdraw_types": (WORKER, raw("withdraw_types", node=1)),
    "set_limits": (WORKER, types.renew_limits),
    "known_types": (ALL_READERS, types.known),
}


def test_of_every_statement_it_is_said_who_runs_it() -> None:
    assert set(STATEMENTS) == set(SQL)


@pytest.mark.parametrize("name", STATEMENTS)
@pytest.mark.parametrize("role", LIMITED)
async def test_a_role_runs_its_own_statements_and_no_others(conn: Connection, role: str, name: str) -> None:
    allowed, work = STATEMENTS[name]
    await become(conn, role)

    if role in allowed:
        await work(conn)
    else:
        with pytest.raises((StoreUnavailable, InsufficientPrivilege)) as refused:
            await work(conn)
        cause = refused.value.__cause__ or refused.value
        assert isinstance(cause, psycopg.Error)
        assert cause.sqlstate == "42501"


@pytest.mark.parametrize("name", STATEMENTS)
async def test_the_owner_runs_every_statement(conn: Connection, name: str) -> None:
    await become(conn, roles.OWNER)

    await STATEMENTS[name][1](conn)


# -- tables: what each role may do to each, column by column -----------------------------------------------

ALL = "*"
QUEUED = "id run_at expires_at priority max_attempts keyed type"
SHOWN = (
    "id client name description prefix public_id pepper_version fingerprint scopes types rate burst"
    " max_pending created_at expires_at revoked_at last_used_at rotated_from"
)
OPEN = [
    *("migrations", "jobs", "queue", "outcomes", "history", "unique_keys", "lanes", "nodes", "types"),
    *("node_types", "type_limits", "running", "cancel_requests", "schedules", "key_buckets", "audit"),
    "job_view",
]
NOTED = "actor action target address request_id detail"

RIGHTS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    roles.API: {
        "migrations": {"select": ALL},
        "jobs": {"select": ALL, "insert": ALL},
        "queue": {"select": ALL, "insert": QUEUED},
        "outcomes": {"select": ALL},
        "history": {"select": ALL},
        "unique_keys": {"select": ALL, "insert": ALL},
        "lanes": {"select": ALL, "insert": ALL},
        "nodes": {"select": ALL},
        "types": {"select": ALL},
        "node_types": {"select": ALL},
        "cancel_requests": {"select": ALL},
        "api_keys": {
            "select": ALL,
            "insert": "id client name description prefix public_id digest pepper_version fingerprint scopes"
            " types rate burst max_pending expires_at rotated_from",
            "update": "name description scopes types rate burst max_pending expires_at revoked_at"
            " last_used_at",
        },
        "audit": {"select": ALL, "insert": NOTED},
    },
    roles.WORKER: {
        "migrations": {"select": ALL},
        "jobs": {"select": ALL, "insert": ALL, "delete": ALL},
        "queue": {
            "select": ALL,
            "insert": QUEUED,
            "update": "run_at expires_at started_at node claim attempts crashes claimed alone counted error",
            "delete": ALL,
        },
        "outcomes": {"select": ALL, "insert": ALL, "delete": ALL},
        "history": {"select": ALL, "insert": ALL, "delete": ALL},
        "unique_keys": {"select": ALL, "insert": ALL, "delete": ALL},
        "lanes": {"select": ALL, "insert": ALL},
        "nodes": {
            "select": ALL,
            "insert": "name host pid version lease lease_until info",
            "update": "state lease_until heartbeat_at ended_at search_from search_file search_again info",
            "delete": ALL,
        },
        "types": {
            "select": ALL,
            "insert": "type info published_by",
            "update": "info published_at published_by retired_at",
        },
        "node_types": {"select": ALL, "insert": ALL, "update": "info", "delete": ALL},
        "type_limits": {
            "select": ALL,
            "insert": "type interval_us burst max_running",
            "update": "interval_us burst max_running tat",
            "delete": ALL,
        },
        "running": {"select": ALL, "insert": ALL, "update": "jobs", "delete": ALL},
        "cancel_requests": {"select": ALL},
        "audit": {"insert": NOTED},
    },
    roles.SUBMIT: {},
    roles.READ_ONLY: {
        **{table: {"select": ALL} for table in OPEN},
        "api_keys": {"select": SHOWN},
    },
}


@pytest.mark.parametrize("role", LIMITED)
async def test_a_role_may_do_to_tables_what_the_table_says_and_nothing_else(
    conn: Connection, role: str
) -> None:
    found = await rows(
        conn,
        "select c.relname, c.relkind = 'v', array_agg(a.attname::text order by a.attnum)"
        " from pg_class as c join pg_attribute as a on a.attrelid = c.oid and a.attnum > 0"
        " where c.relnamespace = 'taskd'::regnamespace and c.relkind in ('r', 'p', 'v', 'm')"
        " group by c.oid order by 1",
    )
    assert {name for name, _, _ in found} >= set(RIGHTS[role])
    await become(conn, role)

    wrong = []
    for table, is_view, columns in found:
        rights = RIGHTS[role].get(table, {})
        tries = {("delete", ALL): f"delete from taskd.{table} where false"}
        if not is_view:
            tries["truncate", ALL] = f"truncate taskd.{table} cascade"
        for column in columns:
            tries["select", column] = f"select {column} from taskd.{table} where false"
            tries["insert", column] = f"insert into taskd.{table} ({column}) values (default)"
            tries["update", column] = f"update taskd.{table} set {column} = default where false"
        for (verb, column), statement in tries.items():
            given = rights.get(verb, "")
            may = given == ALL or (column != ALL and column in given.split())
            if is_view and verb != "select":
                continue  # a view over a join takes no changes from anybody
            if await denied(conn, statement) is may:
                wrong.append(f"{'may not' if may else 'may'}: {statement}")
    assert wrong == []


FUNCTIONS: Mapping[str, frozenset[str]] = {
    "moment": BOTH,
    "insert_jobs": BOTH,
    "take_starts": WORKER,
    "count_starts": WORKER,
    "claim": WORKER,
    "settle_completed": WORKER,
    "settle_others": WORKER,
    "places": WORKER,
    "free_keys": WORKER,
    "rescue": WORKER,
    "take_away": WORKER,
    "floors": WORKER,
    "waiting_of": API,
    "history_of": READERS,
    "take_tokens": API,
    "cancel_jobs": BOTH,
    "retry_jobs": API,
    "submit": frozenset({roles.SUBMIT}),
    "submit_many": frozenset({roles.SUBMIT}),
}
"""Who may call what; functions that are not here are for the owner."""


@pytest.mark.parametrize("role", [*LIMITED, "public"])
async def test_a_role_may_call_its_own_functions_and_no_others(conn: Connection, role: str) -> None:
    found = await rows(
        conn,
        f"select proname, has_function_privilege('{role}', oid, 'execute') from pg_proc"
        " where pronamespace = 'taskd'::regnamespace",
    )

    assert {name for name, _ in found} >= set(FUNCTIONS)
    assert {name for name, may in found if may} == {name for name, who in FUNCTIONS.items() if role in who}


async def test_functions_that_lend_their_owners_rights_find_names_where_they_should(conn: Connection) -> None:
    found = await rows(
        conn,
        "select proname, 'search_path=pg_catalog, pg_temp' = any(proconfig) from pg_proc"
        " where pronamespace = 'taskd'::regnamespace and prosecdef order by 1",
    )

    lending = ["cancel_jobs", "retry_jobs", "submit", "submit_many", "take_tokens"]
    assert found == [(name, True) for name in lending]


FOREIGN = [
    pytest.param("create table taskd.mine ()", id="make a table"),
    pytest.param("create function taskd.mine() returns void language sql as ''", id="make a function"),
    pytest.param("create table public.mine ()", id="make a table in public"),
    pytest.param("create function public.mine() returns void language sql as ''", id="a function in public"),
    pytest.param("create schema mine", id="make a schema"),
    pytest.param("drop table taskd.lanes", id="drop a table"),
    pytest.param("alter table taskd.queue add column mine text", id="change a table"),
    pytest.param("create index on taskd.queue (error)", id="make an index"),
    pytest.param(
        "create trigger mine before insert on taskd.api_keys for each row"
        " execute function suppress_redundant_updates_trigger()",
        id="make a trigger",
    ),
    pytest.param("lock table taskd.audit in exclusive mode", id="lock a table that it does not change"),
    pytest.param("alter function taskd.moment security definer", id="change a function"),
    pytest.param("alter role current_user superuser", id="raise itself"),
    pytest.param("create role mine", id="make a role"),
    pytest.param("set session_replication_role = replica", id="switch triggers off"),
    pytest.param("copy (select 1) to program 'true'", id="run a program"),
    pytest.param("select pg_read_file('PG_VERSION')", id="read the server's files"),
]


@pytest.mark.parametrize("statement", FOREIGN)
@pytest.mark.parametrize("role", LIMITED)
async def test_no_role_but_the_owner_changes_what_there_is(
    conn: Connection, role: str, statement: str
) -> None:
    await become(conn, role)

    with pytest.raises(InsufficientPrivilege):
        await conn.execute(statement)


@pytest.mark.parametrize("role", [roles.API, roles.WORKER, roles.READ_ONLY])
async def test_a_right_is_not_given_away(conn: Connection, role: str) -> None:
    await become(conn, role)

    await conn.execute("grant select on taskd.jobs to public")  # a warning, and nothing done

    assert await rows(conn, "select has_table_privilege('public', 'taskd.jobs', 'select')") == [(False,)]


@pytest.mark.parametrize("role", LIMITED)
@pytest.mark.parametrize("other", ROLES)
async def test_no_role_becomes_another(conn: Connection, role: str, other: str) -> None:
    [(may,)] = await rows(conn, f"select pg_has_role('{role}', '{other}', 'member')")

    assert may == (role == other)


# -- whole days of work ------------------------------------------------------------------------------------


async def test_the_api_keeps_keys_and_takes_jobs(conn: Connection) -> None:
    await become(conn, roles.API)

    async def keep_keys() -> None:
        made = await keys.create(conn, new_key())
        assert made is not None
        assert await keys.find_by_public_id(conn, [made.public_id])
        await keys.touch_last_used(conn, [made.id])
        changed = await keys.change(conn, made.id, {"rate": 5, "expires_at": None})
        assert changed is not None
        assert await keys.lock(conn, made.id) is not None
        assert await rotate(conn, made.id) is not None
        assert await keys.rotation_of(conn, made.id)
        revoked = await keys.revoke(conn, made.id)
        assert revoked is not None
        assert revoked.last_used_at is not None
        assert len(await keys.list_all(conn)) == 2
        await audit.append(conn, actor="admin", action="key.revoke", target=made.id)

    async def take_jobs() -> None:
        first = job(unique_key="a", body_hash=b"1", tags=["x"], meta="{}", delay_s=5, expires_in_s=9)
        again = job(unique_key="a", body_hash=b"1")
        assert await jobs.insert(conn, [first, job(priority=7)]) == {}
        receipts = await jobs.insert(conn, [again])
        assert receipts[again.id].duplicate
        found = await jobs.get(conn, first.id, client=FIRST)
        assert found is not None
        assert found.status == "scheduled"
        assert len((await jobs.list_(conn, client=FIRST, only=Filter())).jobs) == 2
        assert len((await jobs.list_(conn, client=None, only=Filter(status="pending"))).jobs) == 1
        assert set(await submit.existing(conn, [first.id, again.id])) == {first.id}
        await jobs.notify(conn, "taskd", [("plain", 0)])

    [taken] = await limits.take(conn, [limits.Want(FIRST, Limit.of(1, 5), want=2)])
    [taken_again] = await limits.take(conn, [limits.Want(FIRST, Limit.of(1, 5), want=2)])
    await keep_keys()
    await take_jobs()

    assert (taken.granted, taken_again.granted) == (2, 2)


async def test_taking_tokens_still_does_not_wait_for_fsync(conn: Connection) -> None:
    await conn.execute("set synchronous_commit = on")
    await become(conn, roles.API)

    await limits.take(conn, [limits.Want(FIRST, Limit.of(1, 5))])

    assert await rows(conn, "show synchronous_commit") == [("off",)]


async def test_a_worker_runs_jobs_from_its_registration_to_its_good_bye(url: str) -> None:
    """In transactions of its own: claims and limits go by their times."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        await conn.execute(f"set role {roles.WORKER}")
        try:
            await _work(conn)
        finally:
            await conn.execute("reset role")
            await conn.execute(
                "truncate taskd.jobs, taskd.queue, taskd.outcomes, taskd.history, taskd.unique_keys,"
                " taskd.lanes, taskd.types, taskd.type_limits, taskd.nodes, taskd.audit cascade"
            )


async def _work(conn: Connection) -> None:
    async def registered(name: str) -> int:
        return await nodes.register(conn, name=name, host="h", pid=1, version="0", lease=LEASE, info="{}")

    async def stored(*new: NewJob) -> list[str]:
        assert await jobs.insert(conn, new) == {}  # what a job makes with its completion
        return [str(one.id) for one in new]

    async def claimed(node: int, claim: int) -> set[str]:
        return {one.id for one in (await leases.claim(conn, node=node, claim=claim, want=want)).jobs}

    want = lanes("bound", "plain")
    await migrate.check_on(conn)
    me, other = await registered("me"), await registered("other")
    await types.publish(conn, [PLAIN, BOUND], node=me)
    await types.publish(conn, [BOUND], node=other)
    await types.publish(conn, [PLAIN, BOUND], node=me)  # again, over what is there
    assert await nodes.heartbeat(conn, node=me, state="live", info="{}")

    def held(type_: str, **more: Any) -> NewJob:
        key = {"unique_key": uuid4().hex, "body_hash": b"", "unique_while": "unfinished"}
        return job(type=type_, **key, **more)

    ended = await stored(held("bound"), held("plain"))
    failed = await stored(held("bound"), held("plain"))
    again = await stored(held("bound"), held("plain"))
    assert await claimed(me, 1) == {*ended, *failed, *again}
    done = await leases.settle_completed(
        conn, node=me, verdicts=[Completion(one, 1, '{"a": 1}', 3) for one in ended]
    )
    assert done == set(ended)
    other_verdicts = [settlement(one, 1, "failed") for one in failed] + [
        settlement(one, 1, None) for one in again
    ]
    assert await leases.settle_others(conn, node=me, verdicts=other_verdicts) == {*failed, *again}
    assert await leases.settled_by(conn, node=me, claims=dict.fromkeys(ended + again, 1)) == {*ended, *again}

    assert await claimed(me, 2) == set(again)
    assert await leases.put_back_unanswered(conn, node=me, claims=[2]) == (2, 0)
    await stored(held("bound", max_attempts=1), held("plain", max_attempts=1))
    assert len(await claimed(other, 1)) == 4
    rescued = await leases.rescue_named(conn, nodes=[other], cause="lease_expired", error="gone")
    assert rescued == {other: 4}
    assert await leases.rescue_lost(conn) == {}
    await types.renew_limits(conn)

    found, _ = await leases.unclaimed(conn, {("plain", 0): (START, END)})
    assert list(found) == [("plain", 0)]
    await stored(held("plain", expires_in_s=0))
    assert await leases.expire(conn) == 1
    pruned, _ = await jobs.prune(conn, KEEP, after=FIRST, before=jobs.LAST_ID)
    assert pruned == 0  # a unique key keeps its row for a day
    await stored(job())
    assert len(await claimed(me, 3)) == 3
    assert len(await types.known(conn)) == 2
    await nodes.forget(conn, age=timedelta())
    await nodes.end(conn, node=me, lost=[3])
    assert await claimed(me, 4) == set()  # put back, and not for one that has said good-bye
    await audit.append(conn, actor="worker", action="config.reload")


async def test_a_worker_prunes_what_is_over(conn: Connection) -> None:
    await conn.execute(
        "insert into taskd.nodes (name, host, pid, version, lease, lease_until)"
        " values ('n', 'h', 1, '0', '1s', now())"
    )
    [(node,)] = await rows(conn, "select max(id) from taskd.nodes")
    await become(conn, roles.WORKER)
    old = job()
    await jobs.insert(conn, [old])
    # The claim sees what was due when the transaction began.
    await conn.execute("update taskd.queue set run_at = now()")
    await leases.claim(conn, node=node, claim=1, want=lanes("plain"))
    await leases.settle_others(conn, node=node, verdicts=[settlement(str(old.id), 1, "failed")])

    pruned, _ = await jobs.prune(conn, KEEP, after=FIRST, before=jobs.LAST_ID)

    assert pruned == 1
    assert await rows(conn, "select from taskd.history") == []


async def test_an_application_submits_without_a_right_on_any_table(conn: Connection) -> None:
    await types.publish(conn, [PLAIN], node=None)
    async with acting(conn, roles.SUBMIT):
        [(one,)] = await rows(
            conn, """select taskd.submit('plain', '{"a": 1}', unique_key => 'k', wake => true)"""
        )
        [(same,)] = await rows(conn, """select taskd.submit('plain', '{"a": 1}', unique_key => 'k')""")
        many = await rows(
            conn,
            """select job_id from taskd.submit_many('[{"type": "plain", "payload": {}},
            {"type": "plain", "payload": {}, "unique_key": "m", "tags": ["x"]}]', wake => true)""",
        )

    assert one == same
    assert len(await rows(conn, "select from taskd.queue")) == 1 + len(many) == 3


async def test_a_name_of_the_callers_does_not_get_into_a_function_that_lends_rights(conn: Connection) -> None:
    await types.publish(conn, [PLAIN], node=None)
    await become(conn, roles.SUBMIT)
    await conn.execute("create temp table types (type text, info json)")
    await conn.execute("set local search_path = pg_temp, pg_catalog")

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="is no job type here"):
        await conn.execute("select taskd.submit('mine', '{}')")


async def test_people_see_jobs_and_keys_without_what_keys_are_compared_with(conn: Connection) -> None:
    await jobs.insert(conn, [job()])
    await keys.create(conn, new_key())
    async with acting(conn, roles.READ_ONLY):
        seen = await rows(conn, "select status, history from taskd.job_view")
        names = await rows(conn, "select name, fingerprint from taskd.api_keys")

        assert seen == [("pending", [])]
        assert names == [("shop", "fp_0")]
        assert await denied(conn, "select digest from taskd.api_keys")
        assert await denied(conn, "select * from taskd.api_keys")
        assert await denied(conn, "select k from taskd.api_keys as k")


@pytest.mark.parametrize("role", LIMITED)
async def test_what_the_audit_log_has_taken_nobody_but_the_owner_changes(conn: Connection, role: str) -> None:
    await audit.append(conn, actor="admin", action="key.create")
    await become(conn, role)

    for statement in (
        "update taskd.audit set actor = 'nobody'",
        "delete from taskd.audit",
        "truncate taskd.audit",
        "insert into taskd.audit (actor, action, at) values ('a', 'b', '2000-01-01')",
        "insert into taskd.audit (actor, action, id) overriding system value values ('a', 'b', 1)",
        "insert into taskd.audit (actor, action) values ('a', 'b')"
        " on conflict (id) do update set actor = 'c'",
    ):
        assert await denied(conn, statement), statement


# -- roles and settings ------------------------------------------------------------------------------------


async def test_roles_can_do_nothing_to_the_server_and_do_not_log_in_by_themselves(conn: Connection) -> None:
    found = await rows(
        conn,
        f"select rolname from pg_roles where rolname in {tuple(ROLES)}"
        " and not (rolsuper or rolcreaterole or rolcreatedb or rolreplication or rolbypassrls"
        " or rolcanlogin)",
    )

    assert {name for (name,) in found} == set(ROLES)


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_has_its_settings(conn: Connection, role: str) -> None:
    [(connections, config)] = await rows(
        conn, f"select rolconnlimit, rolconfig from pg_roles where rolname = '{role}'"
    )
    settings = dict(entry.split("=", 1) for entry in config)

    assert connections > 0
    assert settings["jit"] == "off"
    assert settings["search_path"] == "pg_catalog, pg_temp"
    assert {"statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"} <= set(settings)
    assert settings.get("default_transaction_read_only") == ("on" if role == roles.READ_ONLY else None)


async def test_everything_in_the_schema_is_the_owners(conn: Connection) -> None:
    found = await rows(
        conn,
        "select relowner::regrole::text from pg_class where relnamespace = 'taskd'::regnamespace"
        " union select proowner::regrole::text from pg_proc where pronamespace = 'taskd'::regnamespace"
        " union select nspowner::regrole::text from pg_namespace where nspname = 'taskd'",
    )

    assert found == [(roles.OWNER,)]


async def test_what_a_later_migration_makes_is_closed_until_the_roles_are_applied(conn: Connection) -> None:
    await become(conn, roles.OWNER)
    await conn.execute("create table taskd.later (secret text)")
    await conn.execute("create function taskd.later() returns integer language sql as 'select 1'")

    for role in LIMITED:
        await become(conn, role)
        assert await denied(conn, "select from taskd.later")
        assert await denied(conn, "select taskd.later()")
