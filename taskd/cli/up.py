"""`taskd up`: all of taskd in one process tree, with a PostgreSQL of its own when none is configured."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from taskd.cli.run import READY, begin, logging_by
from taskd.cli.session import Command, Session

if TYPE_CHECKING:
    from taskd.config.read import Config
    from taskd.embedded import EmbeddedPG
    from taskd.process.family import Exit, Member, Spec
    from taskd.process.keeper import Keeper
    from taskd.process.signals import Signals

log = logging.getLogger("taskd.cli.up")

PATIENCE_S = 20.0
"""How much longer than `workers.drain_timeout` the daemons may take to end, in seconds."""
LOOK_S = 1.0
"""How often is looked whether the embedded server still runs, in seconds."""

_NOT_THEIRS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""The service manager speaks with this process, not with the daemons below it."""


@click.command("up", cls=Command)
@click.pass_context
def up(ctx: click.Context) -> None:
    """Run everything: migrate the database, serve the API, run jobs.

    Without a database URL in force it runs a PostgreSQL of its own, under /var/lib/taskd/pg for root, else
    under ~/.local/state/taskd/pg. SIGTERM and Ctrl-C drain; a second one skips the wait.
    """
    from taskd.cli import plugins, settings
    from taskd.store import migrate

    session = ctx.ensure_object(Session)
    begin()
    config = session.config(need_admin=True)
    with logging_by(config):
        plugins.load(config, session.environ)
        settings.refuse_second(config.tree, session.environ)
        with _database(config, session) as server:
            url = settings.database_url(config, session.environ, None if server is None else server.url())
            for done in migrate.up(url, schema=config.tree.database.schema):
                log.info("migration is done", extra={"migration": f"{done.version:04}_{done.name}"})
            embedded = None if server is None else url
            status = asyncio.run(Tree(config, session, server, embedded).run())
    ctx.exit(status)


@contextmanager
def _database(config: Config, session: Session) -> Iterator[EmbeddedPG | None]:
    """Run the embedded server, if one is needed; TERM while it starts ends it, too."""
    from taskd.embedded import EmbeddedPG, default_home

    database = config.tree.database
    if database.url is not None:
        yield None
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        home = default_home(session.environ, root=os.geteuid() == 0)
        with EmbeddedPG(home, bindir=database.bindir) as server:
            event = "embedded PostgreSQL is adopted" if server.adopted else "embedded PostgreSQL is started"
            log.info(event, extra={"folder": str(home), "pid": server.pid, "url": server.url()})
            adopted = server.adopted
            yield server
            if adopted:
                log.info("embedded PostgreSQL goes on: it ran before", extra={"pid": server.pid})
    finally:
        signal.signal(signal.SIGTERM, before)


