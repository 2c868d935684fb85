"""Real processes, and ways to wait for them that never sleep."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

import taskd
from taskd.process.family import Family, Spec

DEADLINE_S = 20.0
ROOT = str(Path(taskd.__file__).parents[1])

LoopFactories = Mapping[str, Callable[[], asyncio.AbstractEventLoop]]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> LoopFactories:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def family() -> AsyncIterator[Family]:
    family = Family(logging.getLogger("test"))
    yield family
    await family.kill()


class Outlet:
    """A pipe whose writing end a process gets as its stdout; lines are read with a deadline."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self._rest = b""

    def line(self) -> str:
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.read], [], [], DEADLINE_S)
            assert ready, "nothing was written in time"
            data = os.read(self.read, 4096)
            assert data, "closed without a line"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def outlet() -> Iterator[Outlet]:
    outlet = Outlet()
    yield outlet
    outlet.close()


def environ(**more: str) -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": ROOT, **more}


def shell(script: str, **more: object) -> Spec:
    return Spec(name="shell", argv=["/bin/sh", "-c", script], env=environ(), **more)  # type: ignore[arg-type]


def python(script: str, **more: object) -> Spec:
    return Spec(name="python", argv=[sys.executable, "-c", script], env=environ(), **more)  # type: ignore[arg-type]


async def dead(pidfd: int) -> None:
    """Return when the process of `pidfd`, anybody's child, is dead; fail at the deadline."""
    loop = asyncio.get_running_loop()
    seen = asyncio.Event()
    loop.add_reader(pidfd, seen.set)
    try:
        await asyncio.wait_for(seen.wait(), DEADLINE_S)
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat[stat.rindex(")") + 2] != "Z"


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
