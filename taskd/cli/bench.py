"""`taskd bench`: how many jobs a taskd that runs takes in and works off, as a client sees it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from taskd.cli.session import Command, Session
from taskd.cli.submit import span

if TYPE_CHECKING:
    from ssl import SSLContext

KEY_VARIABLE = "TASKD_KEY"
SAMPLE = 200
"""Jobs that are looked at afterwards, evenly out of all: enough for a p99, few beside a rate limit."""
ANSWER_S = 15.0
"""Without an answer for so long a connection is given up."""

_HEAD = re.compile(rb"HTTP/1\.1 (\d\d\d)[^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")
_MEMBER = re.compile(rb"(?im)^(content-length|retry-after|connection): *([^\r\n]+)")


@click.command("bench", cls=Command)
@click.option("--url", metavar="URL", help="The API (default: that of the configuration).")
@click.option(
    "--key-file",
    metavar="FILE",
    help=f"A file with the API key, - for standard input (default: ${KEY_VARIABLE}).",
)
@click.option("-n", "--jobs", default=1000, show_default=True, type=click.IntRange(1, 1_000_000))
@click.option("-c", "--connections", default=8, show_default=True, type=click.IntRange(1, 512))
@click.option("--type", "type_", default="echo", show_default=True, help="The jobs' type.")
@click.option("--payload", default="{}", show_default=True, metavar="JSON", help="Their payload.")
@click.option(
    "--for",
    "limit_s",
    type=span,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up after this; 90 or 5m.",
)
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    url: str | None,
    key_file: str | None,
    jobs: int,
    connections: int,
    type_: str,
    payload: str,
    limit_s: float,
) -> None:
    """Submit jobs to a taskd that runs, and say how fast it took them and worked them off.

    The jobs are real: they stay as any others do, and count against the key's rate limit. What comes out
    is what this client saw from here, network included; to measure taskd itself there is `make bench`.
    Exits with 1 if not all jobs were taken.
    """
    session = ctx.ensure_object(Session)
    if not (math.isfinite(limit_s) and limit_s > 0):
        raise click.UsageError("--for must be above 0")
    target = _target(url or _configured(session), _key(key_file))
    body = json.dumps({"type": type_, "payload": _json(payload)}).encode()
    try:
        found = asyncio.run(measure(target, body, jobs, connections, limit_s))
    except OSError as error:
        raise click.ClickException(f"{target.url}: {error.strerror or error}") from None
    _show(session, found)
    if found["submitted"] < jobs:
        ctx.exit(1)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the API is, and the head of a request up to its path's end."""

    url: str
    host: str
    port: int
    tls: SSLContext | None
    prefix: str
    headers: str

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Return the bytes of a request."""
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self.headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}\r\n".encode() + body


@dataclass(slots=True)
class Answer:
    """One answer."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


@dataclass(slots=True)
class Seen:
    """What the submits brought."""

    ids: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    refusal: str = ""
    """The text of the last answer that was no success."""
    seconds: float = 0.0


