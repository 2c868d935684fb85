"""A plugin whose jobs write down, outside Postgres, that they ran: the other half of what is checked.

Each run appends a line when it starts and one when it ends, each flushed to disk before the run goes on.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from taskd.plugin import Context, JobType, hookimpl, job

DOWNSTREAM_PER_S = 20
"""Calls a second that the downstream of `caller` allows, all processes together."""
STEP = 16 << 20
"""Bytes that `hoard` and `hoard_shared` take at a time."""

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


@job("noop")
async def noop(n: int = 0) -> None:
    """Do nothing at all, and write nothing down."""


@job("noop_limited")
async def noop_limited(n: int = 0) -> None:
    """The same; a case gives it `max_running`."""


@job("sponge")
async def sponge(n: int, v: str) -> None:
    """Take what is large, and do nothing with it."""


@job("hoard", timeout="60s")
def hoard(n: int, *, ctx: Context) -> None:
    """Take memory of its own without end."""
    _Line(ctx).write("start")
    held: list[bytearray] = []
    while True:
        held.append(bytearray(STEP))


@job("hoard_shared", timeout="60s")
def hoard_shared(n: int, *, ctx: Context) -> None:
    """Take memory without end that no limit of the kernel on private memory sees."""
    _Line(ctx).write("start")
    held: list[mmap.mmap] = []
    while True:
        held.append(mmap.mmap(-1, STEP))
        held[-1].write(b"x" * STEP)


@job("opener", timeout="60s")
def opener(n: int, files: int, *, ctx: Context) -> None:
    """Open many files, and keep them."""
    _Line(ctx).write("start")
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(files)]
    raise Asked(f"all {len(held)} files could be opened")


@job("breeder", timeout="60s")
def breeder(n: int, children: int, mark: str, *, ctx: Context) -> None:
    """Start many processes that outlive it, every second one in a session of its own, and fail."""
    _Line(ctx).write("start")
    for number in range(children):
        subprocess.Popen(["/bin/sleep", mark], start_new_session=number % 2 == 1)
    raise Asked(f"{children} processes are left behind")


@job("leaver", timeout="2m")
def leaver(n: int, mark: str, ms: int, *, ctx: Context) -> None:
    """Start a process that would survive this one, and go on."""
    line = _Line(ctx)
    line.write("start")
    if ctx.attempt == 1:
        subprocess.Popen(["/bin/sleep", mark], start_new_session=True)
        time.sleep(ms / 1000)
    line.write("end")


@job("bulky")
async def bulky(n: int, what: str, size: int, *, ctx: Context) -> str | None:
    """Return, raise or print `size` characters."""
    line = _Line(ctx)
    line.write("start")
    text = "x" * size
    line.write("end")
    if what == "error":
        raise Asked(text)
    if what == "line":
        print(text)
    return text if what == "result" else None


_calls: list[float] = []


@job("caller", timeout="30s")
async def caller(down: str, share: int) -> None:
    """Call a downstream that is down while the file `down` exists, and then allows only so much.

    `share` is how many processes call it: each may make its part of `DOWNSTREAM_PER_S` calls.
    """
    now = time.monotonic()
    while _calls and now - _calls[0] >= 1:
        _calls.pop(0)
    if Path(down).exists() or len(_calls) >= DOWNSTREAM_PER_S / share:
        raise Asked("the downstream refuses")
    _calls.append(now)


@hookimpl
def taskd_options_schema() -> Mapping[str, object]:
    """The file that runs are written to."""
    return {"type": "object", "properties": {"ledger": {"type": "string"}}, "required": ["ledger"]}


@hookimpl
def taskd_job_types(options: Mapping[str, object]) -> Sequence[JobType]:
    """Declare all of them."""
    global _file
    _file = str(options["ledger"])
    plain = [ledger, ledger_sync, noop, noop_limited, sponge, bulky, caller]
    deadly = [killer, killer_sync, hoard, hoard_shared, opener, breeder, leaver]
    return [*plain, *deadly, stubborn, deaf, busy]
