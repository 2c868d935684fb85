"""Whatever befalls a job, in whatever order: Postgres and the pure model make the same of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

from taskd.model import verdict as decide
from taskd.model.jobtype import Retry, TypeInfo
from taskd.model.state import Cause, Event, State, allowed
from taskd.model.verdict import Case, Verdict
from taskd.store import jobs, leases, moves
from taskd.store.leases import Claimed, Settlement
from tests.factories import add, add_node, claim, completion, end_lease, publish
from tests.postgres import Server
from tests.store.world import World, examples, planted, world

MAX_CRASHES = 2
WAIT = Retry(backoff="fixed", backoff_base=3600.0, jitter="none")
INFOS = {
    name: TypeInfo(name=name, handler=name, plugin="test", retry=WAIT, restartable=name == "mail")
    for name in ("mail", "pay")
}
WAITING = frozenset({State.SCHEDULED, State.PENDING})


@pytest.fixture(scope="module")
def shared(pg: Server, request: pytest.FixtureRequest) -> Iterator[World]:
    """The database of this module's examples."""
    with world(pg, request, "agreement") as made:
        yield made


@dataclass
class Life:
    """One job as the model has it."""

    type: str
    max_attempts: int
    expires: bool
    state: State = State.PENDING
    attempts: int = 0
    crashes: int = 0
    alone: bool = False
    asked: bool = False
    """It is to be cancelled as soon as it does not run any more."""
    history: list[tuple[int, Cause]] = field(default_factory=list)

    @property
    def case(self) -> Case:
        return Case(
            attempts=self.attempts, max_attempts=self.max_attempts, crashes=self.crashes, alone=self.alone
        )

    def move(self, event: Event, to: State) -> None:
        """Make a move of the table."""
        assert to in allowed(self.state, event), f"{event} leads from {self.state} to {to}"
        self.state = to

    def settle(self, verdict: Verdict) -> None:
        """End a run."""
        later = State.SCHEDULED if verdict.delay_s > 0 else State.PENDING
        self.move(verdict.event, verdict.status or later)
        if verdict.cause is not None:
            self.history.append((self.attempts + 1, verdict.cause))
            self.expires = False
        self.attempts += verdict.counts
        self.crashes, self.alone = verdict.crashes, verdict.alone

    def leave(self, event: Event, to: State, cause: Cause) -> None:
        """End without a run."""
        self.move(event, to)
        self.history.append((self.attempts + 1, cause))

    def again(self) -> None:
        """Begin a further life by hand."""
        self.move(Event.RETRY, State.PENDING)
        self.history.append((self.attempts, Cause.RETRIED))
        self.attempts = self.crashes = 0
        self.alone = self.expires = self.asked = False

    @property
    def seen(self) -> tuple[Any, ...]:
        """What the database should show."""
        attempts = self.attempts + (self.state is State.PROCESSING)
        own = None if self.state.final else (self.crashes, self.alone, self.expires)
        return self.state, attempts, self.history, own, self.asked


