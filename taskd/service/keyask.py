"""What an operator asks for with a new API key: every member checked.

The members of `POST /admin/api-keys`, and of the command that makes keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from taskd.errors import FieldProblem, Refused
from taskd.model import names

SCOPES = ("jobs:write", "jobs:read", "jobs:cancel")
DEFAULT_SCOPES = ("jobs:write", "jobs:read")
DEFAULT_PREFIX = "tk"
MAX_DESCRIPTION = 1000
MAX_RATE = 1_000_000


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


def read_key(body: Mapping[str, Any], *, now: datetime) -> KeyAsk:
    """Return what `body`, a parsed JSON object, asks for.

    Raises:
        Refused: 400 with the code of the first problem; `fields` lists every problem.
    """
    codes: list[str] = []
    fields: list[FieldProblem] = []

    def add(code: str, path: str, problem: str) -> None:
        codes.append(code)
        fields.append(FieldProblem(path, problem))

    values: dict[str, Any] = {}
    if "name" not in body:
        add("missing_field", "name", "is required")
    for member, check in _MEMBERS.items():
        if member in body:
            try:
                values.update(check(member, body[member], now))
            except _Wrong as wrong:
                add("invalid_field", wrong.path, str(wrong))
    for member in body:
        if member not in _MEMBERS:
            close = difflib.get_close_matches(member[:64], _MEMBERS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            add("unknown_field", member[:64], f"is no member of a key{hint}")
    if fields:
        raise Refused(codes[0], f"{fields[0].path}: {fields[0].problem}", fields=fields)
    return KeyAsk(**values)


class _Wrong(ValueError):
    def __init__(self, path: str, problem: str) -> None:
        self.path = path
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
    for member in value:
        if member not in ("rate", "burst"):
            raise _Wrong(f"{path}.{member[:64]}", "must not be there: a rate limit has rate and burst")
    rate: Any = value.get("rate")
    burst: Any = value.get("burst")
    if "rate" in value and not (type(rate) in (int, float) and 0 < rate <= MAX_RATE):
        raise _Wrong(f"{path}.rate", f"must be a number of requests a second above 0, at most {MAX_RATE}")
    if "burst" in value and not (type(burst) is int and 1 <= burst <= MAX_RATE):
        raise _Wrong(f"{path}.burst", f"must be a whole number from 1 to {MAX_RATE}")
    return {"rate": rate, "burst": burst}


def _max_pending(path: str, value: Any, now: datetime) -> dict[str, Any]:
    if value is not None and not (type(value) is int and 0 <= value <= 2**31 - 1):
        raise _Wrong(path, "must be a whole number, 0 or more")
    return {path: value}


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
