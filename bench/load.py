"""A small HTTP load client: keep-alive connections, bounded, on loopback only.

It writes requests and reads answers on plain sockets, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Outcome:
    """What a run of requests brought: seconds, latencies in seconds, answers by status, job ids."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    job_ids: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers with status 200 a second."""
        return self.statuses.get(200, 0) / self.seconds if self.seconds else 0.0

    def quantile_ms(self, share: float) -> float:
        """Return the latency below which `share` of the requests stayed, in milliseconds."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Connection:
    """One keep-alive connection."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(
        self, method: str, path: str, headers: dict[str, str], body: bytes = b""
    ) -> tuple[int, bytes]:
        """Send one request and return status and body of its answer."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        assert self._reader is not None
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(head.encode() + b"\r\n" + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status = int(answer[9:12])
        lower = answer.lower()
        at = lower.find(b"content-length:")
        length = 0 if at < 0 else int(lower[at + 15 : lower.index(b"\r\n", at)])
        content = await self._reader.readexactly(length) if length else b""
        if b"connection: close" in lower:
            self.close()
        return status, content

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def submit(
    host: str, port: int, key: str, *, jobs: int, connections: int, body: Callable[[int], bytes]
) -> Outcome:
    """Submit `jobs` jobs one by one over `connections` connections; `body` makes the body of number n."""
    outcome = Outcome()
    numbers = iter(range(jobs))
    headers = {"X-API-Key": key}

    async def work() -> None:
        connection = Connection(host, port)
        for number in numbers:
            started = time.perf_counter()
            status, content = await connection.request("POST", "/jobs", headers, body(number))
            outcome.latencies.append(time.perf_counter() - started)
            outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
            if status == 200:
                outcome.job_ids.append(json.loads(content)["job_id"])
        connection.close()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(connections)))
    outcome.seconds = time.perf_counter() - started
    return outcome
