"""`taskd migrate`: the schema of the database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from taskd.cli.session import Group, Session, json_option

if TYPE_CHECKING:
    from taskd.store.migrate import Migration, Status


@click.group("migrate", cls=Group, invoke_without_command=True)
@json_option
@click.pass_context
def migrate(ctx: click.Context, /) -> None:
    """Migrate the database to this version.

    Without a subcommand that is `up`.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(up)


@migrate.command("up")
@json_option
@click.pass_obj
def up(session: Session, /) -> None:
    """Apply the migrations that are missing; again is always safe."""
    from taskd.cli import settings, show
    from taskd.store import migrate
    from taskd.store import roles as rights

    config = session.config()
    url, schema = settings.database_url(config, session.environ), config.tree.database.schema
    done = migrate.up(url, schema=schema)
    if done and rights.in_use(url, schema=schema):
        for warning in rights.apply(url, schema=schema):
            click.echo(f"warning: {warning}", err=True)
    if session.json:
        show.echo_json({"applied": [_name(one) for one in done]})
        return
    for one in done:
        click.echo(f"applied {_name(one)}")
    if not done:
        click.echo("nothing to do: the schema is that of this version")


@migrate.command("roles")
@json_option
@click.pass_obj
def roles(session: Session, /) -> None:
    """Make the database roles and set their rights; `up` does it again once they are there.

    The first time the database URL must be that of a superuser, or of a role with CREATEROLE that owns the
    database.
    """
    from taskd.cli import settings, show
    from taskd.store import roles as rights

    config = session.config()
    url, schema = settings.database_url(config, session.environ), config.tree.database.schema
    warnings = rights.apply(url, schema=schema)
    made = [rights.OWNER, rights.API, rights.WORKER, rights.SUBMIT, rights.READ_ONLY]
    if session.json:
        show.echo_json({"roles": made, "warnings": warnings})
        return
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    for role in made:
        click.echo(role)


@migrate.command("plan")
@json_option
@click.pass_obj
def plan(session: Session, /) -> None:
    """Print the SQL that `up` would run; changes nothing."""
    from taskd.cli import show

    state = _state(session)
    if session.json:
        show.echo_json([{"migration": _name(one), "sql": one.text} for one in state.pending])
        return
    for one in state.pending:
        click.echo(f"-- {_name(one)}\n{one.text}")
    if not state.pending:
        click.echo("-- nothing to do")


@migrate.command("status")
@json_option
@click.pass_context
def status(ctx: click.Context, /) -> None:
    """Say what the database has and what is missing. Exits with 1 unless it is what this version needs."""
    from taskd.cli import show

    session = ctx.ensure_object(Session)
    state = _state(session)
    members = {
        "applied": list(state.applied),
        "pending": [_name(one) for one in state.pending],
        "edited": list(state.edited),
        "newer": list(state.newer),
    }
    if session.json:
        show.echo_json(members)
    else:
        show.echo_members({name: value or show.NOTHING for name, value in members.items()})
    if state.pending or state.edited or state.newer:
        ctx.exit(1)


def _state(session: Session) -> Status:
    from taskd.cli import settings
    from taskd.store import migrate

    config = session.config()
    return migrate.status(settings.database_url(config, session.environ), schema=config.tree.database.schema)


def _name(one: Migration) -> str:
    return f"{one.version:04}_{one.name}"
