"""A plugin whose jobs write down, outside Postgres, that they ran: the other half of what is checked.

Each run appends a line when it starts and one when it ends, each flushed to disk before the run goes on.
"""

from __future__ import annotations

import asyncio
import os
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


@hookimpl
def taskd_options_schema() -> Mapping[str, object]:
    """The file that runs are written to."""
    return {"type": "object", "properties": {"ledger": {"type": "string"}}, "required": ["ledger"]}


@hookimpl
def taskd_job_types(options: Mapping[str, object]) -> Sequence[JobType]:
    """Declare both."""
    global _file
    _file = str(options["ledger"])
    return [ledger, ledger_sync]
