"""`taskd up`: all of taskd in one process tree, with a PostgreSQL of its own when none is configured."""

from __future__ import annotations

import asyncio
import logging
import shlex
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from taskd.cli.run import begin, logging_by
from taskd.cli.session import Command, Session

if TYPE_CHECKING:
    from taskd.config.read import Config
    from taskd.embedded import EmbeddedPG
    from taskd.process.family import Exit, Family, Spec
    from taskd.process.keeper import Keeper
    from taskd.process.signals import Signals

log = logging.getLogger("taskd.cli.up")

DAEMONS = ("worker", "api")
HEAD_START_S = 5.0
"""How long the API waits for the worker, in seconds: an API that starts later knows its job types at once."""
PATIENCE_S = 25.0
"""How much longer than `workers.drain_timeout` the daemons may take to end, in seconds."""
LOOK_S = 1.0
"""How often is looked whether the embedded server still runs, in seconds."""

_NOT_THEIRS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""The service manager speaks with this process, not with the daemons below it."""


@click.command("up", cls=Command)
@click.pass_context
def up(ctx: click.Context, /) -> None:
    """Run all of taskd: API, worker, database.

    Migrates the database, then serves the API and runs jobs. Without a database URL in force it runs a
    PostgreSQL of its own, under $STATE_DIRECTORY/pg, for root /var/lib/taskd/pg, else
    ~/.local/state/taskd/pg. SIGTERM and Ctrl-C drain; a second one skips the wait.
    """
    from taskd.cli import plugins, settings
    from taskd.store import migrate

    session = ctx.ensure_object(Session)
    begin()
    config = session.config(need_admin=True)
    with logging_by(config):
        plugins.load(config, session.environ)
        settings.refuse_second(config.tree, session.environ)
        with _server(config, session.environ) as server:
            embedded = None if server is None else server.url()
            url = settings.database_url(config, session.environ, embedded)
            for done in migrate.up(url, schema=config.tree.database.schema):
                log.info("migration is done", extra={"migration": f"{done.version:04}_{done.name}"})
            status = asyncio.run(Tree(config, session.environ, server).run())
    ctx.exit(status)


@contextmanager
def _server(config: Config, environ: Mapping[str, str]) -> Iterator[EmbeddedPG | None]:
    """Run the embedded server, if one is needed."""
    from taskd.cli.settings import embedded_home
    from taskd.embedded import EmbeddedPG

    database = config.tree.database
    if database.url is not None:
        yield None
        return
    home = embedded_home(environ)
    with EmbeddedPG(home, bindir=database.bindir) as server:
        how = "adopted: it ran before, and goes on after this" if server.adopted else "started"
        log.info("embedded PostgreSQL is in use", extra={"how": how, "folder": str(home), "pid": server.pid})
        try:
            yield server
        finally:  # a further signal must not keep it from being stopped
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class Tree:
    """The daemons below this process, the API and the worker. Owned by the task that awaits `run`."""

    def __init__(self, config: Config, environ: Mapping[str, str], server: EmbeddedPG | None) -> None:
        from taskd.process.sdnotify import Notifier

        self._config = config
        self._environ = environ
        self._server = server
        self._embedded = None if server is None else server.url()
        self._notifier = Notifier(environ)
        self._ears: dict[str, Ear] = {}
        self._keepers: dict[str, Keeper] = {}
        self._ready: set[str] = set()
        self._failed = asyncio.Event()
        self._go_on = asyncio.Event()
        self._draining = False
        self._status = 0

    async def run(self) -> int:
        """Keep both daemons alive until the first TERM or INT, then drain; return the exit status.

        A daemon that ends before it was ever ready, or with exit status 78, ends the other one, too: the
        status is then its own. One that dies later is started again.
        """
        from taskd.process.family import Family
        from taskd.process.signals import Signals

        family = Family(log)
        self._spare(family)
        with Signals(log) as signals:
            for name in DAEMONS:
                self._keepers[name] = self._keeper(name, family)
                self._ears[name] = Ear(lambda name=name: self._is_ready(name), self._keepers[name])  # type: ignore[misc]
            lives = [asyncio.create_task(self._live(name), name=name) for name in DAEMONS]
            draining = asyncio.create_task(signals.draining.wait())
            watch = asyncio.create_task(self._watch(family))
            failed = asyncio.create_task(self._failed.wait())
            tasks: list[asyncio.Task[Any]] = [draining, watch, failed, *lives]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    watch.result()  # the embedded server died and does not come up again
                await self._drain(lives, signals)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await family.kill()
                for ear in self._ears.values():
                    ear.close()
        return self._status

    async def _drain(self, lives: list[asyncio.Task[Exit | None]], signals: Signals) -> None:
        """Ask both to end and wait; a second signal is handed on, so that they skip their waits."""
        until = self._config.tree.workers.drain_timeout.total_seconds() + PATIENCE_S
        self._notifier.stopping("draining")
        self._notifier.extend(until + 10)
        self._draining = True
        self._tell()
        ended: asyncio.Future[Any] = asyncio.gather(*lives)
        quick: asyncio.Future[Any] = asyncio.create_task(signals.quick.wait())
        try:
            await asyncio.wait([ended, quick], timeout=until, return_when=asyncio.FIRST_COMPLETED)
            if quick.done() and not ended.done():
                self._tell()
                await asyncio.wait([ended], timeout=PATIENCE_S)
            if not ended.done():
                log.warning("daemons do not end; they are killed")
        finally:
            quick.cancel()
            ended.cancel()
            with suppress(asyncio.CancelledError):
                await ended

    # -- the daemons -----------------------------------------------------------------------------------

    def _keeper(self, name: str, family: Family) -> Keeper:
        from taskd.process.keeper import EX_CONFIG, Keeper

        return Keeper(
            family, lambda: self._spec(name), ended=lambda member, end: self._ended(name, end, EX_CONFIG)
        )

    async def _live(self, name: str) -> Exit | None:
        if name == "api":
            with suppress(TimeoutError):
                await asyncio.wait_for(self._go_on.wait(), HEAD_START_S)
        return await self._keepers[name].run()

    def _spec(self, name: str) -> Spec:
        from taskd.process.family import Spec
        from taskd.process.prctl import supervised

        argv = [sys.executable, "-m", "taskd", name, "--config", self._config.file]
        if self._embedded is not None:
            argv += ["--embedded", self._embedded]
        env = {key: value for key, value in self._environ.items() if key not in _NOT_THEIRS}
        env["NOTIFY_SOCKET"] = self._ears[name].address
        return Spec(name=name, argv=argv, env=supervised(env))

    def _ended(self, name: str, end: Exit, for_good: int) -> None:
        if self._draining or (name in self._ready and end.code != for_good):
            return
        log.error("daemon can't start", extra={"daemon": name, "exit": str(end)})
        self._status = end.code or 1
        self._failed.set()

    def _tell(self) -> None:
        self._go_on.set()
        for keeper in self._keepers.values():
            keeper.end()
            if keeper.member is not None:
                keeper.member.send(signal.SIGTERM)

    def _is_ready(self, name: str) -> None:
        self._keepers[name].healthy()
        if name in self._ready:
            return
        self._ready.add(name)
        self._go_on.set()
        log.info("daemon is ready", extra={"daemon": name})
        if len(self._ready) == len(DAEMONS):
            self._notifier.ready("API and worker are ready")
            click.echo(go_on(self._config, self._embedded))

    # -- the embedded server ---------------------------------------------------------------------------

    def _spare(self, family: Family) -> None:
        if self._server is not None and not self._server.adopted and self._server.pid is not None:
            family.spare(self._server.pid)

    async def _watch(self, family: Family) -> None:
        """Feed the watchdog; start the embedded server again should it have died."""
        while True:
            await asyncio.sleep(LOOK_S)
            self._notifier.watchdog()
            if self._server is not None and self._server.pid is None:
                log.error("embedded PostgreSQL has died; it is started again")
                self._server.start()  # here, in the main thread: all stands still for its recovery
                self._spare(family)
                log.warning("embedded PostgreSQL runs again", extra={"pid": self._server.pid})


class Ear:
    """Hears when a daemon is ready: its `NOTIFY_SOCKET`. Only what the keeper's own child says counts."""

    def __init__(self, ready: Callable[[], None], keeper: Keeper) -> None:
        self._ready = ready
        self._keeper = keeper
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # an abstract address of the kernel's choice
        asyncio.get_running_loop().add_reader(self._socket, self._hear)

    @property
    def address(self) -> str:
        """What `NOTIFY_SOCKET` says."""
        return "@" + bytes(self._socket.getsockname())[1:].decode()

    def close(self) -> None:
        """Hear no more."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _hear(self) -> None:
        try:
            said, extra, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
        except OSError:
            return
        for level, kind, data in extra:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid, _, _ = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])
                member = self._keeper.member
                if member is not None and member.pid == pid and b"READY=1" in said.split(b"\n"):
                    self._ready()


_CREDENTIALS = struct.Struct("iII")
"""Process, user and group of who sent a datagram: `struct ucred` of unix(7)."""


def go_on(config: Config, embedded: str | None) -> str:
    """Return what to type next, for whoever has just started taskd."""
    tree = config.tree
    host = "127.0.0.1" if tree.api.host in ("0.0.0.0", "::") else tree.api.host  # nosec B104
    host = f"[{host}]" if ":" in host else host
    url = f"{'http' if tree.api.tls is None else 'https'}://{host}:{tree.api.port}"
    token, where = "ADMIN_TOKEN", f"; ADMIN_TOKEN is the token of {shlex.quote(config.file)}"
    if tree.admin.source == "token_env" and tree.admin.token_env is not None:
        token, where = tree.admin.token_env, ""
    json = "-H 'Content-Type: application/json'"
    lines = [
        f"taskd is ready at {url} (manual of the API: {url}/docs)",
        "",
        f"  curl {url}/health",
        "",
        f"  # an API key, shown this once{where}",
        f'  curl -X POST {url}/admin/api-keys -H "Authorization: Bearer ${token}" \\',
        f"""    {json} -d '{{"name": "demo"}}'""",
        "",
        '  # a job, with the "key" of that answer in KEY; then what became of it, with its "job_id"',
        f'  curl -X POST {url}/jobs -H "X-API-Key: $KEY" \\',
        f"""    {json} -d '{{"type": "echo", "payload": {{"hello": "world"}}}}'""",
        f'  curl {url}/jobs/JOB_ID -H "X-API-Key: $KEY"',
        "",
    ]
    if embedded is not None:
        variable = tree.database.url_env or "DATABASE_URL"
        lines += ["  # the database, for psql and further commands of taskd in another shell"]
        lines += [f"  export {variable}={shlex.quote(embedded)}", ""]
    return "\n".join(lines)
