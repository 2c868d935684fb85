"""The public API for plugin authors: declare a job type, answer hooks, talk to the running job.

    from taskd.plugin import Context, hookimpl, job

    @job("greet", timeout="10s")
    async def greet(name: str, times: int = 1, *, ctx: Context) -> dict:
        '''Say hello.'''
        return {"text": f"hello {name} " * times}

    @hookimpl
    def taskd_job_types(options):
        return [greet]

All plugin code runs in child processes, never in the daemon or the API. What stands here is covered by
semantic versioning; names that begin with `_` are not.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import msgspec
import pluggy

from taskd.errors import Refused
from taskd.model import result, units
from taskd.model.jobtype import Retry, TypeInfo
from taskd.model.names import is_type
from taskd.model.submit import read_submit

__all__ = [
    "API_VERSION",
    "Context",
    "Fail",
    "Hooks",
    "JobType",
    "Outcome",
    "RetryLater",
    "Secret",
    "Snooze",
    "hookimpl",
    "job",
]

API_VERSION = 1
"""Grows when a plugin written for an older number would no longer work."""

hookimpl = pluggy.HookimplMarker("taskd")
"""Marks a function of a plugin as the answer to the hook of the same name."""

hookspec = pluggy.HookspecMarker("taskd")

Secret = msgspec.Meta(extra_json_schema={"writeOnly": True})
"""Marks a top-level payload member that people must not see: `token: Annotated[str, Secret]`.

Its value is masked in lists, logs, dashboard and errors; a JSON Schema says the same by `writeOnly: true`.
"""

MAX_DELAY_S = 31_536_000.0
"""A year: no job waits longer."""

MAX_SUBMITS = 1000
"""Jobs that one job may submit."""

MAX_SUBMITTED = 16 << 20
"""Bytes of all jobs that one job submits: they travel in one message with its completion."""

Duration = timedelta | str | float
"""A span of time: a timedelta, a text like `10s`, or a number of seconds."""

MAX_BODY = 1 << 20
"""Bytes of one submitted job, as at the door."""


class _Answer(Exception):
    """A handler's way to say how its run ended, other than by returning or failing.

    `exit_code` and `signal` may be set on the instance by a handler that ran a program; they are kept
    in the job's history. Any other exception may carry the two attributes as well.
    """

    exit_code: int | None = None
    signal: int | None = None


class RetryLater(_Answer):
    """Run this job again after `delay`; the attempt counts. Without a delay the retry policy says when.

    When no attempts are left, the job ends as `failed` with `reason`.
    """

    def __init__(self, delay: Duration | None = None, reason: str = "") -> None:
        self.delay_s = None if delay is None else _bounded(seconds(delay))
        self.reason = reason
        super().__init__(reason or "retry later")


class Fail(_Answer):
    """End this job as `failed` with `reason`, whatever attempts are left."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Snooze(_Answer):
    """Run this job again after `delay`; no attempt is used up."""

    def __init__(self, delay: Duration, reason: str = "") -> None:
        self.delay_s = _bounded(seconds(delay))
        self.reason = reason
        super().__init__(reason or "snoozed")


class _Sink(Protocol):
    """Where a context's lines and progress go; the child and `taskd.testing` each have one."""

    def line(self, ctx: Context, level: str, text: str) -> None: ...

    def progress(self, ctx: Context, percent: float, message: str) -> None: ...


