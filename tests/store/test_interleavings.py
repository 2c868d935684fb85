"""Two nodes, people and time, in any order and at once: nothing is lost, done twice or taken away.

The invariants are those of the fault plan (docs/faults.md), on the real functions of the store: I1 to I5, i7
and i8, and beside them what keys, limits and claims promise. `TASKD_TEST_EXAMPLES=20` looks further.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from psycopg import Rollback

from taskd.model.jobtype import TypeInfo
from taskd.model.state import Cause
from taskd.store import jobs, leases, moves, types
from taskd.store.leases import Claimed
from tests.factories import Connection, add_node, claim, completion, end_lease, new_job, settlement
from tests.postgres import Server
from tests.store.world import World, examples, planted, world

EXAMPLES = 80
STEPS = 30

TYPES = [
    TypeInfo(name="mail", handler="mail", plugin="test"),
    TypeInfo(name="few", handler="few", plugin="test", max_running=2),
    TypeInfo(name="once", handler="once", plugin="test", restartable=False),
]
NAMES = [info.name for info in TYPES]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one attempt": {"max_attempts": 1},
    "later": {"delay_s": 3600.0},
    "expires": {"expires_in_s": 3600.0},
    "unfinished": {"unique_key": "u", "body_hash": b"1", "unique_while": "unfinished"},
    "retained": {"unique_key": "r", "body_hash": b"1"},
}
VERDICTS: dict[str, dict[str, Any]] = {
    "error": {},
    "error, later": {"delay_ms": 3_600_000},
    "crashed": {"cause": "crashed", "crashes": 1, "alone": True},
    "failed": {"status": "failed"},
    "invalid": {"status": "failed", "cause": "invalid_payload", "counts": False},
    "cancelled": {"status": "cancelled", "cause": "cancelled"},
    "interrupted": {"cause": "interrupted", "counts": False},
    "snoozed": {"cause": "snoozed", "counts": False, "delay_ms": 3_600_000},
    "put back": {"cause": None, "counts": False, "error": None, "ran_ms": None},
}

NODE = st.integers(0, 1)
EACH = [*range(12)]
PICKS = st.lists(st.integers(0, 11), min_size=1, max_size=4)
WAYS = st.lists(st.sampled_from(sorted(VERDICTS)), min_size=1, max_size=3)
OPERATIONS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(NAMES), st.sampled_from(sorted(KINDS)), st.integers(1, 3)),
    st.tuples(st.just("submit"), st.just("mail"), st.just("unfinished"), st.just(1)),
    st.tuples(st.just("claim"), NODE, st.integers(1, 3), st.sampled_from([True, True, False])),
    st.tuples(st.just("claim"), NODE, st.integers(1, 3), st.just(True)),
    st.tuples(st.just("complete"), NODE, PICKS),
    st.tuples(st.just("settle"), NODE, PICKS, WAYS),
    st.tuples(st.just("settle"), NODE, PICKS, WAYS),
    st.tuples(st.sampled_from(["obey", "put_back_unanswered"]), NODE),
    st.tuples(st.just("cancel"), PICKS),
    st.tuples(st.just("retry"), PICKS),
    st.tuples(st.just("retry"), st.just(EACH)),
    st.tuples(st.sampled_from(["sweep", "expire"])),
    st.tuples(st.just("rescue"), st.one_of(st.none(), NODE)),
)
"""What people, nodes and their sweeps send."""
RIVALS = st.sampled_from(
    [
        *(("claim", node, 3, True) for node in (0, 1) for _ in range(3)),
        *(("complete", node, EACH) for node in (0, 1)),
        *(("settle", node, EACH, [way]) for node in (0, 1) for way in ("error", "failed", "put back")),
        *(("cancel", EACH), ("cancel", EACH), ("retry", EACH), ("retry", EACH), ("sweep",), ("rescue", 0)),
        ("submit", "mail", "unfinished", 1),
    ]
)
"""What is after the same jobs, so that two at once get in each other's way."""
BEFALLS = st.one_of(
    st.sampled_from(["time passes", "the time to start is over"]).map(lambda what: (what, 0)),
    st.tuples(st.sampled_from(["a lease ends", "a lost node starts again"]), NODE),
)
"""What nobody sends."""
FIRST = [
    *(("few", "plain"), ("few", "plain"), ("few", "one attempt"), ("mail", "plain"), ("mail", "retained")),
    *(("few", "plain"), ("mail", "unfinished"), ("once", "plain")),
]
"""Jobs that are there when an example begins."""


