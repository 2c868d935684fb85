"""The `taskd` command: what people type, translated for the parts that do the work.

Each command stands in a module that is imported when it is called, and imports what it needs inside its
function: `taskd --help` and `taskd jobs list` load neither the web framework nor the engine.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from taskd import __version__
from taskd.cli.session import Group, Session, json_option
from taskd.errors import ConfigError, Refused, TaskdError

_MODULES = {
    "up": "up",
    "api": "run",
    "worker": "run",
    "init": "init",
    "migrate": "db",
    "check-config": "config",
    "config": "config",
    "doctor": "doctor",
    "keys": "keys",
    "submit": "submit",
    "jobs": "jobs",
    "types": "types",
    "nodes": "nodes",
    "audit": "audit",
    "bench": "bench",
    "openapi": "openapi",
}
"""Where each command is, in the order of the help."""

EX_TEMPFAIL = 75
"""Try later: from sysexits.h."""
_LATER = frozenset({"rate_limited", "backlog_full", "not_ready", "overloaded", "shutting_down"})
"""Refusals that pass by themselves."""


class Root(Group):
    """The group of all commands: finds their modules, and shows what they raise."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order of the help."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of this name, from its module."""
        module = _MODULES.get(cmd_name)
        if module is None:
            return None
        found: click.Command = getattr(
            importlib.import_module(f"taskd.cli.{module}"), cmd_name.replace("-", "_")
        )
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an expected failure becomes its message on stderr and its exit status."""
        try:
            return super().invoke(ctx)
        except TaskdError as error:
            click.echo(said(error), err=True)
            ctx.exit(exit_status(error))


def said(error: TaskdError) -> str:
    """Return what people read of an expected failure; a configuration's problems, one a line."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, Refused) and len(error.fields) > 1:
        return "\n".join(f"taskd: {field.path}: {field.problem}" for field in error.fields)
    return f"taskd: {error}"


def exit_status(error: TaskdError) -> int:
    """Return what the command exits with because of `error`."""
    if isinstance(error, Refused) and error.error in _LATER:
        return EX_TEMPFAIL
    return error.exit_code


@click.group(
    "taskd",
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 69 database unreachable, 75 try later, "
    "78 configuration.",
)
@click.version_option(__version__, prog_name="taskd", message="%(prog)s %(version)s")
@json_option
@click.pass_context
def main(ctx: click.Context) -> None:
    """A job queue as a service on PostgreSQL: clients submit jobs over HTTP, workers run them.

    The configuration is that of --config, else of $TASKD_CONFIG, else /etc/taskd/taskd.yaml.
    """
    ctx.ensure_object(Session)
