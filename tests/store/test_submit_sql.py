"""`taskd.submit` and `taskd.submit_many`: in the application's own transaction, checked as at the door."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from taskd.model.job import SQL as RESERVED
from taskd.model.jobtype import Retry, TypeInfo
from taskd.model.state import Cause
from taskd.store import types
from taskd.store.queries import for_schema
from tests.engine.node import running
from tests.factories import Connection, add_node

MANY = 10_000


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        yield conn


@pytest.fixture
async def app(db: Connection) -> Connection:
    """The connection of an application; the types `mail` and `slow` are published."""
    await types.publish(
        db,
        [
            TypeInfo(name="mail", handler="mail", plugin="test"),
            TypeInfo(
                name="slow",
                handler="slow",
                plugin="test",
                priority=7,
                timeout=60.0,
                retry=Retry(max_attempts=9),
            ),
            TypeInfo(name="off", handler="off", plugin="test", enabled=False),
            TypeInfo(name="taskd.notify", handler="notify", plugin="builtin"),
        ],
        node=None,
    )
    return db


async def rows(db: Connection, statement: str, *args: object) -> list[Any]:
    cursor = await db.execute(statement.encode(), args)
    return await cursor.fetchall()


async def submit(db: Connection, type_: str = "mail", payload: object = None, **options: object) -> UUID:
    named = "".join(f", {name} => %s" for name in options)
    statement = f"select taskd.submit(%s, %s{named})"
    [[job_id]] = await rows(
        db, statement, type_, Jsonb({} if payload is None else payload), *options.values()
    )
    assert isinstance(job_id, UUID)
    return job_id


async def submit_many(db: Connection, jobs: object, **options: object) -> list[tuple[UUID, bool]]:
    named = "".join(f", {name} => %s" for name in options)
    return await rows(db, f"select * from taskd.submit_many(%s{named})", Jsonb(jobs), *options.values())


async def view(db: Connection, job_id: UUID, *columns: str) -> tuple[Any, ...]:
    [row] = await rows(db, f"select {', '.join(columns)} from taskd.job_view where id = %s", job_id)
    return tuple(row)


async def count(db: Connection) -> int:
    [[jobs, queue]] = await rows(
        db, "select (select count(*) from taskd.jobs), (select count(*) from taskd.queue)"
    )
    assert jobs == queue
    return int(jobs)


# -- what is stored --------------------------------------------------------------------------------------


async def test_defaults_come_from_the_published_type(app: Connection) -> None:
    job_id = await submit(app, "slow", {"a": 1})

    found = await view(app, job_id, "type", "payload", "status", "priority", "max_attempts", "tags", "meta")
    assert found == ("slow", {"a": 1}, "pending", 7, 9, [], None)
    assert (job_id.version, await view(app, job_id, "client")) == (7, (RESERVED,))


async def test_every_option_is_stored(app: Connection) -> None:
    job_id = await submit(
        app,
        "slow",
        priority=-100,
        delay=90.5,
        max_attempts=100,
        timeout=60,
        expires_in=120,
        unique_key="order 1",
        unique_while="unfinished",
        tags=["a", "b"],
        meta=Jsonb({"m": 1}),
    )

    shown = await view(
        app, job_id, "status", "priority", "max_attempts", "unique_key", "tags", "meta", "run_at - created_at"
    )
    assert shown[:6] == ("scheduled", -100, 100, "order 1", ["a", "b"], {"m": 1})
    assert shown[6].total_seconds() == 90.5
    [[timeout_ms, keyed, expires]] = await rows(
        app,
        "select timeout_ms, keyed and key_hash is not null, expires_at > clock_timestamp()"
        " from taskd.queue join taskd.jobs using (id)",
    )
    assert (timeout_ms, keyed, expires) == (60_000, True, True)


async def test_a_moment_that_has_passed_means_now(app: Connection) -> None:
    job_id = await submit(app, run_at="2020-01-01T00:00:00Z")

    assert await view(app, job_id, "status", "run_at = created_at") == ("pending", True)


async def test_a_job_can_be_given_to_another_client(app: Connection) -> None:
    client = UUID(int=77)

    [(many, _)] = await submit_many(app, [{"type": "mail", "payload": {}}], client=client)

    assert await view(app, await submit(app, client=client), "client") == (client,)
    assert await view(app, many, "client") == (client,)


async def test_the_time_is_that_of_the_call_and_its_transaction_has_its_number_by_then(
    app: Connection,
) -> None:
    # A floor may have passed the beginning of the transaction, and looks back only for those with numbers.
    async with app.transaction():
        [[began]] = await rows(app, "select now()")
        job_id = await submit(app)
        [[run_at, numbered]] = await rows(
            app,
            "select run_at, pg_current_xact_id_if_assigned() is not null from taskd.queue where id = %s",
            job_id,
        )

    assert run_at > began
    assert numbered


# -- the caller's transaction ----------------------------------------------------------------------------


async def test_a_rollback_stores_nothing(app: Connection) -> None:
    async with app.transaction(force_rollback=True):
        await submit(app, unique_key="k")
        await submit_many(app, [{"type": "mail", "payload": {}}] * 3)

    assert await count(app) == 0
    await submit(app, unique_key="k", payload={"other": "body"})


async def test_a_refusal_ends_the_transaction_as_any_error_does(app: Connection) -> None:
    async def both() -> None:
        async with app.transaction():
            await submit(app)
            await submit(app, "nobody")

    with pytest.raises(psycopg.errors.InvalidParameterValue):
        await both()

    assert await count(app) == 0


async def test_an_open_transaction_holds_nobody_up(app: Connection, database_url: str) -> None:
    async with connected(database_url) as other, app.transaction():
        await submit(app, priority=3)
        await submit_many(app, [{"type": "mail", "payload": {}, "priority": 4}])

        await asyncio.wait_for(submit(other, priority=3), 10)
        await asyncio.wait_for(submit_many(other, [{"type": "mail", "payload": {}, "priority": 4}]), 10)


# -- rules -----------------------------------------------------------------------------------------------


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def nested_arrays(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 2):
        value = [value]
    return {"a": value}


BAD: list[Any] = [
    ("type", {"type": "Mail"}),
    ("type", {"type": "nobody"}),
    ("type", {"type": "off"}),
    ("type", {"type": "taskd.notify"}),
    ("payload", {"payload": [1]}),
    ("payload", {"payload": "text"}),
    ("payload", {"payload": nested(65)}),
    ("payload", {"payload": nested_arrays(65)}),
    ("payload", {"payload": {"n": 10**300}}),
    ("payload", {"payload": {"text": "x" * 1_048_576}}),
    ("payload", {"payload": {f"k{n}": 1 for n in range(10_001)}}),
    ("priority", {"priority": 101}),
    ("priority", {"priority": -101}),
    ("priority", {"priority": 100_000}),
    ("delay", {"delay": -1}),
    ("delay", {"delay": 31_536_001}),
    ("run_at", {"run_at": "2200-01-01T00:00:00Z"}),
    ("run_at", {"run_at": "2020-01-01T00:00:00Z", "delay": 5}),
    ("max_attempts", {"max_attempts": 0}),
    ("max_attempts", {"max_attempts": 101}),
    ("timeout", {"timeout": 0}),
    ("timeout", {"type": "slow", "timeout": 60.5}),
    ("expires_in", {"expires_in": 0}),
    ("expires_in", {"expires_in": 31_536_001}),
    ("unique_key", {"unique_key": ""}),
    ("unique_key", {"unique_key": "x" * 256}),
    ("unique_key", {"unique_key": "a\u2028b"}),
    ("unique_while", {"unique_while": "never"}),
    ("tags", {"tags": ["t"] * 11}),
    ("tags[1]", {"tags": ["good", ""]}),
    ("tags[0]", {"tags": ["a\nb"]}),
    ("meta", {"meta": {"m": "x" * 4096}}),
    ("meta", {"meta": nested(65)}),
]


@pytest.mark.parametrize(("member", "wrong"), BAD)
async def test_what_the_door_refuses_is_refused_by_name(
    app: Connection, member: str, wrong: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"type": "mail", "payload": {}} | wrong
    alone: dict[str, Any] = {name: Jsonb(value) if name == "meta" else value for name, value in given.items()}
    type_, payload = alone.pop("type"), alone.pop("payload")

    with pytest.raises(psycopg.errors.InvalidParameterValue, match=rf"^{member.replace('[', '.')[:6]}"):
        await submit(app, type_, payload, **alone)
    with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
        await submit_many(app, [{"type": "mail", "payload": {}}, given])

    assert str(refused.value).startswith(f"jobs[1].{member}: ")
    assert await count(app) == 0


GOOD: list[Any] = [
    {"payload": nested(64)},
    {"payload": nested_arrays(64)},
    {"payload": {"n": 10**299, "text": 'ü"\\ 😀'}},
    {"payload": {"text": "x" * 100_000}},
    {"payload": {f"k{n}": 1 for n in range(10_000)}},
    {"priority": 100, "delay": 0, "max_attempts": 1, "timeout": 0.001, "expires_in": 31_536_000},
    {"unique_key": "x" * 255, "tags": ["ä" * 64] * 10, "meta": {"m": "x" * 4000}},
]


@pytest.mark.parametrize(
    "options",
    GOOD,
    ids=["deep", "deep arrays", "digits and signs", "long", "many members", "bounds", "lengths"],
)
async def test_what_lies_just_within_the_rules_is_stored(app: Connection, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"type": "mail", "payload": {}} | options
    alone: dict[str, Any] = {name: Jsonb(value) if name == "meta" else value for name, value in given.items()}
    type_, payload = alone.pop("type"), alone.pop("payload")

    one = await submit(app, type_, payload, **alone)
    [(other, duplicate)] = await submit_many(app, [given])

    assert await view(app, one, "payload") == await view(app, other, "payload") == (given["payload"],)
    assert duplicate == ("unique_key" in given)


BAD_MEMBERS: list[Any] = [
    pytest.param("jobs[0]", 5, id="no object"),
    pytest.param("jobs[0].type", {"payload": {}}, id="no type"),
    pytest.param("jobs[0].type", {"type": 5, "payload": {}}, id="a type that is no text"),
    pytest.param("jobs[0].payload", {"type": "mail"}, id="no payload"),
    pytest.param("jobs[0].payload", {"type": "mail", "payload": None}, id="a payload that is null"),
    pytest.param("jobs[0].prioritty", {"type": "mail", "payload": {}, "prioritty": 1}, id="unknown member"),
    pytest.param("jobs[0].priority", {"type": "mail", "payload": {}, "priority": 1.5}, id="no whole number"),
    pytest.param("jobs[0].priority", {"type": "mail", "payload": {}, "priority": "1"}, id="a number as text"),
    pytest.param("jobs[0].priority", {"type": "mail", "payload": {}, "priority": None}, id="null"),
    pytest.param("jobs[0].delay", {"type": "mail", "payload": {}, "delay": 10**40}, id="a huge number"),
    pytest.param("jobs[0].run_at", {"type": "mail", "payload": {}, "run_at": "tomorrow"}, id="no time"),
    pytest.param(
        "jobs[0].run_at", {"type": "mail", "payload": {}, "run_at": "2026-01-01T00:00:00"}, id="no offset"
    ),
    pytest.param(
        "jobs[0].run_at", {"type": "mail", "payload": {}, "run_at": "2026-02-30T00:00:00Z"}, id="no such day"
    ),
    pytest.param(
        "jobs[0].scheduled_at",
        {
            "type": "mail",
            "payload": {},
            "run_at": "2026-01-01T00:00:00Z",
            "scheduled_at": "2026-01-01T00:00:00Z",
        },
        id="both names of a time",
    ),
    pytest.param(
        "jobs[0].tags", {"type": "mail", "payload": {}, "tags": ["a", 1]}, id="a tag that is no text"
    ),
    pytest.param("jobs[0].meta", {"type": "mail", "payload": {}, "meta": []}, id="meta that is no object"),
]


@pytest.mark.parametrize(("path", "job"), BAD_MEMBERS)
async def test_a_member_of_a_wrong_kind_is_refused_by_path(app: Connection, path: str, job: object) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
        await submit_many(app, [job])

    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "jobs",
    [[], {}, "x", [{"type": "mail", "payload": {}}] * (MANY + 1)],
    ids=["none", "object", "text", "too many"],
)
async def test_submit_many_wants_an_array_of_1_to_10000(app: Connection, jobs: Any) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"^jobs: must"):
        await submit_many(app, jobs)


async def test_the_first_bad_job_is_named_whatever_its_key(app: Connection) -> None:
    job = {"type": "mail", "payload": {}}
    jobs = [job, job, {**job, "unique_key": "z", "delay": -1}, {**job, "unique_key": "a", "delay": -1}]

    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"^jobs\[2\]\.delay: "):
        await submit_many(app, jobs)


# -- unique keys -----------------------------------------------------------------------------------------


async def test_the_same_call_again_returns_the_first_id(app: Connection) -> None:
    first = await submit(app, payload={"a": 1, "b": [1.0, 2]}, unique_key="k", tags=["t"])

    again = await submit(app, payload={"b": [1, 2.0], "a": 1.0}, unique_key="k", tags=["t"])

    assert again == first
    assert await count(app) == 1


async def test_one_moment_is_the_same_in_every_time_zone(app: Connection) -> None:
    await app.execute("set timezone = 'Asia/Kolkata'")
    moment = "select taskd.submit('mail', '{}', unique_key => 'k', run_at => now()::date + interval '2 days')"
    [[first]] = await rows(app, moment)
    [[when]] = await rows(app, "select run_at::text from taskd.queue")
    await app.execute("set timezone = 'UTC'")

    assert await submit(app, unique_key="k", run_at=when) == first


@pytest.mark.parametrize(
    "other", [{"payload": {"a": 2}}, {"priority": 1}, {"tags": ["t"]}, {"delay": 1}], ids=str
)
async def test_another_body_conflicts_and_names_the_holder(app: Connection, other: dict[str, Any]) -> None:
    first = await submit(app, payload={"a": 1}, unique_key="k")

    with pytest.raises(psycopg.errors.UniqueViolation, match=f"^unique_key: is held by job {first}"):
        await submit(app, **{"payload": {"a": 1}, "unique_key": "k", **other})
    with pytest.raises(
        psycopg.errors.UniqueViolation, match=rf"^jobs\[0\]\.unique_key: is held by job {first}"
    ):
        await submit_many(app, [{"type": "mail", "payload": {"a": 1}, "unique_key": "k", **other}])


async def test_a_key_belongs_to_a_client(app: Connection) -> None:
    first = await submit(app, unique_key="k")

    assert await submit(app, unique_key="k", client=UUID(int=5), payload={"a": 2}) != first


@pytest.mark.parametrize(("mode", "free"), [("retained", False), ("unfinished", True)])
async def test_a_finished_job_frees_a_key_of_the_mode_unfinished(
    app: Connection, mode: str, free: bool
) -> None:
    first = await submit(app, unique_key="k", unique_while=mode)
    node = await add_node(app)
    await app.execute(
        "update taskd.queue set claimed = true, node = %s, claim = 1, started_at = now()", (node,)
    )
    await app.execute(
        "select * from taskd.settle_completed(%s, array[%s], array[1], array['null'], array[1])",
        (node, first),
    )

    again = await submit(app, unique_key="k", unique_while=mode)

    assert (again != first) == free


async def test_keys_that_repeat_within_one_call_are_duplicates_of_the_first(app: Connection) -> None:
    job = {"type": "mail", "payload": {"a": 1}}
    jobs = [job, {**job, "unique_key": "z"}, {**job, "unique_key": "a"}, {**job, "unique_key": "z"}, job]

    found = await submit_many(app, jobs)

    assert [duplicate for _, duplicate in found] == [False, False, False, True, False]
    assert found[3][0] == found[1][0]
    assert await count(app) == 4


async def test_the_same_key_at_once_stores_one_job(app: Connection, database_url: str) -> None:
    async def one() -> UUID:
        async with connected(database_url) as conn:
            return await submit(conn, unique_key="k")

    ids = await asyncio.gather(*(one() for _ in range(16)))

    assert len(set(ids)) == 1
    assert await count(app) == 1


async def test_who_waits_for_a_key_gets_it_when_the_other_rolls_back(
    app: Connection, database_url: str
) -> None:
    async with connected(database_url) as other:
        async with app.transaction(force_rollback=True):
            first = await submit(app, unique_key="k")
            waits = asyncio.create_task(submit(other, unique_key="k", payload={"other": "body"}))
            await _blocked(database_url)
        second = await waits

    assert second != first
    assert await count(app) == 1


async def test_calls_with_the_same_keys_in_another_order_do_not_deadlock(
    app: Connection, database_url: str
) -> None:
    jobs = [{"type": "mail", "payload": {}, "unique_key": f"k{n}"} for n in range(40)]

    async def one(turned: bool) -> set[UUID]:
        async with connected(database_url) as conn:
            found = await submit_many(conn, jobs[::-1] if turned else jobs)
            return {job_id for job_id, _ in found}

    sets = await asyncio.gather(*(one(n % 2 == 1) for n in range(8)))

    assert all(found == sets[0] for found in sets)
    assert await count(app) == 40


async def _blocked(url: str) -> None:
    async with connected(url) as conn:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            [[waiting]] = await rows(conn, "select count(*) from pg_locks where not granted")
            if waiting:
                return
    raise AssertionError("nobody waits")


# -- many ------------------------------------------------------------------------------------------------


async def test_ten_thousand_are_stored_in_their_order(app: Connection) -> None:
    jobs = [{"type": "mail", "payload": {"n": n}} for n in range(MANY)]

    found = await submit_many(app, jobs)

    ids = [job_id for job_id, _ in found]
    assert ids == sorted(ids)  # which is the order that they run in
    cursor = await app.execute("select id, (payload->>'n')::integer from taskd.jobs order by id")
    assert await cursor.fetchall() == list(zip(ids, range(MANY), strict=True))
    assert await count(app) == MANY


async def test_plain_jobs_and_others_come_back_in_the_order_of_the_array(app: Connection) -> None:
    jobs = [
        {"type": "slow" if n % 3 else "mail", "payload": {"n": n}, **({"delay": n} if n % 5 == 0 else {})}
        for n in range(100)
    ]

    found = await submit_many(app, jobs)

    cursor = await app.execute("select id, (payload->>'n')::integer from taskd.jobs")
    stored = dict(await cursor.fetchall())
    assert [stored[job_id] for job_id, _ in found] == list(range(100))
    [[priorities]] = await rows(app, "select array_agg(distinct (type, priority)::text) from taskd.lanes")
    assert sorted(priorities) == ["(mail,0)", "(slow,7)"]


async def test_one_bad_job_stores_nothing(app: Connection) -> None:
    jobs = [{"type": "mail", "payload": {}} for _ in range(500)] + [
        {"type": "mail", "payload": {}, "delay": -1}
    ]

    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"^jobs\[500\]\.delay"):
        await submit_many(app, jobs)

    assert await count(app) == 0


# -- a node ----------------------------------------------------------------------------------------------


async def test_wake_notifies_at_the_commit_and_not_before(app: Connection, database_url: str) -> None:
    async with connected(database_url) as ears:
        await ears.execute("listen taskd")
        async with app.transaction():
            await submit(app, "slow", wake=True)
            await submit_many(
                app,
                [{"type": "mail", "payload": {}}] * 5 + [{"type": "mail", "payload": {}, "delay": 1}],
                wake=True,
            )
            await submit(app, priority=9)
            early = [note async for note in ears.notifies(timeout=0.2)]
        heard = {note.payload async for note in ears.notifies(timeout=5, stop_after=2)}

    assert early == []
    assert heard == {"slow 7", "mail 0"}


@pytest.mark.parametrize("many", [False, True])
async def test_a_woken_node_starts_at_once_and_another_at_its_poll(database_url: str, many: bool) -> None:
    async def started_after(conn: Connection, node: Any, type_: str, wake: bool) -> float:
        if many:
            [(job_id, _)] = await submit_many(conn, [{"type": type_, "payload": {}}], wake=wake)
        else:
            job_id = await submit(conn, type_, wake=wake)
        await node.until(job_id)
        [after] = await view(conn, job_id, "extract(epoch from started_at - created_at)::float8")
        return float(after)

    async with running(database_url) as node, connected(database_url) as conn:
        await node.until(await node.add("echo"))  # everything is up
        woken = [await started_after(conn, node, "echo", True) for _ in range(5)]
        polled = [await started_after(conn, node, "echo", False) for _ in range(3)]

    assert min(woken) < 0.1
    assert max(polled) < 3


async def test_a_payload_that_does_not_fit_the_schema_ends_at_its_claim(database_url: str) -> None:
    async with running(database_url) as node, connected(database_url) as conn:
        job_id = await submit(conn, "gate", {"path": 5}, max_attempts=9, wake=True)
        found = await node.until(job_id)

    assert (found.status, found.attempts) == ("failed", 0)
    assert found.history[0].cause == Cause.INVALID_PAYLOAD


def test_a_schema_of_another_name_has_its_own_functions() -> None:
    text = files("taskd.sql.migrations").joinpath("0003_submit.sql").read_text(encoding="utf-8")
    moved = for_schema(text, "jobs_x")

    assert "like 'taskd' || '.%'" in moved  # the names that are reserved stay what they are
    assert "rtrim('jobs_x.', '.')" in moved