class Token(NamedTuple):
    """A claim on a job: with the node's number, that of the claim."""

    job: str
    node: int | None
    claim: int | None


@dataclass
class Node:
    """What one node knows. `past` are runs that it let go of, or that were taken from it."""

    number: int
    serial: int = 0
    held: dict[Token, Claimed] = field(default_factory=dict)
    past: list[Claimed] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """What the database says of a job."""

    where: str
    claimed: bool
    node: int | None
    claim: int | None
    started: bool
    attempts: int
    max_attempts: int
    keyed: bool
    counted: bool
    type: str


_LOOK = """
select j.id::text from taskd.jobs as j;
select q.id::text, 'queue', q.claimed, q.node, q.claim, q.started_at is not null, q.attempts, q.max_attempts,
    q.keyed, q.counted, q.type
from taskd.queue as q
union all
select o.id::text, o.status, false, o.node, o.claim, o.started_at is not null, o.attempts, o.max_attempts,
    false, false, '' from taskd.outcomes as o;
select h.job_id::text, h.node, h.claim, h.cause from taskd.history as h order by h.ended_at, h.attempt;
select k.job_id::text, k.key from taskd.unique_keys as k;
select r.type, r.node, r.jobs from taskd.running as r where r.jobs <> 0;
select n.id, n.state from taskd.nodes as n;
select e.id::text, e.status from public.ends as e order by e.n;
select c.id::text from taskd.cancel_requests as c
"""
_WATCH = """
create table public.ends (n bigint generated always as identity, id uuid, status text);
create function public.note_end() returns trigger language plpgsql as $$
begin
    insert into public.ends (id, status) values (new.id, new.status);
    return null;
end $$;
create trigger note_end after insert or update on taskd.outcomes
    for each row execute function public.note_end()
"""

Book = Callable[[], None]
"""Writes down what an operation did, once it is committed."""


class Look:
    """The database at one moment."""

    def __init__(self, results: Sequence[Sequence[tuple[Any, ...]]]) -> None:
        asked, rows, history, keys, running, states, ends, requests = results
        self.jobs = {job for (job,) in asked}
        self.rows: defaultdict[str, list[Row]] = defaultdict(list)
        for job, *members in rows:
            self.rows[job].append(Row(*members))
        self.history: defaultdict[str, list[tuple[Token, Cause]]] = defaultdict(list)
        for job, node, claim_, cause in history:
            self.history[job].append((Token(job, node, claim_), Cause(cause)))
        self.keys = {(job, key) for job, key in keys}
        self.running = {(type_, node): count for type_, node, count in running}
        self.alive = {node for node, state in states if state == "live"}
        self.ends = Counter(job for job, _ in ends)
        self.requests = {job for (job,) in requests}

    def life(self, job: str) -> list[tuple[Token, Cause]]:
        """Return the history since the last retry by hand."""
        entries = self.history[job]
        retried = [index for index, (_, cause) in enumerate(entries) if cause is Cause.RETRIED]
        return entries[retried[-1] + 1 :] if retried else entries


