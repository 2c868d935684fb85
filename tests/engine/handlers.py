"""Job types for the tests of the daemon: each does one thing to the process that it is in."""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskd.plugin import Fail, JobType, RetryLater, Snooze, hookimpl, job

LOOK_S = 0.005

_kept: list[mmap.mmap] = []


@job("echo")
async def echo(value: Any = None) -> Any:
    """Return what it was given."""
    return {"value": value}


@job("note")
async def note() -> None:
    """Do nothing; lanes of other names run it."""


@job("gate", timeout="60s", grace="0.2s")
async def gate(path: str) -> dict[str, int]:
    """Note its start beside `path`, then wait until that exists."""
    with Path(f"{path}.started").open("a") as file:
        file.write(f"{os.getpid()}\n")
    while not Path(path).exists():
        await asyncio.sleep(LOOK_S)
    return {"pid": os.getpid()}


@job("solo_gate", timeout="60s", grace="0.2s")
def solo_gate(path: str) -> dict[str, int]:
    """Be `gate` in a process of its own."""
    with Path(f"{path}.started").open("a") as file:
        file.write(f"{os.getpid()}\n")
    while not Path(path).exists():
        time.sleep(LOOK_S)
    return {"pid": os.getpid()}


@job("boom")
async def boom(text: str = "boom") -> None:
    """Raise."""
    raise ValueError(text)


@job("outcome")
async def outcome(how: str) -> None:
    """End as its handler asks to."""
    if how == "fail":
        raise Fail("no use")
    if how == "later":
        raise RetryLater(30, "busy")
    raise Snooze(30)


@job("die", timeout="60s")
async def die(code: int = 3, path: str | None = None) -> None:
    """Take the process down, as soon as `path` exists."""
    while path is not None and not Path(path).exists():
        await asyncio.sleep(LOOK_S)
    os._exit(code)


@job("stuck", timeout="0.3s", grace="0.2s")
def stuck() -> None:
    """Sleep in C, deaf to everything."""
    time.sleep(1000)


@job("patient", timeout="0.2s")
async def patient() -> None:
    """Outlast its timeout, and end when it is asked to."""
    await asyncio.sleep(1000)


def _take(size: int) -> None:
    """Hold so many bytes for the life of the process; RLIMIT_DATA does not see them, being shared."""
    _kept.append(mmap.mmap(-1, size))
    _kept[-1].write(b"x" * size)


@job("swell", timeout="60s")
async def swell(path: str, size: int) -> dict[str, int]:
    """Be `gate` in a process that grows by `size` bytes when the gate opens, and stays so large."""
    answer: dict[str, int] = await gate(path)
    _take(size)
    return answer


@job("burst", timeout="60s")
async def burst(path: str) -> None:
    """Take memory without end as soon as `path` exists; it lets others run meanwhile."""
    await gate(path)
    while True:
        _take(8 << 20)
        await asyncio.sleep(0.01)


@job("solo_burst", timeout="60s")
def solo_burst() -> None:
    """Take memory without end."""
    while True:
        _take(8 << 20)


@hookimpl
def taskd_job_types(options: Mapping[str, object]) -> list[JobType]:
    plain = [echo, note, gate, solo_gate, boom, outcome]
    return [*plain, die, stuck, patient, swell, burst, solo_burst]
