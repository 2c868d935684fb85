"""One attempt of one job: decode, call, and say how it ended.

Here stands the edge to other people's code: whatever a handler raises, prints or returns becomes one
`Finished` that Postgres can store. An attempt never raises.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from taskd.child.capture import CURRENT, end_lines
from taskd.child.load import Handler
from taskd.child.outbox import hidden
from taskd.model import result as results
from taskd.model.shape import BadPayload
from taskd.plugin import Context, Fail, Outcome, RetryLater, Snooze, _Sink
from taskd.wire import Finished

Around = Callable[[Context], AbstractContextManager[Any]]

TRACEBACK_FRAMES = 15
"""The last frames of a failed attempt that are kept with its job's lines."""

_MAX_TRACEBACK = 8 * 1024
_DROPPED_SUBMITS = "taskd: jobs submitted by this run are dropped, it did not complete"

_log = logging.getLogger("taskd.child")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of what a run leaves behind, in bytes."""

    result_bytes: int = 64 * 1024
    error_bytes: int = 8 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """How jobs of one type run in this child; made once, used for every job."""

    name: str
    handler: Handler
    options: Mapping[str, object]
    resources: Any
    grace: float
    limits: Limits
    around: Sequence[Around] = ()
    finished: Sequence[Callable[..., None]] = ()
    """The `taskd_job_finished` of all plugins; empty costs nothing."""

    def context(self, start: Any, sink: _Sink) -> Context:
        """Return the context of the run that `start` (a `wire.Start`) asks for."""
        return Context(
            job_id=start.job_id,
            type=self.name,
            attempt=start.attempt,
            max_attempts=start.max_attempts,
            timeout_s=start.timeout_s,
            grace=self.grace,
            options=self.options,
            resources=self.resources,
            sink=sink,
            clock=time.monotonic,
            started=time.time(),
            run=start.run,
        )


async def attempt_async(lane: Lane, ctx: Context, payload: bytes | memoryview) -> Finished:
    """Run an `async def` handler in this task; `task.cancel()` with `ctx._asked` set asks it to stop."""
    CURRENT.set(ctx)
    try:
        arguments, named = _arguments(lane, ctx, payload)
    except Exception as error:
        return _end(lane, ctx, _refused(lane, ctx, error))
    try:
        if lane.around:
            with _wrapped(lane, ctx):
                value = await lane.handler.type.run(*arguments, **named)
        else:
            value = await lane.handler.type.run(*arguments, **named)
    except GeneratorExit:
        raise
    except BaseException as error:
        return _end(lane, ctx, _failed(lane, ctx, error))
    return _end(lane, ctx, _completed(lane, ctx, value))


def attempt(lane: Lane, ctx: Context, payload: bytes | memoryview) -> Finished:
    """Run a plain `def` handler in this thread."""
    token = CURRENT.set(ctx)
    try:
        arguments, named = _arguments(lane, ctx, payload)
    except Exception as error:
        return _end(lane, ctx, _refused(lane, ctx, error))
    try:
        if lane.around:
            with _wrapped(lane, ctx):
                value = lane.handler.type.run(*arguments, **named)
        else:
            value = lane.handler.type.run(*arguments, **named)
    except BaseException as error:
        finished = _failed(lane, ctx, error)
    else:
        finished = _completed(lane, ctx, value)
    finally:
        CURRENT.reset(token)
    return _end(lane, ctx, finished)


def unstarted(ctx: Context) -> Finished:
    """Return the end of a run that was asked to stop before its handler was called."""
    return Finished(ctx._run, _asked_outcome(ctx), False, error=_asked_text(ctx))


def outcome_of(finished: Finished) -> Outcome:
    """Return what plugins and their tests see of the end of a run."""
    return Outcome(
        kind=finished.outcome,
        result=msgspec.json.decode(finished.result),
        error=finished.error,
        delay_s=finished.delay_s,
        exit_code=finished.exit_code,
        signal=finished.signal,
    )


def wrapper(function: Callable[..., Any], names: Sequence[str]) -> Around:
    """Return what wraps a job by `function`, the `taskd_around_job` of a plugin.

    A generator that yields once, marked as a pluggy wrapper or not, or a context manager. It is called
    by us and not by pluggy, whose wrappers end before an `async def` handler has even begun.
    """

    def enter(ctx: Context) -> AbstractContextManager[Any]:
        made = function(ctx) if names else function()
        if inspect.isgenerator(made):
            return _generator_manager(made)
        if not hasattr(made, "__enter__"):
            raise TypeError("taskd_around_job must be a generator or return a context manager")
        return made  # type: ignore[no-any-return]

    return enter


@contextmanager
def _generator_manager(made: Any) -> Iterator[None]:
    yield from made


@contextmanager
def _wrapped(lane: Lane, ctx: Context) -> Iterator[None]:
    with ExitStack() as stack:
        for enter in lane.around:
            stack.enter_context(enter(ctx))
        yield


def _arguments(
    lane: Lane, ctx: Context, payload: bytes | memoryview
) -> tuple[tuple[object, ...], dict[str, object]]:
    if lane.handler.shape.secrets:
        _mask(lane, ctx, payload)
    arguments, named = lane.handler.shape.decode(payload)
    if lane.handler.context is not None:
        named[lane.handler.context] = ctx
    return arguments, named


def _mask(lane: Lane, ctx: Context, payload: bytes | memoryview) -> None:
    """Have the secret members of the payload masked in all that this run says."""
    try:
        members = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return
    if isinstance(members, dict):
        values = [members.get(name) for name in lane.handler.shape.secrets]
        ctx._masked = tuple(value for value in values if isinstance(value, str) and value)


def _completed(lane: Lane, ctx: Context, value: object) -> Finished:
    try:
        raw = results.encode(value, lane.limits.result_bytes)
    except Exception as error:
        # The effect has happened: the job is completed and never runs again for its result.
        ctx._sink.line(ctx, "warning", f"taskd: the result is not kept: {error}")
        raw = b"null"
    if ctx._submits is None:
        return Finished(ctx._run, "completed", True, msgspec.Raw(raw))
    submits = [msgspec.Raw(body) for body in ctx._submits]
    return Finished(ctx._run, "completed", True, msgspec.Raw(raw), submits=submits)


def _refused(lane: Lane, ctx: Context, error: Exception) -> Finished:
    """Return the end of a run whose payload could not be decoded; the handler was not called."""
    if isinstance(error, (BadPayload, RecursionError, UnicodeError)):
        text = hidden(ctx, f"payload: {error}", lane.limits.error_bytes)
        return Finished(ctx._run, "invalid_payload", False, error=text)
    return Finished(ctx._run, "error", False, error=_described(lane, ctx, error))


def _failed(lane: Lane, ctx: Context, error: BaseException) -> Finished:
    delay_s = None
    if isinstance(error, MemoryError):
        # What the handler's frames still hold is what there is no memory for.
        traceback.clear_frames(error.__traceback__)
    if isinstance(error, RetryLater):
        kind, delay_s = "retry_later", error.delay_s
    elif isinstance(error, Snooze):
        kind, delay_s = "snoozed", error.delay_s
    elif isinstance(error, Fail):
        kind = "fail"
    elif ctx._asked is not None:
        # Also when the handler made another exception of it, or failed on its way out.
        kind = _asked_outcome(ctx)
    else:
        kind = "error"
    if isinstance(error, (RetryLater, Snooze, Fail)):
        text = hidden(ctx, error.reason, lane.limits.error_bytes)
    elif kind != "error" and isinstance(error, asyncio.CancelledError):
        text = _asked_text(ctx)
    else:
        text = _described(lane, ctx, error)
        _keep_traceback(ctx, error)
    if ctx._submits:
        ctx._sink.line(ctx, "warning", _DROPPED_SUBMITS)
    exit_code, signal = _number(error, "exit_code"), _number(error, "signal")
    return Finished(ctx._run, kind, True, error=text, delay_s=delay_s, exit_code=exit_code, signal=signal)


def _end(lane: Lane, ctx: Context, finished: Finished) -> Finished:
    if ctx._partial is not None:
        end_lines(ctx)
    if lane.finished:
        outcome = outcome_of(finished)
        for hook in lane.finished:
            try:
                hook(ctx=ctx, outcome=outcome)
            except Exception:
                _log.warning("taskd_job_finished raised", exc_info=True)
    ctx._open = False
    return finished


def _asked_outcome(ctx: Context) -> str:
    return "timeout" if ctx._asked == "timeout" else "cancelled"


def _asked_text(ctx: Context) -> str:
    if ctx._asked == "timeout":
        return f"timed out after {ctx._timeout:g} s"
    return f"asked to stop: {ctx._asked}"


def _described(lane: Lane, ctx: Context, error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:
        message = "(its text can't be made)"
    kind = type(error).__qualname__
    return hidden(ctx, f"{kind}: {message}" if message else kind, lane.limits.error_bytes)


def _keep_traceback(ctx: Context, error: BaseException) -> None:
    trace = error.__traceback__
    if trace is not None and trace.tb_next is not None:
        trace = trace.tb_next  # without our own frame
    try:
        lines = traceback.format_exception(type(error), error, trace, limit=-TRACEBACK_FRAMES)
    except Exception:
        return
    text = "".join(lines).rstrip()
    ctx._sink.line(ctx, "error", text[-_MAX_TRACEBACK:])


def _number(error: BaseException, name: str) -> int | None:
    try:
        value = getattr(error, name, None)
    except Exception:
        return None
    return value if type(value) is int else None