class Machine(RuleBasedStateMachine):
    """Plays the nodes and the people, and keeps the book of what they were told."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.db = self.world.db
        self.submitted: dict[str, str] = {}
        self.claimed: set[Token] = set()
        self.unrun: set[Token] = set()
        """Claims that were given back without a trace."""
        self.settled: set[Token] = set()
        self.sound = True
        self.world.run(self._begin())

    async def _begin(self) -> None:
        await self.world.clear()
        await self.db.execute("delete from public.ends")
        self.nodes = [await self._register(name) for name in "ab"]
        for type_, kind in FIRST:
            (await self.submit(self.db, type_, kind, 1))()

    async def _register(self, name: str) -> Node:
        number = await add_node(self.db, name)
        await types.publish(self.db, TYPES, node=number)
        return Node(number)

    # -- what happens

    @rule(operation=OPERATIONS)
    def one(self, operation: tuple[Any, ...]) -> None:
        """One thing after the other: here it is known to the row what a settle may do."""
        with self._step():
            self.world.run(self._alone(operation))

    @rule(first=RIVALS | OPERATIONS, second=RIVALS | OPERATIONS, commits=st.booleans())
    def two_at_once(self, first: tuple[Any, ...], second: tuple[Any, ...], commits: bool) -> None:
        """One is done and not committed while the other comes; the first may be taken back."""
        with self._step():
            self.world.run(self._at_once(first, second, commits))

    @rule(what=BEFALLS)
    def befalls(self, what: tuple[str, int]) -> None:
        self.world.run(self._befalls(*what))

    async def _befalls(self, what: str, which: int) -> None:
        node = self.nodes[which]
        if what == "time passes":
            await self.world.due()
        elif what == "the time to start is over":
            await self.db.execute(
                "update taskd.queue set expires_at = clock_timestamp() where expires_at > now()"
            )
        elif what == "a lease ends":
            # The node does not know: it goes on as before.
            await end_lease(self.db, node.number)
        else:
            cursor = await self.db.execute(
                "select name from taskd.nodes where id = %s and state = 'dead'", (node.number,)
            )
            for (name,) in await cursor.fetchall():
                self.nodes[which] = await self._register(name)

    @contextmanager
    def _step(self) -> Iterator[None]:
        self.sound = False
        yield
        self.sound = True

    async def _alone(self, operation: tuple[Any, ...]) -> None:
        name, *details = operation
        if name in ("complete", "settle"):
            held = await self._tokens_in_force()
            before = set(self.settled)
            (await getattr(self, name)(self.world.nodes[details[0]], *details))()
            new = self.settled - before
            assert new <= held, f"fenced claims were heard: {new - held}"
            return
        (await getattr(self, name)(self.world.nodes[0], *details))()

    async def _at_once(self, first: tuple[Any, ...], second: tuple[Any, ...], commits: bool) -> None:
        here, there = self.world.nodes
        async with here.transaction() as transaction:
            book = await self._send(here, first)
            other = asyncio.create_task(self._send(there, second))
            # Until it is done or waits for the first: so they overlap, and none waits for ever.
            while not other.done() and not await self.world.blocked(there):
                await asyncio.wait({other}, timeout=0.001)
            if not commits:
                raise Rollback(transaction)
        if commits:
            book()
        (await other)()

    async def _send(self, conn: Connection, operation: tuple[Any, ...]) -> Book:
        name, *details = operation
        done: Awaitable[Book] = getattr(self, name)(conn, *details)
        return await done

    async def _tokens_in_force(self) -> set[Token]:
        cursor = await self.db.execute("select id::text, node, claim from taskd.queue where claimed")
        return {Token(*row) for row in await cursor.fetchall()}

    # -- operations; each sends its statement on `conn` and returns what is to be written down

    async def submit(self, conn: Connection, type_: str, kind: str, count: int) -> Book:
        made = [new_job(type=type_, **KINDS[kind]) for _ in range(count)]
        refused = await jobs.insert(conn, made)

        def book() -> None:
            self.submitted |= {str(job.id): kind for job in made if job.id not in refused}

        return book

    async def claim(self, conn: Connection, which: int, most: int, answered: bool) -> Book:
        node = self.nodes[which]
        node.serial += 1
        serial = node.serial
        haul = await claim(conn, node.number, serial, dict.fromkeys(NAMES, most))

        def book() -> None:
            tokens = {Token(job.id, node.number, serial): job for job in haul.jobs}
            self.claimed |= tokens.keys()
            if answered:
                node.held |= tokens
            else:
                node.unanswered.append(serial)

        return book

    async def complete(self, conn: Connection, which: int, picks: list[int]) -> Book:
        node, chosen = self._pick(which, picks)
        done = (
            await leases.settle_completed(
                conn, node=node.number, verdicts=[completion(job) for job in chosen]
            )
            if chosen
            else set()
        )
        return lambda: self._let_go(node, chosen, done, set())

    async def settle(self, conn: Connection, which: int, picks: list[int], ways: list[str]) -> Book:
        node, chosen = self._pick(which, picks)
        verdicts = []
        for index, job in enumerate(chosen):
            way = VERDICTS[ways[index % len(ways)]]
            # As the model does: an attempt that was the last one ends the job.
            last = way.get("counts", True) and job.attempts + 1 >= job.max_attempts
            verdicts.append(
                settlement(job, **(way | ({"status": "failed"} if last and "status" not in way else {})))
            )
        done = await leases.settle_others(conn, node=node.number, verdicts=verdicts) if verdicts else set()
        unrun = {verdict.id for verdict in verdicts if verdict.cause is None}
        return lambda: self._let_go(node, chosen, done, unrun)

    def _pick(self, which: int, picks: list[int]) -> tuple[Node, list[Claimed]]:
        """Choose among what the node holds and what it thinks that it held: one run a job, by id."""
        node = self.nodes[which]
        all_ = [*node.held.values(), *node.past[-3:]]
        chosen = {all_[pick % len(all_)].id: all_[pick % len(all_)] for pick in picks} if all_ else {}
        return node, [chosen[job] for job in sorted(chosen)]

    def _let_go(self, node: Node, chosen: list[Claimed], done: set[str], unrun: set[str]) -> None:
        for job in chosen:
            token = Token(job.id, node.number, job.claim)
            if job.id in done:
                assert token not in self.settled, f"{token} was settled twice"
                self.settled.add(token)
                if job.id in unrun:
                    self.unrun.add(token)
            if node.held.pop(token, None) is not None:
                node.past.append(job)

    async def obey(self, conn: Connection, which: int) -> Book:
        """The node stops what it is asked to stop."""
        node = self.nodes[which]
        asked = await moves.asked(conn, node=node.number)
        chosen = [job for token, job in sorted(node.held.items()) if asked.get(job.id) == token.claim]
        verdicts = [settlement(job, status="cancelled", cause="cancelled") for job in chosen]
        done = await leases.settle_others(conn, node=node.number, verdicts=verdicts) if verdicts else set()
        return lambda: self._let_go(node, chosen, done, set())

    async def put_back_unanswered(self, conn: Connection, which: int) -> Book:
        node = self.nodes[which]
        lost = list(node.unanswered)
        await leases.put_back_unanswered(conn, node=node.number, claims=lost)

        def book() -> None:
            told = {token for token in self.claimed if token.node == node.number and token.claim in lost}
            self.unrun |= told
            node.unanswered = [serial for serial in node.unanswered if serial not in lost]

        return book

    async def cancel(self, conn: Connection, picks: list[int]) -> Book:
        await moves.cancel(conn, self._people(picks), client=None)
        return _nothing

    async def retry(self, conn: Connection, picks: list[int]) -> Book:
        await moves.retry(conn, self._people(picks), client=None)
        return _nothing

    def _people(self, picks: list[int]) -> list[UUID]:
        made = sorted(self.submitted)
        return [UUID(made[pick % len(made)]) for pick in picks] if made else []

    async def sweep(self, conn: Connection) -> Book:
        await moves.cancel_requested(conn)
        return _nothing

    async def expire(self, conn: Connection) -> Book:
        await leases.expire(conn)
        return _nothing

    async def rescue(self, conn: Connection, which: int | None) -> Book:
        """Nodes whose lease has ended or ends now do not know it: they go on, and are not heard."""
        if which is not None:
            await end_lease(conn, self.nodes[which].number)
        await leases.rescue_lost(conn)
        return _nothing

    # -- what holds at any moment

    @invariant()
    def all_is_well(self) -> None:
        with self._step():
            self._check(self.world.run(self._look()))

    async def _look(self) -> Look:
        cursor = await self.db.execute(_LOOK.encode())
        results = [await cursor.fetchall()]
        while cursor.nextset():
            results.append(await cursor.fetchall())
        return Look(results)

    def _check(self, look: Look) -> None:
        assert look.jobs == self.submitted.keys(), "I1, I3: other jobs than those that were submitted"
        assert look.rows.keys() == look.jobs, "I1: a job that neither waits nor has ended"
        for job, rows in look.rows.items():
            assert len(rows) == 1, f"I1: {job} waits and has ended"
            self._check_job(job, rows[0], look)
        self._check_runs(look)
        self._check_limits(look)

    def _check_job(self, job: str, row: Row, look: Look) -> None:
        waits = row.where == "queue"
        retries = sum(cause is Cause.RETRIED for _, cause in look.history[job])
        assert look.ends[job] == retries + (not waits), f"I5: {job} ended {look.ends[job]} times"
        counted = sum(cause.counts for token, cause in look.life(job) if token.node is not None)
        assert row.attempts == counted + (row.where == "completed"), f"I4: attempts of {job}"
        assert row.attempts + row.claimed <= row.max_attempts, f"i7: too many attempts of {job}"
        token = Token(job, row.node, row.claim)
        if row.claimed:
            assert token in self.claimed, f"i8: {job} runs by a claim that nobody made"
            assert row.started, f"i8: {job} runs and shows no start"
            assert row.node in look.alive, f"{job} runs on a node that is dead"
        elif waits and (row.node or row.claim):
            assert token in self.settled - self.unrun, f"i8: {job} waits and keeps a claim"
        kind = self.submitted[job]
        assert ((job, "r") in look.keys) == (kind == "retained"), f"the key that {job} keeps"
        assert ((job, "u") in look.keys) == (waits and row.keyed), f"the key of {job} until its end"
        assert row.keyed == (waits and kind == "unfinished"), f"whether {job} holds a key"

    def _check_runs(self, look: Look) -> None:
        """I4: each claim is under way or explained, once; what a living node holds nobody takes from it."""
        told: Counter[Token] = Counter()
        completed = {
            Token(job, row.node, row.claim) for job, [row] in look.rows.items() if row.where == "completed"
        }
        in_force = {Token(job, row.node, row.claim) for job, [row] in look.rows.items() if row.claimed}
        for entries in look.history.values():
            for token, cause in entries:
                if cause is not Cause.RETRIED:
                    told[token] += token.node is not None
                elif token.node is not None:
                    completed.add(token)
        assert told.keys() - {token for token, count in told.items() if not count} <= self.claimed
        for token in self.claimed - in_force:
            assert told[token] + (token in completed) + (token in self.unrun) >= 1, f"I4: {token} vanished"
        for token in self.claimed:
            assert told[token] + (token in completed) <= 1, f"I4: {token} is told twice"
            assert not (token in in_force and told[token]), f"I4: {token} is told and goes on"
        for node in self.nodes:
            if node.number in look.alive:
                assert node.held.keys() <= in_force, "a living node lost a job"

    def _check_limits(self, look: Look) -> None:
        held = Counter((row.type, row.node) for [row] in look.rows.values() if row.counted and row.claimed)
        assert look.running == held, "what is counted is not what runs"
        assert sum(row.type == "few" and row.claimed for [row] in look.rows.values()) <= 2

    # -- the end

    def teardown(self) -> None:
        if self.sound:
            self.world.run(self._quiet())

    async def _quiet(self) -> None:
        """I2: once all is quiet, everything ends, and nothing is left of it but what is kept."""
        for node in self.nodes:
            await end_lease(self.db, node.number)
        await leases.rescue_lost(self.db)
        last = await self._register("last")
        for serial in range(1, 100):
            await self.world.due()
            haul = await claim(self.db, last.number, serial, dict.fromkeys(NAMES, 10))
            tokens = {Token(job.id, last.number, serial) for job in haul.jobs}
            self.claimed |= tokens
            if not haul.jobs:
                break
            verdicts = [completion(job) for job in haul.jobs]
            assert len(await leases.settle_completed(self.db, node=last.number, verdicts=verdicts)) == len(
                verdicts
            )
        await moves.cancel_requested(self.db)
        look = await self._look()
        self._check(look)
        assert all(row.where != "queue" for [row] in look.rows.values()), "I2: a job does not end"
        assert not look.requests
        assert not look.running


def on(shared: World) -> type[Machine]:
    """Return the machine that plays in this database."""

    class Here(Machine):
        world = shared

    return Here


def _nothing() -> None:
    pass


@pytest.fixture(scope="module")
def shared(pg: Server, request: pytest.FixtureRequest) -> Iterator[World]:
    """The database of this module's examples, with a trigger that notes each end of a job."""
    with world(pg, request, "interleavings") as made:
        made.run(_watch(made))
        yield made


