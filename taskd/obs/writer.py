"""Brings lines to a stream that may be slow, hang, or be gone, without ever holding up who writes them.

A thread of its own does the writing: a reader of stderr that hangs stops neither heartbeats nor
answers; lines beyond a bound are dropped and counted, and the count is told when there is a reader
again.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TextIO

MAX_WAITING = 2 * 1024 * 1024
"""Characters of lines that wait for a slow reader; beyond it lines are dropped."""


class Writer:
    """A bounded queue of lines and the thread that writes them. `write` may be called by any thread."""

    def __init__(self, stream: TextIO, dropped_line: Callable[[int], str]) -> None:
        """`dropped_line` makes the line that tells how many were dropped."""
        self.dropped = 0
        """Lines that were given up since the start."""
        self._stream = stream
        self._dropped_line = dropped_line
        # Written to past the stream's buffer, whose lock would be held by a thread that hangs, and which
        # Python wants to flush at its end; a duplicate, so that the number can't become somebody else's.
        self._fd = _duplicate(stream)
        self._lines: deque[str] = deque()
        self._waiting = 0
        self._told = 0
        self._busy = False
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Queue `line`, without its line break; drop it when too much waits."""
        with self._change:
            if self._closed or self._waiting + len(line) > MAX_WAITING:
                self.dropped += 1
                return
            self._lines.append(line)
            self._waiting += len(line)
            self._change.notify_all()

    def flush(self, wait_s: float) -> bool:
        """Wait up to `wait_s` until all lines are written; says whether they are."""
        with self._change:
            return self._change.wait_for(lambda: not self._lines and not self._busy, wait_s)

    def close(self, wait_s: float) -> None:
        """Flush, then take no more lines and end the thread; the stream stays open."""
        done = self.flush(wait_s)
        with self._change:
            self._closed = True
            self._change.notify_all()
        if done:
            self._thread.join()

    def _work(self) -> None:
        while batch := self._take():
            lost = self.dropped - self._told
            if lost:
                batch.append(self._dropped_line(lost))
            try:
                self._put("\n".join(batch) + "\n")
                self._told += lost
            except (OSError, ValueError):  # nobody reads, or the stream is closed
                with self._change:
                    self.dropped += len(batch) - bool(lost)
        if self._fd is not None:
            os.close(self._fd)

    def _take(self) -> list[str]:
        """Wait for lines and return some; none once the writer is closed and all are written."""
        with self._change:
            self._busy = False
            self._change.notify_all()
            self._change.wait_for(lambda: self._lines or self._closed)
            batch: list[str] = []
            while self._lines and len(batch) < 100:
                batch.append(self._lines.popleft())
                self._waiting -= len(batch[-1])
            self._busy = bool(batch)
            return batch

    def _put(self, text: str) -> None:
        if self._fd is None:
            self._stream.write(text)
            self._stream.flush()
            return
        data = memoryview(text.encode())
        while data:
            data = data[os.write(self._fd, data) :]


def _duplicate(stream: TextIO) -> int | None:
    try:
        return os.dup(stream.fileno())
    except (OSError, ValueError):  # not a file: a StringIO
        return None