class Tree:
    """The daemons below this process: the API and the worker. Lives in `run`."""

    def __init__(
        self, config: Config, session: Session, server: EmbeddedPG | None, embedded: str | None
    ) -> None:
        from taskd.process.sdnotify import Notifier

        self._config = config
        self._environ = session.environ
        self._server = server
        self._embedded = embedded
        self._notifier = Notifier(session.environ)
        self._ready: set[str] = set()
        self._status = 0

    async def run(self) -> int:
        """Keep both daemons alive until the first TERM or INT, then drain; return the exit status.

        A daemon that can't work with its configuration (exit 78) ends the other one, too.
        """
        from taskd.process.family import Family
        from taskd.process.keeper import EX_CONFIG, Keeper
        from taskd.process.signals import Signals

        family = Family(log)
        self._spare(family.spare)
        with Signals(log) as signals:
            keepers = {
                name: Keeper(
                    family,
                    lambda name=name: self._spec(name),  # type: ignore[misc]
                    started=lambda member, name=name: self._started(name, member),  # type: ignore[misc]
                    ended=lambda member, end: self._ended(member, end),
                )
                for name in ("api", "worker")
            }
            lives = [asyncio.create_task(keeper.run(), name=name) for name, keeper in keepers.items()]
            draining = asyncio.create_task(signals.draining.wait())
            watch = asyncio.create_task(self._watch(family.spare))
            try:
                await asyncio.wait([draining, watch, *lives], return_when=asyncio.FIRST_COMPLETED)
                self._notifier.stopping("draining")
                self._notifier.extend(
                    self._config.tree.workers.drain_timeout.total_seconds() + PATIENCE_S + 10
                )
                for keeper in keepers.values():
                    keeper.end()
                await self._drain(list(keepers.values()), lives, signals)
                exits = [life.result() for life in lives if life.done() and not life.cancelled()]
                if not signals.draining.is_set() and any(end and end.code == EX_CONFIG for end in exits):
                    self._status = EX_CONFIG
                if watch.done():
                    watch.result()
            finally:
                for task in (draining, watch, *lives):
                    task.cancel()
                await asyncio.gather(draining, watch, *lives, return_exceptions=True)
                await family.kill()
        return self._status

    async def _drain(
        self, keepers: list[Keeper], lives: list[asyncio.Task[Exit | None]], signals: Signals
    ) -> None:
        """Ask both to end and wait; a second signal is handed on, so that they skip their waits."""

        def tell() -> None:
            for keeper in keepers:
                if keeper.member is not None:
                    keeper.member.send(signal.SIGTERM)

        tell()
        until = self._config.tree.workers.drain_timeout.total_seconds() + PATIENCE_S
        ended = asyncio.gather(*lives)
        quick = asyncio.create_task(signals.quick.wait())
        try:
            await asyncio.wait([ended, quick], timeout=until, return_when=asyncio.FIRST_COMPLETED)
            if quick.done() and not ended.done():
                tell()
                await asyncio.wait([ended], timeout=PATIENCE_S)
            if not ended.done():
                log.warning("daemons do not end; they are killed")
        finally:
            quick.cancel()
            if not ended.done():
                ended.cancel()
            with suppress(asyncio.CancelledError):
                await ended

    # -- the daemons -----------------------------------------------------------------------------------

    def _spec(self, name: str) -> Spec:
        from taskd.process.family import Spec
        from taskd.process.prctl import supervised

        argv = [sys.executable, "-m", "taskd", name, "--config", self._config.file]
        if self._embedded is not None:
            argv += ["--embedded", self._embedded]
        env = {key: value for key, value in self._environ.items() if key not in _NOT_THEIRS}
        return Spec(name=name, argv=argv, env=supervised(env), pipe_option="--ready-fd")

    def _started(self, name: str, member: Member) -> None:
        pipe = member.pipe
        assert pipe is not None
        loop = asyncio.get_running_loop()

        def heard() -> None:
            loop.remove_reader(pipe)
            try:
                said = pipe.recv(len(READY))
            except OSError:
                said = b""
            if said == READY:
                self._is_ready(name)
            pipe.close()

        loop.add_reader(pipe, heard)

    def _ended(self, member: Member, end: Exit) -> None:
        pipe = member.pipe
        if pipe is not None and pipe.fileno() >= 0:  # ended before it was ready
            asyncio.get_running_loop().remove_reader(pipe)
            pipe.close()

    def _is_ready(self, name: str) -> None:
        first = name not in self._ready
        self._ready.add(name)
        log.info("daemon is ready", extra={"daemon": name})
        if first and len(self._ready) == 2:
            self._notifier.ready("API and worker are ready")
            click.echo(go_on(self._config, self._embedded), nl=False)
            sys.stdout.flush()

    # -- the embedded server ---------------------------------------------------------------------------

    def _spare(self, spare: Callable[[int], None]) -> None:
        if self._server is not None and not self._server.adopted and self._server.pid is not None:
            spare(self._server.pid)

    async def _watch(self, spare: Callable[[int], None]) -> None:
        """Feed the watchdog; start the embedded server again should it have died."""
        while True:
            await asyncio.sleep(LOOK_S)
            self._notifier.watchdog()
            if self._server is not None and self._server.pid is None:
                log.error("embedded PostgreSQL has died; it is started again")
                # In the main thread: it stands still for the moment that a recovery takes.
                self._server.start()
                self._spare(spare)


def go_on(config: Config, embedded: str | None) -> str:
    """Return what to type next, for whoever has just started taskd."""
    api = config.tree.api
    host = f"[{api.host}]" if ":" in api.host else api.host
    if api.host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        host = "127.0.0.1"
    url = f"{'http' if api.tls is None else 'https'}://{host}:{api.port}"
    admin = config.tree.admin
    token = f"${admin.token_env}" if admin.source == "token_env" else "$ADMIN_TOKEN"
    json = "-H 'Content-Type: application/json'"
    lines = [
        f"taskd is ready at {url} (its manual: {url}/docs)",
        "",
        "  # is it there?",
        f"  curl {url}/health",
    ]
    if admin.source != "token_env":
        lines += [
            f"  # ADMIN_TOKEN is the token of {shlex.quote(config.file)}; then an API key, shown this once:"
        ]
    else:
        lines += ["  # an API key, shown this once:"]
    lines += [
        f'  curl -X POST {url}/admin/api-keys -H "Authorization: Bearer {token}" \\',
        f'    {json} -d \'{{"name": "demo"}}\'',
        '  # with KEY set to its "key", a job and what became of it:',
        f'  curl -X POST "{url}/jobs?wait=10" -H "X-API-Key: $KEY" \\',
        f'    {json} -d \'{{"type": "echo", "payload": {{"hello": "world"}}}}\'',
        f'  curl {url}/jobs/JOB_ID -H "X-API-Key: $KEY"',
    ]
    if embedded is not None:
        variable = config.tree.database.url_env
        lines += ["", "  # the database, for psql and further commands of taskd:"]
        lines += [f"  export {variable or 'DATABASE_URL'}={shlex.quote(embedded)}"]
    return "\n".join([*lines, "", ""])
