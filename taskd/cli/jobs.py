"""`taskd jobs`: the jobs of all clients."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

import click

from taskd.cli.session import Group, Session, json_option
from taskd.errors import Refused

if TYPE_CHECKING:
    from taskd.model.job import Job
    from taskd.store.pool import Connection, Link

STATUSES = ("scheduled", "pending", "processing", "completed", "failed", "cancelled")


def job_id(text: str | UUID) -> UUID:
    """Return the id of a job, also from `Message of id: ID`.

    Raises:
        click.BadParameter: it is none.
    """
    from taskd.model.names import job_id

    found = text if isinstance(text, UUID) else job_id(text)
    if found is None:
        raise click.BadParameter(f"{text!r} is no id of a job")
    return found


def moment(text: str | datetime) -> datetime:
    """Return a moment from RFC 3339, or from how long ago it was, as `2h`.

    Raises:
        click.BadParameter: it is neither.
    """
    from taskd.config.units import duration
    from taskd.model.names import instant

    if isinstance(text, datetime):
        return text
    with suppress(ValueError):
        return datetime.now(UTC) - duration(text)
    with suppress(ValueError):
        return instant(text)
    raise click.BadParameter(
        f"{text!r} must be a time like 2026-01-31T09:00:00Z, or how long ago: 90s, 2h, 7d"
    )


@click.group("jobs", cls=Group)
def jobs() -> None:
    """List and show jobs."""


@jobs.command("list")
@click.option("--type", "type_", metavar="TYPE", help="Only of this job type.")
@click.option("--status", type=click.Choice(STATUSES), help="Only in this state.")
@click.option("--tag", help="Only with this tag.")
@click.option("--unique-key", metavar="TEXT", help="Only with this unique key.")
@click.option(
    "--since", type=moment, metavar="TIME", help="Only made since then; a time, or 2h for two hours."
)
@click.option("--until", type=moment, metavar="TIME", help="Only made before then.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
@click.pass_obj
def list_(
    session: Session,
    /,
    type_: str | None,
    status: str | None,
    tag: str | None,
    unique_key: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
) -> None:
    """List the jobs of all clients, newest first."""
    from taskd.api import answers
    from taskd.cli import show
    from taskd.store import jobs as rows
    from taskd.store import types

    only = rows.Filter(type=type_, status=status, tag=tag, unique_key=unique_key, since=since, until=until)

    async def work(link: Link) -> tuple[list[Job], dict[str, tuple[str, ...]]]:
        found: list[Job] = []
        before: UUID | None = rows.LAST_ID
        while before is not None and len(found) < limit:
            most = min(limit - len(found), 200)
            page = await link.run(partial(rows.list_, client=None, only=only, before=before, limit=most))
            found += page.jobs
            before = page.before
        known = await link.run(types.known)
        return found, {one.info.name: one.info.secrets for one in known}

    found, secrets = session.serve(work)
    if session.json:
        show.echo_json([answers.job(one, secrets=secrets.get(one.type, ())) for one in found])
        return
    show.echo_table(
        ["id", "type", "status", "attempts", "created", "due", "error"],
        [
            (
                one.id,
                one.type,
                one.status.value,
                f"{one.attempts}/{one.max_attempts}",
                one.created_at,
                one.run_at,
                (one.error_message or "")[:80],
            )
            for one in found
        ],
    )


@jobs.command("show")
@click.argument("wanted", metavar="ID", type=job_id)
@json_option
@click.pass_obj
def show_(session: Session, /, wanted: UUID) -> None:
    """Show a job, its payload and result, and its runs that did not complete."""
    from taskd.api import answers
    from taskd.cli import show
    from taskd.store import jobs as rows
    from taskd.store import types

    async def work(conn: Connection) -> tuple[Job | None, tuple[str, ...]]:
        job = await rows.get(conn, wanted, client=None)
        known = [] if job is None else await types.known(conn)
        return job, next((one.info.secrets for one in known if job and one.info.name == job.type), ())

    job, secrets = session.run(work)
    if job is None:
        raise Refused("not_found", f"there is no job {wanted}")
    members = answers.job(job, secrets=secrets)
    if session.json:
        show.echo_json(members)
        return
    history = members.pop("history")
    show.echo_members({**members, "client": job.client})
    if history:
        columns = ["attempt", "cause", "node", "started_at", "ended_at", "error"]
        click.echo()
        show.echo_table(columns, [[run[name] for name in columns] for run in history])
