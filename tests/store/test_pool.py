"""Connections: a deadline closes the socket and cancels nothing, and what broke is made again."""

from __future__ import annotations

import ast
import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

import taskd
from taskd.errors import BadRow, OutcomeUnknown, SchemaMismatch, StoreUnavailable, Unforeseen
from taskd.store import pool
from taskd.store.pool import Connection, Link, NotConnected, Pace, Target, may_be_done
from tests.factories import one

SOURCES = Path(taskd.__file__).parent


@pytest.fixture
def link(database_url: str) -> Link:
    return Link(Target(url=database_url), Pace(dice=random.Random(1)))


def sends(statement: str) -> Callable[[Connection], Awaitable[object]]:
    async def work(conn: Connection) -> object:
        cursor = await conn.execute(statement.encode())
        return (await cursor.fetchone() or (None,))[0] if cursor.description else None

    return work


def raises(sqlstate: str) -> Callable[[Connection], Awaitable[object]]:
    return sends(f"do $$ begin raise exception 'told to' using errcode = '{sqlstate}'; end $$")


async def answered(link: Link) -> int:
    """Return the process id of the link's server as soon as there is a connection again."""
    until = time.monotonic() + 10
    while True:
        try:
            return int(str(await link.run(sends("select pg_backend_pid()"))))
        except NotConnected:
            assert time.monotonic() < until
            await asyncio.sleep(link.wait_s)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# -- deadlines -------------------------------------------------------------------------------------------


async def test_a_server_that_does_not_answer_is_given_up_at_the_deadline(link: Link) -> None:
    began = time.monotonic()
    with frozen(await answered(link)), pytest.raises(StoreUnavailable, match="did not answer within"):
        await link.run(sends("select 1"), deadline_s=0.2)

    assert time.monotonic() - began < 2
    assert not link.connected


async def test_a_deadline_sends_no_cancel_request(link: Link, db: psycopg.AsyncConnection) -> None:
    pid = await answered(link)

    with pytest.raises(StoreUnavailable):
        await link.run(sends("select pg_sleep(60)"), deadline_s=0.1)

    # The server goes on: it looks at its socket only when it has something to say.
    assert await one(db, "select state from pg_stat_activity where pid = %s", pid) == "active"
    await db.execute("select pg_terminate_backend(%s)", (pid,))


async def test_aborting_a_link_ends_its_statement_and_nothing_else(
    link: Link, db: psycopg.AsyncConnection
) -> None:
    pid = await answered(link)
    waits = asyncio.create_task(link.run(sends("select pg_sleep(60)")))
    while await one(db, "select state from pg_stat_activity where pid = %s", pid) != "active":
        pass

    link.abort()

    with pytest.raises(StoreUnavailable):
        await waits
    await db.execute("select pg_terminate_backend(%s)", (pid,))


async def test_a_server_that_freezes_after_the_connect_is_given_up_too(link: Link) -> None:
    async def listen(conn: Connection) -> None:
        await conn.execute("select pg_sleep(60)")

    link.on_connect = listen

    with pytest.raises(NotConnected):
        await link.run(sends("select 1"), deadline_s=0.1)

    assert not link.connected


async def test_the_next_use_after_a_deadline_gets_a_connection_of_its_own(link: Link) -> None:
    pid = await answered(link)
    with frozen(pid), pytest.raises(StoreUnavailable):
        await link.run(sends("select 1"), deadline_s=0.1)

    assert await answered(link) != pid
    assert link.failures == 0


# -- what an error does to the connection ----------------------------------------------------------------


@pytest.mark.parametrize(
    "sqlstate",
    [
        pytest.param("25006", id="a primary that was demoted"),
        pytest.param("57P01", id="shut down by an administrator"),
        pytest.param("57P02", id="another process crashed"),
        pytest.param("57P03", id="starting up"),
    ],
)
async def test_what_says_that_the_server_goes_away_ends_the_connection(link: Link, sqlstate: str) -> None:
    with pytest.raises(StoreUnavailable):
        await link.run(raises(sqlstate))

    assert not link.connected


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "53100", "55P03", "57014"])
async def test_what_passes_by_itself_leaves_the_connection(link: Link, sqlstate: str) -> None:
    with pytest.raises(StoreUnavailable):
        await link.run(raises(sqlstate))

    assert link.connected
    assert link.wait_s == 0


@pytest.mark.parametrize("sqlstate", ["22P02", "23505", "54000"])
async def test_a_row_that_is_refused_is_no_fault_of_the_connection(link: Link, sqlstate: str) -> None:
    with pytest.raises(BadRow) as caught:
        await link.run(raises(sqlstate))

    assert caught.value.sqlstate == sqlstate
    assert link.connected


