"""Which job is running here, and what is printed meanwhile.

`print`, `warnings` and the loggers of libraries know nothing of jobs. The running job is found through
a context variable (an asyncio task and what it starts inherit it); in a child that runs one job at a
time it is also whoever runs now, so that threads of the handler are heard.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from contextvars import ContextVar

from taskd.plugin import Context

MAX_LINE = 16 * 1024
"""Characters of a printed line; a longer one is cut into several."""

CURRENT: ContextVar[Context | None] = ContextVar("taskd_current_job", default=None)
"""The job whose handler runs in this context."""

_log = logging.getLogger("taskd.child.output")


class Running:
    """Tells which job a line belongs to. `alone` is the one job of a child that runs one at a time."""

    def __init__(self) -> None:
        self.alone: Context | None = None

    def find(self) -> Context | None:
        """Return the job that runs here; None between jobs and in threads that nobody can place."""
        ctx = CURRENT.get() or self.alone
        return ctx if ctx is not None and ctx._open else None


RUNNING = Running()


class Printed(io.TextIOBase):
    """Stands for `sys.stdout` or `sys.stderr`: whole lines go to the job that printed them.

    What no job printed goes to the child's own log, where it can't pass for a line of ours.
    """

    def __init__(self, level: str) -> None:
        super().__init__()
        self.level = level
        self._rest = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """UTF-8; some libraries ask before they print."""
        return "utf-8"

    def writable(self) -> bool:
        """Whether this can be written to: it can."""
        return True

    def write(self, text: str, /) -> int:
        """Take `text`; a line is kept when its end has come."""
        ctx = RUNNING.find()
        if ctx is None:
            self._rest = _cut(self._rest + text, _unplaced)
            return len(text)
        if ctx._partial is None:
            ctx._partial = {}
        rest = ctx._partial.get(self.level, "") + text
        ctx._partial[self.level] = _cut(rest, lambda line: ctx._sink.line(ctx, self.level, line))
        return len(text)


def end_lines(ctx: Context) -> None:
    """Keep what `ctx` has printed without an end of line; called when its handler has ended."""
    for level, rest in (ctx._partial or {}).items():
        if rest:
            ctx._sink.line(ctx, level, rest)


class JobLines(logging.Handler):
    """Keeps warnings of all loggers with the job in which they were made."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep `record` if a job runs here."""
        ctx = RUNNING.find()
        if ctx is not None:
            ctx._sink.line(ctx, record.levelname.lower(), f"{record.name}: {self.format(record)}")


def outside_jobs(record: logging.LogRecord) -> bool:
    """Filter for the child's own log: the lines of jobs are kept with the jobs."""
    return RUNNING.find() is None


def _cut(text: str, keep: Callable[[str], None]) -> str:
    *lines, rest = text.split("\n")
    while len(rest) > MAX_LINE:
        lines.append(rest[:MAX_LINE])
        rest = rest[MAX_LINE:]
    for line in lines:
        keep(line)
    return rest


def _unplaced(line: str) -> None:
    if line:
        _log.info("printed outside of a job", extra={"text": line})
