"""The processes of the API: a parent that binds and watches, children that serve.

The parent opens no connection of clients; it binds, starts `python -m taskd.api.serve --fd N` for each
worker, hands each its settings over a pipe (so no secret is ever an argument or in an environment), and
starts them again when they end. A child serves Sanic on the socket that it inherited.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvloop

from taskd.api.app import Door, create_app
from taskd.api.http1 import DoorProtocol
from taskd.api.settings import ApiSettings, settings_of
from taskd.api.strikes import Strikes, make_table
from taskd.errors import StoreUnavailable, TaskdError, UnsafeDatabase
from taskd.obs.log import setup
from taskd.obs.redact import REDACTOR
from taskd.process.environment import NODE_VARIABLE, child_env
from taskd.process.family import Family, Member, Spec
from taskd.process.keeper import Keeper
from taskd.process.prctl import die_with_parent
from taskd.process.sdnotify import Notifier
from taskd.process.signals import Signals
from taskd.store import nodes
from taskd.store.pool import Link, Pace, Target

if TYPE_CHECKING:
    from taskd.config.read import Config

log = logging.getLogger("taskd.api")

BACKLOG = 1024
LINGER_S = 3.0
"""How long open connections are still answered (503) in a drain when nothing else holds it up."""
GRACE_S = 20.0
"""How long requests that have begun may take in a drain."""
LOOK_S = 0.5


class CannotListen(TaskdError):
    """The address can't be listened on: it is taken, or not this machine's."""

    code = "cannot_listen"


def bind(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on every address `host` stands for; port 0 is any free one, for all alike.

    Raises:
        CannotListen: one of them can't be had.
    """
    sockets: list[socket.socket] = []
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(infos):
            listener = socket.socket(family, kind, protocol)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            at = (address[0], port or sockets[0].getsockname()[1], *address[2:])
            listener.bind(at)
            listener.listen(BACKLOG)
            listener.setblocking(False)
    except OSError as error:
        for listener in sockets:
            listener.close()
        problem = error.strerror or str(error)
        raise CannotListen(f"api.host, api.port: can't listen on {host} port {port}: {problem}") from error
    return sockets


