"""The forms that names, ids and moments may have, each as a full match.

Python's own parsers take far more than taskd means (`uuid.UUID` takes braces and dashes anywhere,
`datetime.fromisoformat` takes dates, naive times and week dates), so a pattern stands in front of each.
Nothing here raises for hostile text: the answer is False, None or a `ValueError` with the reason.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

TYPE = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
PREFIX = re.compile(r"[a-z][a-z0-9]{1,15}")

RESERVED = "taskd."
"""Job types that begin so belong to taskd; no client may submit them."""

MAX_UNIQUE_KEY = 255
MAX_TAG = 64
MAX_KEY_NAME = 100

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
_RECEIPT = "Message of id: "
_INSTANT = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,18}))?"
    r"(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))"
)


def is_type(text: str) -> bool:
    """Whether `text` can be the name of a job type; reserved names can."""
    return TYPE.fullmatch(text) is not None


def is_prefix(text: str) -> bool:
    """Whether `text` can be the prefix of an API key."""
    return PREFIX.fullmatch(text) is not None


def is_unique_key(text: str) -> bool:
    """Whether `text` can be a `unique_key`: 1 to 255 printable characters, a space is one of them."""
    return 0 < len(text) <= MAX_UNIQUE_KEY and text.isprintable()


def is_tag(text: str) -> bool:
    """Whether `text` can be a tag of a job: 1 to 64 printable characters."""
    return 0 < len(text) <= MAX_TAG and text.isprintable()


def is_key_name(text: str) -> bool:
    """Whether `text` can be the name of an API key: 1 to 100 printable characters."""
    return 0 < len(text) <= MAX_KEY_NAME and text.isprintable()


def uuid(text: str) -> UUID | None:
    """Return the UUID that `text` is in its plain 36-character form, upper or lower case; else None."""
    return UUID(text) if len(text) == 36 and _UUID.fullmatch(text) else None


def job_id(text: str) -> UUID | None:
    """Return the id of a job from its plain form or from the documented text `Message of id: U`.

    >>> job_id("Message of id: 018f0000-0000-7000-8000-00000000000a")
    UUID('018f0000-0000-7000-8000-00000000000a')
    """
    return uuid(text.removeprefix(_RECEIPT))


def instant(text: str) -> datetime:
    """Return the moment that an RFC 3339 text names, in UTC, cut to microseconds.

    The offset is required, `T` stands between date and time, hour 24 and second 60 are refused: a
    leap second can't be said in Unix time, and no caller means one.

    Raises:
        ValueError: the text is not of this form or names no moment of the years 1 to 9999; the
            message is meant for the client.

    >>> instant("2026-03-29T02:30:00.5+05:30")
    datetime.datetime(2026, 3, 28, 21, 0, 0, 500000, tzinfo=datetime.timezone.utc)
    """
    match = _INSTANT.fullmatch(text)
    if match is None:
        raise ValueError("must be an RFC 3339 time with an offset, like 2026-01-31T09:00:00Z")
    year, month, day, hour, minute, second = map(int, match.groups()[:6])
    fraction, sign, offset_hours, offset_minutes = match.groups()[6:]
    zone: timezone = UTC
    if sign is not None:
        if int(offset_hours) > 23 or int(offset_minutes) > 59:
            raise ValueError("has an offset that does not exist")
        offset = timedelta(hours=int(offset_hours), minutes=int(offset_minutes))
        zone = timezone(-offset if sign == "-" else offset)
    micro = int((fraction or "0")[:6].ljust(6, "0"))
    try:
        return datetime(year, month, day, hour, minute, second, micro, zone).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("is a moment that does not exist") from None
