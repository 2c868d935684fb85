"""A job's life: six states and the one table of moves between them.

The table is the truth. Every changing statement in `sql/` names its moves in a `-- moves:` header and
is guarded by the old state; a test compares all headers with this table, in both directions.

`scheduled` and `pending` are one stored state, told apart by the clock: a waiting job is scheduled
while its `run_at` lies ahead and pending from then on (docs/decisions/0001-storage.md). The move `due`
is therefore made by time and by no statement.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """Where a job is in its life. The last three are final."""

    SCHEDULED = "scheduled"
    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether only `retry` moves a job out of this state."""
        return self in _FINAL


_FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})


class Event(StrEnum):
    """What happens to a job; each is one row or more in `MOVES`."""

    DUE = "due"
    CLAIM = "claim"
    COMPLETE = "complete"
    RETRY_LATER = "retry_later"
    FAIL = "fail"
    PUT_BACK = "put_back"
    RESCUE = "rescue"
    CANCEL = "cancel"
    EXPIRE = "expire"
    RETRY = "retry"


MOVES: Mapping[tuple[State, Event], frozenset[State]] = MappingProxyType(
    {
        (State.SCHEDULED, Event.DUE): frozenset({State.PENDING}),
        (State.PENDING, Event.CLAIM): frozenset({State.PROCESSING}),
        (State.SCHEDULED, Event.EXPIRE): frozenset({State.FAILED}),
        (State.PENDING, Event.EXPIRE): frozenset({State.FAILED}),
        (State.PROCESSING, Event.EXPIRE): frozenset({State.FAILED}),  # claimed too late, and not started
        (State.PROCESSING, Event.COMPLETE): frozenset({State.COMPLETED}),
        (State.PROCESSING, Event.RETRY_LATER): frozenset({State.SCHEDULED, State.PENDING}),
        (State.PROCESSING, Event.FAIL): frozenset({State.FAILED}),
        (State.PROCESSING, Event.PUT_BACK): frozenset({State.SCHEDULED, State.PENDING}),
        (State.PROCESSING, Event.RESCUE): frozenset({State.PENDING, State.FAILED}),
        (State.SCHEDULED, Event.CANCEL): frozenset({State.CANCELLED}),
        (State.PENDING, Event.CANCEL): frozenset({State.CANCELLED}),
        (State.PROCESSING, Event.CANCEL): frozenset({State.CANCELLED}),
        (State.COMPLETED, Event.RETRY): frozenset({State.SCHEDULED, State.PENDING}),
        (State.FAILED, Event.RETRY): frozenset({State.SCHEDULED, State.PENDING}),
        (State.CANCELLED, Event.RETRY): frozenset({State.SCHEDULED, State.PENDING}),
    }
)
"""Where each event may take a job from each state; what is absent is forbidden."""


def allowed(state: State, event: Event) -> frozenset[State]:
    """Return the states that `event` may take a job in `state` to; empty when the move is forbidden."""
    return MOVES.get((state, event), frozenset())


class Cause(StrEnum):
    """Why a run did not complete, as the job's history says it; `retried` is why there is a further life.

    Runs since the last `retried` are the job's attempts and its uncounted runs.
    """

    ERROR = "error"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    OOM = "oom"
    LEASE_EXPIRED = "lease_expired"
    INTERRUPTED = "interrupted"
    RETRY_LATER = "retry_later"
    SNOOZED = "snoozed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    INVALID_PAYLOAD = "invalid_payload"
    RETRIED = "retried"
    """Somebody put the job back in line by hand: its attempts start anew."""

    @property
    def counts(self) -> bool:
        """Whether a run that ended so uses up an attempt."""
        return self not in _UNCOUNTED


_UNCOUNTED = frozenset(
    {Cause.INTERRUPTED, Cause.SNOOZED, Cause.EXPIRED, Cause.INVALID_PAYLOAD, Cause.RETRIED}
)
