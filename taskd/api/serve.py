"""The parent of the API's processes: it binds, starts those that serve, and watches them.

It opens no connection, to clients or to the database, and loads neither the web framework nor the driver:
it starts `python -m taskd.api.process --fd N` for each worker, hands each its settings over a pipe (so no
secret is ever an argument or in an environment), and starts them again when they end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from taskd.api.settings import (
    BACKLOG,
    GRACE_S,
    LINGER_S,
    SERVING,
    UNSAFE,
    ApiSettings,
    settings_of,
)
from taskd.api.strikes import make_table
from taskd.errors import TaskdError, UnsafeDatabase
from taskd.obs.log import setup
from taskd.process.environment import NODE_VARIABLE, child_env
from taskd.process.family import Family, Member, Spec
from taskd.process.keeper import Keeper
from taskd.process.sdnotify import Notifier
from taskd.process.signals import Signals

if TYPE_CHECKING:
    from taskd.config.read import Config

log = logging.getLogger("taskd.api")


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
        self._told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when every child serves, or has said why it must not."""

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each socket that is listened on."""
        return [listener.getsockname()[:2] for listener in self.sockets]

    async def start(self) -> None:
        """Bind, and start the children; returns before they serve (`ready`).

        Raises:
            CannotListen: the address can't be had.
        """
        self.sockets = bind(self.settings.host, self.settings.port)
        self._strikes = make_table()
        loop = asyncio.get_running_loop()
        for number in range(self.settings.workers):
            keeper = self._keeper(number)
            self._keepers.append(keeper)
            self._tasks.append(loop.create_task(keeper.run()))

    async def ready(self) -> None:
        """Return when every child serves.

        Raises:
            UnsafeDatabase: the database answers, and its settings would lose accepted jobs.
        """
        await asyncio.shield(self._told)

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
        argv = [sys.executable, "-m", "taskd.api.process", *fds, "--strikes", str(self._strikes)]
        # Only at the start: what becomes of the database later makes them answer 503, not end.
        check = ["--check"] if number == 0 and not self._told.done() else []
        return Spec(
            name=f"api {number + 1}",
            argv=[*argv, "--parent", str(os.getpid()), *check],
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
                said = await loop.sock_recv(pipe, 1)
                if said == SERVING:
                    keeper.healthy()
                    self._ready.add(member.pid)
                    if len(self._ready) >= self.settings.workers and not self._told.done():
                        self._told.set_result(None)
                elif said == UNSAFE and not self._told.done():
                    keeper.end()
                    self._told.set_exception(UnsafeDatabase((await _rest(loop, pipe)).decode()))
                if said:
                    await loop.sock_recv(pipe, 1)  # the end of the child; it sees ours by the same pipe
        except OSError:
            pass  # it died early: its keeper says so


async def _rest(loop: asyncio.AbstractEventLoop, pipe: socket.socket) -> bytes:
    """Return what is said until the other end closes."""
    parts = []
    while part := await loop.sock_recv(pipe, 4096):
        parts.append(part)
    return b"".join(parts)


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
                ready.result()
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
