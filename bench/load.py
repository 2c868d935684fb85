"""The HTTP load client: keep-alive connections on loopback, in a process of its own.

What is measured is the server, so the client must cost little of the machine that both share: one loop
over epoll, request bytes made beforehand, an answer read by one compiled expression, no event loop and
no task a request. `Outcome.client_us` says what it cost. `python -m bench.load` reads a plan as JSON
and writes the outcome; `start` and `run` call it.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUCK_S = 30.0
"""Without an answer for so long the run is given up."""

NUMBER = "%010d"
"""Stands in a body for the request's number, in as many digits, so that the length stays the same."""

_ANSWER = re.compile(
    rb"HTTP/1\.1 (\d\d\d)[^\r\n]*\r\n(?:[^\r\n]+\r\n)*?[Cc]ontent-[Ll]ength: *(\d+)\r\n(?:[^\r\n]+\r\n)*\r\n"
)
_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send: `count` times the same request over so many connections.

    Each connection sends its next request when the last one was answered. With `rate` requests become due
    at that pace instead, and one that finds no free connection counts its wait from when it was due.
    """

    port: int
    path: str
    body: str
    count: int
    connections: int
    headers: Mapping[str, str] = field(default_factory=dict)
    rate: float | None = None
    """Requests a second; None: as fast as answers come."""
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came back. Times in seconds; `sent` is CLOCK_MONOTONIC, by number of the request."""

    seconds: float
    cpu_s: float
    statuses: dict[int, int]
    """Answers by HTTP status; 0 counts connections that were lost with a request in flight."""
    sent: array[float]
    latencies: array[float]
    """In the order of the requests; NaN for those without an answer."""

    @property
    def answered(self) -> int:
        """Answers with a status below 300."""
        return sum(n for status, n in self.statuses.items() if 200 <= status < 300)

    @property
    def rate(self) -> float:
        """Those a second."""
        return self.answered / self.seconds

    @property
    def client_us(self) -> float:
        """CPU that this client used for a request, in µs."""
        return self.cpu_s / max(1, sum(self.statuses.values())) * 1e6

    def quantile_ms(self, share: float, first: float = 0.0, last: float = 1.0) -> float:
        """Return the latency below which `share` of the requests stayed, in ms.

        `first` and `last` choose requests by their place in the run, as parts of it.
        """
        part = self.latencies[int(first * len(self.latencies)) : int(last * len(self.latencies))]
        ordered = sorted(one for one in part if one == one)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def expect(self, count: int) -> None:
        """Raise RuntimeError unless there are `count` answers, all of them good."""
        if self.statuses != {200: count} and self.answered != count:
            raise RuntimeError(f"answers by status: {self.statuses}, {count} good ones were expected")


class Running:
    """A load client that is under way."""

    def __init__(self, plan: Plan) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.load"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._plan = json.dumps(asdict(plan)).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(self._plan)
        self._process.stdin.close()
        self._process.stdin = None

    def outcome(self, timeout_s: float) -> Outcome:
        """Wait for its end.

        Raises:
            RuntimeError: it failed, or did not end in time.
        """
        try:
            data, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the load client did not end within {timeout_s:.0f} s") from None
        finally:
            self._process.kill()
            self._process.wait()
        if self._process.returncode:
            raise RuntimeError("the load client failed; it wrote why above")
        line, _, rest = data.partition(b"\n")
        head = json.loads(line)
        both: array[float] = array("d")
        both.frombytes(rest)
        half = len(both) // 2
        statuses = {int(status): n for status, n in head["statuses"].items()}
        return Outcome(head["seconds"], head["cpu_s"], statuses, both[:half], both[half:])


def run(plan: Plan, timeout_s: float = 120.0) -> Outcome:
    """Send it all from a process of its own and return what came back."""
    return Running(plan).outcome(timeout_s)


def drive(plan: Plan) -> Outcome:
    """Send it all from here."""
    return _Client(plan).drive()


