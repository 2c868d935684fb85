"""What a service manager does: keeps `taskd api` and `taskd worker` alive, and knows their processes.

Only processes that a unit of this rig started are ever signalled, by their number, found below the unit's
own child at that moment.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from taskd.process.prctl import supervised

ROOT = Path(__file__).resolve().parents[3]
RESTART_S = 1.0
"""Between the death of a daemon and its next start, as RestartSec= of the unit files."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from a later one with the same number by when it started."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        fields = _stat(self.pid)
        return fields is not None and fields[19] == self.started and fields[0] not in "ZX"

    def signal(self, number: int) -> bool:
        """Send a signal if it is still the same process."""
        if not self.alive:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()


def process(pid: int) -> Process | None:
    """Return the process that has this number now."""
    fields = _stat(pid)
    return None if fields is None else Process(pid, fields[19])


def children(pid: int) -> list[Process]:
    """Return the children of a process, the oldest first."""
    found: list[Process | None] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += [process(int(word)) for word in (task / "children").read_text().split()]
    living = [one for one in found if one is not None and one.alive]
    return sorted(living, key=lambda one: (int(one.started), one.pid))


def tree(pid: int) -> Iterator[Process]:
    """Yield a process and all below it."""
    root = process(pid)
    if root is not None:
        yield root
        for child in children(pid):
            yield from tree(child.pid)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one process holds."""

    rss: int
    """Bytes."""
    descriptors: int


def resources(pid: int) -> Resources | None:
    """Return what a process holds now; None when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Resources(pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path(f"/proc/{pid}/fd").iterdir())))
    except (OSError, IndexError):
        return None


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = _stat(pid)
    ticks = int(fields[11]) + int(fields[12]) if fields else 0
    return ticks / os.sysconf("SC_CLK_TCK")


class Unit:
    """One daemon, started again when it ends. Owned by the case; `start` once, `stop` always."""

    def __init__(
        self,
        name: str,
        command: str,
        config: Path,
        log: Path,
        runtime: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`env` comes on top of this process' own."""
        self.name = name
        self.log = log
        self.starts = 0
        self.started_at: list[float] = []
        """Unix times of the starts."""
        self.exits: list[int] = []
        self._argv = [sys.executable, "-m", "taskd", "--config", str(config), command]
        # The rig's death is theirs: nothing may be left behind even when pytest itself is killed.
        own = {"XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT), **(env or {})}
        self._env = supervised({**os.environ, **own})
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending = False
        self._kin: set[Process] = set()

    @property
    def pid(self) -> int:
        """The process id of the daemon (supervisor or API parent)."""
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the daemon lives."""
        return self._process is not None and self._process.returncode is None

    @property
    def main(self) -> Process | None:
        """The daemon itself."""
        return process(self.pid) if self.running else None

    @property
    def children(self) -> list[Process]:
        """The job processes, or the serving processes of an API."""
        return children(self.pid) if self.running else []

    @property
    def processes(self) -> list[Process]:
        """The daemon and all below it."""
        return list(tree(self.pid)) if self.running else []

    def start(self) -> None:
        """Start the daemon, and again whenever it ends."""
        self._ending = False
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while not self._ending:
            with self.log.open("ab") as log:
                self.started_at.append(time.time())
                self._process = await asyncio.create_subprocess_exec(
                    *self._argv,
                    env=self._env,
                    cwd=ROOT,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.starts += 1
            self.exits.append(await self._process.wait())
            if not self._ending:
                await asyncio.sleep(RESTART_S)

    def kill(self, number: int = signal.SIGKILL) -> float:
        """Send a signal to the daemon alone, and return when (Unix time)."""
        main = self.main
        assert main is not None, f"{self.name} is not running"
        self._kin.update(self.processes)
        main.signal(number)
        return time.time()

    def signal_all(self, number: int) -> list[Process]:
        """Send a signal to the daemon and all below it, the daemon first; returns whom."""
        found = self.processes
        self._kin.update(found)
        for one in found:
            one.signal(number)
        return found

    async def end(self, timeout_s: float = 60.0) -> tuple[float, int]:
        """SIGTERM, no restart; returns the seconds until the exit and its status."""
        self._ending = True
        assert self._process is not None
        assert self._task is not None
        self._kin.update(self.processes)
        began = time.monotonic()
        self.kill(signal.SIGTERM)
        async with asyncio.timeout(timeout_s):
            status = await self._process.wait()
        took = time.monotonic() - began
        await self._task
        return took, status

    async def stop(self) -> None:
        """End all of it at once, whatever state it is in."""
        self._ending = True
        if self._task is None:
            return
        self._kin.update(self.processes)
        for one in self._kin:
            one.signal(signal.SIGCONT)
        for one in self._kin:
            one.signal(signal.SIGKILL)
        if not self._task.done():
            if self.running:
                with suppress(TimeoutError):
                    async with asyncio.timeout(10):
                        await asyncio.shield(self._task)
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.running and self._process is not None:  # cancelled between its start and our look
            self._process.kill()
            await self._process.wait()


async def until(
    condition: Callable[[], object], limit_s: float, what: Callable[[], str] | str, *, every_s: float = 0.05
) -> float:
    """Wait until `condition()` is true and return the seconds that took; it may be a coroutine function.

    Raises:
        AssertionError: it did not come true within `limit_s`; `what` tells what should have.
    """
    began = time.monotonic()
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return time.monotonic() - began
        if time.monotonic() - began > limit_s:
            raise AssertionError(f"not within {limit_s:g} s: {what if isinstance(what, str) else what()}")
        await asyncio.sleep(every_s)