@pytest.mark.parametrize("sqlstate", ["P0001", "0A000", "38000", "42804", "2F003", "21000", "ZZ999"])
async def test_whatever_else_postgres_says_is_an_error_of_taskd(link: Link, sqlstate: str) -> None:
    with pytest.raises(Unforeseen, match=sqlstate):
        await link.run(raises(sqlstate))

    assert link.connected


async def test_what_the_driver_refuses_is_a_bad_row_too(link: Link) -> None:
    async def work(conn: Connection) -> None:
        await conn.execute("select %s::text", ("a\x00b",))

    with pytest.raises(BadRow):
        await link.run(work)

    assert link.connected


async def test_a_missing_schema_says_what_to_run(link: Link) -> None:
    with pytest.raises(SchemaMismatch, match="taskd migrate"):
        await link.run(sends("select * from taskd.no_such_table"))


async def test_a_broken_connection_is_made_again(link: Link, db: psycopg.AsyncConnection) -> None:
    pid = await answered(link)
    await db.execute("select pg_terminate_backend(%s, 5000)", (pid,))

    with pytest.raises(StoreUnavailable):
        await link.run(sends("select 1"))

    assert await answered(link) != pid


async def test_while_a_connect_is_not_worth_trying_none_is_tried() -> None:
    link = Link(Target(url="postgresql://x@127.0.0.1:1/x"), Pace(dice=random.Random(1)))
    with pytest.raises(NotConnected):
        await link.run(sends("select 1"))

    with pytest.raises(NotConnected, match="trying again shortly"):
        await link.run(sends("select 1"))

    assert link.failures == 1


async def test_a_connection_is_made_anew_at_its_age(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await answered(link)
    monkeypatch.setattr(pool, "MAX_AGE_S", 0.0)

    assert await answered(link) != first


@pytest.mark.parametrize(
    ("warning", "unknown"),
    [
        pytest.param("canceling wait for synchronous replication due to user request", True, id="cancelled"),
        pytest.param(
            "canceling the wait for synchronous replication and terminating connection", True, id="ended"
        ),
        pytest.param("something else", False, id="another warning"),
    ],
)
async def test_a_commit_that_was_not_replicated_is_no_success(
    link: Link, warning: str, unknown: bool
) -> None:
    statement = sends(f"do $$ begin raise warning '{warning}'; end $$")

    if unknown:
        with pytest.raises(OutcomeUnknown):
            await link.run(statement)
    else:
        await link.run(statement)

    assert await link.run(sends("select 7")) == 7, "it is about that one statement"


async def test_one_after_the_other(link: Link) -> None:
    answers = await asyncio.gather(*(link.run(sends(f"select {number}")) for number in range(20)))

    assert answers == list(range(20))


async def test_settings_of_a_connection_are_safe(link: Link) -> None:
    assert await link.run(sends("show jit")) == "off"
    assert await link.run(sends("show statement_timeout")) == "5s"


# -- where and when to connect ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "name", "value"),
    [
        pytest.param("postgresql://h/x", "tcp_user_timeout", "4000", id="a dead peer is noticed"),
        pytest.param("postgresql://h/x?tcp_user_timeout=9", "tcp_user_timeout", "9", id="unless told so"),
        pytest.param("postgresql://a,b/x", "target_session_attrs", "read-write", id="two: the primary"),
        pytest.param("postgresql://a/x", "target_session_attrs", None, id="one: whatever it is"),
        pytest.param("postgresql://a,b/x?target_session_attrs=any", "target_session_attrs", "any", id="told"),
        pytest.param(
            "postgresql://h/x?options=-c%20a.b%3D1",
            "options",
            "-c jit=off -c statement_timeout=5000 -c a.b=1",
            id="options are joined",
        ),
    ],
)
def test_parameters(url: str, name: str, value: str | None) -> None:
    assert Target(url=url).parameters().get(name) == value


def test_a_pooler_that_refuses_options_gets_none() -> None:
    assert "options" not in Target(url="postgresql://h/x").parameters(options=False)


@given(steps=st.lists(st.floats(min_value=0, max_value=3), min_size=2, max_size=60))
def test_connects_of_a_process_are_at_most_two_in_any_second(steps: list[float]) -> None:
    now = 0.0
    pace = Pace(clock=lambda: now)
    begun = []
    for step in steps:
        begun.append(now + pace.book())
        now += step

    assert begun == sorted(begun)
    assert all(third - first > 1 for first, third in zip(begun, begun[2:], strict=False))


async def test_a_process_that_starts_connects_at_once_and_then_keeps_its_pace(database_url: str) -> None:
    pace = Pace()
    links = [Link(Target(url=database_url), pace) for _ in range(3)]
    began = time.monotonic()

    for link in links:
        await answered(link)
    assert time.monotonic() - began < 0.9
    for link in links:
        await link.renew()
    for link in links:
        await answered(link)

    assert time.monotonic() - began > 2.0, "three more connects, after three that were made at once"
    for link in links:
        await link.close()


