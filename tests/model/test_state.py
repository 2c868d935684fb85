"""The table of moves, and the statements that make them: neither knows a move that the other does not."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from taskd.model.state import MOVES, Cause, Event, State, allowed

Move = tuple[State, State]

_HEADER = re.compile(r"^-- name: (\w+)\n-- moves: ([^\n]+)$", re.MULTILINE)


def headers() -> dict[str, set[Move]]:
    """Return the moves that each statement says it makes."""
    found: dict[str, set[Move]] = {}
    for file in files("taskd.sql.queries").iterdir():
        if file.name.endswith(".sql"):
            for name, text in _HEADER.findall(file.read_text(encoding="utf-8")):
                before, after = text.split(" -> ")
                found[name] = {
                    (State(one), State(other)) for one in before.split(" | ") for other in after.split(" | ")
                }
    return found


def table() -> set[Move]:
    """Return the moves of the table, that of the clock excepted."""
    return {
        (state, other)
        for (state, event), others in MOVES.items()
        if event is not Event.DUE
        for other in others
    }


def test_every_move_of_a_statement_is_in_the_table() -> None:
    made = set().union(*headers().values())

    assert made <= table()


def test_every_move_of_the_table_is_made_by_a_statement() -> None:
    made = set().union(*headers().values())

    assert table() <= made


@pytest.mark.parametrize(
    "name", ["claim_jobs", "settle_completed", "settle_others", "expire_jobs", "cancel_jobs", "retry_jobs"]
)
def test_a_statement_that_moves_jobs_says_so(name: str) -> None:
    assert headers()[name]


def test_a_job_falls_due_by_the_clock_and_by_no_statement() -> None:
    due = (State.SCHEDULED, State.PENDING)

    assert allowed(State.SCHEDULED, Event.DUE) == {State.PENDING}
    assert all(due not in moves for moves in headers().values())


def test_what_is_not_in_the_table_is_forbidden() -> None:
    assert allowed(State.COMPLETED, Event.CLAIM) == frozenset()
    assert allowed(State.SCHEDULED, Event.CLAIM) == frozenset()


@pytest.mark.parametrize("state", [state for state in State if state.final])
def test_only_retry_leaves_a_final_state(state: State) -> None:
    assert {event for (one, event) in MOVES if one is state} == {Event.RETRY}


@pytest.mark.parametrize("state", list(State))
def test_every_state_can_be_left_or_is_final(state: State) -> None:
    assert any(one is state for one, _ in MOVES)
    assert state.final == (state in {State.COMPLETED, State.FAILED, State.CANCELLED})


def test_which_causes_use_up_an_attempt() -> None:
    uncounted = {cause for cause in Cause if not cause.counts}

    assert uncounted >= {Cause.INTERRUPTED, Cause.SNOOZED}
    assert not uncounted & {Cause.ERROR, Cause.TIMEOUT, Cause.CRASHED, Cause.OOM, Cause.LEASE_EXPIRED}
    assert Cause.RETRY_LATER not in uncounted
