"""The checker finds what it is there to find: each invariant is broken once, on purpose."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from tests.faults.rig import checker
from tests.faults.rig.checker import LedgerRun
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import Tally
from tests.faults.rig.keeper import Resources

CLIENT = uuid.UUID(int=1)


@dataclass
class World:
    """A database with one job that was accepted, ran twice and completed; all is well."""

    conn: psycopg.Connection
    ledger: Path
    tally: Tally = field(default_factory=Tally)
    job: str = ""

    def ask(self, statement: str) -> list[tuple[object, ...]]:
        return self.conn.execute(statement.encode()).fetchall()

    def do(self, statement: str, *, checked: bool = True, **args: object) -> None:
        """Run a statement; unchecked it is hidden from the trigger that watches final rows."""
        with self.conn.transaction():
            if not checked:
                self.conn.execute("set local session_replication_role = replica")
            self.conn.execute(statement.encode(), args)

    def submit(self, number: int) -> str:
        """Put a waiting job there, as an accepted one."""
        job = str(uuid.uuid4())
        self.tally.sent.add(number)
        self.tally.accepted[number] = job
        self.do(
            "insert into taskd.jobs (id, client, priority, max_attempts, type, payload) "
            "values (%(id)s, %(client)s, 0, 3, 'ledger', json_build_object('n', %(n)s::integer))",
            id=job,
            client=CLIENT,
            n=number,
        )
        self.do(
            "insert into taskd.queue (id, run_at, priority, max_attempts, type) "
            "values (%(id)s, clock_timestamp(), 0, 3, 'ledger')",
            id=job,
        )
        return job

    def tell(self, job: str, attempt: int, cause: str, *, claim: int | None = 5) -> None:
        """Write a run that did not complete into the history, by node 1; without a claim it was none."""
        self.do(
            "insert into taskd.history (job_id, attempt, node, claim, ended_at, cause) "
            "values (%(id)s, %(attempt)s, %(node)s, %(claim)s, clock_timestamp(), %(cause)s)",
            id=job,
            attempt=attempt,
            node=None if claim is None else 1,
            claim=claim,
            cause=cause,
        )

    def retry(self, job: str) -> None:
        """Put a job back in line, as a person does."""
        (row,) = self.ask(f"select done from taskd.retry_jobs(array['{job}'::uuid], null, null, null)")
        assert row == (True,)

    def end(self, job: str, attempts: int, status: str = "completed") -> None:
        """Move a job to its end."""
        self.do("delete from taskd.queue where id = %(id)s", id=job)
        self.do(
            "insert into taskd.outcomes (id, finished_at, run_at, attempts, max_attempts, status) "
            "values (%(id)s, clock_timestamp(), clock_timestamp(), %(attempts)s, 3, %(status)s)",
            id=job,
            attempts=attempts,
            status=status,
        )

    def run(self, job: str, attempt: int, started: float, ended: float | None) -> None:
        """Write a run into the ledger of the jobs."""
        name = uuid.uuid4().hex
        with self.ledger.open("a") as ledger:
            ledger.write(f"start {job} {attempt} 77 {name} {started} {started}\n")
            if ended is not None:
                ledger.write(f"end {job} {attempt} 77 {name} {ended} {ended}\n")

    def node(self, state: str, lease_left_s: float, started_s_ago: float = 100) -> int:
        """Make a node whose lease ends in so many seconds."""
        (row,) = self.ask(
            "insert into taskd.nodes (name, host, pid, version, state, lease, lease_until, started_at) "
            f"values ('n', 'h', 1, '0', '{state}', '5 s', clock_timestamp() + interval '{lease_left_s} s', "
            f"clock_timestamp() - interval '{started_s_ago} s') returning id"
        )
        return int(str(row[0]))

    def claim(self, job: str, node: int | None) -> None:
        """Have a node hold a job."""
        self.do(
            "update taskd.queue set claimed = true, node = %(node)s, claim = 1, "
            "started_at = clock_timestamp() where id = %(id)s",
            id=job,
            node=node,
        )

    def broken(self) -> set[str]:
        """Return the invariants that the check after a case finds broken."""
        found = checker.after(self.tally, self.ask, self.ledger)
        return {name for name, texts in found.violations.items() if texts}

    def broken_now(self) -> set[str]:
        """Return those that the check of a moment finds broken."""
        found = checker.during(self.ask, grace_s=2)
        return {name for name, texts in found.violations.items() if texts}


@pytest.fixture
def world(durable: Cluster, tmp_path: Path) -> Iterator[World]:
    name = durable.database()
    with psycopg.connect(durable.server.url(name), autocommit=True) as conn:
        made = World(conn, tmp_path / "runs.txt")
        made.job = made.submit(0)
        made.tell(made.job, 1, "error")
        made.run(made.job, 1, 10.0, 11.0)
        made.run(made.job, 2, 12.0, 13.0)
        made.end(made.job, 2)
        yield made
    durable.drop(name)


def test_a_sound_world_has_no_findings(world: World) -> None:
    assert world.broken() == set()
    assert world.broken_now() == set()


def test_i1_an_accepted_job_that_is_absent(world: World) -> None:
    world.tally.sent.add(1)
    world.tally.accepted[1] = str(uuid.uuid4())

    assert world.broken() == {"I1"}


def test_i1_a_job_that_neither_waits_nor_has_ended(world: World) -> None:
    job = world.submit(1)
    world.do("delete from taskd.queue where id = %(id)s", id=job)

    assert world.broken() == {"I1", "I2"}


def test_i2_an_accepted_job_that_never_ends(world: World) -> None:
    world.submit(1)

    assert world.broken() == {"I2"}


def test_i3_a_job_that_nobody_submitted(world: World) -> None:
    job = world.submit(1)
    world.end(job, 1)
    world.tally.sent.remove(1)
    del world.tally.accepted[1]

    assert world.broken() == {"I3"}


def test_i3_a_second_job_of_one_submit(world: World) -> None:
    world.end(world.submit(0), 1)

    assert world.broken() == {"I3"}


def test_i3_a_job_whose_submit_was_refused(world: World) -> None:
    world.end(world.submit(1), 1)
    del world.tally.accepted[1]
    world.tally.refused.add(1)

    assert world.broken() == {"I3"}


def test_i4_a_second_run_without_a_cause(world: World) -> None:
    world.run(world.job, 2, 14.0, 15.0)

    assert world.broken() == {"I4"}


def test_i4_a_run_that_the_history_explains_is_none(world: World) -> None:
    world.tell(world.job, 2, "interrupted")
    world.run(world.job, 2, 14.0, 15.0)

    assert world.broken() == set()


def test_i4_an_attempt_that_the_history_does_not_tell_of(world: World) -> None:
    world.do("delete from taskd.history")

    assert world.broken() == {"I4"}


@pytest.mark.parametrize(("cause", "status"), [("cancelled", "cancelled"), ("expired", "failed")])
def test_what_ends_while_it_waits_was_no_run(world: World, cause: str, status: str) -> None:
    job = world.submit(1)
    world.tell(job, 1, cause, claim=None)
    world.end(job, 0, status)

    assert world.broken() == set()


@pytest.mark.parametrize(("cause", "status"), [("cancelled", "cancelled"), ("expired", "failed")])
def test_i4_a_run_of_a_job_that_ended_while_it_waited(world: World, cause: str, status: str) -> None:
    job = world.submit(1)
    world.tell(job, 1, cause, claim=None)
    world.end(job, 0, status)
    world.run(job, 1, 10.0, 11.0)

    assert world.broken() == {"I4"}


def test_i4_what_ended_while_it_waited_uses_up_no_attempt(world: World) -> None:
    job = world.submit(1)
    world.tell(job, 1, "cancelled", claim=None)
    world.end(job, 1, "cancelled")

    assert world.broken() == {"I4"}


def test_a_job_that_was_retried_by_hand_and_runs_again_is_well(world: World) -> None:
    world.do("update taskd.outcomes set node = 1, claim = 6", checked=False)
    world.retry(world.job)
    world.run(world.job, 1, 14.0, 15.0)
    world.end(world.job, 1)

    assert world.broken() == set()
    assert world.broken_now() == set()


def test_a_failed_job_that_was_retried_by_hand_and_waits_is_not_finished_and_else_well(world: World) -> None:
    job = world.submit(1)
    world.tell(job, 1, "error")
    world.run(job, 1, 10.0, 11.0)
    world.end(job, 1, "failed")
    world.retry(job)

    assert world.broken() == {"I2"}


def test_i4_a_run_too_many_after_a_retry_by_hand(world: World) -> None:
    job = world.submit(1)
    world.tell(job, 1, "error")
    world.run(job, 1, 10.0, 11.0)
    world.end(job, 1, "failed")
    world.retry(job)
    world.run(job, 1, 14.0, 15.0)
    world.run(job, 1, 16.0, 17.0)
    world.end(job, 1)

    assert world.broken() == {"I4"}


def test_i4_attempts_that_a_retry_by_hand_did_not_give_again(world: World) -> None:
    world.do("update taskd.outcomes set node = 1, claim = 6", checked=False)
    world.retry(world.job)
    world.run(world.job, 3, 14.0, 15.0)
    world.end(world.job, 3)

    assert world.broken() == {"I4"}


def test_i4_two_runs_at_once(world: World) -> None:
    runs = [LedgerRun(world.job, 1, 77, 10.0, 10.0, 12.5), LedgerRun(world.job, 2, 77, 12.0, 12.0, 13.0)]
    rows = checker.read_rows(world.ask)

    assert checker.unexplained(rows, runs) != []


def test_i4_two_runs_at_once_after_a_lost_lease_are_allowed(world: World) -> None:
    world.do("update taskd.history set cause = 'lease_expired'")
    runs = [LedgerRun(world.job, 1, 77, 10.0, 10.0, 12.5), LedgerRun(world.job, 2, 77, 12.0, 12.0, 13.0)]

    assert checker.unexplained(checker.read_rows(world.ask), runs) == []


def test_i5_a_final_row_can_not_change(world: World) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="a final row was changed"):
        world.do("update taskd.outcomes set status = 'failed'")


def test_i5_a_job_that_ended_twice(world: World) -> None:
    world.do("delete from taskd.outcomes", checked=False)
    world.end(world.job, 2)

    assert world.broken() == {"I5"}


def test_i5_a_job_that_had_ended_and_is_back_without_a_retry(world: World) -> None:
    world.do("delete from taskd.outcomes")
    world.do(
        "insert into taskd.queue (id, run_at, priority, attempts, max_attempts, type) "
        "values (%(id)s, clock_timestamp(), 0, 1, 3, 'ledger')",
        id=world.job,
    )

    assert "I5" in world.broken()


def test_i5_a_retry_by_hand_of_what_had_not_ended(world: World) -> None:
    world.tell(world.job, 2, "retried", claim=None)

    assert "I5" in world.broken()


def test_i5_a_job_that_is_not_what_it_ended_as(world: World) -> None:
    world.do("update taskd.outcomes set status = 'cancelled'", checked=False)

    assert "I5" in world.broken()


def test_i6_a_job_held_by_a_node_that_lost_its_lease(world: World) -> None:
    world.node("live", 5)
    world.claim(world.submit(1), world.node("live", -10))

    assert world.broken_now() == {"i6"}


def test_i6_is_not_asked_while_no_other_node_lives(world: World) -> None:
    world.claim(world.submit(1), world.node("live", -10))

    assert world.broken_now() == set()


def test_i7_more_attempts_than_allowed(world: World) -> None:
    world.submit(1)
    world.do("update taskd.queue set attempts = 4")

    assert world.broken_now() == {"i7"}


def test_i8_processing_for_nobody(world: World) -> None:
    world.claim(world.submit(1), None)

    assert "i8" in world.broken_now()


def test_i8_waiting_with_a_claim_that_no_run_explains(world: World) -> None:
    world.submit(1)
    world.do("update taskd.queue set node = 1, claim = 9")

    assert world.broken_now() == {"i8"}


def test_i9_a_transaction_left_open(world: World, durable: Cluster) -> None:
    url = f"{world.conn.info.dsn} application_name=taskd-test"
    with psycopg.connect(url) as conn:
        conn.execute("select 1")
        world.do("select pg_sleep(1.1)")

        assert world.broken_now() == {"i9"}


def test_i10_memory_and_descriptors_that_grow() -> None:
    before = {1: Resources(100 << 20, 20), 2: Resources(100 << 20, 20), 3: Resources(100 << 20, 20)}
    after = {1: Resources(150 << 20, 20), 2: Resources(100 << 20, 60), 3: Resources(105 << 20, 22)}

    assert [text.split()[1] for text in checker.grown(before, after)] == ["1", "2"]


def test_a_ledger_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    ledger = tmp_path / "runs.txt"
    ledger.write_text("start a 1 7 x 1.0 2.0\nend a 1 7 x 3.0 4.0\nstart b 1 7")

    assert checker.read_ledger(ledger) == [LedgerRun("a", 1, 7, 1.0, 2.0, 3.0)]