class Connection(asyncio.Protocol):
    """A keep-alive connection with at most one request under way; it connects again when it must."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._transport: asyncio.Transport | None = None
        self._data = b""
        self._waiter: asyncio.Future[Answer] | None = None

    async def ask(self, request: bytes, limit_s: float = ANSWER_S) -> Answer:
        """Send a request and return its answer.

        Raises:
            OSError: there is none: no connection, a lost one, or none in time.
        """
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            target = self._target
            await loop.create_connection(lambda: self, target.host, target.port, ssl=target.tls)
        assert self._transport is not None
        self._waiter = loop.create_future()
        timer = loop.call_later(limit_s, self._give_up)
        self._transport.write(request)
        try:
            return await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._data = transport, b""

    def data_received(self, data: bytes) -> None:
        """Hand over the answer when it is whole."""
        self._data += data
        head = _HEAD.match(self._data)
        if head is None or self._waiter is None or self._waiter.done():
            return
        headers = {name.lower(): value for name, value in _MEMBER.findall(head[2])}
        length = int(headers.get(b"content-length", b"0"))
        if len(self._data) < head.end() + length:
            return
        body, self._data = self._data[head.end() : head.end() + length], b""
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        self._waiter.set_result(Answer(int(head[1]), headers, body))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionError("the connection was lost"))

    def _give_up(self) -> None:
        self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(TimeoutError("no answer came in time"))


async def measure(target: Target, body: bytes, jobs: int, connections: int, limit_s: float) -> dict[str, Any]:
    """Submit, wait until the last job has ended or the time is over, and return what was seen.

    Raises:
        OSError: the API can't be reached.
    """
    end = time.monotonic() + limit_s
    lines = [Connection(target) for _ in range(min(connections, jobs))]
    try:
        seen = await _submit(lines, target.request("POST", "/jobs", body), jobs, end)
        found = {
            "submitted": len(seen.ids),
            "seconds": round(seen.seconds, 3),
            "submits_per_s": round(len(seen.ids) / seen.seconds, 1) if seen.seconds else 0.0,
            "submit_p50_ms": quantile_ms(seen.waits_s, 0.5),
            "submit_p99_ms": quantile_ms(seen.waits_s, 0.99),
            "refused": {str(status): n for status, n in sorted(seen.statuses.items()) if status != 200},
            "last_refusal": seen.refusal,
        }
        return found | worked_off(await _look(lines[0], target, seen.ids, end), len(seen.ids))
    finally:
        for line in lines:
            line.close()


async def _submit(lines: Sequence[Connection], request: bytes, jobs: int, end: float) -> Seen:
    seen = Seen()
    left = jobs

    async def work(line: Connection) -> None:
        nonlocal left
        while left > 0 and time.monotonic() < end:
            left -= 1
            began = time.monotonic()
            answer = await line.ask(request)
            seen.statuses[answer.status] += 1
            if answer.status == 200:
                seen.waits_s.append(time.monotonic() - began)
                seen.ids.append(json.loads(answer.body)["job_id"])
                continue
            seen.refusal = _problem(answer)
            left += 1
            if answer.status not in (429, 503):  # the others would be answered the same again
                left = 0
                return
            pause_s = float(answer.headers.get(b"retry-after", b"1"))
            await asyncio.sleep(max(0.0, min(pause_s, end - time.monotonic())))

    began = time.monotonic()
    await asyncio.gather(*(work(line) for line in lines))
    seen.seconds = time.monotonic() - began
    return seen


async def _look(line: Connection, target: Target, ids: Sequence[str], end: float) -> list[Mapping[str, Any]]:
    """Return some of the jobs as they are, evenly out of all, when the last of them has ended."""
    if not ids:
        return []
    while (left := end - time.monotonic()) > 0:
        wait_s = min(left, ANSWER_S - 5)
        answer = await line.ask(target.request("GET", f"/jobs/{ids[-1]}?wait={wait_s:.0f}"))
        if answer.status != 200 or json.loads(answer.body)["finished_at"] is not None:
            break
    step = max(1, math.ceil(len(ids) / SAMPLE))
    jobs = []
    for job in dict.fromkeys([*ids[::step], ids[-1]]):
        answer = await line.ask(target.request("GET", f"/jobs/{job}"))
        if answer.status == 200:
            jobs.append(json.loads(answer.body))
        elif answer.status == 429:
            await asyncio.sleep(min(5.0, float(answer.headers.get(b"retry-after", b"1"))))
    return jobs


def worked_off(jobs: Sequence[Mapping[str, Any]], submitted: int) -> dict[str, Any]:
    """Return what a sample of the jobs, as `GET /jobs/{id}` shows them, says of all.

    Jobs a second is told only when all of the sample have ended.
    """
    starts = [
        (_moment(job["started_at"]) - _moment(job["created_at"])).total_seconds()
        for job in jobs
        if job["started_at"] is not None
    ]
    ends = [_moment(job["finished_at"]) for job in jobs if job["finished_at"] is not None]
    found: dict[str, Any] = {
        "looked_at": len(jobs),
        "ended": len(ends),
        "completed": sum(job["status"] == "completed" for job in jobs),
        "start_p50_ms": quantile_ms(starts, 0.5),
        "start_p99_ms": quantile_ms(starts, 0.99),
        "done_per_s": None,
    }
    if jobs and len(ends) == len(jobs) and len(starts) == len(jobs):
        seconds = (max(ends) - min(_moment(job["started_at"]) for job in jobs)).total_seconds()
        found["done_per_s"] = round(submitted / seconds, 1) if seconds > 0 else None
    return found


def quantile_ms(values: Sequence[float], share: float) -> float | None:
    """Return the value in seconds below which `share` of all lie, in ms.

    >>> quantile_ms([0.003, 0.001, 0.002], 0.5)
    2.0
    """
    if not values:
        return None
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 2)


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _problem(answer: Answer) -> str:
    try:
        return str(json.loads(answer.body)["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status}"


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--payload is no JSON: {error}") from None


def _configured(session: Session) -> str:
    api = session.config().tree.api
    scheme = "http" if api.tls is None else "https"
    return f"{scheme}://{f'[{api.host}]' if ':' in api.host else api.host}:{api.port}"


def _key(file: str | None) -> str:
    """Return the API key: never an argument, which every user of the machine can read.

    Raises:
        click.UsageError: there is none.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "")
    elif file == "-":
        key = sys.stdin.readline()
    else:
        try:
            key = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    key = key.strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise click.UsageError(
            f"give an API key: --key-file FILE, or the environment variable {KEY_VARIABLE}"
        )
    return key


def _target(url: str, key: str) -> Target:
    import ssl

    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
        raise click.UsageError(f"--url {url}: write http://HOST:PORT or https://HOST:PORT")
    secure = parts.scheme == "https"
    headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nX-API-Key: {key}\r\n"
    return Target(
        url=url,
        host=parts.hostname,
        port=port or (443 if secure else 80),
        tls=ssl.create_default_context() if secure else None,
        prefix=parts.path.rstrip("/"),
        headers=headers,
    )


def _show(session: Session, found: Mapping[str, Any]) -> None:
    from taskd.cli import show

    if session.json:
        show.echo_json(found)
        return
    refused = ", ".join(f"{n} x {status}" for status, n in found["refused"].items())
    show.echo_members(
        {
            "submitted": f"{found['submitted']} in {found['seconds']:g} s",
            "submits/s": found["submits_per_s"],
            "submit p50": _ms(found["submit_p50_ms"]),
            "submit p99": _ms(found["submit_p99_ms"]),
            "refused": f"{refused}; the last one: {found['last_refusal']}" if refused else None,
            "looked at": f"{found['looked_at']} jobs, {found['ended']} ended, {found['completed']} completed",
            "start p50": _ms(found["start_p50_ms"]),
            "start p99": _ms(found["start_p99_ms"]),
            "done/s": found["done_per_s"],
        }
    )


def _ms(value: float | None) -> str | None:
    return None if value is None else f"{value:g} ms"
