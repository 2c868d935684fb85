"""`taskd audit`: who did what to keys, jobs, types and the configuration."""

from __future__ import annotations

import click

from taskd.cli.session import Command, Session, json_option


@click.command("audit", cls=Command)
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many at most."
)
@click.option("--before", type=click.IntRange(1), metavar="ID", help="Only entries older than this one.")
@json_option
@click.pass_obj
def audit(session: Session, /, limit: int, before: int | None) -> None:
    """Show who did what, newest first."""
    from taskd.api import answers
    from taskd.cli import show
    from taskd.store import audit

    found = session.run(lambda conn: audit.page(conn, before=before, limit=limit))
    shown = [answers.audit(entry) for entry in found]
    if session.json:
        show.echo_json(shown)
        return
    columns = ["id", "at", "actor", "action", "target", "address", "request_id", "detail"]
    show.echo_table(
        [column.replace("_", " ") for column in columns],
        [[entry[column] for column in columns] for entry in shown],
    )
