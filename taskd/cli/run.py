"""`taskd worker` and `taskd api`: a daemon from its configuration to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import click

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
@click.pass_obj
def worker(session: Session, /, instance: str | None, embedded: str | None) -> None:
    """Run jobs until SIGTERM.

    The first signal drains, a second one skips the wait. Exits with 1 if another worker runs under this
    node's name on this host.
    """
    from taskd.cli import plugins, settings
    from taskd.process.predecessor import FamilyLock
    from taskd.process.runtime import NodeLock, node_file, runtime_folder

    begin()
    config = session.config()
    with logging_by(config):
        name = settings.node_name(config.tree, instance)
        # Before any lock or folder: a bad configuration is told as one, with exit status 78.
        registry, warnings = plugins.load(config, session.environ, node=name)
        for warning in warnings:
            log.warning("plugin is left out", extra={"reason": warning})
        told = settings.daemon_settings(config, registry, session.environ, name=name, embedded=embedded)
        folder = runtime_folder(session.environ, os.geteuid())
        with NodeLock(node_file(folder, name, "lock")) as lock:
            lock.acquire(name)
            with FamilyLock(node_file(folder, name, "family"), name) as family:
                before = family.take_over()
                env = {**told.child_env, **family.env}
                _work(replace(told, family_lock=family, predecessor=before, child_env=env))


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
    from taskd.cli import settings

    session = ctx.ensure_object(Session)
    begin()
    config = session.config(need_admin=True)
    with logging_by(config):
        from taskd.api.serve import serve
        from taskd.api.settings import settings_of

        url = settings.database_url(config, session.environ, embedded)
        told = settings_of(config.tree, file=config.file, database_url=url)
        status = asyncio.run(serve(told, session.environ))
    ctx.exit(status)


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
