"""The roles that each queue of PyPI plays in the benchmark: see bench/peers/jobs.py.

`python -m bench.programs.QUEUE ROLE ARGUMENTS`: ARGUMENTS is JSON; answers are lines of JSON on stdout.
Moments are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

Payload = dict[str, Any]
Handle = Callable[[Payload], None]


class Producer(Protocol):
    """A client that submits."""

    async def one(self, payload: Payload) -> None:
        """Submit one job in a transaction of its own."""

    async def many(self, payloads: Sequence[Payload]) -> None:
        """Submit many jobs in one call."""


class Queue(Protocol):
    """What a peer brings."""

    async def install(self, url: str) -> None:
        """Make its tables."""

    def produce(self, url: str, connections: int) -> AbstractAsyncContextManager[Producer]:
        """Open a client with that many connections."""

    async def work(self, url: str, handle: Handle) -> None:
        """Run a worker until it is cancelled."""


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def _bulk(
    queue: Queue, *, url: str, count: int, batch: int, connections: int, payload: Payload
) -> None:
    """Insert `count` jobs in batches over some connections; answer the seconds."""
    sizes = iter([min(batch, count - first) for first in range(0, count, batch)])

    async def work(producer: Producer) -> None:
        for size in sizes:
            await producer.many([payload] * size)

    async with queue.produce(url, connections) as producer:
        started = time.monotonic()
        await asyncio.gather(*(work(producer) for _ in range(connections)))
        _say({"seconds": time.monotonic() - started})


async def _submit(
    queue: Queue, *, url: str, count: int, connections: int, pause_ms: int, payload: Payload
) -> None:
    """Insert `count` jobs one by one, each stamped with the moment before; answer the seconds."""
    numbers = iter(range(count))

    async def work(producer: Producer) -> None:
        for _ in numbers:
            await producer.one({**payload, "sent_ns": time.monotonic_ns()})
            if pause_ms:
                await asyncio.sleep(pause_ms / 1000)

    async with queue.produce(url, connections) as producer:
        started = time.monotonic()
        await asyncio.gather(*(work(producer) for _ in range(connections)))
        _say({"seconds": time.monotonic() - started})


class _Seen:
    """What the handlers saw; the worker's event loop owns it."""

    def __init__(self) -> None:
        self.handled = 0
        self.first_ns: int | None = None
        self.last_ns: int | None = None
        self.waits_ns: list[int] = []

    def handle(self, payload: Payload) -> None:
        at = time.monotonic_ns()
        if self.first_ns is None:
            self.first_ns = at
        self.last_ns = at
        self.handled += 1
        if "sent_ns" in payload:
            self.waits_ns.append(at - payload["sent_ns"])


async def _work(queue: Queue, *, url: str) -> None:
    """Run jobs that do nothing from the line `go` on; report on the line `report`; end with SIGTERM."""
    seen = _Seen()
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop.add_reader(sys.stdin.fileno(), lambda: lines.put_nowait(sys.stdin.readline()))
    _say({"ready": True})
    await lines.get()

    async def report() -> None:
        while await lines.get():
            _say(vars(seen))

    tasks = [asyncio.ensure_future(each) for each in (queue.work(url, seen.handle), report(), ended.wait())]
    _say({"working": True})
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=10)
    for task in done:
        task.result()


def main(queue: Queue, run: Callable[[Any], object] = asyncio.run) -> None:
    """Play the role that the command line names; `run` runs the coroutine."""
    role, text = sys.argv[1:]
    arguments = json.loads(text)
    if role == "install":
        run(queue.install(**arguments))
        _say({"installed": True})
    else:
        roles: dict[str, Callable[..., Any]] = {"bulk": _bulk, "submit": _submit, "work": _work}
        run(roles[role](queue, **arguments))
