"""The child that runs one job at a time in its main thread: plain `def`, or `async def` set apart.

A job here can be killed without touching a neighbour, so nothing in this process has to survive its
handler. A thread of its own reads the pipe, another writes what handlers say while they run; the main
thread writes for itself, one frame a job, with the end of one run and the start of the next.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Iterable, Mapping

import msgspec

from taskd.child import guard
from taskd.child.capture import RUNNING
from taskd.child.loop import exhausted
from taskd.child.outbox import Outbox, frames
from taskd.child.run import Lane, attempt, attempt_async, unstarted
from taskd.plugin import Context
from taskd.wire import BrokenFrame, Cancel, Finished, Reader, Start, Started, Stop

_READ = 256 * 1024

_log = logging.getLogger("taskd.child")


class SoloChild:
    """The one running job, those that wait, and the pipe.

    The main thread owns the running job; the reading thread adds to what waits and asks it to stop.
    """

    def __init__(self, pipe: socket.socket, reader: Reader, runner: asyncio.Runner, log_lines: int) -> None:
        """`pipe` blocks; `reader` has read the setup; `runner` runs what is `async def`."""
        self.outbox = Outbox(log_lines, self._wake)
        self._pipe = pipe
        self._reader = reader
        self._runner = runner
        self._process = os.getpid()
        self._waiting: dict[int, Start] = {}
        self._order: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._current: Context | None = None
        self._task: asyncio.Task[Finished] | None = None
        self._said = threading.Event()
        self._writing = threading.Lock()

    def work(self, lanes: Mapping[str, Lane], messages: Iterable[object]) -> None:
        """Run jobs until told to stop, or until this process should start anew; `messages` came first."""
        self._take(messages)
        threading.Thread(target=self._read, name="pipe reader", daemon=True).start()
        threading.Thread(target=self._write_lines, name="pipe writer", daemon=True).start()
        while True:
            if self._order.empty():
                self._flush()
            number = self._order.get()
            if number is None:
                break
            finished = self._run(lanes, number)
            if finished is not None:
                self.outbox.put(finished)
                if (finished.outcome == "error" and exhausted(finished)) or guard.has_children():
                    break
        self._drop_waiting()
        self._flush()

    def _run(self, lanes: Mapping[str, Lane], number: int) -> Finished | None:
        start = self._waiting.get(number)
        if start is None:
            return None  # dropped by a cancel
        lane = lanes.get(start.type)
        if lane is None:
            self._waiting.pop(number, None)
            text = f"taskd: this child has no handler for job type {start.type}"
            return Finished(number, "error", False, error=text)
        ctx = lane.context(start, self.outbox)
        # First current, then out of the queue: a cancel that finds it in neither can't be.
        self._current = ctx
        if self._waiting.pop(number, None) is None:
            self._current = None
            return None
        self.outbox.put(Started([number]))
        self._flush()
        if ctx._asked is not None:
            self._current = None
            return unstarted(ctx)
        used_s = time.process_time()
        RUNNING.alone = ctx
        if lane.handler.type.is_async:
            finished = self._runner.run(self._attempt(lane, ctx, start), context=contextvars.copy_context())
        else:
            finished = attempt(lane, ctx, start.payload)
        RUNNING.alone = self._current = None
        if os.getpid() != self._process:
            os._exit(1)  # the handler forked: its copy must not go on with our jobs
        if finished.outcome != "completed":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return msgspec.structs.replace(finished, cpu_s=time.process_time() - used_s, max_rss=peak)
        return finished

    async def _attempt(self, lane: Lane, ctx: Context, start: Start) -> Finished:
        self._task = asyncio.current_task()
        try:
            return unstarted(ctx) if ctx._asked else await attempt_async(lane, ctx, start.payload)
        finally:
            self._task = None

    def _read(self) -> None:
        try:
            while data := self._pipe.recv(_READ):
                self._take(self._reader.feed(data))
        except (OSError, BrokenFrame):
            _log.exception("the pipe to the supervisor is broken")
        guard.die()  # the supervisor is gone; nobody would hear of this job

    def _take(self, messages: Iterable[object]) -> None:
        for message in messages:
            if type(message) is Start:
                self._waiting[message.run] = message
                self._order.put(message.run)
            elif type(message) is Cancel:
                self._cancel(message)
            elif type(message) is Stop:
                self._drop_waiting()
                self._order.put(None)

    def _cancel(self, message: Cancel) -> None:
        if self._waiting.pop(message.run, None) is not None:
            self._say_dropped(message.run)
            return
        ctx = self._current
        if ctx is None or ctx._run != message.run:
            return
        if ctx._asked is None:
            ctx._asked = message.reason
        # First asked, then a look for the task; `_attempt` does the reverse, so one sees the other.
        task = self._task
        if task is not None:
            self._runner.get_loop().call_soon_threadsafe(task.cancel, message.reason)

    def _drop_waiting(self) -> None:
        for number in list(self._waiting):
            if self._waiting.pop(number, None) is not None:
                self._say_dropped(number)

    def _say_dropped(self, number: int) -> None:
        self.outbox.put(Finished(number, "dropped", False))
        self._wake()

    def _wake(self) -> None:
        self._said.set()

    def _write_lines(self) -> None:
        while True:
            self._said.wait()
            self._said.clear()
            self._flush()

    def _flush(self) -> None:
        try:
            with self._writing:
                for data in frames(messages) if (messages := self.outbox.take()) else ():
                    self._pipe.sendall(data)
        except OSError:
            guard.die()
