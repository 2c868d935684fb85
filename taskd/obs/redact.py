"""Keeps secrets out of log lines: known shapes, named members, and values that were registered.

The filter sits on the one handler that `log.setup` installs, where the records of all loggers pass,
the framework's and the plugins' too. It works on values before they are cut or escaped, since half a
secret, or one in another spelling, would not be recognised afterwards.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Mapping, Sequence, Set
from datetime import datetime, timedelta
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
    (
        re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s/:@\"'<>]{0,256}:)[^\s/\"'<>]{0,1024}@"),
        rf"\1{MASK}@",
    ),
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
    # API keys; the public id stays readable. One cut short or mistyped is still most of a secret.
    (
        re.compile(
            r"([a-z][a-z0-9]{1,15}-[0-9A-Za-z]{12})"
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

    def value(self, value: object, name: str = "", depth: int = 6) -> object:
        """Return `value` with secrets masked in it, as plain data; `name` is the member that it is of.

        Numbers, booleans, times and None stay; what else is no container becomes text. Below `depth`
        levels all is text.
        """
        if value is None:
            return None
        if _NAMED.search(name):
            return MASK
        if isinstance(value, bool | int | float | datetime | timedelta):
            return value
        if isinstance(value, bytes | bytearray):
            value = bytes(value[:LONGEST]).decode("utf-8", "backslashreplace")
        if isinstance(value, str) or depth == 0:
            return self.brief(str(value))
        if isinstance(value, Mapping):
            members = ((str(key), item) for key, item in value.items())
            return {self.brief(key): self.value(item, key, depth - 1) for key, item in members}
        if isinstance(value, Sequence | Set):
            items = list(value)
            if len(items) == 2 and isinstance(items[0], str | bytes):  # may be a header: (name, value)
                head = items[0] if isinstance(items[0], str) else items[0].decode("latin-1")
                return [self.value(head, name, depth - 1), self.value(items[1], head, depth - 1)]
            return [self.value(item, name, depth - 1) for item in items]
        return self.brief(str(value))

    def brief(self, text: str) -> str:
        """Return `text` with secrets masked, and cut when it is longer than `LONGEST`."""
        if len(text) <= LONGEST:
            return self.text(text)
        return self.text(text[:LONGEST])[:-1024]  # the last piece may be half a secret


class RedactFilter(logging.Filter):
    """Masks secrets in a record: its text, its extras, its traceback (which never has locals)."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record in place and let it pass."""
        record.msg = self._redactor.brief(record.getMessage())
        record.args = None
        if record.exc_info and record.exc_info[1] is not None:
            trace = "".join(traceback.format_exception(record.exc_info[1]))
            record.exc_text = self._redactor.brief(trace.rstrip("\n"))
        if record.stack_info:
            record.stack_info = self._redactor.text(record.stack_info)
        for name in record.__dict__.keys() - ORDINARY:
            record.__dict__[name] = self._redactor.value(record.__dict__[name], name)
        return True


REDACTOR = Redactor()
"""Knows the secrets of this process."""

hide = REDACTOR.hide
redact = REDACTOR.text
