"""Makes what a handler returns fit for Postgres.

jsonb refuses U+0000, lone surrogates and numbers without end; what Postgres refuses would make the
*settle* fail, and the job would run for ever. So text inside a result is repaired, and a result that
can't be repaired is refused here, where the job can still be told. Source: FACTS.md M3 and M4.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from taskd.model.payload import MAX_DEPTH

MAX_INTEGER = 1 << 1024
"""Integers stay within a double (309 digits). That is more than the door's 300: jsonb writes 1e308 as
so many digits, and a handler may return the payload that it got."""

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_LONG_DIGITS = re.compile(rb"[0-9]{300}")


class Unstorable(ValueError):
    """A value that Postgres or a reader of it could not take; the message says why."""


def encode(value: object, limit: int) -> bytes:
    """Return `value` as JSON of at most `limit` bytes that Postgres stores and every reader reads back.

    U+0000 and lone surrogates become U+FFFD, NaN and infinities null. Structs, dataclasses, dates and
    what else msgspec knows have their usual form, pydantic models theirs.

    Raises:
        Unstorable: too large, nested deeper than `MAX_DEPTH`, an integer beyond `MAX_INTEGER`, or of a
            type that has no JSON form.
    """
    if value is None:
        return b"null"
    try:
        raw = _encoded(value)
    except RecursionError:
        raise _too_deep() from None
    except (TypeError, ValueError, OverflowError) as error:
        raise Unstorable(str(error)) from error
    _check_size(raw, limit)
    # Counts clear nearly every value; only a suspicion pays for a walk.
    suspect = b"\\u0000" in raw or raw.count(b"[") + raw.count(b"{") > MAX_DEPTH
    if suspect or (len(raw) > 300 and _LONG_DIGITS.search(raw) is not None):
        raw = msgspec.json.encode(_clean(_decoded(raw), 0))
        _check_size(raw, limit)
    return raw


def _encoded(value: object) -> bytes:
    try:
        return msgspec.json.encode(value, enc_hook=_plain)
    except UnicodeEncodeError:
        return msgspec.json.encode(_clean(msgspec.to_builtins(value, enc_hook=_plain, str_keys=True), 0))


def _plain(value: Any) -> object:
    dump = getattr(value, "model_dump", None)
    if dump is None:
        raise TypeError(f"a {type(value).__qualname__} has no JSON form")
    return dump(mode="json")


def _decoded(raw: bytes) -> object:
    try:
        return msgspec.json.decode(raw)
    except RecursionError:
        raise _too_deep() from None
    except msgspec.DecodeError as error:  # an integer beyond what any reader takes
        raise Unstorable(str(error)) from error


def _clean(value: object, depth: int) -> object:
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, int) and not -MAX_INTEGER < value < MAX_INTEGER:
        raise Unstorable("an integer in it is beyond the range of a double")
    if isinstance(value, (dict, list)):
        if depth == MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, dict):
            return {_clean(key, depth): _clean(member, depth + 1) for key, member in value.items()}
        return [_clean(item, depth + 1) for item in value]
    return value


def _check_size(raw: bytes, limit: int) -> None:
    if len(raw) > limit:
        raise Unstorable(f"its {len(raw)} bytes are more than {limit}")


def _too_deep() -> Unstorable:
    return Unstorable(f"it is nested deeper than {MAX_DEPTH} levels")
