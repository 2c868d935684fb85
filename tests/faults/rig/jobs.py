"""A plugin whose jobs write down, outside Postgres, that they ran: the other half of what is checked.

Each run appends a line when it starts and one when it ends, each flushed to disk before the run goes on.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
import uuid
from collections.abc import Mapping, Sequence

from taskd.plugin import Context, JobType, hookimpl, job

_file = ""


class _Line:
    """The lines of one run."""

    def __init__(self, ctx: Context) -> None:
        self._head = f"{ctx.job_id} {ctx.attempt} {os.getpid()} {uuid.uuid4().hex}"

    def write(self, what: str) -> None:
        line = f"{what} {self._head} {time.clock_gettime(time.CLOCK_BOOTTIME):.6f} {time.time():.6f}\n"
        fd = os.open(_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode())
            os.fsync(fd)
        finally:
            os.close(fd)


class Asked(Exception):
    """The payload wants this attempt to fail."""


def _end(line: _Line, ctx: Context, n: int, fails: int) -> dict[str, int]:
    line.write("end")
    if ctx.attempt <= fails:
        raise Asked(f"attempt {ctx.attempt} of number {n}")
    return {"n": n, "attempt": ctx.attempt}


@job("ledger", timeout="2m")
async def ledger(n: int, ms: int = 20, fails: int = 0, *, ctx: Context) -> dict[str, int]:
    """Take `ms` milliseconds; the first `fails` attempts raise."""
    line = _Line(ctx)
    line.write("start")
    await asyncio.sleep(ms / 1000)
    return _end(line, ctx, n, fails)


@job("ledger_sync", timeout="2m")
def ledger_sync(n: int, ms: int = 20, fails: int = 0, *, ctx: Context) -> dict[str, int]:
    """The same in a process of its own."""
    line = _Line(ctx)
    line.write("start")
    time.sleep(ms / 1000)
    return _end(line, ctx, n, fails)


def _die(how: str) -> None:
    if how == "exit":
        os._exit(1)
    if how == "abort":
        os.abort()
    if how == "null":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "descriptors":
        os.closerange(0, 4096)
        time.sleep(60)


@job("killer", timeout="30s", grace="1s")
async def killer(n: int, how: str, *, ctx: Context) -> None:
    """End the process that it shares with other jobs."""
    _Line(ctx).write("start")
    _die(how)


@job("killer_sync", timeout="30s", grace="1s")
def killer_sync(n: int, how: str, *, ctx: Context) -> None:
    """End the process that it has to itself."""
    _Line(ctx).write("start")
    _die(how)


@job("stubborn")
async def stubborn(n: int, *, ctx: Context) -> None:
    """Swallow every wish that it should stop."""
    _Line(ctx).write("start")
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


@job("deaf")
def deaf(n: int, *, ctx: Context) -> None:
    """Block all signals and sleep in C."""
    _Line(ctx).write("start")
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    time.sleep(10**6)


@job("busy", grace="1s")
async def busy(n: int, seconds: float, *, ctx: Context) -> None:
    """Keep the loop that it shares with other jobs from turning."""
    line = _Line(ctx)
    line.write("start")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    line.write("end")


@hookimpl
def taskd_options_schema() -> Mapping[str, object]:
    """The file that runs are written to."""
    return {"type": "object", "properties": {"ledger": {"type": "string"}}, "required": ["ledger"]}


@hookimpl
def taskd_job_types(options: Mapping[str, object]) -> Sequence[JobType]:
    """Declare all of them."""
    global _file
    _file = str(options["ledger"])
    return [ledger, ledger_sync, killer, killer_sync, stubborn, deaf, busy]
