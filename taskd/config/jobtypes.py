"""`job_types:` - what the file says about a job type, over what its author declared.

None means that the file says nothing and the author's value stands, or taskd's default.
"""

# ruff: noqa: RUF009 - key() returns a dataclass field

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from taskd.config import checks
from taskd.config.keys import key
from taskd.config.units import Rate, Size

COMMAND_KEYS = ("params", "success_codes", "no_retry_codes", "env", "cwd")
"""Keys that mean nothing without `command`."""

PARAM_TYPES = ("string", "integer", "number", "boolean")
"""What a parameter's JSON Schema may say it is: values that are one argument."""

# As the handler of commands reads arguments: {name} is a parameter's place, {{name}} the text {name}; other
# braces are themselves.
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_PLACE = re.compile(rf"\{{\{{({_NAME})\}}\}}|\{{({_NAME})\}}")

_TEMPFAIL = 75  # EX_TEMPFAIL of sysexits.h: the command asks for a retry


def _param_name(text: str) -> str | None:
    if re.fullmatch(_NAME, text):
        return None
    return "must be a parameter's name: a letter or _, then letters, digits and _"


def _variable(text: str) -> str | None:
    if re.fullmatch(_NAME, text):
        return None
    return "must be the name of an environment variable: letters, digits and _"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryOverride:
    """`job_types.NAME.retry:` - when a failed attempt of this type runs again."""

    max_attempts: int | None = key(None, min=1, max=100, example="3")
    """Runs of a job before it is failed for good."""
    backoff: Literal["fixed", "linear", "exponential"] | None = key(None, example="exponential")
    """How the wait grows with each failure."""
    backoff_base: timedelta | None = key(None, min="1ms", max="7d", example="2s")
    """The wait after the first failure."""
    backoff_cap: timedelta | None = key(None, min="1ms", max="30d", example="1h")
    """The longest wait."""
    jitter: Literal["full", "none"] | None = key(None, example="full")
    """Full: each wait is drawn evenly between zero and the curve; none: the curve itself."""
    delays: tuple[timedelta, ...] | None = key(None, min="0s", max="30d", example="[10s, 1m, 10m]")
    """The waits themselves in place of the curve; the last one repeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTypeOverride:
    """`job_types.NAME:` - limits and policy of one job type, or a command that is one."""

    description: str | None = key(None, example="Makes a picture smaller")
    """What people read about it in GET /types."""
    handler: str | None = key(None, check=checks.type_name, example="send_email")
    """The job type whose code runs, so that one handler serves two lanes."""
    command: tuple[str, ...] | None = key(None, example='[/usr/bin/convert, "{file}", out.png]')
    """A program and its arguments, no shell; {name} is a parameter."""
    params: Mapping[str, Any] | None = key(None, name_check=_param_name, example='{file: "[a-z0-9]+[.]png"}')
    """For each parameter of the command a pattern that must match all of it, or a JSON Schema."""
    success_codes: tuple[int, ...] | None = key(None, min=0, max=255, example="[0]")
    """Exit codes of the command that mean completed."""
    no_retry_codes: tuple[int, ...] | None = key(None, min=1, max=255, example="[64, 65]")
    """Exit codes of the command that mean failed for good."""
    env: Mapping[str, str] | None = key(None, name_check=_variable, empty=True, example="{TZ: UTC}")
    """Environment of the command beside PATH, HOME, LANG and the like."""
    cwd: Path | None = key(None, check=checks.absolute_path, example="/var/lib/taskd/work")
    """Where the command runs."""
    http: Mapping[str, Any] | None = key(None, example="{url: https://example.org/hook, method: POST}")
    """An HTTP call in place of code; comes with a later version."""
    enabled: bool | None = key(None, example="true")
    """False: this node does not run it."""
    pool: str | None = key(None, example="default")
    """The pool whose processes run it."""
    concurrency: int | None = key(None, min=1, max=10_000, example="4")
    """Jobs at once on this node."""
    max_running: int | None = key(None, min=1, max=1_000_000, example="10")
    """Jobs at once over all nodes."""
    rate: Rate | None = key(None, example='"100/m"')
    """Starts a second over all nodes: 10, or "2/s", "100/m"."""
    rate_burst: int | None = key(None, min=1, max=1_000_000, example="1")
    """Starts that may come at once."""
    timeout: timedelta | None = key(None, min="100ms", max="30d", example="5m")
    """How long one run may take."""
    grace: timedelta | None = key(None, min="0s", max="10m", example="5s")
    """Between asking a run to stop and killing it."""
    priority: int | None = key(None, min=-100, max=100, example="0")
    """Of jobs submitted without one; higher runs first."""
    retry: RetryOverride | None = key(None)
    """When a failed attempt runs again."""
    restartable: bool | None = key(None, example="true")
    """False: never run twice after its process or node was lost."""
    max_backlog: int | None = key(None, min=1, max=1_000_000_000, example="1000000")
    """Waiting jobs beyond which submits are refused."""
    retention: timedelta | None = key(None, min="1m", max="3650d", example="7d")
    """How long finished jobs of this type are kept."""
    isolation: Literal["async", "process"] | None = key(None, example="process")
    """Async: shares a process with other jobs; process: has one of its own."""
    max_memory: Size | None = key(None, min="16MiB", max="1024GiB", example="512MiB")
    """Memory of one run's process."""
    options: Mapping[str, Any] | None = key(None, empty=True, example="{}")
    """What the handler finds in ctx.options."""


def job_type_problems(entry: JobTypeOverride) -> Iterator[tuple[str, str]]:
    """Yield what is wrong between the keys of one job type, as (path inside it, message)."""
    given = [name for name in ("handler", "command", "http") if getattr(entry, name) is not None]
    if len(given) > 1:
        yield (
            given[1],
            f"only one of handler, command and http can be a job type's code; {given[0]} is set too",
        )
    if entry.command is None:
        for name in COMMAND_KEYS:
            if getattr(entry, name) is not None:
                yield name, "means something only beside command, for a job type that is a program"
    else:
        yield from _command_problems(entry.command, entry.params or {})
    yield from _code_problems(entry)
    retry = entry.retry
    if retry and retry.backoff_base and retry.backoff_cap and retry.backoff_cap < retry.backoff_base:
        yield "retry.backoff_cap", "is less than retry.backoff_base of this type; raise it, or lower the base"


def _command_problems(command: tuple[str, ...], params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not command[0].startswith("/"):
        yield "command[0]", "must be the absolute path of the program: begin with /"
    elif _PLACE.search(command[0]):
        yield "command[0]", "must be the program's fixed path: a parameter must not choose the program"
    for index, argument in enumerate(command[1:], start=1):
        for place in _PLACE.finditer(argument):
            where, name = f"command[{index}]", place[2]
            if name is None:
                continue
            if name not in params:
                yield (
                    where,
                    f"uses the parameter {name}, which is unknown: add it to params, or double its braces",
                )
            elif argument.startswith("-") and "=" not in argument[: place.start()]:
                yield (
                    where,
                    "has a parameter in an option's name: put = before it, or make it an argument alone",
                )


def _code_problems(entry: JobTypeOverride) -> Iterator[tuple[str, str]]:
    both = set(entry.success_codes or (0,)) & set(entry.no_retry_codes or ())
    if both:
        yield "no_retry_codes", f"has {min(both)}, which is one of success_codes too"
    elif _TEMPFAIL in (entry.no_retry_codes or ()):
        yield "no_retry_codes", f"has {_TEMPFAIL}, which always means retry (EX_TEMPFAIL)"
