"""One process of the API, started by `serve`: Sanic on the sockets that it inherited.

It reads its settings from a pipe, and lives no longer than its parent.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvloop

from taskd.api.lean import leave_out_pages
from taskd.api.settings import BACKLOG, GRACE_S, LINGER_S, SERVING, UNSAFE, ApiSettings
from taskd.api.strikes import Strikes
from taskd.errors import StoreUnavailable
from taskd.obs.log import setup
from taskd.obs.redact import REDACTOR
from taskd.process.prctl import die_with_parent
from taskd.store import nodes
from taskd.store.pool import Link, Pace, Target

if TYPE_CHECKING:
    from taskd.api.app import Door

log = logging.getLogger("taskd.api")

LOOK_S = 0.5
LARGE = 256 * 1024
"""Bytes from which on a block of memory goes back to the system when it is freed: else many large bodies
at once leave a process that stays large. Set by hand, for glibc's own threshold grows with what is freed."""
_M_MMAP_THRESHOLD = -3
"""From malloc.h of glibc."""


async def serve(
    settings: ApiSettings, sockets: Sequence[socket.socket], strikes: int, pipe: socket.socket, *, check: bool
) -> None:
    """Serve on `sockets` until SIGTERM, or until the parent's end of `pipe` closes.

    With `check` a database that would lose accepted jobs is told to the parent, and nothing is served.
    """
    loop = asyncio.get_running_loop()
    if check and (reason := await unsafe(settings)):
        await loop.sock_sendall(pipe, UNSAFE + reason.encode())
        return
    stop = asyncio.Event()
    quick = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: quick.set() if stop.is_set() else stop.set())
    leave_out_pages()
    from taskd.api.app import create_app
    from taskd.api.http1 import DoorProtocol

    app = create_app(settings, Strikes(strikes))
    door: Door = app.ctx.door
    servers: list[Any] = [
        await app.create_server(
            sock=listener,
            protocol=DoorProtocol,
            ssl=_tls(settings),
            backlog=BACKLOG,
            return_asyncio_server=True,
            access_log=False,
            asyncio_server_kwargs={"start_serving": False},
        )
        for listener in sockets
    ]
    first = servers[0]
    await first.startup()
    await first.before_start()
    work = [loop.create_task(chore) for chore in door.chores()]
    for server in servers:
        await server.start_serving()
    await first.after_start()
    guard = loop.create_task(_look(servers, settings.request_timeout_s))
    gc.collect()
    gc.freeze()  # what is there now stays: no collection need look at it again
    gc.set_threshold(20_000, 20, 20)
    await loop.sock_sendall(pipe, SERVING)
    parent = loop.create_task(_watch(pipe, quick, stop))
    await stop.wait()
    await _drain(door, servers, quick)
    for task in (guard, parent, *work):
        task.cancel()
    await first.before_stop()
    await first.after_stop()
    await asyncio.wait_for(app.ctx.links.close(), 2.0)


async def _drain(door: Door, servers: Sequence[Any], quick: asyncio.Event) -> None:
    """Accept no more; answer what has begun, and 503 to what comes on open connections; then close them."""
    loop = asyncio.get_running_loop()
    door.draining_at = began = loop.time()
    for server in servers:
        server.close()
    door.waiting.end()
    while not quick.is_set() and (connections := [c for server in servers for c in server.connections]):
        passed = loop.time() - began
        busy = any(connection.since is not None for connection in connections)
        if passed > GRACE_S or (not busy and passed > LINGER_S):
            break
        await asyncio.sleep(0.05)
    for server in servers:
        for connection in list(server.connections):
            if connection.since is None:
                connection.close()
            else:
                connection.abort()
    await asyncio.sleep(0)


async def _look(servers: Sequence[Any], request_timeout_s: float) -> None:
    """Enforce the deadlines of all connections."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(LOOK_S, request_timeout_s / 2))
        now = loop.time()
        for server in servers:
            for connection in list(server.connections):
                connection.look(now, request_timeout_s)


async def _watch(pipe: socket.socket, quick: asyncio.Event, stop: asyncio.Event) -> None:
    """End with the parent: its end of the pipe closes with it, however it dies."""
    with suppress(OSError):
        await asyncio.get_running_loop().sock_recv(pipe, 1)
    quick.set()
    stop.set()


async def unsafe(settings: ApiSettings, wait_s: float = 2.0) -> str:
    """Return why the database would lose accepted jobs; nothing when it would not, or does not answer."""
    if settings.allow_unsafe:
        return ""
    link = Link(Target(url=settings.database_url, application="taskd api start"), Pace(), deadline_s=wait_s)
    try:
        found = (await link.run(nodes.server_facts)).unsafe()
    except StoreUnavailable as error:
        log.warning("the database does not answer yet", extra={"error": str(error)})
        return ""
    finally:
        await link.close()
    if not found:
        return ""
    return (
        f"the database can lose accepted jobs: {'; '.join(found)}. "
        "Change that, or set database.allow_unsafe: true if losing jobs is all right."
    )


def _tls(settings: ApiSettings) -> ssl.SSLContext | None:
    if settings.tls_certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _read_settings(pipe: socket.socket) -> ApiSettings:
    with pipe.makefile("rb") as stream:
        size = int.from_bytes(stream.read(4), "big")
        return ApiSettings.decode(stream.read(size))


def _give_back_large_blocks() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none, and needs none
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE)


def main(argv: Sequence[str]) -> int:
    """Run one process: what `python -m taskd.api.process` does."""
    fds: list[int] = []
    told = {"--strikes": -1, "--parent": -1, "--pipe": -1}
    check = False
    words = iter(argv)
    for word in words:
        if word == "--check":
            check = True
        elif word == "--fd":
            fds.append(int(next(words)))
        else:
            told[word] = int(next(words))
    die_with_parent(told["--parent"])
    _give_back_large_blocks()
    pipe = socket.socket(fileno=told["--pipe"])
    settings = _read_settings(pipe)
    pipe.setblocking(False)
    REDACTOR.hide(settings.database_url)
    if settings.listen_url is not None:
        REDACTOR.hide(settings.listen_url)
    setup(settings.log_level, settings.log_format, sys.stderr, os.environ)  # type: ignore[arg-type]
    sockets = [socket.socket(fileno=fd) for fd in fds]
    uvloop.run(serve(settings, sockets, told["--strikes"], pipe, check=check))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