class Both:
    """A job in the model and in Postgres, side by side. The node's claims are its own."""

    def __init__(self, shared: World, life: Life) -> None:
        self.world = shared
        self.db = shared.db
        self.life = life
        self.serials = itertools.count(1)
        self.held: Claimed | None = None
        self.past: list[Claimed] = []

    async def begin(self) -> None:
        await self.world.clear()
        for name in INFOS:
            await publish(self.db, None, name, restartable=INFOS[name].restartable)
        self.node = await add_node(self.db)
        self.id = await add(
            self.db,
            type=self.life.type,
            max_attempts=self.life.max_attempts,
            expires_in_s=3600.0 if self.life.expires else None,
        )

    async def seen(self) -> tuple[Any, ...]:
        job = await jobs.get(self.db, UUID(self.id), client=None)
        assert job is not None
        cursor = await self.db.execute(
            "select crashes, alone, expires_at is not null from taskd.queue where id = %s", (self.id,)
        )
        own = await cursor.fetchone()
        cursor = await self.db.execute("select count(*) > 0 from taskd.cancel_requests")
        [(asked,)] = await cursor.fetchall()
        return job.status, job.attempts, [(run.attempt, run.cause) for run in job.history], own, asked

    # -- events: each in the model if the table allows it, and in Postgres whatever it says

    async def claim(self) -> None:
        before = await claim(self.db, self.node, next(self.serials), {self.life.type: 1})
        if Event.CLAIM in {event for event in Event if allowed(self.life.state, event)}:
            self.life.move(Event.CLAIM, State.PROCESSING)
            [self.held] = before.jobs
            found = self.held
            assert (found.attempts, found.crashes, found.alone) == (
                self.life.attempts,
                self.life.crashes,
                self.life.alone,
            )
        else:
            assert before.jobs == []

    async def complete(self) -> None:
        await self._late()
        if self.held is not None:
            job = self._let_go()
            assert await leases.settle_completed(self.db, node=self.node, verdicts=[completion(job)])
            self.life.move(Event.COMPLETE, State.COMPLETED)
            self.life.attempts += 1

    async def settle(self, verdict: Verdict) -> None:
        await self._late()
        if self.held is not None:
            job = self._let_go()
            assert await leases.settle_others(self.db, node=self.node, verdicts=[_written(job, verdict)]) == {
                self.id
            }
            self.life.settle(verdict)

    async def _late(self) -> None:
        """Whatever the node still says of claims that are over: it is not heard."""
        for job in self.past[-2:]:
            assert not await leases.settle_completed(self.db, node=self.node, verdicts=[completion(job)])
            verdict = decide.died(
                Cause.CRASHED, self.life.case, INFOS[self.life.type], error="late", max_crashes=MAX_CRASHES
            )
            assert not await leases.settle_others(self.db, node=self.node, verdicts=[_written(job, verdict)])

    def _let_go(self) -> Claimed:
        assert self.held is not None
        job, self.held = self.held, None
        self.past.append(job)
        return job

    async def rescue(self) -> None:
        await end_lease(self.db, self.node)
        assert await leases.rescue_lost(self.db) == {self.node: int(self.held is not None)}
        self.node = await add_node(self.db)
        self.past = []  # claims of an earlier incarnation
        if self.held is not None:
            self.held = None
            info = INFOS[self.life.type]
            self.life.settle(
                decide.died(
                    Cause.LEASE_EXPIRED, self.life.case, info, error="lost", max_crashes=MAX_CRASHES + 99
                )
            )

    async def expire(self) -> None:
        await self.db.execute(
            "update taskd.queue set expires_at = clock_timestamp() where expires_at > now()"
        )
        gone = await leases.expire(self.db)
        await self.db.execute(
            "update taskd.queue set expires_at = now() + interval '1 h' where expires_at < now()"
        )
        if self.life.expires and self.life.state in WAITING:
            self.life.leave(Event.EXPIRE, State.FAILED, Cause.EXPIRED)
            assert gone == 1
        else:
            assert gone == 0

    async def cancel(self) -> None:
        [move] = (await moves.cancel(self.db, [UUID(self.id)], client=None)).values()
        assert move == (self.life.state, bool(allowed(self.life.state, Event.CANCEL)), None)
        if self.life.state in WAITING:
            self.life.leave(Event.CANCEL, State.CANCELLED, Cause.CANCELLED)
            self.life.asked = False
        else:
            # Of one that has ended since it was asked nothing is left to ask.
            self.life.asked = self.life.state is State.PROCESSING

    async def sweep(self) -> None:
        asked = await moves.asked(self.db, node=self.node)
        assert asked == ({self.id: self.held.claim} if self.life.asked and self.held else {})
        cancelled = await moves.cancel_requested(self.db)
        assert cancelled == (self.life.asked and self.life.state in WAITING)
        if self.life.asked and self.life.state in WAITING:
            self.life.leave(Event.CANCEL, State.CANCELLED, Cause.CANCELLED)
        self.life.asked = self.life.asked and self.life.state is State.PROCESSING

    async def retry(self) -> None:
        [move] = (await moves.retry(self.db, [UUID(self.id)], client=None)).values()
        assert move == (self.life.state, self.life.state.final, None)
        if self.life.state.final:
            self.life.again()

    async def due(self) -> None:
        await self.world.due()
        if self.life.state is State.SCHEDULED:
            self.life.move(Event.DUE, State.PENDING)