async def test_a_first_connect_waits_its_turn_when_the_server_is_away() -> None:
    pace = Pace(dice=random.Random(1))
    target = Target(url="postgresql://x@127.0.0.1:1/x")
    connects = []
    began = time.monotonic()

    for link in [Link(target, pace) for _ in range(4)]:
        with pytest.raises(NotConnected):
            await link.run(sends("select 1"), deadline_s=10)
        connects.append(time.monotonic() - began)

    assert connects[1] < 0.9
    assert connects[2] > 1.0
    assert connects[3] > 1.0


async def test_a_server_that_answers_one_link_is_tried_by_the_others_at_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace(dice=random.Random(1))
    one_, other = Link(Target(url=database_url), pace), Link(Target(url=database_url), pace)
    monkeypatch.setattr(pace, "jitter_s", lambda failures: 60.0)
    pid = await answered(other)
    with frozen(pid), pytest.raises(StoreUnavailable):
        await other.run(sends("select 1"), deadline_s=0.1)
    assert other.wait_s > 50

    await one_.run(sends("select 1"))

    assert other.wait_s == 0
    assert await answered(other) != pid
    await one_.close()
    await other.close()


async def test_an_old_connection_is_kept_while_no_other_may_be_made(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await answered(link)
    link._pace.book()
    monkeypatch.setattr(pool, "MAX_AGE_S", 0.0)

    assert await answered(link) == first


async def test_a_link_is_renewed_after_the_statement_that_is_under_way(link: Link) -> None:
    first = await answered(link)
    waits = asyncio.create_task(link.run(sends("select pg_backend_pid() from pg_sleep(0.2)")))
    await asyncio.sleep(0)

    await link.renew()

    assert await waits == first
    assert await answered(link) != first


def test_waits_grow_with_the_failures_up_to_five_seconds() -> None:
    pace = Pace(dice=random.Random(3))
    longest = [max(pace.jitter_s(n) for _ in range(300)) for n in (1, 3, 20)]

    assert longest == pytest.approx([0.2, 0.8, 5.0], rel=0.05)
    assert min(pace.jitter_s(n) for n in range(50)) >= 0.1


def _unavailable(cause: BaseException | None) -> StoreUnavailable:
    error = StoreUnavailable("x")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "may"),
    [
        pytest.param(NotConnected("x"), False, id="nothing was sent"),
        pytest.param(BadRow("x", sqlstate="23505"), False, id="refused"),
        pytest.param(Unforeseen("x"), False, id="refused for no reason that we know"),
        pytest.param(_unavailable(psycopg.errors.SerializationFailure("x")), False, id="rolled back"),
        pytest.param(_unavailable(psycopg.errors.QueryCanceled("x")), False, id="timed out in the server"),
        pytest.param(_unavailable(psycopg.OperationalError("x")), True, id="the connection broke"),
        pytest.param(_unavailable(psycopg.errors.AdminShutdown("x")), True, id="the server went away"),
        pytest.param(_unavailable(None), True, id="the deadline passed"),
        pytest.param(OutcomeUnknown("x"), True, id="committed, not replicated"),
    ],
)
def test_what_failed_may_have_happened_or_not(
    error: StoreUnavailable | BadRow | Unforeseen, may: bool
) -> None:
    assert may_be_done(error) == may


# -- the rule about cancelling ---------------------------------------------------------------------------

_TALKS = re.compile(
    r"\.run\(lambda conn|link\.run\(|\.execute\(|\b(leases|jobs|nodes|types|keys|limits)\.\w+\("
)


def _timed(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what stands under a timeout: arguments of `wait_for`, bodies of `timeout`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("wait_for"):
            yield from node.args[:1]
        if isinstance(node, ast.AsyncWith | ast.With):
            calls = [ast.unparse(item.context_expr) for item in node.items]
            if any(re.match(r"(asyncio\.)?timeout(_at)?\(", call) for call in calls):
                yield from node.body


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=str(path.relative_to(SOURCES))) for path in sorted(SOURCES.rglob("*.py"))]
)
def test_no_statement_stands_under_a_timeout_of_asyncio(path: Path) -> None:
    # It would cancel the await, psycopg would send a cancel request, and a commit that waits for its
    # standby would then be reported as done.
    text = path.read_text(encoding="utf-8")

    bad = [ast.unparse(node) for node in _timed(ast.parse(text)) if _TALKS.search(ast.unparse(node))]

    assert bad == []


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.name) for path in sorted((SOURCES / "store").glob("*.py"))]
)
def test_store_cancels_no_task(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    cancelled = [
        ast.unparse(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".cancel", "wait_for", "timeout"))
    ]

    assert set(cancelled) <= {"timer.cancel"}
