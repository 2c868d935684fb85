"""What this child has to tell its supervisor and has not written yet.

Messages gather while the last write is under way; nothing waits on a timer. Log lines and progress
come from handlers at any moment and from any thread; they are bounded here, for each run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from taskd.model.payload import clean_text
from taskd.obs.redact import MASK, REDACTOR
from taskd.plugin import Context
from taskd.wire import Completed, Finished, Log, Progress, frame

MAX_LINE = 16 * 1024
"""Bytes of one line kept with a job; longer ones are cut."""

MAX_FRAME = 256 * 1024
"""Bytes at which a batch is cut: the supervisor holds a whole frame, of each of its children."""

SMALL = 512
"""Bytes of a result that travels beside others; a longer one has a message of its own."""

_LEVELS = frozenset({"debug", "info", "warning", "error", "critical"})


class Outbox:
    """Collects messages; owned by the child, filled by all of its threads, emptied by its writer."""

    def __init__(self, log_lines: int, wake: Callable[[], None]) -> None:
        """`wake` is called when a handler left something to write; `log_lines` is the most for a run."""
        self._messages: deque[msgspec.Struct] = deque()
        self._completed: list[int] = []
        self._results: list[msgspec.Raw] = []
        self._progress: dict[int, Progress] = {}
        self._log_lines = log_lines
        self._wake = wake
        self.put = self._messages.append
        """Add a message of the child itself, whose writer needs no waking."""

    def end(self, finished: Finished) -> None:
        """Add the end of a run; called in the thread that calls `take`."""
        result = finished.result
        if finished.outcome != "completed" or finished.submits or memoryview(result).nbytes > SMALL:
            self.put(finished)
        else:
            self._completed.append(finished.run)
            self._results.append(result)

    def line(self, ctx: Context, level: str, text: str) -> None:
        """Keep a line with the job of `ctx`; beyond the limit one line says that more are dropped."""
        if not ctx._open or ctx._lines > self._log_lines:
            return
        ctx._lines += 1
        if ctx._lines > self._log_lines:
            level, text = "warning", f"taskd: lines after the first {self._log_lines} are dropped"
        level = level if level in _LEVELS else "info"
        self.put(Log(ctx._run, time.time(), level, hidden(ctx, text, MAX_LINE)))
        self._wake()

    def progress(self, ctx: Context, percent: float, message: str) -> None:
        """Keep how far the job of `ctx` is; only the latest is sent."""
        self._progress[ctx._run] = Progress(ctx._run, percent, hidden(ctx, message, 1024))
        self._wake()

    def take(self) -> list[msgspec.Struct]:
        """Return all that waits, progress first and ends last: nothing may follow the end of its run."""
        taken: list[msgspec.Struct] = []
        while self._progress:
            taken.append(self._progress.popitem()[1])
        messages = self._messages
        # Not a swap of the two: another thread may be about to add to the old one.
        taken += [messages.popleft() for _ in range(len(messages))]
        if self._completed:
            taken.append(Completed(self._completed, self._results))
            self._completed, self._results = [], []
        return taken


def frames(messages: list[msgspec.Struct]) -> Iterator[bytes]:
    """Yield `messages` as frames, each at most `MAX_FRAME` bytes unless one message is longer."""
    data = frame(messages)
    if len(data) <= MAX_FRAME or len(messages) == 1:
        yield data
    else:
        most = max(1, len(messages) * MAX_FRAME // len(data))  # so many fit where all are alike
        for first in range(0, len(messages), most):
            yield from frames(messages[first : first + most])


def hidden(ctx: Context, text: str, limit: int) -> str:
    """Return `text` fit to be stored and shown: secrets masked, cut to `limit` bytes at a character."""
    # Cut twice: 50 MB are not searched for secrets, and no half of one is left at the end.
    text = clean_text(text, 2 * limit)
    for secret in ctx._masked:
        text = text.replace(secret, MASK)
    return clean_text(REDACTOR.text(text), limit)
