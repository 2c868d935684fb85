"""What an outcome means for a job: which event, whether it counts, when it runs again.

The only place that decides it, for outcomes that a child reports and for those that befall a child.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from taskd.model.backoff import wait_s
from taskd.model.jobtype import TypeInfo
from taskd.model.state import Cause, Event, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to write. `status` is final or None (waits again for `delay_s`)."""

    event: Event
    status: State | None
    cause: Cause | None
    counts: bool
    delay_s: float = 0.0
    crashes: int = 0
    alone: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The job that a verdict is about; `attempts` were used up before this run."""

    attempts: int
    max_attempts: int
    crashes: int = 0
    alone: bool = False


MAX_DELAY_S = 365 * 86400.0
"""A handler may put its job off for as long as a client may at most."""

UNKNOWN = "outcome unknown: "
"""Begins the error of a job of a type that must not run twice and whose run was cut short."""


def retryable(
    cause: Cause,
    case: Case,
    info: TypeInfo,
    dice: random.Random,
    *,
    error: str | None,
    delay_s: float | None = None,
) -> Verdict:
    """Decide a failed attempt: again by the retry policy (or after `delay_s`), or failed for good."""
    attempt = case.attempts + 1
    if attempt >= case.max_attempts:
        return Verdict(event=Event.FAIL, status=State.FAILED, cause=cause, counts=True, error=error)
    wait = wait_s(info.retry, attempt, dice) if delay_s is None else delay_s
    return Verdict(
        event=Event.RETRY_LATER,
        status=None,
        cause=cause,
        counts=True,
        delay_s=wait,
        crashes=case.crashes,
        alone=case.alone,
        error=error,
    )


def reported(
    outcome: str, case: Case, info: TypeInfo, dice: random.Random, *, error: str | None, delay_s: float | None
) -> Verdict:
    """Decide what a child reported; `outcome` is one of `wire.Finished`, `completed` excepted.

    A child runs other people's code: a delay out of range is bounded, an outcome that is none is an error.
    """
    if delay_s is not None:
        delay_s = min(max(0.0, delay_s), MAX_DELAY_S)
    if outcome in ("error", "timeout"):
        return retryable(Cause(outcome), case, info, dice, error=error, delay_s=delay_s)
    if outcome == "retry_later":
        return retryable(Cause.RETRY_LATER, case, info, dice, error=error, delay_s=delay_s)
    if outcome == "fail":
        return Verdict(event=Event.FAIL, status=State.FAILED, cause=Cause.ERROR, counts=True, error=error)
    if outcome == "invalid_payload":
        return Verdict(
            event=Event.FAIL, status=State.FAILED, cause=Cause.INVALID_PAYLOAD, counts=False, error=error
        )
    if outcome == "snoozed":
        return Verdict(
            event=Event.PUT_BACK,
            status=None,
            cause=Cause.SNOOZED,
            counts=False,
            delay_s=delay_s or 0.0,
            crashes=case.crashes,
            alone=case.alone,
        )
    if outcome == "cancelled":
        return Verdict(
            event=Event.CANCEL, status=State.CANCELLED, cause=Cause.CANCELLED, counts=True, error=error
        )
    if outcome == "dropped":
        return put_back(case)
    text = f"its process reported an unknown outcome {outcome[:40]!r}"
    return retryable(Cause.ERROR, case, info, dice, error=text)


def put_back(case: Case) -> Verdict:
    """Decide a job that was claimed and never started: it waits again, nothing is written down."""
    return Verdict(
        event=Event.PUT_BACK, status=None, cause=None, counts=False, crashes=case.crashes, alone=case.alone
    )


def expired() -> Verdict:
    """Decide a job that was claimed after the time by which it had to start."""
    return Verdict(
        event=Event.EXPIRE,
        status=State.FAILED,
        cause=Cause.EXPIRED,
        counts=False,
        error="not started in time",
    )


def interrupted(case: Case, info: TypeInfo, *, error: str, alone: bool = False) -> Verdict:
    """Decide a run that was cut short through no fault of its own; `alone` asks for a process apart."""
    if not info.restartable:
        return Verdict(
            event=Event.FAIL,
            status=State.FAILED,
            cause=Cause.INTERRUPTED,
            counts=False,
            error=UNKNOWN + error,
        )
    return Verdict(
        event=Event.PUT_BACK,
        status=None,
        cause=Cause.INTERRUPTED,
        counts=False,
        crashes=case.crashes,
        alone=case.alone or alone,
        error=error,
    )


def died(cause: Cause, case: Case, info: TypeInfo, *, error: str, max_crashes: int) -> Verdict:
    """Decide a run whose process died, or whose lease ended, while it ran alone there.

    Crashes and deaths by memory are ready again at once, whatever the policy's waits are; after
    `max_crashes` of them the job fails whatever `max_attempts` says.
    """
    crashes = case.crashes + (cause in (Cause.CRASHED, Cause.OOM))
    final = case.attempts + 1 >= case.max_attempts or crashes >= max_crashes or not info.restartable
    return Verdict(
        event=Event.FAIL if final else Event.RESCUE,
        status=State.FAILED if final else None,
        cause=cause,
        counts=True,
        crashes=crashes,
        alone=cause is not Cause.LEASE_EXPIRED or case.alone,
        error=error if info.restartable else UNKNOWN + error,
    )
