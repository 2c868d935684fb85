"""What each outcome means for a job: which event, whether it counts, when it runs again."""

from __future__ import annotations

import random

import pytest

from taskd.model import verdict as decide
from taskd.model.jobtype import Retry, TypeInfo
from taskd.model.state import MOVES, Cause, Event, State
from taskd.model.verdict import Case, Verdict

FIXED = Retry(backoff="fixed", backoff_base=7.0, jitter="none")
INFO = TypeInfo(name="mail", handler="mail", plugin="test", retry=FIXED)
ONCE = TypeInfo(name="pay", handler="pay", plugin="test", retry=FIXED, restartable=False)

FIRST = Case(attempts=0, max_attempts=3)
LAST = Case(attempts=2, max_attempts=3)


def reported(outcome: str, case: Case, *, info: TypeInfo = INFO, delay_s: float | None = None) -> Verdict:
    return decide.reported(outcome, case, info, random.Random(1), error="why", delay_s=delay_s)


def died(cause: Cause, case: Case, *, info: TypeInfo = INFO) -> Verdict:
    return decide.died(cause, case, info, error="why", max_crashes=3)


@pytest.mark.parametrize(
    ("verdict", "event", "status", "counts", "delay_s"),
    [
        pytest.param(reported("error", FIRST), Event.RETRY_LATER, None, True, 7.0, id="error, by the policy"),
        pytest.param(reported("error", LAST), Event.FAIL, State.FAILED, True, 0.0, id="error, no more left"),
        pytest.param(reported("timeout", FIRST), Event.RETRY_LATER, None, True, 7.0, id="timeout"),
        pytest.param(reported("timeout", LAST), Event.FAIL, State.FAILED, True, 0.0, id="timeout, the last"),
        pytest.param(
            reported("retry_later", FIRST, delay_s=5.0), Event.RETRY_LATER, None, True, 5.0, id="as asked"
        ),
        pytest.param(
            reported("retry_later", FIRST), Event.RETRY_LATER, None, True, 7.0, id="asked, by the policy"
        ),
        pytest.param(
            reported("retry_later", LAST, delay_s=5.0), Event.FAIL, State.FAILED, True, 0.0, id="none left"
        ),
        pytest.param(reported("fail", FIRST), Event.FAIL, State.FAILED, True, 0.0, id="fail, no retry"),
        pytest.param(
            reported("invalid_payload", FIRST), Event.FAIL, State.FAILED, False, 0.0, id="invalid payload"
        ),
        pytest.param(
            reported("snoozed", LAST, delay_s=9.0), Event.PUT_BACK, None, False, 9.0, id="snooze is free"
        ),
        pytest.param(reported("cancelled", FIRST), Event.CANCEL, State.CANCELLED, True, 0.0, id="cancelled"),
        pytest.param(reported("dropped", LAST), Event.PUT_BACK, None, False, 0.0, id="never started"),
        pytest.param(
            reported("what?", FIRST), Event.RETRY_LATER, None, True, 7.0, id="a child talks rubbish"
        ),
        pytest.param(decide.expired(), Event.EXPIRE, State.FAILED, False, 0.0, id="expired"),
        pytest.param(
            decide.interrupted(LAST, INFO, error="why"), Event.PUT_BACK, None, False, 0.0, id="interrupted"
        ),
        pytest.param(died(Cause.CRASHED, FIRST), Event.RESCUE, None, True, 0.0, id="crashed, at once"),
        pytest.param(died(Cause.OOM, LAST), Event.FAIL, State.FAILED, True, 0.0, id="crashed, none left"),
        pytest.param(died(Cause.LEASE_EXPIRED, FIRST), Event.RESCUE, None, True, 0.0, id="lease lost"),
    ],
)
def test_table(verdict: Verdict, event: Event, status: State | None, counts: bool, delay_s: float) -> None:
    assert (verdict.event, verdict.status, verdict.counts, verdict.delay_s) == (
        event,
        status,
        counts,
        delay_s,
    )


@pytest.mark.parametrize("info", [INFO, ONCE])
@pytest.mark.parametrize("case", [FIRST, LAST])
def test_every_verdict_is_a_move_of_the_table(info: TypeInfo, case: Case) -> None:
    outcomes = [
        "error",
        "timeout",
        "fail",
        "invalid_payload",
        "snoozed",
        "cancelled",
        "dropped",
        "retry_later",
    ]
    verdicts = [reported(outcome, case, info=info) for outcome in outcomes]
    verdicts += [died(cause, case, info=info) for cause in (Cause.CRASHED, Cause.LEASE_EXPIRED)]
    verdicts += [decide.interrupted(case, info, error="why"), decide.expired()]

    for verdict in verdicts:
        to = MOVES[State.PROCESSING, verdict.event]
        assert (verdict.status in to) if verdict.status else (State.PENDING in to)


@pytest.mark.parametrize("cause", [Cause.CRASHED, Cause.OOM])
def test_the_third_death_ends_a_job_whatever_attempts_it_has(cause: Cause) -> None:
    second = died(cause, Case(attempts=1, max_attempts=100, crashes=1))
    third = died(cause, Case(attempts=2, max_attempts=100, crashes=2))

    assert (second.status, second.crashes, second.alone) == (None, 2, True)
    assert (third.status, third.crashes) == (State.FAILED, 3)


def test_a_lost_lease_is_no_crash() -> None:
    verdict = died(Cause.LEASE_EXPIRED, Case(attempts=2, max_attempts=100, crashes=2))

    assert (verdict.status, verdict.crashes, verdict.alone) == (None, 2, False)


@pytest.mark.parametrize("cause", [Cause.CRASHED, Cause.OOM, Cause.LEASE_EXPIRED])
def test_what_must_not_run_twice_fails_with_its_outcome_unknown(cause: Cause) -> None:
    verdict = died(cause, FIRST, info=ONCE)

    assert verdict.status is State.FAILED
    assert verdict.error == "outcome unknown: why"


def test_a_kill_at_drain_ends_what_must_not_run_twice() -> None:
    verdict = decide.interrupted(FIRST, ONCE, error="why")

    assert (verdict.status, verdict.counts) == (State.FAILED, False)
    assert verdict.error == "outcome unknown: why"


def test_an_error_is_retried_even_for_what_must_not_be_restarted() -> None:
    assert reported("error", FIRST, info=ONCE).status is None


def test_crashes_and_solitude_stay_with_a_job_until_it_ends() -> None:
    case = Case(attempts=0, max_attempts=3, crashes=2, alone=True)

    for verdict in (reported("error", case), reported("snoozed", case), decide.put_back(case)):
        assert (verdict.crashes, verdict.alone) == (2, True)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        pytest.param(-5.0, 0.0, id="never before now: floors may have passed"),
        pytest.param(1e300, decide.MAX_DELAY_S, id="beyond what Postgres can add"),
    ],
)
def test_a_handlers_delay_is_bounded(asked: float, given: float) -> None:
    assert reported("snoozed", FIRST, delay_s=asked).delay_s == given
    assert reported("retry_later", FIRST, delay_s=asked).delay_s == given
