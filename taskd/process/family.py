"""Starts, watches and kills child processes.

A member leads a session and process group of its own, so that a signal reaches it with what it
started, and a terminal's Ctrl-C reaches the supervisor alone. Its end is seen through a pidfd: no
SIGCHLD handler, no polling, and the exit comes with what the kernel counted (`wait4`). When a member
has died, whatever it left behind is killed before its exit is told.

`keeper` starts members again; what they do and say is their caller's business.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from taskd.errors import TaskdError
from taskd.obs.metrics import Metrics
from taskd.process.leftovers import kill_leftovers
from taskd.process.prctl import become_subreaper

LEFTOVERS_S = 1.0
"""Seconds that an exit is held back for leftovers to die; longer means stuck in the kernel."""


class SpawnFailed(TaskdError):
    """A child process could not be started: no such program, or no more processes or memory."""

    code = "spawn_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How to start a member. `env` is all of its environment."""

    name: str
    """What logs call it, `child 3`."""
    argv: Sequence[str]
    env: Mapping[str, str]
    pass_fds: Sequence[int] = ()
    """Descriptors that it inherits under the same numbers (listening sockets); they stay open here."""
    pipe_option: str | None = None
    """When set, it gets one end of a socket pair: this option and the end's number end its `argv`."""
    cwd: str | None = None
    stdin: int = subprocess.DEVNULL
    stdout: int | None = None
    """None: the supervisor's own; likewise `stderr`."""
    stderr: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a member ended: one of `code` and `signal` is set, neither if somebody else reaped it."""

    code: int | None
    signal: int | None
    lived_s: float
    cpu_s: float
    """User and system time, its reaped children included."""
    max_rss: int | None
    """Peak memory in bytes; None if it stayed below the supervisor's own peak at the start, which the
    kernel counts in (exec takes over the mark of the memory it replaces)."""

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by {_signal_name(self.signal)}"
        return "exit status unknown" if self.code is None else f"exit code {self.code}"


class Member:
    """One child process. Made by `Family.spawn`, changed by its family alone."""

    def __init__(
        self,
        spec: Spec,
        process: subprocess.Popen[bytes],
        pipe: socket.socket | None,
        *,
        started_at: float,
        rss_floor: int,
    ) -> None:
        self.name = spec.name
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        """Readable when it is dead; closed, and -1, once `exit` is set."""
        self.pipe = pipe
        """Our end of the socket pair, non-blocking; the caller's to read and to close."""
        self.started_at = started_at
        """By the family's clock, in seconds."""
        self.exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        """Set when it and all it left behind are dead. A task that may be cancelled uses `wait`."""
        self._process = process
        self._rss_floor = rss_floor

    def __repr__(self) -> str:
        return f"<{self.name}, pid {self.pid}>"

    @property
    def alive(self) -> bool:
        """Whether its exit has not been seen yet."""
        return self._process.returncode is None

    def send(self, number: int) -> None:
        """Send a signal to the process alone; nothing happens when it is dead."""
        if self.alive:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to its whole process group; nothing happens when it is dead."""
        if self.alive:  # not reaped, so the number can't belong to another group
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    async def wait(self) -> Exit:
        """Return its exit when it has ended; cancelling the wait does no harm."""
        return await asyncio.shield(self.exit)

    async def stop(self, grace_s: float) -> Exit:
        """Ask it to end with SIGTERM, kill its group after `grace_s` seconds, return its exit."""
        self.send(signal.SIGTERM)
        await asyncio.wait({self.exit}, timeout=grace_s)
        self.kill()
        return await self.wait()


class Family:
    """The children of this process, by process id. One a process, used in its main thread's loop.

    Making one turns the process into a subreaper.
    """

    def __init__(
        self,
        log: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        """`clock` gives seconds that only grow; `metrics` counts respawns."""
        self.log = log
        self.clock = clock
        self.metrics = Metrics() if metrics is None else metrics
        self.members: dict[int, Member] = {}
        self._foreign: set[int] = set()
        become_subreaper()

    async def spawn(self, spec: Spec) -> Member:
        """Start a process and return it once its program runs.

        The loop stands still meanwhile, a millisecond or two (vfork: the supervisor's size is no cost).

        Raises:
            SpawnFailed: it can't be started.
            RuntimeError: called outside the main thread: the death signal of the children would go off
                when that thread ends.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("children are started from the main thread alone")
        try:
            member = self._start(spec)
        except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
            raise SpawnFailed(f"{spec.name}: can't start {spec.argv[0]}: {error}") from error
        self.members[member.pid] = member
        asyncio.get_running_loop().add_reader(member.pidfd, self._died, member)
        self.log.debug("child started", extra={"child": member.name, "pid": member.pid})
        return member

    def spare(self, pid: int) -> None:
        """Never touch nor reap process `pid`, which something else in this process started.

        Only needed for one with a session of its own (a Postgres server); without it the family may take
        its exit status away.
        """
        self._foreign.add(pid)

    async def stop(self, grace_s: float) -> None:
        """Stop all members at once as `Member.stop` does, and wait for them."""
        await asyncio.gather(*(member.stop(grace_s) for member in list(self.members.values())))

    async def kill(self) -> None:
        """Kill all members and wait until they are dead."""
        await self.stop(0)

    def _start(self, spec: Spec) -> Member:
        rss_floor = _peak_memory()
        argv, pass_fds = list(spec.argv), list(spec.pass_fds)
        with ExitStack() as undo, ExitStack() as theirs_too:
            ours = None
            if spec.pipe_option is not None:
                ours, theirs = socket.socketpair()
                undo.callback(ours.close)
                theirs_too.callback(theirs.close)
                ours.setblocking(False)
                argv += [spec.pipe_option, str(theirs.fileno())]
                pass_fds.append(theirs.fileno())
            process = subprocess.Popen(
                argv,
                env=dict(spec.env),
                cwd=spec.cwd,
                pass_fds=pass_fds,
                stdin=spec.stdin,
                stdout=spec.stdout,
                stderr=spec.stderr,
                start_new_session=True,
            )
            undo.callback(process.wait)
            undo.callback(process.kill)  # before the wait: callbacks run from the last to the first
            member = Member(spec, process, ours, started_at=self.clock(), rss_floor=rss_floor)
            undo.pop_all()
        return member

    def _spared(self) -> set[int]:
        return self._foreign | self.members.keys()

    def _died(self, member: Member) -> None:
        asyncio.get_running_loop().remove_reader(member.pidfd)
        member.kill()
        del self.members[member.pid]
        # Before it is reaped: its number is still its own.
        left = kill_leftovers(member.pid, self._spared())
        end = self._reap(member)
        self._await_leftovers(member, end, left, self.clock() + LEFTOVERS_S)

    def _reap(self, member: Member) -> Exit:
        try:
            _, status, usage = os.wait4(member.pid, 0)  # dead already: does not wait
        except ChildProcessError:
            member._process.returncode = 0
            lived_s = self.clock() - member.started_at
            return Exit(code=None, signal=None, lived_s=lived_s, cpu_s=0.0, max_rss=None)
        finally:
            os.close(member.pidfd)
            member.pidfd = -1
        code = os.waitstatus_to_exitcode(status)
        member._process.returncode = code  # Popen must not wait for the number again
        max_rss = usage.ru_maxrss * 1024
        return Exit(
            code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            lived_s=self.clock() - member.started_at,
            cpu_s=usage.ru_utime + usage.ru_stime,
            max_rss=max_rss if max_rss > member._rss_floor else None,
        )

    def _await_leftovers(self, member: Member, end: Exit, left: int | None, until: float) -> None:
        """Tell the exit once nothing is left of the member, or `until` has passed."""
        loop = asyncio.get_running_loop()
        pidfd = -1
        while left is not None and self.clock() < until:
            try:
                pidfd = os.pidfd_open(left)
                break
            except ProcessLookupError:
                left = kill_leftovers(member.pid, self._spared())
            except OSError:  # no descriptor free: it was killed, that must do
                break
        if pidfd < 0:
            if left is not None:
                extra = {"child": member.name, "pid": member.pid, "left": left}
                self.log.warning("child left a process that does not die", extra=extra)
            if not member.exit.done():
                member.exit.set_result(end)
            return

        def look_again() -> None:
            timer.cancel()
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._await_leftovers(member, end, kill_leftovers(member.pid, self._spared()), until)

        timer = loop.call_later(max(0.0, until - self.clock()), look_again)
        loop.add_reader(pidfd, look_again)


def _peak_memory() -> int:
    """Return the most bytes that this process had in memory, and 4 MiB, since the kernel counts roughly."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024 + 4 * 1024 * 1024
    return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have numbers only
        return f"signal {number}"