class Api:
    """The children of one API. Owned by the supervisor that makes it; used in its loop."""

    def __init__(self, settings: ApiSettings, family: Family, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.sockets: list[socket.socket] = []
        self._family = family
        self._env = child_env(environ, "")
        del self._env[NODE_VARIABLE]
        self._strikes = -1
        self._keepers: list[Keeper] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._ready: set[int] = set()
        self._all_ready = asyncio.Event()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each socket that is listened on."""
        return [listener.getsockname()[:2] for listener in self.sockets]

    async def start(self) -> None:
        """Bind, and start the children; returns before they serve (`ready`).

        Raises:
            CannotListen: the address can't be had.
            UnsafeDatabase: the database answers, and its settings would lose accepted jobs.
        """
        await check_safe(self.settings)
        self.sockets = bind(self.settings.host, self.settings.port)
        self._strikes = make_table()
        loop = asyncio.get_running_loop()
        for number in range(self.settings.workers):
            keeper = self._keeper(number)
            self._keepers.append(keeper)
            self._tasks.append(loop.create_task(keeper.run()))

    async def ready(self) -> None:
        """Return when every child serves."""
        await self._all_ready.wait()

    async def drain(self, quick: asyncio.Event | None = None) -> None:
        """Stop accepting, let what has begun be answered, end the children; `quick` skips the wait."""
        for listener in self.sockets:
            listener.close()
        for keeper in self._keepers:
            keeper.end()
            if keeper.member is not None:
                keeper.member.send(signal.SIGTERM)
        if self._tasks:
            waits: set[asyncio.Future[Any]] = {asyncio.gather(*self._tasks, return_exceptions=True)}
            if quick is not None:
                waits.add(asyncio.ensure_future(quick.wait()))
            await asyncio.wait(waits, timeout=GRACE_S + LINGER_S + 2.0, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*(keeper.stop(0.0) for keeper in self._keepers))
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._strikes >= 0:
            os.close(self._strikes)
            self._strikes = -1

    def _keeper(self, number: int) -> Keeper:
        return Keeper(
            self._family,
            lambda: self._spec(number),
            started=lambda member: self._started(member, self._keepers[number]),
        )

    def _spec(self, number: int) -> Spec:
        listeners = [listener.fileno() for listener in self.sockets]
        fds = [word for fd in listeners for word in ("--fd", str(fd))]
        argv = [sys.executable, "-m", "taskd.api.serve", *fds, "--strikes", str(self._strikes)]
        return Spec(
            name=f"api {number + 1}",
            argv=[*argv, "--parent", str(os.getpid())],
            env=self._env,
            pass_fds=(*listeners, self._strikes),
            pipe_option="--pipe",
        )

    def _started(self, member: Member, keeper: Keeper) -> None:
        task = asyncio.get_running_loop().create_task(self._talk(member, keeper))
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _talk(self, member: Member, keeper: Keeper) -> None:
        """Give a child its settings and wait until it serves."""
        pipe = member.pipe
        assert pipe is not None
        loop = asyncio.get_running_loop()
        data = self.settings.encode()
        try:
            with pipe:
                await loop.sock_sendall(pipe, len(data).to_bytes(4, "big") + data)
                if await loop.sock_recv(pipe, 1):
                    keeper.healthy()
                    self._ready.add(member.pid)
                    if len(self._ready) >= self.settings.workers:
                        self._all_ready.set()
                    await loop.sock_recv(pipe, 1)  # the end of the child; it sees ours by the same pipe
        except OSError:
            pass  # it died early: its keeper says so


async def check_safe(settings: ApiSettings, wait_s: float = 2.0) -> None:
    """Refuse a database that would lose accepted jobs. One that does not answer is looked at later.

    Raises:
        UnsafeDatabase: fsync, full_page_writes or synchronous_commit is off, or a table is not permanent.
    """
    if settings.allow_unsafe:
        return
    link = Link(Target(url=settings.database_url, application="taskd api start"), Pace(), deadline_s=wait_s)
    try:
        found = (await link.run(nodes.server_facts)).unsafe()
    except StoreUnavailable as error:
        log.warning("the database does not answer yet", extra={"error": str(error)})
        return
    finally:
        await link.close()
    if found:
        raise UnsafeDatabase(
            f"the database can lose accepted jobs: {'; '.join(found)}. "
            "Change that, or set database.allow_unsafe: true if losing jobs is all right."
        )


async def serve(settings: ApiSettings, environ: Mapping[str, str]) -> int:
    """Run an API until it is told to end, and return its exit status.

    Raises:
        CannotListen: the address can't be had.
        UnsafeDatabase: the database would lose accepted jobs.
    """
    notify = Notifier(environ)
    with Signals(log) as signals:
        api = Api(settings, Family(log), environ)
        await api.start()
        drain = asyncio.ensure_future(signals.draining.wait())
        ready = asyncio.ensure_future(api.ready())
        try:
            await asyncio.wait({drain, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                shown = ", ".join(f"{host} port {port}" for host, port in api.addresses)
                log.info("serving", extra={"address": shown, "workers": settings.workers})
                notify.ready(f"serving on {shown}")
            while not drain.done():
                notify.watchdog()
                every_s = None if notify.watchdog_s is None else notify.watchdog_s / 2
                await asyncio.wait({drain}, timeout=every_s)
        finally:
            ready.cancel()
            notify.stopping("draining")
            await api.drain(signals.quick)
    return 0


def main(config: Config, environ: Mapping[str, str] = os.environ) -> int:
    """Run `taskd api`: set up logging, serve until SIGTERM, return the exit status.

    Raises:
        TaskdError: it can't start; the message says why.
    """
    settings = settings_of(config.tree, file=config.file)
    setup(config.tree.log.level, config.tree.log.format, sys.stderr, environ)
    for warning in config.warnings:
        log.warning("configuration", extra={"problem": warning})
    return asyncio.run(serve(settings, environ))


async def serve_child(
    settings: ApiSettings, sockets: Sequence[socket.socket], strikes: int, pipe: socket.socket
) -> None:
    """Serve on `sockets` until SIGTERM, or until the parent's end of `pipe` closes."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    quick = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: quick.set() if stop.is_set() else stop.set())
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
    await loop.sock_sendall(pipe, b"r")
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


def child_main(argv: Sequence[str]) -> int:
    """Run one child: what `python -m taskd.api.serve` does."""
    parser = argparse.ArgumentParser(prog="taskd.api.serve")
    parser.add_argument("--fd", type=int, action="append", required=True)
    parser.add_argument("--strikes", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--pipe", type=int, required=True)
    args = parser.parse_args(argv)
    die_with_parent(args.parent)
    pipe = socket.socket(fileno=args.pipe)
    settings = _read_settings(pipe)
    pipe.setblocking(False)
    REDACTOR.hide(settings.database_url)
    if settings.listen_url is not None:
        REDACTOR.hide(settings.listen_url)
    setup(settings.log_level, settings.log_format, sys.stderr, os.environ)  # type: ignore[arg-type]
    sockets = [socket.socket(fileno=fd) for fd in args.fd]
    uvloop.run(serve_child(settings, sockets, args.strikes, pipe))
    return 0


if __name__ == "__main__":
    sys.exit(child_main(sys.argv[1:]))
