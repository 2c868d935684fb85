"""The child that runs many `async def` jobs at once in one event loop.

Each job is a task of its own: `asyncio.current_task`, context variables and cancelling mean what
authors expect. What costs is paid per pass of the loop and not per job: one read, one write.

A job's `Started` is in the pipe before its handler is called. So a job whose `Started` was not seen has
not run, whatever kills this process.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping

from taskd.child import guard
from taskd.child.outbox import Outbox, frames
from taskd.child.run import Lane, attempt_async, unstarted
from taskd.plugin import Context
from taskd.wire import BrokenFrame, Cancel, Finished, Reader, Start, Started, Stop

_READ = 256 * 1024

_log = logging.getLogger("taskd.child")


class _Run:
    """One job on its way through this child."""

    __slots__ = ("begun", "ctx", "lane", "start", "task")

    def __init__(self, start: Start, lane: Lane, ctx: Context) -> None:
        self.start = start
        self.lane = lane
        self.ctx = ctx
        self.begun = False
        self.task: asyncio.Task[None] | None = None


class LoopChild:
    """The running jobs, those that wait for a slot, and the pipe. Everything happens in the loop's thread."""

    def __init__(self, pipe: socket.socket, reader: Reader, slots: int, log_lines: int) -> None:
        """`pipe` must not block; `reader` has read the setup and may hold the beginning of more."""
        self.outbox = Outbox(log_lines, self._wake)
        self.done = asyncio.Event()
        """Set when the child was told to stop, or has had enough, and its last job has ended."""
        self._pipe = pipe
        self._reader = reader
        self._slots = slots
        self._lanes: Mapping[str, Lane] = {}
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._process = os.getpid()
        self._running: dict[int, _Run] = {}
        self._waiting: deque[Start] = deque()
        self._announced: list[_Run] = []
        self._unsent = b""
        self._pumping = False
        self._stopping = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def begin(self, lanes: Mapping[str, Lane], messages: Iterable[object]) -> None:
        """Take jobs from now on; `messages` came with the setup."""
        self._lanes = lanes
        self._loop.add_reader(self._pipe, self._readable)
        self._take(messages)

    def _readable(self) -> None:
        try:
            data = self._pipe.recv(_READ)
            messages = self._reader.feed(data)
        except BlockingIOError:
            return
        except (OSError, BrokenFrame):
            _log.exception("the pipe to the supervisor is broken")
            guard.die()
        if not data:
            guard.die()  # the supervisor is gone; nobody would hear of these jobs
        self._take(messages)

    def _take(self, messages: Iterable[object]) -> None:
        for message in messages:
            if type(message) is Start:
                self._waiting.append(message)
            elif type(message) is Cancel:
                self._cancel(message)
            elif type(message) is Stop:
                self._stopping = True
        self._pump()

    def _cancel(self, message: Cancel) -> None:
        run = self._running.get(message.run)
        if run is not None:
            self._ask(run, message.reason)
            return
        for start in self._waiting:
            if start.run == message.run:
                self._waiting.remove(start)
                self.outbox.put(_dropped(start))
                return

    def _ask(self, run: _Run, reason: str) -> None:
        if run.ctx._asked is None:
            run.ctx._asked = reason
        if run.begun and run.task is not None:
            run.task.cancel(reason)

    def _pump(self) -> None:
        """Announce what there are slots for, write everything, then start what was announced."""
        self._pumping = False
        first = len(self._announced)
        while self._waiting and (self._stopping or len(self._running) < self._slots):
            self._announce(self._waiting.popleft())
        if len(self._announced) > first:
            self.outbox.put(Started([run.start.run for run in self._announced[first:]]))
        self._write()
        if self._stopping and not self._running and not self._unsent:
            self.done.set()

    def _announce(self, start: Start) -> None:
        lane = self._lanes.get(start.type)
        if self._stopping:
            self.outbox.put(_dropped(start))
        elif lane is None:
            text = f"taskd: this child has no handler for job type {start.type}"
            self.outbox.put(Finished(start.run, "error", False, error=text))
        else:
            run = _Run(start, lane, lane.context(start, self.outbox))
            self._running[start.run] = run
            self._announced.append(run)

    def _write(self) -> None:
        if self._unsent:
            return  # the supervisor does not read; `_writable` goes on when it does
        messages = self.outbox.take()
        if messages:
            self._send(b"".join(frames(messages)))
        if not self._unsent:
            self._launch()

    def _send(self, data: bytes) -> None:
        try:
            sent = self._pipe.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            guard.die()
        if sent < len(data):
            self._unsent = data[sent:]
            self._loop.add_writer(self._pipe, self._writable)

    def _writable(self) -> None:
        data, self._unsent = self._unsent, b""
        self._loop.remove_writer(self._pipe)
        self._send(data)
        if not self._unsent:
            self._pump()

    def _launch(self) -> None:
        if self._announced:
            runs, self._announced = self._announced, []
            for run in runs:
                run.task = self._loop.create_task(self._run(run))
                if run.ctx._ends < self._timer_at:
                    self._set_timer(run.ctx._ends)

    async def _run(self, run: _Run) -> None:
        run.begun = True
        if run.ctx._asked is not None:
            finished = unstarted(run.ctx)
        else:
            finished = await attempt_async(run.lane, run.ctx, run.start.payload)
        if os.getpid() != self._process:
            os._exit(1)  # the handler forked: its copy must not go on with our jobs
        self.outbox.end(finished)
        del self._running[run.start.run]
        if finished.outcome == "error" and exhausted(finished):
            self._stopping = True
        self._pump_soon()

    def _set_timer(self, at: float) -> None:
        # One timer for all jobs: it rings at the earliest time out that may be, and looks.
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_later(max(0.001, at - time.monotonic()), self._time_out)

    def _time_out(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now, earliest = time.monotonic(), math.inf
        for run in self._running.values():
            if run.ctx._asked is None:
                if run.ctx._ends <= now:
                    self._ask(run, "timeout")
                else:
                    earliest = min(earliest, run.ctx._ends)
        if earliest < math.inf:
            self._set_timer(earliest)

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _wake(self) -> None:
        if threading.get_ident() == self._thread:
            self._pump_soon()
        elif not self._pumping:
            self._loop.call_soon_threadsafe(self._pump_soon)


def exhausted(finished: Finished) -> bool:
    """Whether an attempt failed for want of memory or descriptors: its process had better start anew."""
    text = finished.error or ""
    return text.startswith("MemoryError") or f"[Errno {errno.EMFILE}]" in text


def _dropped(start: Start) -> Finished:
    return Finished(start.run, "dropped", False)
