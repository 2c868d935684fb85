"""What a client asks for with `POST /jobs`: every member checked, nothing filled in.

Rules that need no more than the request stand here; what depends on the type (its timeout, its schema,
its defaults) is the service's. `bool` is no number, `null` is no way to leave a member out, and a
member nobody knows is refused: a misspelt option must not be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NoReturn
from uuid import UUID

import msgspec

from taskd.errors import FieldProblem, Refused
from taskd.model import names, payload
from taskd.model.job import NewJob
from taskd.model.jobtype import TypeInfo

YEAR_S = 365 * 86_400
"""How far ahead a job may be due, and how long a timeout or an expiry may be, in seconds."""
MAX_META = 4096
"""Bytes of `meta` as compact JSON."""
MAX_TAGS = 10
MOST_JOBS = 1000
"""Jobs of one bulk."""
UNIQUE_WHILE = ("retained", "unfinished")
HEADER = "Idempotency-Key"


class Submit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One job as asked for; None means that the client left it to the type and the configuration.

    `meta` is compact JSON text. `body_hash` is there when there is a `unique_key`: the digest that
    tells whether a second submit with that key is the same (`payload.body_hash`).
    """

    type: str
    payload: dict[str, Any]
    priority: int | None = None
    delay_s: float | None = None
    run_at: datetime | None = None
    max_attempts: int | None = None
    timeout_s: float | None = None
    expires_in_s: float | None = None
    unique_key: str | None = None
    unique_while: str = "retained"
    tags: Sequence[str] = ()
    meta: str | None = None
    body_hash: bytes | None = None


def read_submit(
    body: Mapping[str, Any], *, now: datetime, header_key: str | None = None, path: str = ""
) -> Submit:
    """Return what `body`, a parsed JSON object, asks for.

    `now` bounds how far ahead `run_at` may lie. `header_key` is the value of the `Idempotency-Key`
    header. `path` stands before each member in problems: `jobs[3].` for the fourth job of a bulk.

    Raises:
        Refused: 400 with the code of the first problem; `fields` lists every problem. What is missing
            comes first, then wrong members, then unknown ones, then those that exclude each other.
    """
    if header_key is None and body.keys() == _PLAIN:  # what most jobs of a bulk are
        type_, given = body["type"], body["payload"]
        if (
            type(given) is dict
            and type(type_) is str
            and names.is_type(type_)
            and not type_.startswith(names.RESERVED)
        ):
            return Submit(type=type_, payload=given)
    problems = _Problems(path)
    for member in ("type", "payload"):
        if member not in body:
            problems.add("missing_field", member, "is required")
    values = problems.read(body, _MEMBERS, now)
    for member in body:
        if member not in _MEMBERS:
            problems.add("unknown_field", member, "is no member of a job" + _did_you_mean(member))
    for one, other in (("delay", "run_at"), ("delay", "scheduled_at"), ("run_at", "scheduled_at")):
        if one in body and other in body:
            problems.add("exclusive_fields", other, f"can't stand beside {one}")
    if header_key is not None:
        if "unique_key" in body:
            problems.add("exclusive_fields", "unique_key", f"can't stand beside the header {HEADER}")
        elif not names.is_unique_key(header_key):
            problems.add("invalid_field", HEADER, _UNIQUE_KEY)
    problems.refuse()

    unique_key = values.get("unique_key", header_key)
    return Submit(
        type=values["type"],
        payload=values["payload"],
        priority=values.get("priority"),
        delay_s=values.get("delay"),
        run_at=values.get("run_at", values.get("scheduled_at")),
        max_attempts=values.get("max_attempts"),
        timeout_s=values.get("timeout"),
        expires_in_s=values.get("expires_in"),
        unique_key=unique_key,
        unique_while=values.get("unique_while", "retained"),
        tags=values.get("tags", ()),
        meta=values.get("meta"),
        body_hash=None if unique_key is None else _body_hash(body, values),
    )