class Context:
    """The running job, as its handler sees it. Owned by one run; of no use after it.

    All calls are plain, never block and may come from any thread. `options` are the plugin's own
    options with the `options:` of the job type laid over them; `resources` is what
    `taskd_child_started` of the plugin returned. `grace` is the seconds that a handler has left to
    end once it was asked to stop.
    """

    __slots__ = (
        "_asked",
        "_clock",
        "_ends",
        "_lines",
        "_log",
        "_masked",
        "_open",
        "_partial",
        "_run",
        "_sink",
        "_started",
        "_submits",
        "_timeout",
        "attempt",
        "grace",
        "job_id",
        "max_attempts",
        "options",
        "resources",
        "type",
    )

    def __init__(
        self,
        *,
        job_id: str,
        type: str,
        attempt: int,
        max_attempts: int,
        timeout_s: float,
        grace: float,
        options: Mapping[str, object],
        resources: Any,
        sink: _Sink,
        clock: Callable[[], float],
        started: float,
        run: int = 0,
    ) -> None:
        """Made by taskd. `clock` is monotonic, `started` the Unix time of the call, both in seconds."""
        self.job_id = job_id
        self.type = type
        self.attempt = attempt
        self.max_attempts = max_attempts
        self.grace = grace
        self.options = options
        self.resources = resources
        self._sink = sink
        self._clock = clock
        self._started = started
        self._timeout = timeout_s
        self._ends = clock() + timeout_s
        self._run = run
        self._asked: str | None = None
        self._open = True
        self._lines = 0
        self._log: logging.Logger | None = None
        self._partial: dict[str, str] | None = None
        self._submits: list[bytes] | None = None
        self._masked: tuple[str, ...] = ()

    @property
    def idempotency_key(self) -> str:
        """The same text over all attempts of this job, to hand on to a service that knows such keys."""
        return f"taskd/{self.job_id}"

    @property
    def deadline(self) -> datetime:
        """When this run times out, by the host's clock, in UTC."""
        return datetime.fromtimestamp(self._started + self._timeout, UTC)

    def remaining(self) -> float:
        """Return the seconds until this run times out; 0.0 when it has."""
        return max(0.0, self._ends - self._clock())

    @property
    def cancelled(self) -> bool:
        """Whether this run was asked to stop: by a client, its timeout, or a drain."""
        return self._asked is not None

    def check(self) -> None:
        """Stop here if this run was asked to stop or has timed out; for a long plain `def`.

        Raises:
            asyncio.CancelledError: it was; let it pass, `except Exception` does.
        """
        if self._asked is None and self._clock() >= self._ends:
            self._asked = "timeout"
        if self._asked is not None:
            raise asyncio.CancelledError(self._asked)

    def progress(self, percent: float, message: str = "") -> None:
        """Say how far this job is: `percent` from 0 to 100; only the latest is kept.

        Raises:
            ValueError: `percent` is outside that range.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"progress is between 0 and 100, not {percent}")
        if self._open:
            self._sink.progress(self, float(percent), message)

    @property
    def log(self) -> logging.Logger:
        """A standard logger; lines from INFO on are kept with the job."""
        if self._log is None:
            self._log = logging.Logger(self.type, logging.INFO)
            self._log.addHandler(_LineHandler(self))
        return self._log

    def submit(self, type: str, payload: Mapping[str, object], **options: object) -> None:
        """Submit another job, stored together with this job's completion, and only then.

        `options` are the optional members of `POST /jobs`: priority, delay (seconds) or run_at,
        max_attempts, timeout, expires_in, unique_key, unique_while, tags, meta. The job belongs to the
        client of this one. The payload is checked against the type's schema when the job is claimed.

        Raises:
            ValueError: a name, option or value that can't be, or more than 1000 submits.
        """
        if self._submits is None:
            self._submits = []
        if len(self._submits) == MAX_SUBMITS:
            raise ValueError(f"submit: a job may submit at most {MAX_SUBMITS} jobs")
        now = datetime.fromtimestamp(self._started + self._timeout - (self._ends - self._clock()), UTC)
        try:
            body = result.encode({"type": type, "payload": payload, **options}, MAX_BODY)
            read_submit(msgspec.json.decode(body), now=now)
        except (result.Unstorable, Refused) as error:
            raise ValueError(f"submit: {error}") from None
        if sum(map(len, self._submits)) + len(body) > MAX_SUBMITTED:
            raise ValueError(f"submit: all jobs of one job together may have {MAX_SUBMITTED} bytes")
        self._submits.append(body)


class _LineHandler(logging.Handler):
    """Hands the lines of one job's logger to where that job's lines are kept."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self._ctx = ctx

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self._ctx._sink.line(self._ctx, record.levelname.lower(), text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one run of a job ended.

    `kind` is one of completed, error, timeout, fail, retry_later, snoozed, cancelled, invalid_payload.
    `result` is what is stored for a completed run; `error` the text that people see; `delay_s` the
    seconds that `RetryLater` or `Snooze` asked for.
    """

    kind: str
    result: Any = None
    error: str | None = None
    delay_s: float | None = None
    exit_code: int | None = None
    signal: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobType:
    """A job type: a name that clients may submit, and the code behind it. Made by `@job` or directly.

    Without `payload` the parameters of `run` are the payload, checked by their types; a single
    parameter of a Struct, dataclass or pydantic model takes it whole. `payload` names such a class, or
    `dict` for any object, or is a JSON Schema; then `run` gets the payload as its first argument. The
    parameter named `ctx`, or typed `Context`, gets the context. Members that are not declared are
    refused, those inside nested classes by what the class says.

    Everything else is a default that `job_types:` in the configuration may override:

    - `description`, `example`: for people; default is the docstring and its JSON after `Example:`.
    - `isolation`: "async" shares a process, "process" has one for each running job. Default: "async"
      for `async def`, "process" for `def`, which can't be "async": it would block its neighbours.
    - `timeout`, `grace`: of one run, and to end after being asked to stop. Default 5 minutes, 5 s.
    - `concurrency` a node; `max_running`, `rate` (`"2/s"`, `"100/m"` or a number a second) and
      `rate_burst` over all nodes. Default: no limit.
    - `retry`: the members of `retry:` in the configuration, `{"max_attempts": 5, "backoff_base": "10s"}`.
    - `restartable`: False means never run again after a crash, a lost node or a kill. Default True.
    - `priority`, `max_backlog`, `retention`, `max_memory` (`"256MiB"` or bytes), `pool`.

    A handler ends its run by returning (JSON: completed), `RetryLater`, `Fail` or `Snooze`; any other
    exception is a failed attempt, `SystemExit` and `KeyboardInterrupt` too: they end the attempt and
    not its process.

    Raises:
        ValueError: a name or value that can't be; the message names the job type.
    """

    name: str
    run: Callable[..., Any]
    payload: Any = None
    description: str = ""
    example: Mapping[str, object] | None = None
    isolation: str | None = None
    timeout: Duration | None = None
    grace: Duration | None = None
    concurrency: int | None = None
    max_running: int | None = None
    rate: str | float | None = None
    rate_burst: int | None = None
    priority: int = 0
    retry: Mapping[str, object] = field(default_factory=dict)
    restartable: bool = True
    max_backlog: int | None = None
    retention: Duration | None = None
    max_memory: str | int | None = None
    pool: str = "default"

    def __post_init__(self) -> None:
        """Refuse what can't be, at the line that declares it."""
        if not is_type(str(self.name)):
            raise ValueError(f"job type {self.name!r}: a name matches ^[a-z][a-z0-9_.-]{{0,63}}$")
        self.info(plugin="", schema={}, secrets=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the handler as plain Python, for its author's own tests."""
        return self.run(*args, **kwargs)

    @property
    def is_async(self) -> bool:
        """Whether the handler is an `async def`."""
        return inspect.iscoroutinefunction(self.run) or inspect.iscoroutinefunction(
            getattr(self.run, "__call__", None)  # noqa: B004 - an instance whose __call__ is async
        )

    def info(self, *, plugin: str, schema: dict[str, object], secrets: tuple[str, ...]) -> TypeInfo:
        """Return this job type as data, times in seconds. Called by taskd."""
        description, example = _documented(inspect.getdoc(self.run))
        try:
            isolation = self.isolation or ("async" if self.is_async else "process")
            if isolation not in ("async", "process") or (isolation == "async" and not self.is_async):
                raise ValueError("isolation is async (of an async def) or process")
            for name in ("concurrency", "max_running", "rate_burst", "max_backlog"):
                number = getattr(self, name)
                if number is not None and (type(number) is not int or number < 1):
                    raise ValueError(f"{name} is a whole number from 1")
            memory = units.size(self.max_memory) if isinstance(self.max_memory, str) else self.max_memory
            return TypeInfo(
                name=self.name,
                handler=self.name,
                plugin=plugin,
                description=self.description or description,
                schema=schema,
                example=dict(self.example) if self.example is not None else example,
                secrets=secrets,
                isolation="async" if isolation == "async" else "process",
                pool=self.pool,
                concurrency=self.concurrency,
                max_running=self.max_running,
                rate=None if self.rate is None else units.rate(self.rate),
                rate_burst=self.rate_burst,
                timeout=300.0 if self.timeout is None else _above_zero("timeout", self.timeout),
                grace=5.0 if self.grace is None else seconds(self.grace),
                priority=self.priority,
                retry=_retry(self.retry),
                restartable=self.restartable,
                max_backlog=1_000_000 if self.max_backlog is None else self.max_backlog,
                retention=None if self.retention is None else seconds(self.retention),
                max_memory=memory,
            )
        except ValueError as error:
            raise ValueError(f"job type {self.name}: {error}") from None


def job(name: str, **options: Any) -> Callable[[Callable[..., Any]], JobType]:
    """Make a `JobType` of the function below; `options` are the fields of `JobType`."""

    def declare(run: Callable[..., Any]) -> JobType:
        return JobType(name=name, run=run, **options)

    return declare


class Hooks(Protocol):
    """What a plugin may implement, each with `@hookimpl`. All of it runs in child processes.

    A hook may leave out arguments that it does not need. `options` is the plugin's own `config:`,
    checked and with secrets resolved.
    """

    @hookspec(firstresult=True)
    def taskd_job_types(self, options: Mapping[str, object]) -> Sequence[JobType]:
        """Declare the job types of this plugin.

        Called once in each child process, before its first job, and where types are described. Raise
        `ValueError` to refuse the options: taskd then does not start, and shows your message beside
        the line, without the options' values.
        """
        ...

    @hookspec(firstresult=True)
    def taskd_options_schema(self) -> Mapping[str, object] | type:
        """Return what options the plugin takes: a JSON Schema, or a msgspec Struct or dataclass.

        Called before every other hook, which see only options that fit. Unknown options are refused.
        Without this hook any options are taken.
        """
        ...

    @hookspec(firstresult=True)
    def taskd_child_started(self, options: Mapping[str, object]) -> Any:
        """Open what the jobs of this child share, a client or a pool; what is returned is `ctx.resources`.

        Called once in each child that runs jobs, before its first; may be `async def`, in the loop
        that the jobs run in. An exception ends the child before it takes jobs, and is shown.
        """
        ...

    @hookspec(firstresult=True)
    def taskd_child_stopping(self) -> None:
        """Close what `taskd_child_started` opened. Called when the last job of the child has ended.

        May be `async def`. Not called when the process is killed. An exception is logged.
        """
        ...

    @hookspec
    def taskd_around_job(self, ctx: Context) -> AbstractContextManager[None]:
        """Wrap each job that runs in this child: a generator that yields once, or a context manager.

        The code before `yield` runs before the handler, the rest after it; the handler's exception is
        raised at the `yield`. An exception of your own fails the attempt. Plugins wrap in the order
        of the configuration, the first outermost.
        """
        ...

    @hookspec
    def taskd_job_finished(self, ctx: Context, outcome: Outcome) -> None:
        """Hear how a run ended, before taskd has stored it. Called in the child, must not block.

        An exception is logged and changes nothing.
        """
        ...

    @hookspec(firstresult=True)
    def taskd_check(self, options: Mapping[str, object]) -> Sequence[str] | None:
        """Say what would keep the jobs from working, for `taskd doctor`: one sentence for each problem.

        May be `async def`. An exception counts as a problem.
        """
        ...


def seconds(value: Duration) -> float:
    """Return the seconds of a timedelta, of a text like `10s`, or of a number of seconds.

    Raises:
        ValueError: a text of no such form, a negative or endless span, or no number.
    """
    if isinstance(value, timedelta):
        found = value.total_seconds()
    elif isinstance(value, str):
        found = units.duration(value)
    elif type(value) in (int, float):  # a bool is no number
        found = float(value)
    else:
        raise ValueError("a duration is a timedelta, a text like 10s or a number of seconds")
    if not 0 <= found <= units.MAX_DURATION_S:
        raise ValueError("a duration must be 0 to ten years")
    return found


def _bounded(delay_s: float) -> float:
    return min(delay_s, MAX_DELAY_S)


def _above_zero(name: str, value: Duration) -> float:
    found = seconds(value)
    if found == 0:
        raise ValueError(f"{name} must be above 0")
    return found


def _retry(members: Mapping[str, object]) -> Retry:
    plain: dict[str, object] = dict(members)
    for name in ("backoff_base", "backoff_cap"):
        if name in plain:
            plain[name] = seconds(plain[name])  # type: ignore[arg-type]
    if "delays" in plain:
        plain["delays"] = [seconds(delay) for delay in plain["delays"]]  # type: ignore[attr-defined]
    unknown = [name for name in plain if name not in Retry.__struct_fields__]
    if unknown:
        raise ValueError(f"retry has no {unknown[0]!r}, only {', '.join(Retry.__struct_fields__)}")
    try:
        return msgspec.convert(plain, Retry)
    except msgspec.ValidationError as error:
        raise ValueError(f"retry: {error}") from None


def _documented(doc: str | None) -> tuple[str, dict[str, object] | None]:
    """Return the description and the example of a docstring; the example stands after `Example:`."""
    if not doc:
        return "", None
    before, mark, after = f"\n{doc}".partition("\nExample:")
    if not mark:
        return doc.strip(), None
    # The example ends where its JSON ends; sections that follow belong to the description.
    text = after.lstrip()
    try:
        example, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return doc.strip(), None
    if not isinstance(example, dict):
        return doc.strip(), None
    return "\n\n".join(part for part in (before.strip(), text[end:].strip()) if part), example