async def _watch(made: World) -> None:
    await made.db.execute(_WATCH.encode())


def test_random_interleavings_of_two_nodes_and_people_keep_every_invariant(shared: World) -> None:
    run_state_machine_as_test(on(shared), settings=examples(EXAMPLES, stateful_step_count=STEPS))


FENCE = "and q.claim = v.claim and q.node = p_node and q.claimed"
FAULTS = [
    pytest.param("places settle_completed", FENCE, "", id="completions of anybody are heard"),
    pytest.param("places settle_others", FENCE, "and q.claimed", id="verdicts of anybody are heard"),
    pytest.param("free_keys", "where k.ctid", "where false and k.ctid", id="a key is not freed"),
    pytest.param("settle_others", "cause is not null", "cause = 'error'", id="some runs are not told"),
    pytest.param("settle_others", "claim = case when v.counts then q.claim end,", "", id="a claim stays"),
    pytest.param("claim", "<= t and not q.claimed", "<= t", id="what runs is claimed again"),
    pytest.param("claim", "n.state in ('live', 'draining')", "true", id="the dead claim"),
    pytest.param("take_starts", "for update skip locked", "", id="limits are counted without a lock"),
    pytest.param("count_starts", "r.jobs + excluded.jobs", "r.jobs", id="starts are not counted"),
    pytest.param("take_away", "attempts = q.attempts + 1", "attempts = q.attempts", id="a rescue is free"),
    pytest.param("take_away", "node = null, claim = null,", "", id="a rescue leaves the claim"),
    pytest.param("take_away", ">= q.max_attempts", "> q.max_attempts", id="one attempt more"),
    pytest.param("cancel_jobs", "for update of q", "", id="a cancel locks nothing"),
    pytest.param("cancel_jobs", "filter (where not k.claimed)", "", id="what runs is cancelled at once"),
    pytest.param("cancel_jobs", "where g.keyed and", "where false and", id="a cancelled job keeps its key"),
    pytest.param("retry_jobs", "j.key_hash is not null, j.type", "false, j.type", id="a key is forgotten"),
    pytest.param("retry_jobs", "'retried'", "'error'", id="a retry is told as a run"),
]


@pytest.mark.parametrize(("functions", "right", "wrong"), FAULTS)
def test_a_planted_fault_is_found(shared: World, functions: str, right: str, wrong: str) -> None:
    # With room to spare: the random order that a fault takes is found sooner or later, as a rule soon.
    found = examples(
        4 * EXAMPLES,
        stateful_step_count=STEPS,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        print_blob=False,
    )

    with ExitStack() as stack:
        for function in functions.split():
            stack.enter_context(planted(shared, function, right, wrong))
        with pytest.raises(AssertionError):
            run_state_machine_as_test(on(shared), settings=found)