def read_bulk(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the jobs of `body`, the parsed JSON object of a bulk: objects, not looked into yet.

    Raises:
        Refused: 400; there must be 1 to `MOST_JOBS`, and nothing beside them.
    """
    if "jobs" not in body:
        raise Refused.field("missing_field", "jobs", "is required")
    for member in body:
        if member != "jobs":
            raise Refused.field("unknown_field", member[:64], "is no member of a bulk")
    jobs = body["jobs"]
    if type(jobs) is not list or not 1 <= len(jobs) <= MOST_JOBS:
        raise Refused.field("invalid_field", "jobs", f"must be an array of 1 to {MOST_JOBS} jobs")
    for place, job in enumerate(jobs):
        if type(job) is not dict:
            raise Refused.field("invalid_field", f"jobs[{place}]", "must be an object")
    return jobs


def read_retry(body: Mapping[str, Any], *, now: datetime) -> tuple[Mapping[str, Any] | None, datetime | None]:
    """Return the new payload and the new `run_at` of `POST /jobs/{id}/retry`; both are optional.

    Raises:
        Refused: 400, as for `read_submit`.
    """
    problems = _Problems()
    values = problems.read(body, _RETRY_MEMBERS, now)
    for member in body:
        if member not in _RETRY_MEMBERS:
            problems.add("unknown_field", member, "is no member of a retry")
    if "run_at" in body and "scheduled_at" in body:
        problems.add("exclusive_fields", "scheduled_at", "can't stand beside run_at")
    problems.refuse()
    return values.get("payload"), values.get("run_at", values.get("scheduled_at"))


class _Wrong(ValueError):
    """A member can't be accepted; `place` leads to the wrong part inside it."""

    def __init__(self, problem: str, place: str = "") -> None:
        self.place = place
        super().__init__(problem)


_Checks = Mapping[str, Callable[[Any, datetime], Any]]
"""For each member what turns its JSON value, at a time, into the checked one, or raises `ValueError`."""


class _Problems:
    """Collects what is wrong with one body; `path` stands before each member."""

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._code = ""
        self._fields: list[FieldProblem] = []

    def add(self, code: str, member: str, problem: str) -> None:
        self._code = self._code or code
        self._fields.append(FieldProblem(self._path + member[:64], problem))

    def read(self, body: Mapping[str, Any], checks: _Checks, now: datetime) -> dict[str, Any]:
        """Return the checked values of the known members that `body` has and that are right."""
        values: dict[str, Any] = {}
        for member, check in checks.items():
            if member in body:
                try:
                    values[member] = check(body[member], now)
                except _Wrong as wrong:
                    self.add("invalid_field", member + wrong.place, str(wrong))
        return values

    def refuse(self) -> None:
        """Raise `Refused` if there was any problem."""
        if self._fields:
            first = self._fields[0]
            raise Refused(self._code, f"{first.path}: {first.problem}", fields=self._fields)


_UNIQUE_KEY = f"must be 1 to {names.MAX_UNIQUE_KEY} printable characters"


def _type(value: Any, now: datetime) -> str:
    if type(value) is not str or not names.is_type(value):
        raise _Wrong(f"must match ^{names.TYPE.pattern}$")
    if value.startswith(names.RESERVED):
        raise _Wrong(f"names that begin with {names.RESERVED} are reserved")
    return value


def _object(value: Any, now: datetime) -> dict[str, Any]:
    if type(value) is not dict:
        raise _Wrong("must be an object")
    return value


def _whole(low: int, high: int) -> Callable[[Any, datetime], int]:
    def check(value: Any, now: datetime) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise _Wrong(f"must be a whole number from {low} to {high}")

    return check


def _seconds(low: str, fits: Callable[[float], bool]) -> Callable[[Any, datetime], float]:
    def check(value: Any, now: datetime) -> float:
        if (type(value) is float or type(value) is int) and fits(value) and value <= YEAR_S:
            return float(value)
        raise _Wrong(f"must be a number of seconds, {low}, at most {YEAR_S}")

    return check


def _moment(value: Any, now: datetime) -> datetime:
    if type(value) is not str:
        raise _Wrong("must be an RFC 3339 time as text, like 2026-01-31T09:00:00Z")
    try:
        moment = names.instant(value)
    except ValueError as error:
        raise _Wrong(str(error)) from None
    if moment - now > timedelta(seconds=YEAR_S):
        raise _Wrong("is more than 365 days ahead")
    return moment


def _unique_key(value: Any, now: datetime) -> str:
    if type(value) is str and names.is_unique_key(value):
        return value
    raise _Wrong(_UNIQUE_KEY)


def _unique_while(value: Any, now: datetime) -> str:
    if type(value) is str and value in UNIQUE_WHILE:
        return value
    raise _Wrong('must be "retained" or "unfinished"')


def _tags(value: Any, now: datetime) -> tuple[str, ...]:
    if type(value) is not list or len(value) > MAX_TAGS:
        raise _Wrong(f"must be an array of up to {MAX_TAGS} tags")
    for index, tag in enumerate(value):
        if type(tag) is not str or not names.is_tag(tag):
            raise _Wrong(f"must be 1 to {names.MAX_TAG} printable characters", f"[{index}]")
    return tuple(value)


def _meta(value: Any, now: datetime) -> str:
    text = payload.encode(_object(value, now))
    if len(text.encode()) > MAX_META:
        raise _Wrong(f"is larger than {MAX_META} bytes")
    return text


def _notify(value: Any, now: datetime) -> NoReturn:
    raise _Wrong("webhooks are not configured here")


_MEMBERS: _Checks = {
    "type": _type,
    "payload": _object,
    "priority": _whole(-100, 100),
    "delay": _seconds("0 or more", lambda value: value >= 0),
    "run_at": _moment,
    "scheduled_at": _moment,
    "max_attempts": _whole(1, 100),
    "timeout": _seconds("above 0", lambda value: value > 0),
    "expires_in": _seconds("above 0", lambda value: value > 0),
    "unique_key": _unique_key,
    "unique_while": _unique_while,
    "tags": _tags,
    "meta": _meta,
    "notify": _notify,
}
"""The members of a job, in the order in which their problems are told."""

_PLAIN = frozenset({"type", "payload"})

_RETRY_MEMBERS: _Checks = {"payload": _object, "run_at": _moment, "scheduled_at": _moment}

_NOT_COMPARED = frozenset({"type", "payload", "unique_key", "scheduled_at"})


def _body_hash(body: Mapping[str, Any], values: Mapping[str, Any]) -> bytes:
    options = {member: body[member] for member in body if member not in _NOT_COMPARED}
    due = values.get("run_at", values.get("scheduled_at"))
    if due is not None:  # one moment, however it was written and under which of its two names
        options["run_at"] = due.isoformat()
    return payload.body_hash(values["type"], values["payload"], options)


def _did_you_mean(member: str) -> str:
    import difflib  # for people who mistype alone

    close = difflib.get_close_matches(member[:64], _MEMBERS, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def new_job(
    ask: Submit,
    info: TypeInfo,
    text: str,
    *,
    id: UUID,
    client: UUID,
    trace: str | None = None,
    path: str = "",
) -> NewJob:
    """Return the job that `ask` becomes, with the defaults of its type; `text` is the payload as JSON.

    Raises:
        Refused: the timeout is longer than the type allows.
    """
    if ask.timeout_s is not None and ask.timeout_s > info.timeout:
        problem = f"must be at most {info.timeout:g}, that of the type"
        raise Refused.field("invalid_field", f"{path}timeout", problem)
    return NewJob(
        id=id,
        client=client,
        type=ask.type,
        payload=text,
        priority=info.priority if ask.priority is None else ask.priority,
        run_at=ask.run_at,
        delay_s=ask.delay_s,
        max_attempts=info.retry.max_attempts if ask.max_attempts is None else ask.max_attempts,
        timeout_s=ask.timeout_s,
        expires_in_s=ask.expires_in_s,
        unique_key=ask.unique_key,
        unique_while=ask.unique_while,
        body_hash=ask.body_hash,
        tags=ask.tags,
        meta=ask.meta,
        trace=trace,
    )
