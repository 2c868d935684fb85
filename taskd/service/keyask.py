"""What an operator asks for with an API key, new or old: every member checked.

The members of `POST` and `PATCH /admin/api-keys` and of a rotation, and of the commands that do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from taskd.errors import FieldProblem, Refused
from taskd.model import names, units

SCOPES = ("jobs:write", "jobs:read", "jobs:cancel")
DEFAULT_SCOPES = ("jobs:write", "jobs:read")
DEFAULT_PREFIX = "tk"
MAX_DESCRIPTION = 1000
MAX_RATE = 1_000_000
DEFAULT_OVERLAP = timedelta(hours=24)
MAX_OVERLAP = timedelta(days=90)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyAsk:
    """A key as asked for. `client` None makes a client of its own, `types` None means every type;
    `rate` (requests a second), `burst` and `max_pending` None mean the configured default."""

    name: str
    description: str | None = None
    prefix: str = DEFAULT_PREFIX
    client: UUID | None = None
    scopes: tuple[str, ...] = DEFAULT_SCOPES
    types: tuple[str, ...] | None = None
    expires_at: datetime | None = None
    rate: float | None = None
    burst: int | None = None
    max_pending: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateAsk:
    """A rotation as asked for. The old key ends after `overlap`.

    The new one ends at `expires_at` (None: never), or with `keep_span` as far from now as the old one's
    end was from its making.
    """

    overlap: timedelta = DEFAULT_OVERLAP
    expires_at: datetime | None = None
    keep_span: bool = True


def read_key(body: Mapping[str, Any], *, now: datetime) -> KeyAsk:
    """Return what `body`, a parsed JSON object, asks for.

    Raises:
        Refused: 400 with the code of the first problem; `fields` lists every problem.
    """
    return KeyAsk(**_read(body, _MEMBERS, now, required=("name",)))


def read_change(body: Mapping[str, Any], *, now: datetime) -> dict[str, Any]:
    """Return the members of a key that `body` sets, None as well; what it does not name stays.

    `rate_limit` null sets `rate` and `burst` back to the configured default, a member of it that is
    null that one.

    Raises:
        Refused: 400, as for `read_key`.
    """
    return _read(body, _CHANGES, now)


def read_rotate(body: Mapping[str, Any], *, now: datetime) -> RotateAsk:
    """Return what `body` asks for; `{}` is a rotation with the usual overlap.

    Raises:
        Refused: 400, as for `read_key`.
    """
    return RotateAsk(**_read(body, _ROTATION, now))


def _read(
    body: Mapping[str, Any], checks: Mapping[str, _Check], now: datetime, required: Sequence[str] = ()
) -> dict[str, Any]:
    codes: list[str] = []
    fields: list[FieldProblem] = []

    def add(code: str, path: str, problem: str) -> None:
        codes.append(code)
        fields.append(FieldProblem(path, problem))

    values: dict[str, Any] = {}
    for member in required:
        if member not in body:
            add("missing_field", member, "is required")
    for member, check in checks.items():
        if member in body:
            try:
                values.update(check(member, body[member], now))
            except _Wrong as wrong:
                add("invalid_field" if wrong.known else "unknown_field", wrong.path, str(wrong))
    for member in body:
        if member not in checks:
            add("unknown_field", member[:64], _unknown(member, checks))
    if fields:
        raise Refused(codes[0], f"{fields[0].path}: {fields[0].problem}", fields=fields)
    return values


def _unknown(member: str, checks: Mapping[str, _Check]) -> str:
    if member in _MEMBERS:
        return "can't be changed"
    import difflib  # for people who mistype alone

    close = difflib.get_close_matches(member[:64], checks, n=1)
    return "is not known here" + (f"; did you mean {close[0]}?" if close else "")


class _Wrong(ValueError):
    def __init__(self, path: str, problem: str, *, known: bool = True) -> None:
        self.path = path
        self.known = known
        super().__init__(problem)


_Check = Callable[[str, Any, datetime], dict[str, Any]]


def _name(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if type(value) is not str or not names.is_key_name(value):
        raise _Wrong(path, f"must be 1 to {names.MAX_KEY_NAME} printable characters")
    return {path: value}


def _description(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if value is not None and (type(value) is not str or len(value) > MAX_DESCRIPTION):
        raise _Wrong(path, f"must be a text of up to {MAX_DESCRIPTION} characters")
    return {path: value}


def _prefix(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if type(value) is not str or not names.is_prefix(value):
        raise _Wrong(path, f"must match ^{names.PREFIX.pattern}$")
    return {path: value}


def _client(path: str, value: Any, now: datetime) -> dict[str, Any]:
    client = names.uuid(value) if type(value) is str else None
    if client is None:
        raise _Wrong(path, "must be the id of a client")
    return {path: client}


def _scopes(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if type(value) is not list or not value:
        raise _Wrong(path, f"must be an array of scopes: {', '.join(SCOPES)}")
    for index, scope in enumerate(value):
        if type(scope) is not str or scope not in SCOPES:
            raise _Wrong(f"{path}[{index}]", f"must be one of {', '.join(SCOPES)}")
    return {path: tuple(scope for scope in SCOPES if scope in value)}


def _types(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if value is None:
        return {path: None}
    if type(value) is not list or not value or len(value) > 1000:
        raise _Wrong(path, "must be an array of 1 to 1000 job types")
    for index, type_ in enumerate(value):
        if type(type_) is not str or not names.is_type(type_):
            raise _Wrong(f"{path}[{index}]", f"must match ^{names.TYPE.pattern}$")
    return {path: tuple(dict.fromkeys(value))}


def _expires_at(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if value is None:
        return {path: None}
    if type(value) is not str:
        raise _Wrong(path, "must be an RFC 3339 time as text, like 2026-01-31T09:00:00Z")
    try:
        moment = names.instant(value)
    except ValueError as error:
        raise _Wrong(path, str(error)) from None
    if moment <= now:
        raise _Wrong(path, "has passed already")
    return {path: moment}


def _rate_limit(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if type(value) is not dict or not value:
        raise _Wrong(path, "must be an object with rate, burst or both")
    _known(path, value)
    checks: dict[str, Callable[[str, Any], Any]] = {"rate": _rate, "burst": _burst}
    return {member: checks[member](path, value[member]) for member in checks if member in value}


def _new_rate_limit(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if value is None:
        return {"rate": None, "burst": None}
    if type(value) is not dict:
        raise _Wrong(path, "must be an object with rate, burst or both, or null for the default")
    _known(path, value)
    reset: dict[str, Any] = {member: None for member in value if value[member] is None}
    given = {member: value[member] for member in value if member not in reset}
    return (_rate_limit(path, given, now) if given or not reset else {}) | reset


def _known(path: str, value: Mapping[str, Any]) -> None:
    for member in value:
        if member not in ("rate", "burst"):
            raise _Wrong(
                f"{path}.{member[:64]}", "is not known here: a rate limit has rate and burst", known=False
            )


def _rate(path: str, rate: Any) -> float:
    if type(rate) in (int, float) and 0 < rate <= MAX_RATE:
        return float(rate)
    raise _Wrong(f"{path}.rate", f"must be a number of requests a second above 0, at most {MAX_RATE}")


def _burst(path: str, burst: Any) -> int:
    if type(burst) is int and 1 <= burst <= MAX_RATE:
        return burst
    raise _Wrong(f"{path}.burst", f"must be a whole number from 1 to {MAX_RATE}")


def _max_pending(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if value is not None and not (type(value) is int and 0 <= value <= 2**31 - 1):
        raise _Wrong(path, "must be a whole number, 0 or more")
    return {path: value}


def _overlap(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if type(value) is not str:
        raise _Wrong(path, "must be a duration as text, like 24h")
    try:
        overlap = timedelta(seconds=units.duration(value))
    except ValueError as error:
        raise _Wrong(path, str(error)) from None
    if overlap > MAX_OVERLAP:
        raise _Wrong(path, f"must be at most {MAX_OVERLAP.days}d")
    return {path: overlap}


def _new_expires_at(path: str, value: Any, now: datetime) -> dict[str, Any]:
    return _expires_at(path, value, now) | {"keep_span": False}


_MEMBERS: Mapping[str, _Check] = {
    "name": _name,
    "description": _description,
    "prefix": _prefix,
    "client": _client,
    "scopes": _scopes,
    "types": _types,
    "expires_at": _expires_at,
    "rate_limit": _rate_limit,
    "max_pending": _max_pending,
}
"""The members of a key, in the order in which their problems are told."""

_CHANGES: Mapping[str, _Check] = {
    **{member: check for member, check in _MEMBERS.items() if member not in ("prefix", "client")},
    "rate_limit": _new_rate_limit,
}
_ROTATION: Mapping[str, _Check] = {"overlap": _overlap, "expires_at": _new_expires_at}
