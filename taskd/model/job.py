"""A job as values: what is asked for, what is stored, what a claim hands out.

Payloads and results travel as JSON text: they are parsed once at the door and once by the handler,
and nowhere between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

import msgspec

from taskd.model.state import Cause, State

COMMAND_LINE = UUID("00000000-0000-7000-8000-000000000001")
"""The reserved client that owns jobs submitted by `taskd submit`."""
SQL = UUID("00000000-0000-7000-8000-000000000002")
"""The reserved client that owns jobs submitted by the SQL functions."""
SCHEDULES = UUID("00000000-0000-7000-8000-000000000003")
"""The reserved client that owns jobs made by schedules."""


def new_id(now_ms: int, dice: bytes) -> UUID:
    """Return a version 7 UUID: ids sort by the millisecond they were made in.

    `now_ms` is Unix time in milliseconds, `dice` ten random bytes. Source: RFC 9562, section 5.7.
    """
    value = (now_ms & 0xFFFF_FFFF_FFFF) << 80 | int.from_bytes(dice, "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    return UUID(int=value & ~(0x3 << 62) | 0x2 << 62)


def new_ids(now_ms: int, dice: bytes, count: int) -> list[UUID]:
    """Return `count` ids that follow one another: jobs stored together start in this order.

    One random number, counted up (RFC 9562, section 6.2, method 2); arguments as for `new_id`.
    """
    first = new_id(now_ms, dice).int & ~(1 << 61)  # room to count within the last 62 bits
    return [UUID(int=first + step) for step in range(count)]


class NewJob(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A job that was checked and is ready to be stored; defaults are already filled in.

    `run_at` wins over `delay_s`; both absent means now. A `run_at` in the past becomes now.
    `body_hash` is the digest that a second submit with the same `unique_key` is compared with
    (SHA-256 over type, canonical payload and the options as first submitted).

    A struct, as everything that is made for each submit: a frozen dataclass takes five times as long.
    """

    id: UUID
    client: UUID
    type: str
    payload: str
    priority: int = 0
    run_at: datetime | None = None
    delay_s: float | None = None
    max_attempts: int = 3
    timeout_s: float | None = None
    expires_in_s: float | None = None
    unique_key: str | None = None
    unique_while: str = "retained"
    body_hash: bytes | None = None
    tags: Sequence[str] = ()
    meta: str | None = None
    trace: str | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What became of one submitted job.

    `duplicate` with `conflict` false: the same body was submitted before and `id` is that job.
    `conflict`: another body holds the same `unique_key`; `id` is the job that holds it.
    `error` is set when Postgres refused this row alone; then nothing was stored for it.
    """

    id: UUID
    status: State = State.PENDING
    run_at: datetime | None = None
    duplicate: bool = False
    conflict: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One entry of a job's history: a run that did not complete. Member names are those of SPEC part 11."""

    attempt: int
    claim: str
    node: str | None
    started_at: datetime | None
    ended_at: datetime
    cause: Cause
    error: str | None
    exit_code: int | None = None
    signal: int | None = None
    cpu_s: float | None = None
    max_rss: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as a client or an operator sees it: one row of `taskd.job_view`."""

    id: UUID
    client: UUID
    type: str
    payload: str
    status: State
    attempts: int
    max_attempts: int
    created_at: datetime
    run_at: datetime
    error_message: str | None
    result: str | None
    progress: Mapping[str, object] | None
    priority: int
    started_at: datetime | None
    finished_at: datetime | None
    unique_key: str | None
    tags: Sequence[str]
    meta: str | None
    history: Sequence[Run] = field(default=())


@dataclass(frozen=True, slots=True)
class Claimed:
    """One job that a claim statement took for this node."""

    id: UUID
    type: str
    priority: int
    run_at: datetime
    payload: str
    attempts: int
    """Attempts used up before this run: the number of this attempt is one more."""
    max_attempts: int
    timeout_s: float | None
    crashes: int
    """Deaths of a process while this job ran alone in it."""
    alone: bool
    """Must run with no other job in its process: a neighbour of a death that nobody is blamed for."""
    client: UUID
    claim: int
