"""`taskd worker` and `taskd api`: a daemon from its configuration to its end."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from taskd.cli.apart import apart
from taskd.cli.session import Command, Session

if TYPE_CHECKING:
    from taskd.config.read import Config
    from taskd.engine.daemon import DaemonSettings

log = logging.getLogger("taskd.cli")

# How `taskd up` tells the daemons below it where its own server is: a socket without a password.
_embedded = click.option("--embedded", metavar="URL", hidden=True)


@click.command("worker", cls=Command)
@click.option(
    "--instance",
    metavar="NAME",
    help="Tells workers on one host apart: the node's name gets -NAME, unless workers.node is set.",
)
@_embedded
@click.pass_context
def worker(ctx: click.Context, /, instance: str | None, embedded: str | None) -> None:
    """Run jobs until SIGTERM.

    The first signal drains, a second one skips the wait. Exits with 1 if another worker runs under this
    node's name on this host.
    """
    session = ctx.ensure_object(Session)
    begin()
    # Before any lock or folder: a bad configuration is told as one, with exit status 78.
    found = apart(
        ctx,
        lambda: _read_worker(session, instance, embedded),
        meanwhile=lambda: importlib.import_module("taskd.engine.daemon"),
    )

    import msgspec

    from taskd.engine.daemon import DaemonSettings
    from taskd.process.predecessor import FamilyLock
    from taskd.process.runtime import NodeLock, node_file, runtime_folder

    logs, told = msgspec.json.decode(found, type=tuple[Logs, DaemonSettings])
    with logs.kept(session):
        name = told.node_name
        folder = runtime_folder(session.environ, os.geteuid())
        with NodeLock(node_file(folder, name, "lock")) as lock:
            lock.acquire(name)
            with FamilyLock(node_file(folder, name, "family"), name) as family:
                before = family.take_over()
                env = {**told.child_env, **family.env}
                _work(replace(told, family_lock=family, predecessor=before, child_env=env))


def _read_worker(session: Session, instance: str | None, embedded: str | None) -> bytes:
    from taskd.cli import plugins, settings

    config = session.config()
    with logging_by(config):
        name = settings.node_name(config.tree, instance)
        registry, warnings = plugins.load(config, session.environ, node=name)
        for warning in warnings:
            log.warning("plugin is left out", extra={"reason": warning})
        told = settings.daemon_settings(config, registry, session.environ, name=name, embedded=embedded)
        return _answer(config, told)


def _work(told: DaemonSettings) -> None:
    import uvloop

    from taskd.engine.daemon import Daemon
    from taskd.process.sdnotify import Notifier
    from taskd.process.signals import Signals
    from taskd.store.queries import SQL

    SQL.use_schema(told.schema)

    async def live() -> None:
        with Signals(log) as signals:
            daemon = Daemon(told, signals, Notifier(os.environ), dice=random.SystemRandom())
            await daemon.run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(live())


@click.command("api", cls=Command)
@_embedded
@click.pass_context
def api(ctx: click.Context, /, embedded: str | None) -> None:
    """Serve the HTTP API until SIGTERM.

    Then what has begun is answered, and the rest refused.
    """
    session = ctx.ensure_object(Session)
    begin()
    found = apart(
        ctx,
        lambda: _read_api(session, embedded),
        meanwhile=lambda: importlib.import_module("taskd.api.serve"),
    )

    import msgspec

    from taskd.api.serve import serve
    from taskd.api.settings import ApiSettings

    logs, told = msgspec.json.decode(found, type=tuple[Logs, ApiSettings])
    with logs.kept(session):
        status = asyncio.run(serve(told, session.environ))
    ctx.exit(status)


def _read_api(session: Session, embedded: str | None) -> bytes:
    from taskd.api.settings import settings_of
    from taskd.cli import settings

    config = session.config(need_admin=True)
    with logging_by(config):
        url = settings.database_url(config, session.environ, embedded)
        return _answer(config, settings_of(config.tree, file=config.file, database_url=url))


@dataclass(frozen=True, slots=True)
class Logs:
    """How a daemon logs: what of the configuration's `log:` it is told, and the secrets to mask."""

    level: str
    format: str
    secrets: Sequence[str]

    @contextmanager
    def kept(self, session: Session) -> Iterator[None]:
        """Log to standard error like this."""
        from taskd.obs.log import setup
        from taskd.obs.redact import hide

        for secret in self.secrets:
            hide(secret)
        handler = setup(self.level, self.format, sys.stderr, session.environ)  # type: ignore[arg-type]
        try:
            yield
        finally:
            handler.flush()


def _answer(config: Config, told: Any) -> bytes:
    """Return what the copy of this process says: how to log, and the settings, secrets and all."""
    import msgspec

    from taskd.cli.settings import secrets_of

    tree = config.tree
    return msgspec.json.encode((Logs(tree.log.level, tree.log.format, list(secrets_of(tree))), told))


def begin() -> None:
    """Do what a daemon does first: die with the `taskd up` that started it, if one did; heed SIGTERM.

    Until the daemon listens to signals itself there is nothing to drain: it ends at once, with exit status 0.
    """
    from taskd.process.prctl import follow_supervisor

    follow_supervisor(os.environ)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))


@contextmanager
def logging_by(config: Config) -> Iterator[None]:
    """Log to standard error as `config` says, without its secrets; name the file, and what it warns of."""
    from taskd.cli.settings import hide_secrets
    from taskd.obs.log import setup

    hide_secrets(config.tree)
    handler = setup(config.tree.log.level, config.tree.log.format, sys.stderr, os.environ)
    log.info("configuration is in use", extra={"file": config.file, "digest": config.digest[:12]})
    for warning in config.warnings:
        log.warning("configuration", extra={"reason": warning})
    try:
        yield
    finally:
        handler.flush()
