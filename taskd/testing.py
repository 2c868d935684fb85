"""Run one job of a plugin in process, without a database: for the tests of plugin authors.

    from taskd.testing import run
    from my_plugin import greet

    def test_greet_says_hello() -> None:
        outcome = run(greet, {"name": "Ada"})

        assert outcome.kind == "completed"
        assert outcome.result == {"text": "hello Ada "}

The payload goes through JSON and the checks of the door, the result through those of the storage, as in
a real run. The code is covered by semantic versioning.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import msgspec

from taskd.child.load import handler_of, payload_check
from taskd.child.outbox import Outbox
from taskd.child.run import Lane, Limits, attempt, attempt_async, outcome_of
from taskd.plugin import Context, JobType
from taskd.plugin import Outcome as _Outcome
from taskd.wire import Finished, Log, Progress, Start

__all__ = ["Outcome", "run", "run_async"]

JOB_ID = "00000000-0000-7000-8000-000000000000"
"""The id of the job when a test gives none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(_Outcome):
    """How the run ended (`taskd.plugin.Outcome`), and what the handler said meanwhile.

    `lines` are those of `ctx.log`, `progress` the last percent and message, `submitted` the bodies of
    `ctx.submit`.
    """

    lines: tuple[str, ...] = ()
    progress: tuple[float, str] | None = None
    submitted: tuple[dict[str, Any], ...] = ()


def run(
    job_type: JobType,
    payload: Mapping[str, Any],
    *,
    attempt: int = 1,
    max_attempts: int = 3,
    timeout: float | None = None,
    options: Mapping[str, object] | None = None,
    resources: Any = None,
    job_id: str = JOB_ID,
) -> Outcome:
    """Run `job_type` once with `payload` and return how it ended; whatever the handler raises, too.

    `timeout` is seconds, default the type's. `options` and `resources` are what `ctx` shows by these
    names. A plain `def` runs in this thread and is not stopped by its timeout; `ctx.check()` is.

    Raises:
        taskd.child.load.NotLoaded: the job type can't be; `taskd plugin check` says the same.
        RuntimeError: called in a running event loop, for an `async def`; await `run_async` there.
    """
    lane, start = _prepared(job_type, payload, attempt, max_attempts, timeout, options, resources, job_id)
    if job_type.is_async:
        return asyncio.run(_attempt_async(lane, start))
    return _attempt(lane, start)


async def run_async(
    job_type: JobType,
    payload: Mapping[str, Any],
    *,
    attempt: int = 1,
    max_attempts: int = 3,
    timeout: float | None = None,
    options: Mapping[str, object] | None = None,
    resources: Any = None,
    job_id: str = JOB_ID,
) -> Outcome:
    """Do what `run` does, in the running event loop: for resources that belong to it."""
    lane, start = _prepared(job_type, payload, attempt, max_attempts, timeout, options, resources, job_id)
    return await _attempt_async(lane, start) if job_type.is_async else _attempt(lane, start)


def _prepared(
    job_type: JobType,
    payload: Mapping[str, Any],
    attempt: int,
    max_attempts: int,
    timeout: float | None,
    options: Mapping[str, object] | None,
    resources: Any,
    job_id: str,
) -> tuple[Lane, Start]:
    handler = handler_of(job_type)
    lane = Lane(
        name=job_type.name,
        handler=handler,
        options=MappingProxyType(dict(options or {})),
        resources=resources,
        grace=handler.info.grace,
        limits=Limits(),
    )
    start = Start(
        run=0,
        type=job_type.name,
        job_id=job_id,
        attempt=attempt,
        max_attempts=max_attempts,
        timeout_s=handler.info.timeout if timeout is None else timeout,
        client="",
        payload=msgspec.Raw(msgspec.json.encode(payload)),
    )
    return lane, start


def _refusal(lane: Lane, start: Start) -> Finished | None:
    # The door checks the published schema before a job is stored.
    problem = payload_check(lane.handler.shape.schema)(msgspec.json.decode(start.payload))
    return None if problem is None else Finished(0, "invalid_payload", False, error=f"payload: {problem}")


def _attempt(lane: Lane, start: Start) -> Outcome:
    outbox = Outbox(1000, lambda: None)
    ctx = lane.context(start, outbox)
    return _outcome(_refusal(lane, start) or attempt(lane, ctx, start.payload), ctx, outbox)


async def _attempt_async(lane: Lane, start: Start) -> Outcome:
    outbox = Outbox(1000, lambda: None)
    ctx = lane.context(start, outbox)
    refused = _refusal(lane, start)
    if refused is not None:
        return _outcome(refused, ctx, outbox)
    task = asyncio.create_task(attempt_async(lane, ctx, start.payload))
    timer = asyncio.get_running_loop().call_later(ctx.remaining(), _time_out, ctx, task)
    try:
        return _outcome(await task, ctx, outbox)
    finally:
        timer.cancel()


def _time_out(ctx: Context, task: asyncio.Task[Finished]) -> None:
    ctx._asked = ctx._asked or "timeout"
    task.cancel()


def _outcome(finished: Finished, ctx: Context, outbox: Outbox) -> Outcome:
    said = outbox.take()
    how = outcome_of(finished)
    progress = [(message.percent, message.message) for message in said if isinstance(message, Progress)]
    return Outcome(
        **{field.name: getattr(how, field.name) for field in fields(how)},
        lines=tuple(message.text for message in said if isinstance(message, Log)),
        progress=progress[-1] if progress else None,
        submitted=tuple(msgspec.json.decode(body) for body in ctx._submits or ()),
    )