class _Client:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._next = self._requests()
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._number: dict[int, int] = {}
        """The request that a connection waits for an answer to."""
        self._partial: dict[int, bytes] = {}
        self._statuses: dict[int, int] = {}
        self._sent = array("d", [float("nan")]) * plan.count
        self._latencies = array("d", [float("nan")]) * plan.count

    def drive(self) -> Outcome:
        idle = [self._connect() for _ in range(self._plan.connections)]
        cpu, start = time.process_time(), time.monotonic()
        if self._plan.rate is None:
            self._at_will(idle)
        else:
            self._at_pace(idle, start, self._plan.rate)
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        for one in self._sockets.values():
            one.close()
        return Outcome(seconds, cpu, self._statuses, self._sent, self._latencies)

    def _at_will(self, idle: list[int]) -> None:
        count, number = self._plan.count, 0
        for fd in idle[:count]:
            self._send(fd, number)
            number += 1
        answer, poll, send = self._answer, self._poll.poll, self._send
        done = 0
        while done < count:
            events = poll(STUCK_S)
            if not events:
                raise TimeoutError(f"no answer for {STUCK_S:.0f} s")
            for fd, _ in events:
                free = answer(fd)
                if free is None:
                    continue
                done += 1
                if number < count:
                    send(free, number)
                    number += 1

    def _at_pace(self, idle: list[int], start: float, rate: float) -> None:
        count, number, done = self._plan.count, 0, 0
        heard = start
        while done < count:
            now = time.monotonic()
            # in whole ms, which is what epoll waits in
            while number < count and (due := start + int(number / rate * 1000) / 1000) <= now and idle:
                self._send(idle.pop(), number)
                self._sent[number] = due
                number += 1
            wait_s = max(0.0, due - now) if number < count and idle else STUCK_S
            for fd, _ in self._poll.poll(wait_s):
                heard = time.monotonic()
                free = self._answer(fd)
                if free is not None:
                    done += 1
                    idle.append(free)
            if self._number and time.monotonic() - heard > STUCK_S:
                raise TimeoutError(f"no answer for {STUCK_S:.0f} s")
            heard = max(heard, now) if not self._number else heard

    def _connect(self) -> int:
        one = socket.create_connection(("127.0.0.1", self._plan.port), timeout=STUCK_S)
        one.settimeout(None)  # blocking: Python would poll before each call otherwise
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit = struct.pack("ll", int(STUCK_S), 0)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._sockets[one.fileno()] = one
        self._poll.register(one.fileno(), select.EPOLLIN)
        return one.fileno()

    def _send(self, fd: int, number: int) -> None:
        data = self._next(number)
        self._number[fd] = number
        self._sent[number] = time.monotonic()
        wrote = os.write(fd, data)
        if wrote < len(data):
            self._sockets[fd].sendall(data[wrote:])

    def _answer(self, fd: int) -> int | None:
        """Read what has come; return the connection that is free now, if the answer is whole."""
        try:
            data = os.read(fd, _CHUNK)
        except ConnectionError:
            data = b""
        if not data:
            return self._lost(fd)
        if fd in self._partial:
            data = self._partial.pop(fd) + data
        head = _ANSWER.match(data)
        if head is None or len(data) < head.end() + int(head[2]):
            self._partial[fd] = data
            return None
        now = time.monotonic()
        number = self._number.pop(fd)
        self._latencies[number] = now - self._sent[number]
        status = int(head[1])
        self._statuses[status] = self._statuses.get(status, 0) + 1
        if status != 200 and b"connection: close" in data.lower():
            self._drop(fd)
            return self._connect()
        return fd

    def _lost(self, fd: int) -> int | None:
        self._drop(fd)
        if self._number.pop(fd, None) is None:
            self._connect()
            return None
        self._statuses[0] = self._statuses.get(0, 0) + 1
        return self._connect()

    def _drop(self, fd: int) -> None:
        self._partial.pop(fd, None)
        self._poll.unregister(fd)
        self._sockets.pop(fd).close()

    def _requests(self) -> Callable[[int], bytes]:
        """Return what makes the bytes of request number n."""
        plan = self._plan
        length = len((plan.body % 0).encode() if NUMBER in plan.body else plan.body.encode())
        lines = [f"{plan.method} {plan.path} HTTP/1.1", f"Host: 127.0.0.1:{plan.port}"]
        lines += [f"{name}: {value}" for name, value in plan.headers.items()]
        if length:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        if NUMBER not in plan.body:
            request = head + plan.body.encode()
            return lambda _: request
        before, after = (part.encode() for part in plan.body.split(NUMBER))
        return lambda number: b"%b%b%010d%b" % (head, before, number, after)


def main() -> None:
    """Read a plan, drive it, write the outcome: a line of JSON, then both arrays as doubles."""
    outcome = drive(Plan(**json.load(sys.stdin)))
    line = {"seconds": outcome.seconds, "cpu_s": outcome.cpu_s, "statuses": outcome.statuses}
    out = sys.stdout.buffer
    out.write(json.dumps(line).encode() + b"\n" + outcome.sent.tobytes() + outcome.latencies.tobytes())
    out.flush()


if __name__ == "__main__":
    main()