def _written(job: Claimed, verdict: Verdict) -> Settlement:
    return Settlement(
        id=job.id,
        claim=job.claim,
        status=None if verdict.status is None else str(verdict.status),
        delay_ms=round(verdict.delay_s * 1000),
        counts=verdict.counts,
        cause=None if verdict.cause is None else str(verdict.cause),
        error=verdict.error,
        result=None,
        ran_ms=1 if verdict.cause else None,
        exit_code=None,
        signal=None,
        cpu_s=None,
        max_rss=None,
        crashes=verdict.crashes,
        alone=verdict.alone,
    )


OUTCOMES = [
    *("error", "timeout", "fail", "retry_later", "snoozed", "cancelled", "invalid_payload", "dropped"),
    "rubbish",
]
EVENTS = st.sampled_from(
    [
        *(("claim",) for _ in range(16)),
        *((name,) for name in ("complete", "cancel", "retry", "sweep", "rescue", "due") for _ in range(4)),
        *(("expire",), ("expired",)),
        *(("report", outcome, delay_s) for outcome in OUTCOMES for delay_s in (None, 0.0, 60.0, -5.0)),
        *(("died", cause) for cause in (Cause.CRASHED, Cause.OOM, Cause.LEASE_EXPIRED)),
        *(("interrupted", alone) for alone in (False, True)),
    ]
)
"""What may happen next, as often as it stands here."""


async def _happen(both: Both, event: tuple[Any, ...]) -> None:
    name, *details = event
    case, info = both.life.case, INFOS[both.life.type]
    if name == "report":
        outcome, delay_s = details
        await both.settle(
            decide.reported(outcome, case, info, random.Random(1), error="why", delay_s=delay_s)
        )
    elif name == "died":
        await both.settle(decide.died(details[0], case, info, error="why", max_crashes=MAX_CRASHES))
    elif name == "interrupted":
        await both.settle(decide.interrupted(case, info, error="why", alone=details[0]))
    elif name == "expired":
        await both.settle(decide.expired())
    else:
        await getattr(both, name)()


def agree(shared: World, life: Life, events: list[tuple[Any, ...]]) -> None:
    """Have the events happen to a job, and compare after each."""
    both = Both(shared, life)

    async def live() -> None:
        await both.begin()
        for event in events:
            await _happen(both, event)
            assert await both.seen() == life.seen, event

    shared.run(live())


LIVES = st.builds(
    Life, type=st.sampled_from(sorted(INFOS)), max_attempts=st.integers(1, 3), expires=st.booleans()
)
SEQUENCES = st.lists(EVENTS, min_size=5, max_size=25)


@examples(200)
@given(life=LIVES, events=SEQUENCES)
def test_random_events_lead_to_the_same_state_in_the_model_and_in_postgres(
    shared: World, life: Life, events: list[tuple[Any, ...]]
) -> None:
    agree(shared, life, events)


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        pytest.param(
            "take_away", "attempts = q.attempts + 1", "attempts = q.attempts", id="a rescue is free"
        ),
        pytest.param("settle_others", "crashes = v.crashes,", "", id="deaths are not counted"),
        pytest.param("settle_others", "when v.cause is null then", "when true then", id="what ran expires"),
        pytest.param("cancel_jobs", "g.attempts + 1", "g.attempts", id="a cancelled job's last number"),
    ],
)
def test_a_planted_difference_is_found(shared: World, function: str, right: str, wrong: str) -> None:
    @examples(600, phases=[Phase.generate], database=None, derandomize=True, print_blob=False)
    @given(life=LIVES, events=SEQUENCES)
    def compare(life: Life, events: list[tuple[Any, ...]]) -> None:
        agree(shared, life, events)

    with planted(shared, function, right, wrong), pytest.raises(AssertionError):
        compare()
