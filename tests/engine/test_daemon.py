"""A whole node: jobs in, verdicts out, whatever befalls its children, its lease and its database."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from taskd.embedded import EmbeddedPG
from taskd.engine import crew, daemon, heart, slots
from taskd.engine.children import PoolSettings
from taskd.model.state import Cause
from taskd.store import jobs, leases, migrate, nodes
from tests.engine.node import Node, appears, claims_left, eventually, running
from tests.factories import Connection, add, add_node, claim, claim_one, column, new_job, one
from tests.faults.rig.proxy import Proxy, proxy
from tests.postgres import DurablePG, crash

FIXED: dict[str, object] = {"retry": {"backoff": "fixed", "backoff_base": 0.01, "jitter": "none"}}


def payload(**members: object) -> str:
    return msgspec.json.encode(members).decode()


def gone(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


# -- ordinary outcomes -----------------------------------------------------------------------------------


async def test_outcomes_of_handlers(database_url: str) -> None:
    async with running(database_url, types={"boom": FIXED, "echo": FIXED}) as node:
        echo = await node.add("echo", payload(value=[1, "ü"]))
        boom = await node.add("boom", payload(text="why"), max_attempts=3)
        fail = await node.add("outcome", payload(how="fail"), max_attempts=9)
        later = await node.add("outcome", payload(how="later"))
        snooze = await node.add("outcome", payload(how="snooze"))
        wrong = await node.add("gate", payload(path=5), max_attempts=9)

        done = await node.until(echo)
        assert (done.status, done.attempts, done.history) == ("completed", 1, ())
        assert msgspec.json.decode(done.result or "") == {"value": [1, "ü"]}

        failed = await node.until(boom)
        assert (failed.status, failed.attempts) == ("failed", 3)
        assert failed.error_message == "ValueError: why"
        assert [(run.cause, run.attempt) for run in failed.history] == [(Cause.ERROR, n) for n in (1, 2, 3)]

        refused = await node.until(fail)
        assert (refused.status, refused.attempts, refused.error_message) == ("failed", 1, "no use")

        waits = await node.until(later, "scheduled")
        assert (waits.attempts, waits.history[0].cause) == (1, Cause.RETRY_LATER)
        assert waits.error_message == "busy"

        asleep = await node.until(snooze, "scheduled")
        assert (asleep.attempts, asleep.history[0].cause) == (0, Cause.SNOOZED)

        invalid = await node.until(wrong)
        assert (invalid.status, invalid.attempts) == ("failed", 0)
        assert invalid.history[0].cause == Cause.INVALID_PAYLOAD


async def test_a_deaf_job_is_killed_at_its_timeout_and_its_neighbours_are_not(
    database_url: str, tmp_path: Path
) -> None:
    async with running(database_url, types={"stuck": FIXED}) as node:
        beside = await node.add("gate", payload(path=str(tmp_path / "a")))
        alone = await node.add("solo_gate", payload(path=str(tmp_path / "b")))
        await appears(tmp_path / "a.started")
        await appears(tmp_path / "b.started")

        began = time.monotonic()
        stuck = await node.add("stuck", max_attempts=1)
        patient = await node.add("patient", max_attempts=1)
        killed = await node.until(stuck)
        asked = await node.until(patient)
        took = time.monotonic() - began
        for name in "ab":
            (tmp_path / name).touch()
        neighbours = [await node.until(beside), await node.until(alone)]

    assert [job.status for job in (killed, asked)] == ["failed", "failed"]
    assert [job.history[0].cause for job in (killed, asked)] == [Cause.TIMEOUT, Cause.TIMEOUT]
    assert killed.history[0].signal == signal.SIGKILL
    assert took < 10
    assert [(job.status, job.attempts, job.history) for job in neighbours] == [("completed", 1, ())] * 2


# -- crashes ---------------------------------------------------------------------------------------------


async def test_a_death_with_several_jobs_blames_nobody_and_finds_the_culprit_alone(
    database_url: str, tmp_path: Path
) -> None:
    async with running(database_url) as node:
        path = str(tmp_path / "go")
        good = [await node.add("gate", payload(path=path)) for _ in range(3)]
        await appears(tmp_path / "go.started", lines=3)
        bad = await node.add("die", payload(code=9, path=path), max_attempts=50)
        await node.until(bad, "processing")
        (tmp_path / "go").touch()

        culprit = await node.until(bad)
        others = [await node.until(job_id) for job_id in good]

    # The gate may open before the death: then its job was in nobody's way.
    assert all(job.status == "completed" and job.attempts == 1 for job in others)
    assert all(run.cause is Cause.INTERRUPTED for job in others for run in job.history)
    assert (culprit.status, culprit.attempts) == ("failed", 3)
    crashes = [run for run in culprit.history if run.cause is Cause.CRASHED]
    assert [run.exit_code for run in crashes] == [9, 9, 9]
    assert {run.cause for run in culprit.history} <= {Cause.CRASHED, Cause.INTERRUPTED}


async def test_a_death_with_two_jobs_has_both_run_alone_next(database_url: str, tmp_path: Path) -> None:
    async with running(database_url) as node:
        keeps = await node.add("gate", payload(path=str(tmp_path / "never")))
        await appears(tmp_path / "never.started")
        bad = await node.add("die", payload(path=str(tmp_path / "go")), max_attempts=50)
        await node.until(bad, "processing")
        (tmp_path / "go").touch()

        first, second = await appears(tmp_path / "never.started", lines=2)
        interrupted = await node.job(keeps)
        (tmp_path / "never").touch()
        done = await node.until(keeps)

    assert first != second
    assert (interrupted.status, interrupted.attempts) == ("processing", 1), "uncounted, and this is its first"
    assert [run.cause for run in done.history] == [Cause.INTERRUPTED]
    assert msgspec.json.decode(done.result or "")["pid"] == int(second)


async def test_a_job_that_exits_as_a_child_that_refuses_to_work_does_not_close_its_pool(
    database_url: str,
) -> None:
    async with running(database_url) as node:
        bad = await node.add("die", payload(code=78), max_attempts=1)
        await node.until(bad)

        good = await node.add("echo")

        assert (await node.until(good)).status == "completed"


async def test_what_a_child_said_before_it_died_is_heard(database_url: str) -> None:
    async with running(database_url) as node:
        jobs_before = [await node.add("echo") for _ in range(20)]
        await node.add("die", max_attempts=1)

        for job_id in jobs_before:
            job = await node.until(job_id)
            assert (job.status, job.attempts) == ("completed", 1)


# -- drain -----------------------------------------------------------------------------------------------


async def test_a_node_that_holds_all_that_it_may_goes_on_when_verdicts_are_written(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "MOST_HELD", 50)
    await jobs.insert(db, [new_job(type="echo", payload=payload(value=1)) for _ in range(1000)])

    async with running(database_url):

        async def over() -> bool:
            return bool(await one(db, "select count(*) = 0 as done from taskd.queue"))

        await eventually(over, within_s=60)
    took_s = await one(
        db, "select extract(epoch from max(finished_at) - min(started_at))::float8 from taskd.outcomes"
    )

    assert float(took_s) < 4, "twenty times what it may hold, and no wait for polls between"


async def test_a_drain_lets_run_what_runs_and_leaves_nothing_claimed(
    database_url: str, db: Connection, tmp_path: Path
) -> None:
    pools = {"default": PoolSettings(processes=1, concurrency=2)}
    async with running(database_url, pools=pools) as node:
        path = tmp_path / "go"
        ids = [await node.add("gate", payload(path=str(path))) for _ in range(4)]
        await appears(tmp_path / "go.started", lines=2)

        node.signals.drain()
        await eventually(lambda: _state(db, node.number, "draining"))
        late = await node.add("echo")
        path.touch()
        await node.ended()

        states = sorted([(await node.job(job_id)).status for job_id in ids])
        assert states == ["completed", "completed", "pending", "pending"]
        assert (await node.job(late)).status == "pending"

    assert await claims_left(db) == 0
    assert await one(db, "select count(*) from taskd.history") == 0
    assert await column(db, "select state from taskd.nodes") == ["gone"]


async def _state(db: Connection, node: int, state: str) -> bool:
    return bool(await one(db, "select state = %s from taskd.nodes where id = %s", state, node))


@pytest.mark.parametrize("type_", ["gate", "solo_gate"])
async def test_a_second_signal_skips_the_wait_and_costs_no_attempt(
    database_url: str, db: Connection, tmp_path: Path, type_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "STOP_GRACE_S", 0.5)
    async with running(database_url) as node:
        job_id = await node.add(type_, payload(path=str(tmp_path / "never")))
        [pid] = await appears(tmp_path / "never.started")

        node.signals.drain()
        node.signals.drain()
        await node.ended()

        job = await node.job(job_id)
        assert (job.status, job.attempts) == ("pending", 0)
        assert [run.cause for run in job.history] == [Cause.INTERRUPTED]
        assert gone(int(pid))
    assert await claims_left(db) == 0


async def test_a_signal_before_the_children_are_ready_is_heard(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "STOP_GRACE_S", 0.5)
    # These children say nothing, ever.
    argv = ["/bin/sh", "-c", "sleep 1000"]
    async with running(database_url, child_argv=argv, ready=False) as node:
        await eventually(lambda: _registered(db))

        node.signals.drain()
        node.signals.drain()

        await node.ended()


async def _registered(db: Connection) -> bool:
    return bool(await one(db, "select count(*) from taskd.nodes"))


async def test_a_drain_without_postgres_ends_in_time_and_its_jobs_run_again(
    durable_pg: DurablePG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(daemon, "END_S", 2.0)
    server = durable_pg()
    migrate.up(server.url())
    async with running(server.url(), allow_unsafe=False, drain_s=1.0, lease_s=5.0) as node:
        ends = await node.add("gate", payload(path=str(tmp_path / "go")))
        await appears(tmp_path / "go.started")
        crash(server)
        (tmp_path / "go").touch()
        await eventually(_unsettled(node))
        began = time.monotonic()

        node.signals.drain()
        await node.ended()

        assert time.monotonic() - began < 1.0 + 2.0 + 1.0
        assert "verdicts could not be stored; their jobs run again" in caplog.text
        server.start()
        async with running(server.url(), allow_unsafe=False, node_name="heir") as heir:
            job = await heir.until(ends)

    assert (job.status, job.attempts) == ("completed", 2)
    assert [run.cause for run in job.history] == [Cause.LEASE_EXPIRED]


async def test_a_drain_ends_in_time_when_postgres_has_frozen(
    durable_pg: DurablePG, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "END_S", 2.0)
    server = durable_pg()
    migrate.up(server.url())
    async with running(server.url(), allow_unsafe=False, drain_s=1.0) as node:
        await node.until(await node.add("echo"))
        with stopped_server(server):
            began = time.monotonic()

            node.signals.drain()
            await node.ended()

            assert time.monotonic() - began < 1.0 + 2.0 + 1.5


@contextmanager
def stopped_server(server: EmbeddedPG) -> Iterator[None]:
    """Freeze a server with all its processes: it takes connections and says nothing."""
    assert server.pid is not None
    family = [server.pid]
    os.kill(server.pid, signal.SIGSTOP)  # first: from then on it makes no more processes
    try:
        for child in _children(server.pid):
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(int(child), signal.SIGSTOP)
                family.append(int(child))
        yield
    finally:
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


# -- hints -----------------------------------------------------------------------------------------------


async def test_a_listener_that_is_lost_is_told_and_back_at_once(database_url: str, db: Connection) -> None:
    # Beats and checks are far apart: nothing but the lost connection itself makes the node look.
    async with running(database_url, heartbeat_s=10.0) as node:
        figure = node.daemon._metrics.get
        await eventually(_is(lambda: figure("taskd_listener_up") == 1))
        began = time.monotonic()

        await db.execute(f"select pg_terminate_backend({await _heart(db)})".encode())
        await eventually(_is(lambda: figure("taskd_listener_lost_total") == 1))
        await eventually(_is(lambda: figure("taskd_listener_up") == 1))

        assert time.monotonic() - began < 5, "its own ping is due every ten seconds, and after a connect"


def _is(what: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return what()

    return check


async def _heart(db: Connection) -> int:
    pids = "select pid from pg_stat_activity where starts_with(application_name, 'taskd heart')"
    return int(await one(db, pids))


async def test_a_listener_that_hears_nothing_is_made_anew(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heart, "PING_S", 0.5)
    monkeypatch.setattr(heart, "channel", lambda: "somewhere_else")
    async with running(database_url) as node:
        first = await _heart(db)
        assert node.daemon._metrics.get("taskd_listener_up") == 0

        await eventually(lambda: _another(db, first))
        monkeypatch.setattr(heart, "channel", lambda: "taskd")

        await eventually(_is(lambda: node.daemon._metrics.get("taskd_listener_up") == 1))


@asynccontextmanager
async def through_proxy(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Put a proxy before a server; yields it with the URL of the same database through it."""
    given = conninfo_to_dict(url)
    socket = f"{given['host']}/.s.PGSQL.{given.get('port', 5432)}"
    async with proxy(socket, random.Random(1)) as between:
        port = between.port
        yield (
            between,
            make_conninfo(url, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable"),
        )


async def test_hints_that_cease_on_a_connection_that_holds_are_noticed_before_the_next_ping(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heart, "PING_S", 3.0)
    monkeypatch.setattr(heart, "ANSWER_S", 0.3)
    async with through_proxy(database_url) as (between, url), running(url) as node:
        figure = node.daemon._metrics.get
        await eventually(_is(lambda: figure("taskd_listener_up") == 1))
        assert between.deafen("taskd heart") == 1
        deaf = time.monotonic()

        await eventually(_is(lambda: figure("taskd_listener_lost_total") == 1))
        await eventually(_is(lambda: figure("taskd_listener_up") == 1))

        assert time.monotonic() - deaf < 3.0 + 0.3 + 1.5, "not at the second ping"


async def _another(db: Connection, pid: int) -> bool:
    hearts = "select count(*) from pg_stat_activity where starts_with(application_name, 'taskd heart')"
    return bool(await one(db, f"{hearts} and pid <> %s", pid))


# -- what Postgres may say -------------------------------------------------------------------------------


REFUSED = {
    "claim": "before update on taskd.queue for each row when (new.claimed and not old.claimed)",
    "settle": "before insert on taskd.outcomes for each row",
    "heartbeat": "before update on taskd.nodes for each row when (new.state = 'live')",
    "register": "before insert on taskd.nodes for each row",
}
"""What a trigger refuses, by the work that meets it."""


@pytest.mark.parametrize("sqlstate", ["P0001", "0A000", "42804"])
@pytest.mark.parametrize("work", REFUSED)
async def test_no_answer_of_postgres_ends_a_node(
    database_url: str, db: Connection, caplog: pytest.LogCaptureFixture, work: str, sqlstate: str
) -> None:
    await db.execute(
        f"""create function taskd.refuse() returns trigger language plpgsql as $$ begin
            raise exception 'planted' using errcode = '{sqlstate}';
        end $$""".encode()
    )
    refuse = f"create trigger refuse {REFUSED[work]} execute function taskd.refuse()".encode()
    table = re.findall(r"on (taskd\.\w+)", REFUSED[work])[0]
    if work == "register":
        await db.execute(refuse)
    async with running(database_url, ready=work != "register") as node:
        if work != "register":
            await db.execute(refuse)
        job_id = await node.add("echo")
        await eventually(_said(caplog, f"Postgres answered {sqlstate}"))
        await asyncio.sleep(0.5)
        assert not node.task.done()
        said = sum(sqlstate in str(getattr(record, "error", "")) for record in caplog.records)
        assert said == 1, "once, however often it was tried"

        await db.execute(f"drop trigger refuse on {table}".encode())
        job = await node.until(job_id)

        assert (job.status, job.attempts, job.history) == ("completed", 1, ())


def _said(caplog: pytest.LogCaptureFixture, text: str) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return any(text in str(getattr(record, "error", "")) for record in caplog.records)

    return check


async def test_a_type_that_postgres_refuses_to_claim_stops_no_other(
    database_url: str, db: Connection
) -> None:
    await db.execute(
        """create function taskd.refuse() returns trigger language plpgsql as $$ begin
            raise exception 'planted';
        end $$;
        create trigger refuse before update on taskd.queue for each row
        when (new.claimed and new.type = 'note') execute function taskd.refuse()"""
    )
    async with running(database_url) as node:
        refused = await node.add("note", priority=5)
        for _ in range(5):
            assert (await node.until(await node.add("echo"))).status == "completed"
        assert (await node.job(refused)).status == "pending"


async def test_a_chore_that_fails_keeps_no_other_from_being_done(
    database_url: str, db: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(database_url) as node:
        await node.until(await node.add("echo"))
        await db.execute("drop function taskd.floors")
        await node.until(await node.add("echo"))
        await eventually(_said(caplog, "42883"))

        dead = await add_node(db, "dead", lease_s=1)
        lost = await add(db, type="echo")
        await claim_one(db, dead, 1, "echo")

        assert (await node.until(UUID(lost))).attempts == 2


async def test_a_claim_that_cannot_be_rescued_holds_up_no_other(
    database_url: str, db: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    dead = await add_node(db, "dead", lease_s=1)
    ids = [await add(db, type="echo") for _ in range(5)]
    await claim(db, dead, 1, {"echo": 5})
    await db.execute(
        f"""create function taskd.refuse() returns trigger language plpgsql as $$ begin
            raise exception 'planted';
        end $$;
        create trigger refuse before update on taskd.queue for each row
        when (old.id = '{ids[2]}' and not new.claimed) execute function taskd.refuse()""".encode()
    )
    async with running(database_url) as node:
        for job_id in ids[:2] + ids[3:]:
            assert (await node.until(UUID(job_id))).status == "completed"
        assert (await node.job(UUID(ids[2]))).status == "processing"
        assert "jobs of a lost node can't be taken from it" in caplog.text

        await db.execute("drop trigger refuse on taskd.queue")
        assert (await node.until(UUID(ids[2]))).status == "completed"


# -- the lease -------------------------------------------------------------------------------------------


async def test_a_node_that_was_given_up_stops_its_jobs_and_goes_on_as_another(
    database_url: str, db: Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(database_url) as node:
        job_id = await node.add("gate", payload(path=str(tmp_path / "go")))
        [pid] = await appears(tmp_path / "go.started")
        before = node.number

        assert await leases.rescue_named(db, nodes=[before], cause="lease_expired", error="e") == {before: 1}

        _, second = await appears(tmp_path / "go.started", lines=2)
        assert gone(int(pid))
        assert node.number > before
        (tmp_path / "go").touch()
        job = await node.until(job_id)

        # The run of the old incarnation was killed; its verdict came late and changed nothing.
        assert (job.status, job.attempts) == ("completed", 2)
        assert [run.cause for run in job.history] == [Cause.LEASE_EXPIRED]
        assert msgspec.json.decode(job.result or "")["pid"] == int(second)
        assert "late verdicts fenced" in caplog.text
        assert node.daemon._metrics.get("taskd_fenced_total") == 1


async def test_jobs_are_stopped_before_a_lease_that_cannot_be_renewed_ends(
    database_url: str, db: Connection, tmp_path: Path
) -> None:
    async with running(database_url, lease_s=5.0) as node:
        job_id = await node.add("gate", payload(path=str(tmp_path / "never")))
        [pid] = await appears(tmp_path / "never.started")
        async with db.transaction():
            await db.execute("lock table taskd.nodes in exclusive mode")
            ends = await one(db, "select lease_until from taskd.nodes")
            await eventually(_is_gone(int(pid)))
            killed = await one(db, "select clock_timestamp()")

        await eventually(lambda: _attempted(node, job_id))
        settled = await node.job(job_id)

    assert ends - timedelta(seconds=1) < killed < ends
    assert settled.history[0].cause is Cause.LEASE_EXPIRED


async def test_a_short_lease_outlives_a_connection_that_carries_nothing_more(
    database_url: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async with (
        through_proxy(database_url) as (between, url),
        running(url, lease_s=5.0, heartbeat_s=1.5, sweep_s=1.0) as node,
    ):
        number = node.number
        job_id = await node.add("gate", payload(path=str(tmp_path / "gate")))
        await appears(tmp_path / "gate.started")
        lease_end = node.daemon._heart._lease_end
        await eventually(_is(lambda: node.daemon._heart._lease_end > lease_end))
        for _ in range(2):
            before = node.daemon._heart._lease_end
            assert between.silence("taskd heart") == 1
            await eventually(_is(lambda: node.daemon._heart._lease_end > before))  # noqa: B023
        (tmp_path / "gate").touch()
        job = await node.until(job_id)

    assert node.number == number
    assert job.history == ()
    assert "lease lost" not in caplog.text


def _is_gone(pid: int) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return gone(pid)

    return check


async def _attempted(node: Node, job_id: UUID) -> bool:
    return bool((await node.job(job_id)).history)


async def test_an_outage_of_the_database_keeps_verdicts_and_runs_nothing_twice(
    durable_pg: DurablePG, tmp_path: Path
) -> None:
    server = durable_pg()
    migrate.up(server.url())
    async with running(server.url(), allow_unsafe=False) as node:
        before = node.number
        ends = await node.add("gate", payload(path=str(tmp_path / "during")))
        goes_on = await node.add("gate", payload(path=str(tmp_path / "after")))
        await appears(tmp_path / "during.started")
        await appears(tmp_path / "after.started")

        crash(server)
        (tmp_path / "during").touch()
        await eventually(_unsettled(node))
        server.start()

        first = await node.until(ends)
        (tmp_path / "after").touch()
        second = await node.until(goes_on)
        fresh = await node.until(await node.add("echo"))
        assert node.number == before, "the lease outlived the outage"

    for job in (first, second, fresh):
        assert (job.status, job.attempts, job.history) == ("completed", 1, ())
    for name in ("during", "after"):
        assert len((tmp_path / f"{name}.started").read_text().splitlines()) == 1


def _unsettled(node: Node) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return node.daemon._settler.unsettled > 0

    return check


async def test_a_node_takes_the_jobs_of_one_that_is_lost_and_fails_what_has_expired(
    database_url: str, db: Connection
) -> None:
    dead = await add_node(db, "dead", lease_s=1)
    lost = await add(db, type="echo", payload=payload(value=1))
    await claim_one(db, dead, 1, "echo")
    expired = await add(db, type="nobody", expires_in_s=0.001)

    async with running(database_url) as node:
        rescued = await node.until(UUID(lost))
        late = await node.until(UUID(expired))

    assert (rescued.status, rescued.attempts) == ("completed", 2)
    assert [run.cause for run in rescued.history] == [Cause.LEASE_EXPIRED]
    assert (late.status, late.history[0].cause) == ("failed", Cause.EXPIRED)
    assert await one(db, "select state from taskd.nodes where id = %s", dead) == "dead"


async def test_verdicts_that_a_failover_undid_are_given_again_once(
    database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with running(database_url, types={"note": {"restartable": False}}) as node:
        running_id = await node.add("gate", payload(path=str(tmp_path / "gate")))
        await appears(tmp_path / "gate.started")
        lost = [await node.add(type_, max_attempts=5) for type_ in ("echo", "note")]
        for job_id in lost:
            await node.until(job_id)
        # What a standby promoted shows that has not seen the last verdicts.
        await db.execute(
            "insert into taskd.queue "
            "(id, run_at, priority, max_attempts, attempts, type, claimed, node, claim, started_at) "
            "select o.id, o.run_at, j.priority, 5, 2, j.type, true, o.node, o.claim, o.started_at "
            "from taskd.outcomes as o join taskd.jobs as j using (id)"
        )
        await db.execute("delete from taskd.outcomes")

        async def other(conn: Connection) -> str:
            return "00000002"

        monkeypatch.setattr(nodes, "timeline", other)
        await db.execute(f"select pg_terminate_backend({await _heart(db)})".encode())
        again, unknown = [await node.until(job_id) for job_id in lost]
        (tmp_path / "gate").touch()
        untouched = await node.until(running_id)

    assert again.status == "completed"
    assert [(run.cause, run.attempt) for run in again.history] == [(Cause.INTERRUPTED, 3)]
    assert again.attempts == 3, "a verdict that was lost costs no attempt"
    assert unknown.status == "failed"
    assert (unknown.error_message or "").startswith("outcome unknown: its verdict was lost")
    assert (untouched.status, untouched.history) == ("completed", ())


async def test_a_claim_whose_answer_is_lost_takes_nothing_away(database_url: str, db: Connection) -> None:
    async with running(database_url) as node:
        await node.until(await node.add("echo"))
        # Commits, and then says that nobody may rely on it.
        await db.execute(
            """create sequence taskd.tries;
            create function taskd.lose() returns trigger language plpgsql as $$ begin
                if nextval('taskd.tries') = 1 then
                    raise warning 'canceling wait for synchronous replication due to user request';
                end if;
                return null;
            end $$;
            create trigger lose after update on taskd.queue for each row execute function taskd.lose()"""
        )

        job = await node.until(await node.add("echo", max_attempts=1))

    assert (job.status, job.attempts, job.history) == ("completed", 1, ())


# -- time and order --------------------------------------------------------------------------------------


async def test_a_scheduled_job_starts_when_it_is_due(database_url: str) -> None:
    async with running(database_url) as node:
        ids = [await node.add("echo", delay_s=0.3 + number * 0.15) for number in range(6)]
        done = [await node.until(job_id) for job_id in ids]

    late = [(job.started_at - job.run_at).total_seconds() for job in done if job.started_at]
    assert len(late) == 6
    assert min(late) >= 0, "never before"
    assert statistics.median(late) < 0.1


async def test_types_take_turns_and_each_keeps_its_priorities(database_url: str, db: Connection) -> None:
    names = [f"lane{number:02}" for number in range(20)]
    priorities = [-100, 0, 7]
    batch = [new_job(type=name, priority=priority) for name in names for priority in priorities * 2]
    await jobs.insert(db, batch)
    lanes: dict[str, dict[str, object]] = {name: {"handler": "note"} for name in names}

    async with running(
        database_url, types=lanes, pools={"default": PoolSettings(processes=1, concurrency=1)}
    ):
        await eventually(lambda: _empty(db))

    cursor = await db.execute(
        """select j.type, j.priority, o.claim, o.started_at from taskd.outcomes as o
        join taskd.jobs as j using (id) order by o.claim, j.priority desc"""
    )
    runs = await cursor.fetchall()
    for name in names:
        order = [priority for type_, priority, _, _ in runs if type_ == name]
        assert order == sorted(order, reverse=True), name
    # Each type is first in its turn: nobody waits until another has nothing left.
    first = [min(place for place, run in enumerate(runs) if run[0] == name) for name in names]
    assert max(first) < len(runs) - len(priorities)


async def _empty(db: Connection) -> bool:
    return not await one(db, "select count(*) from taskd.queue")


async def test_a_type_that_holds_all_its_slots_leaves_others_theirs(
    database_url: str, tmp_path: Path
) -> None:
    types: dict[str, dict[str, object]] = {"gate": {"concurrency": 2}}
    async with running(database_url, types=types) as node:
        for _ in range(6):
            await node.add("gate", payload(path=str(tmp_path / "never")))
        await appears(tmp_path / "never.started", lines=2)

        for _ in range(5):
            assert (await node.until(await node.add("echo"), within_s=5)).status == "completed"

        assert len((tmp_path / "never.started").read_text().splitlines()) == 2


async def test_free_slots_are_filled_while_most_are_held_for_long(
    database_url: str, db: Connection, tmp_path: Path
) -> None:
    pools = {"default": PoolSettings(processes=1, concurrency=24)}
    async with running(database_url, pools=pools) as node:
        path = str(tmp_path / "never")
        await jobs.insert(db, [new_job(type="gate", payload=payload(path=path)) for _ in range(21)])
        await appears(tmp_path / "never.started", lines=21)

        # Three of 24 slots are free: a claim for so few must not wait for more.
        await jobs.insert(db, [new_job(type="echo") for _ in range(60)])

        await eventually(lambda: _echoed(db, 60), within_s=8)
        del node


async def _echoed(db: Connection, count: int) -> bool:
    return bool(await one(db, "select count(*) = %s from taskd.outcomes", count))


async def test_a_type_with_max_running_runs_on_as_soon_as_a_place_is_free(
    database_url: str, db: Connection
) -> None:
    await jobs.insert(db, [new_job(type="echo") for _ in range(20)])

    async with running(database_url, types={"echo": {"max_running": 1}}):
        await eventually(lambda: _echoed(db, 20), within_s=8)

    assert sum(await column(db, "select jobs from taskd.running")) == 0


@pytest.fixture(autouse=True)
def _logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "taskd")
