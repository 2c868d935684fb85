"""Log lines: one event, one line, as JSON or as text, on a stream that may be dead.

A line is made of what people and plugins sent us, so nothing in it may begin another line, colour a
terminal or turn the reading direction: such characters are escaped. `writer` brings it out.

Source: sd-daemon(3) for the priority prefix, systemd.exec(5) for JOURNAL_STREAM.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, TextIO

from taskd.errors import TaskdError
from taskd.obs.redact import ORDINARY, REDACTOR, RedactFilter, rfc3339
from taskd.obs.writer import Writer

MAX_LINE = 16 * 1024
"""Bytes of a line with its line break; longer values are cut."""

Format = Literal["json", "text"]
Level = Literal["debug", "info", "warning", "error"]

_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_CHATTY = ("asyncio", "httpcore", "httpx", "sanic.access")
"""Loggers of libraries that speak of every request; heard from `warning` on."""

_HEAD = ("time", "level", "event", "logger")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# C0 and C1 controls, delete, line and paragraph separators, direction and invisible marks, lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_BARE = re.compile(r"[\w.:/@+*-]+", re.ASCII)

Fields = dict[str, object]


def setup(level: Level, format: Format, stream: TextIO, environ: Mapping[str, str]) -> LineHandler:
    """Send the records of all loggers to `stream`, redacted; also warnings and uncaught exceptions.

    Replaces what was set up before; call it again for a reload. Text lines for the journal
    ($JOURNAL_STREAM names `stream`) begin with their priority and leave the time to it.
    """
    journal = format == "text" and _is_journal(stream, environ)
    render = render_json if format == "json" else render_journal if journal else render_text
    handler = LineHandler(stream, render)
    handler.addFilter(RedactFilter(REDACTOR))
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old, LineHandler):
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_thread
    return handler


class LineHandler(logging.Handler):
    """Writes each record as one line. Handling a record never waits and never raises."""

    def __init__(self, stream: TextIO, render: Callable[[Fields], str]) -> None:
        """`render` makes the line of a record's fields."""
        super().__init__()
        self.writer = Writer(stream, self._dropped_line)
        self._render = render

    def handle(self, record: logging.LogRecord) -> bool:
        """Filter and queue `record`; one that makes trouble is replaced by a line that says so."""
        try:
            return bool(super().handle(record))
        except Exception as error:  # an edge: whatever the str() of an extra raises must not reach the caller
            event = "log line could not be made"
            fields = {**_head(record), "event": event, "error": type(error).__name__, "line": record.lineno}
            self.writer.write(self._render(fields))
            return True

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line of `record`."""
        self.writer.write(fit(fields_of(record), self._render))

    def flush(self) -> None:
        """Wait up to a second until all lines are written."""
        self.writer.flush(1.0)

    def close(self) -> None:
        """Write what waits, for up to a second, and end the writing thread."""
        self.writer.close(1.0)
        super().close()

    def _dropped_line(self, lines: int) -> str:
        record = logging.makeLogRecord(
            {"name": __name__, "levelname": "WARNING", "msg": "log lines were dropped"}
        )
        return self._render({**_head(record), "lines": lines})


def fields_of(record: logging.LogRecord) -> Fields:
    """Return the members of the line of a filtered record: time, level, event, logger, then the extras.

    An extra with the name of one of the first four gets an underscore behind it. An expected error
    (`TaskdError`) comes with its code and without a traceback.
    """
    fields = _head(record)
    for name, value in record.__dict__.items():
        if name not in ORDINARY and value is not None:
            fields[f"{name}_" if name in _HEAD else name] = value
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, TaskdError):
        fields["code"] = error.code
    elif error is not None:
        fields["traceback"] = record.exc_text
    if record.stack_info:
        fields["stack"] = record.stack_info
    return fields


def safe(text: str) -> str:
    r"""Return `text` with every character that could forge or disturb a line as `\n` or `\uXXXX`.

    What it makes of JSON is the same JSON.
    """
    return _UNSAFE.sub(_escaped, text)


def fit(fields: Fields, render: Callable[[Fields], str]) -> str:
    """Return the line of `fields`, its texts cut until it has at most `MAX_LINE` bytes."""
    for longest in (4096, 1024, 256):
        line = render(fields)
        if len(line.encode()) < MAX_LINE:
            return line
        fields = {name: _cut(value, longest) for name, value in fields.items()}
    line = render(fields)
    if len(line.encode()) < MAX_LINE:
        return line
    return render({**{name: fields[name] for name in _HEAD}, "cut": True})


def render_json(fields: Fields) -> str:
    """Return a JSON object on one line."""
    return safe(json.dumps(fields, ensure_ascii=False, separators=(",", ":")))


def render_text(fields: Fields) -> str:
    """Return `TIME LEVEL LOGGER: EVENT name=value ..` for people."""
    return f"{fields['time']} {_message(fields)}"


def render_journal(fields: Fields) -> str:
    """Return the line for the journal, which knows the time and takes the priority from `<N>`."""
    return f"<{_PRIORITY.get(str(fields['level']), 6)}>{_message(fields)}"


def _message(fields: Fields) -> str:
    facts = (f" {name}={_word(value)}" for name, value in fields.items() if name not in _HEAD)
    return safe(f"{fields['level']} {fields['logger']}: {fields['event']}{''.join(facts)}")


def _head(record: logging.LogRecord) -> Fields:
    return {
        "time": rfc3339(datetime.fromtimestamp(record.created, UTC)),
        "level": record.levelname.lower(),
        "event": str(record.msg),
        "logger": record.name,
    }


def _word(value: object) -> str:
    """Return a value of a text line: bare if it is one plain word, else as JSON."""
    if isinstance(value, str) and _BARE.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _escaped(found: re.Match[str]) -> str:
    char = found[0]
    if "\ud800" <= char <= "\udfff":
        return "\ufffd"  # half a surrogate pair is no text in any encoding
    return _SHORT.get(char, f"\\u{ord(char):04x}")


def _cut(value: object, longest: int) -> object:
    if isinstance(value, str):
        return value if len(value) <= longest else value[:longest] + "…"
    if isinstance(value, dict | list):
        text = json.dumps(value, ensure_ascii=False)
        return value if len(text) <= longest else text[:longest] + "…"
    return value


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("taskd").error("uncaught exception", exc_info=(kind, error, trace))


def _log_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
