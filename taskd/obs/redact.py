"""Keeps secrets out of log lines: known shapes, named members, and values that were registered.

The filter sits on the one handler that `log.setup` installs, where the records of all loggers pass,
the framework's and the plugins' too. It works on values before they are cut or escaped, since half a
secret, or one in another spelling, would not be recognised afterwards.
"""

from __future__ import annotations

import logging
import math
import re
import traceback
from collections.abc import Mapping, Sequence, Set
from datetime import UTC, datetime, timedelta
from itertools import repeat, takewhile
from urllib.parse import quote

MASK = "***"

SHORTEST = 8
"""Characters; a shorter registered value is not masked: it would blot out ordinary words."""

_NAMED = re.compile(
    r"(?i)(?:^|[_.-])(?:(?:proxy[_-])?authorization|(?:x[_-])?api[_-]?key|(?:set[_-])?cookie"
    r"|password|passwd|secret|token|pepper|dsn)$"
)
"""Names of members whose values are secret whatever they look like."""

_HEADER = r"(?i)\b((?:proxy-)?authorization|x-api-key|(?:set-)?cookie)"

# Every repetition that could start at each character is bounded: a log line must not take a second.
_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    # A URL with a password: everything up to the last @ of the word, since people forget to quote one.
    (re.compile(r"(://[^\s/:@\"'<>]{0,256}:)[^\s/\"'<>]{0,1024}@"), rf"\1{MASK}@"),
    # libpq's other form and query strings: password=x, password='x y'.
    (re.compile(r"(?i)((?:password|passwd|pwd)\s*=\s*)(?:'(?:\\.|[^'\\])*'|[^\s'\"&;,)]+)"), rf"\1{MASK}"),
    # Headers: `Cookie: a="b"; c=d` to the end of the line, {'X-API-Key': 'x'} to the quote.
    (re.compile(_HEADER + r"(\s*[:=]\s*)[^\r\n]+"), rf"\1\2{MASK}"),
    (re.compile(_HEADER + r"(\\*[\"']\s*[:,=]\s*b?\\*([\"']))(?:\\.|(?!\3)[^\\\r\n])*"), rf"\1\2{MASK}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {MASK}"),
    # JSON: "password": "x".
    (
        re.compile(
            r"(?i)(\"[^\"\s]{0,64}(?:password|secret|token|api_?key|pepper)\"\s*:\s*\")(?:\\.|[^\"\\])*"
        ),
        rf"\1{MASK}",
    ),
    # API keys; the public id stays readable. One cut short or mistyped is most of a secret too.
    (
        re.compile(
            r"(-(?<=[a-z0-9]-)[0-9A-Za-z]{12})"
            r"(?:[_-][0-9A-Za-z]{16,}(?:[_-][0-9A-Za-z]+)?|[0-9A-Za-z]{43}[_-]?[0-9A-Za-z]{6,})"
        ),
        rf"\1_{MASK}",
    ),
    # Signing secrets of webhooks.
    (re.compile(r"whsec_[A-Za-z0-9+/=_-]{8,}"), f"whsec_{MASK}"),
)

LONGEST = 64 * 1024
"""Characters of one text that a record keeps; far more than a line shows, so that its masking is quick."""

ORDINARY = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
"""What every record has by itself; the rest of it came by `extra`."""


class Redactor:
    """Masks secrets in texts and values. `REDACTOR` is the one of this process."""

    def __init__(self) -> None:
        self._hidden: frozenset[str] = frozenset()
        self._pattern: re.Pattern[str] | None = None

    def hide(self, value: str) -> None:
        """Mask `value` from now on, in every line of it, also where it is quoted for a URL or by `repr`.

        Values (or lines) under `SHORTEST` characters are not masked.
        """
        lines = [line.strip() for line in (value, *value.splitlines())]
        secrets = [line for line in lines if len(line) >= SHORTEST]
        spelled = {form for line in secrets for form in (line, quote(line, safe=""), repr(line)[1:-1])}
        self._hidden |= spelled
        longest_first = sorted(self._hidden, key=len, reverse=True)  # else the part would hide the whole
        if longest_first:
            self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def text(self, text: str) -> str:
        """Return `text` with secrets masked."""
        if self._pattern is not None:
            text = self._pattern.sub(MASK, text)
        for shape, masked in _SHAPES:
            text = shape.sub(masked, text)
        return text

    def value(self, value: object, name: str = "") -> object:
        """Return `value` as JSON data with secrets masked in it; `name` is the member that it is of.

        Moments become RFC 3339 in UTC, spans seconds, what else JSON has no word for text. What is nested
        deeper than 5 levels, or comes after the first `LONGEST` characters, becomes "…".
        """
        return _Copy(self).of(value, name, 5)

    def brief(self, text: str) -> str:
        """Return `text` with secrets masked, and cut when it is longer than `LONGEST`."""
        if len(text) <= LONGEST:
            return self.text(text)
        return self.text(text[:LONGEST])[:-1024]  # the last piece may be half a secret


class _Copy:
    """One masked copy of one value, which may be as big and as odd as a plugin likes."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._room = LONGEST

    def of(self, value: object, name: str, depth: int) -> object:
        self._room -= 1
        if value is None or isinstance(value, bool):
            return value
        if _NAMED.search(name):
            return MASK
        if isinstance(value, int | float | datetime | timedelta):
            return _scalar(value)
        if isinstance(value, bytes | bytearray):
            value = _text(value)
        if isinstance(value, str) or not isinstance(value, Mapping | Sequence | Set):
            return self._text(str(value))
        if depth == 0 or self._room <= 0:
            return "…"
        if isinstance(value, Mapping):
            members = ((str(key), item) for key, item in takewhile(self._fits, value.items()))
            return {self._text(key): self.of(item, key, depth - 1) for key, item in members}
        head = next(iter(value), None)
        pair = len(value) == len(("name", "value")) and isinstance(head, str | bytes)  # may be a header
        names = repeat("") if not pair else ("", _text(head) if isinstance(head, bytes) else str(head))
        items = takewhile(self._fits, value)
        return [self.of(item, name, depth - 1) for item, name in zip(items, names, strict=False)]

    def _fits(self, _: object) -> bool:
        return self._room > 0

    def _text(self, text: str) -> str:
        if self._room <= 0:
            return "…"
        masked = self._redactor.brief(text)
        self._room -= len(masked)
        return masked


class RedactFilter(logging.Filter):
    """Masks secrets in a record: its text, its extras, its traceback (which never has locals)."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record in place and let it pass; its exception's text becomes the extra `error`."""
        record.msg = self._redactor.brief(record.getMessage())
        record.args = None
        if record.exc_info and record.exc_info[1] is not None:
            trace = "".join(traceback.format_exception(record.exc_info[1]))
            record.exc_text = self._redactor.brief(trace.rstrip("\n"))
            record.__dict__["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        if record.stack_info:
            record.stack_info = self._redactor.brief(record.stack_info)
        for name in record.__dict__.keys() - ORDINARY:
            record.__dict__[name] = self._redactor.value(record.__dict__[name], name)
        return True


def rfc3339(at: datetime) -> str:
    """Return `at`, which must be aware, in UTC with milliseconds and a `Z`."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _scalar(value: int | float | datetime | timedelta) -> int | float | str:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        return rfc3339(value) if value.tzinfo else value.isoformat()
    return value if math.isfinite(value) else str(value)


def _text(value: bytes | bytearray) -> str:
    return bytes(value[:LONGEST]).decode("utf-8", "backslashreplace")


REDACTOR = Redactor()
"""Knows the secrets of this process."""

hide = REDACTOR.hide
redact = REDACTOR.text
