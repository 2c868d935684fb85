"""A plugin whose handlers do what handlers must not, each in its own way. Run by the tests in children."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from taskd.plugin import Context, Fail, JobType, RetryLater, Secret, Snooze, hookimpl, job

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")


@job("noop")
async def noop() -> None: ...


@job("die")
def die(how: str) -> None:
    """End this process in one of the ways in which processes end."""
    if how == "exit":
        os._exit(3)
    if how == "abort":
        os.abort()
    if how == "null":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "descriptors":
        os.closerange(0, 4096)


@job("die_async")
async def die_async(how: str) -> None:
    await asyncio.sleep(0)
    die(how)


@job("sys_exit")
def sys_exit(code: int) -> None:
    sys.exit(code)


@job("sys_exit_async")
async def sys_exit_async(code: int) -> None:
    sys.exit(code)


@job("interrupt")
async def interrupt() -> None:
    raise KeyboardInterrupt


@job("swallow")
async def swallow() -> None:
    """Ignore every wish to stop, and say so."""
    print("begun")
    for _ in range(2):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            print("swallowed")


@job("wait")
async def wait(*, ctx: Context) -> None:
    ctx.progress(1, "waiting")
    await asyncio.sleep(3600)


@job("wait_and_clean")
async def wait_and_clean(*, ctx: Context) -> None:
    ctx.progress(1, "waiting")
    try:
        await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(0)
        raise RuntimeError("clean-up failed")


@job("finish_anyway")
async def finish_anyway(*, ctx: Context) -> str:
    ctx.progress(1, "waiting")
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        return f"done, {ctx.cancelled}"
    return "never"


@job("cancel_self")
async def cancel_self() -> None:
    raise asyncio.CancelledError


@job("check")
def check(*, ctx: Context) -> None:
    """Poll `ctx.check()` as a long computation does."""
    ctx.progress(1, "checking")
    while True:
        ctx.check()


@job("current_task")
async def current_task() -> bool:
    before = asyncio.current_task()
    async with asyncio.timeout(30):
        await asyncio.sleep(0)
    return before is asyncio.current_task() and before is not None


@job("set_variable")
async def set_variable() -> str:
    found = variable.get()
    variable.set("dirty")
    return found


@job("returns")
async def returns(what: str) -> Any:
    """Return something that is hard to store."""
    deep: Any = 1
    if what in ("deep", "64"):
        for _ in range(5000 if what == "deep" else 64):
            deep = [deep]
        return deep
    if what == "cycle":
        cycle: list[Any] = []
        cycle.append(cycle)
        return cycle
    return {
        "big": "x" * 50_000_000,
        "nul": {"a\0b": "c\0d"},
        "surrogate": ["\ud800", {"\udfff": 1}],
        "nan": [float("nan"), float("inf")],
        "int": 10**5000,
        "int310": 10**310,
        "int308": 10**308,
        "object": object(),
        "struct": Point(1, 2),
        "escaped": "\\u0000",
        "none": None,
    }[what]


@job("raises")
async def raises(what: str) -> None:
    """Fail with something that is hard to show."""
    if what == "long":
        raise ValueError("é" * 25_000_000)
    if what == "nul":
        raise ValueError("a\0b\ud800")
    if what == "unprintable":
        raise Unprintable
    if what == "group":
        raise ExceptionGroup("several", [ValueError("one"), OSError("two")])
    if what == "recursion":
        await raises.run("recursion")
    raise ValueError(what)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


@job("ends")
async def ends(how: str) -> None:
    if how == "retry":
        raise RetryLater("90s", "busy")
    if how == "retry by policy":
        raise RetryLater()
    if how == "fail":
        raise Fail("no such user")
    if how == "coded":
        failure = Fail("refused")
        failure.exit_code = 9
        raise failure
    raise Snooze(2.5)


@job("speaks")
async def speaks(*, ctx: Context) -> None:
    """Speak through every mouth there is."""
    print("printed")
    print("half", end="")
    print("to stderr", file=sys.stderr)
    ctx.log.info("logged %s", "well")
    ctx.log.debug("not kept")
    logging.getLogger("some.library").warning("from a library")
    logging.getLogger("some.library").info("not kept")
    warnings.warn("watch out", stacklevel=1)
    await asyncio.sleep(0)
    print(" a line")
    await asyncio.to_thread(print, "from a thread")
    print("no end of line", end="")


@job("floods")
async def floods(lines: int) -> None:
    for number in range(lines):
        print(number)


@job("long_line")
async def long_line(*, ctx: Context) -> None:
    ctx.log.info("x" * 5_000_000)


@job("late")
async def late(*, ctx: Context) -> None:
    """Go on speaking after the end."""
    asyncio.get_running_loop().call_soon(ctx.log.info, "too late")
    asyncio.get_running_loop().call_soon(print, "too late")


@job("progress")
async def progress(percent: float, *, ctx: Context) -> None:
    ctx.progress(percent, "so far")


@job("progresses")
def progresses(*, ctx: Context) -> None:
    for number in range(100_000):
        ctx.progress(number / 1000, f"step {number}")


@dataclass
class Point:
    x: int
    y: int = 0


class Mail(msgspec.Struct):
    to: str
    password: Annotated[str, Secret]


@job("point")
async def point(where: Point) -> int:
    return where.x + where.y


@job("mail")
async def mail(message: Mail) -> None:
    print(f"sending with {message.password}")
    raise ValueError(f"login failed: {message.password}")


@job("typed")
async def typed(name: str, times: Annotated[int, msgspec.Meta(ge=1)] = 1) -> str:
    return name * times


@job("context")
async def context(*, ctx: Context) -> dict[str, Any]:
    return {
        "job_id": ctx.job_id,
        "type": ctx.type,
        "attempt": ctx.attempt,
        "max_attempts": ctx.max_attempts,
        "key": ctx.idempotency_key,
        "remaining": ctx.remaining(),
        "options": dict(ctx.options),
        "cancelled": ctx.cancelled,
        "deadline": ctx.deadline,
    }


@job("submits")
async def submits(fail: bool = False, *, ctx: Context) -> None:
    ctx.submit("greet", {"name": "Ada"}, priority=5, delay=2)
    ctx.submit("greet", {"name": "Eve"})
    if fail:
        raise ValueError("after all")


@job("allocates")
def allocates() -> None:
    """Take memory without end."""
    held = []
    while True:
        held.append(bytearray(1 << 20))


@job("opens")
def opens() -> None:
    """Take descriptors without end."""
    held = []
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))


@job("leaves_children")
def leaves_children() -> int:
    return subprocess.Popen(["/bin/sleep", "3600"]).pid


@job("forks")
def forks() -> str:
    """Come back twice."""
    return "child" if os.fork() == 0 else "parent"


@job("forks_async")
async def forks_async() -> str:
    return "child" if os.fork() == 0 else "parent"


@job("threads")
def threads() -> None:
    thread = threading.Thread(target=print, args=["from a plain thread"])
    thread.start()
    thread.join()


@job("sync_noop")
def sync_noop() -> None: ...


@job("reads_stdin")
def reads_stdin() -> str:
    return sys.stdin.read()


@job("blocks_signals")
def blocks_signals(*, ctx: Context) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctx.progress(1, "deaf")
    threading.Event().wait()


@job("environment")
def environment() -> dict[str, str]:
    return dict(os.environ)


@hookimpl
def taskd_job_types() -> list[JobType]:
    """All of them."""
    return [value for value in globals().values() if isinstance(value, JobType)]
