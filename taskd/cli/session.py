"""What every command shares: which configuration is meant, how to answer, how to ask the database."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from taskd.config.read import Config
    from taskd.store.pool import Connection, Link

T = TypeVar("T")

DEFAULT_FILE = "/etc/taskd/taskd.yaml"
VARIABLE = "TASKD_CONFIG"


@dataclass(slots=True)
class Session:
    """One call of `taskd`. Made by the group, filled in by options, read by the command."""

    file: str | None = None
    """What `--config` says."""
    json: bool = False
    """Answer in JSON."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def path(self) -> Path:
        """The configuration file that is meant; it may not exist."""
        return Path(self.file or self.environ.get(VARIABLE) or DEFAULT_FILE)

    def config(self, *, need_admin: bool = False, need_pepper: bool | None = None) -> Config:
        """Return the configuration; the two flags are those of `config.read`.

        Raises:
            ConfigError: it is missing or wrong.
        """
        from taskd.config.read import read

        return read(self.path, env=self.environ, need_admin=need_admin, need_pepper=need_pepper)

    def run(self, work: Callable[[Connection], Awaitable[T]], config: Config | None = None) -> T:
        """Return what `work` returns on a connection to the database of `config` (default: the file's).

        Raises:
            ConfigError: the file is wrong, or names no database.
            StoreUnavailable: no answer came.
        """
        return self.serve(lambda link: link.run(work, deadline_s=ANSWER_S), config)

    def serve(self, work: Callable[[Link], Awaitable[T]], config: Config | None = None) -> T:
        """The same for what needs more than one statement at a time: `work` gets a link."""
        import asyncio

        from taskd.cli.settings import database_url
        from taskd.store.pool import Link, Pace, Target
        from taskd.store.queries import SQL

        config = config or self.config()
        SQL.use_schema(config.tree.database.schema)
        target = Target(
            url=database_url(config, self.environ),
            application="taskd command line",
            statement_timeout_s=config.tree.database.statement_timeout.total_seconds(),
        )

        async def ask() -> T:
            link = Link(target, Pace())
            try:
                return await work(link)
            finally:
                await link.close()

        return asyncio.run(ask())


ANSWER_S = 15.0
"""How long a command waits for the database, in seconds."""


def _set_file(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Session).file = value


def _set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Session).json = True


def _config_option() -> click.Option:
    return click.Option(
        ["--config"],
        metavar="FILE",
        expose_value=False,
        callback=_set_file,
        help=f"The configuration (default: ${VARIABLE}, else {DEFAULT_FILE}).",
    )


json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_set_json, help="Answer in JSON."
)
"""`--json`, also before the command's name."""


class Command(click.Command):
    """A command that takes `--config FILE`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_config_option())


class Group(click.Group):
    """A group of commands that take `--config FILE`; it takes it itself, too."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_config_option())
