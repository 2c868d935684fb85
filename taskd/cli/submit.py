"""`taskd submit`: a job by hand, with the checks of the HTTP door."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskd.cli.session import ANSWER_S, Command, Session

if TYPE_CHECKING:
    from taskd.model.job import Job, NewJob
    from taskd.service.jobs import Submitted
    from taskd.store.pool import Link

EX_TEMPFAIL = 75
LOOK_S = 3600.0


def span(text: str | float) -> float:
    """Return a time span in seconds, from a number of them or from one with its unit, as `5m`.

    Raises:
        click.BadParameter: it is neither.
    """
    from taskd.config.units import duration

    if isinstance(text, float):
        return text
    with suppress(ValueError):
        if math.isfinite(seconds := float(text)):
            return seconds
    with suppress(ValueError):
        return duration(text) / timedelta(seconds=1)
    raise click.BadParameter(f"{text!r} must be a number of seconds, or a time like 90s, 5m, 2h")


@click.command("submit", cls=Command)
@click.argument("type_", metavar="TYPE")
@click.option(
    "-p", "params", metavar="NAME=VALUE", multiple=True, help="A member of the payload; repeatable."
)
@click.option("--json", "source", metavar="JSON|@FILE|-", help="The payload as JSON; - reads standard input.")
@click.option("--priority", type=int, help="-100 to 100; higher runs first.")
@click.option("--delay", type=span, metavar="SECONDS", help="Not before this has passed; 90 or 5m.")
@click.option("--run-at", metavar="TIME", help="Not before this, like 2027-01-31T09:00:00Z.")
@click.option("--max-attempts", type=int)
@click.option("--timeout", type=span, metavar="SECONDS", help="How long a run may take.")
@click.option("--expires-in", type=span, metavar="SECONDS", help="Failed if it has not started by then.")
@click.option("--unique-key", metavar="TEXT", help="A second submit with it is answered with the first job.")
@click.option("--tag", "tags", multiple=True, help="Repeatable.")
@click.option(
    "--wait",
    type=span,
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=math.inf,
    help="Wait for the end of the job, for ever or so long, and print what became of it.",
)
@click.pass_context
def submit(
    ctx: click.Context,
    /,
    type_: str,
    params: tuple[str, ...],
    source: str | None,
    tags: tuple[str, ...],
    wait: float | None,
    **options: str | float | None,
) -> None:
    """Submit a job of TYPE.

    Its payload is made of -p members, or given whole by --json. A VALUE that is JSON is taken as such (-p
    n=3 -p ok=true), anything else as text. For an answer in JSON write `taskd --json submit ...`. Exits
    with 1 if the job that was waited for did not complete, and with 75 if it has not ended yet.
    """
    session = ctx.ensure_object(Session)
    body = _body(type_, _payload(params, source), tags, options)
    receipt, job = session.serve(lambda link: _submit(link, body, wait))
    _show(session, receipt, job)
    if job is not None and not job.status.final:
        click.echo(f"taskd: job {job.id} goes on: it is {job.status.value}", err=True)
        ctx.exit(EX_TEMPFAIL)
    if job is not None and job.status.value != "completed":
        ctx.exit(1)


def _payload(params: Sequence[str], source: str | None) -> bytes:
    """Return the JSON text of the payload, as it was given or made of `params`.

    Raises:
        click.UsageError: it is given in both ways, or a member has no `=`.
    """
    if source is None:
        return json.dumps(dict([_member(param) for param in params])).encode()
    if params:
        raise click.UsageError("give the payload by -p or by --json, not by both")
    if source == "-":
        return sys.stdin.buffer.read()
    if source.startswith("@"):
        try:
            return Path(source[1:]).read_bytes()
        except OSError as error:
            raise click.UsageError(f"{source[1:]}: {error.strerror}") from None
    return source.encode("utf-8", "surrogateescape")


def _member(param: str) -> tuple[str, Any]:
    name, equals, value = param.partition("=")
    if not equals or not name:
        raise click.UsageError(f"-p {param}: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _body(
    type_: str, payload: bytes, tags: Sequence[str], options: Mapping[str, str | float | None]
) -> bytes:
    """Return the body that `POST /jobs` would get for this.

    Raises:
        Refused: the payload is no JSON.
    """
    import msgspec

    from taskd.model.payload import parse

    parse(payload, above=0)  # alone first: a `}` in it must not end our object
    members: dict[str, object] = {"type": type_, "payload": msgspec.Raw(payload)}
    members |= {name: value for name, value in options.items() if value is not None}
    if tags:
        members["tags"] = list(tags)
    return msgspec.json.encode(members)


async def _submit(link: Link, body: bytes, wait_s: float | None) -> tuple[Submitted, Job | None]:
    from taskd.model.job import COMMAND_LINE
    from taskd.model.payload import parse, payload_text
    from taskd.model.submit import read_submit
    from taskd.service.batch import Reads
    from taskd.service.bulk import Bulks
    from taskd.service.jobs import Jobs
    from taskd.service.submitter import Submitter
    from taskd.service.types import KnownTypes
    from taskd.service.waiting import Waiting
    from taskd.store import jobs as rows
    from taskd.store.listen import channel

    loop = asyncio.get_running_loop()
    stored: list[NewJob] = []
    reads = Reads(link)
    jobs = Jobs(
        types=KnownTypes(reads),
        submitter=Submitter([link], stored=stored.extend),
        bulks=Bulks([link], stored=stored.extend),
        reads=reads,
        waiting=Waiting(reads),
        now=lambda: datetime.now(UTC),
        dice=secrets.token_bytes,
    )
    parsed = parse(body)
    ask = read_submit(parsed, now=datetime.now(UTC))
    text = payload_text(body, parsed["payload"])
    until = loop.time() + ANSWER_S
    receipt = await jobs.submit(ask, text, client=COMMAND_LINE, only=None, until=until)
    if stored:
        lanes = {(job.type, job.priority) for job in stored}
        await link.run(lambda conn: rows.notify(conn, channel(), lanes))
    if wait_s is None:
        return receipt, None
    until = loop.time() + wait_s
    while True:
        await jobs.waiting.wait(receipt.id, min(until - loop.time(), LOOK_S))
        job = await jobs.show(receipt.id, client=COMMAND_LINE, only=None, until=loop.time() + ANSWER_S)
        if job.status.final or loop.time() >= until:
            return receipt, job


def _show(session: Session, receipt: Submitted, job: Job | None) -> None:
    from taskd.api import answers
    from taskd.cli import show

    if session.json:
        show.echo_json(answers.submitted(receipt) if job is None else answers.job(job))
        return
    for warning in receipt.warnings:
        click.echo(f"taskd: warning: {_WARNINGS.get(warning, warning)}", err=True)
    if receipt.duplicate:
        click.echo("taskd: this job was submitted before", err=True)
    if job is None:
        click.echo(str(receipt.id))
        return
    members = {"id": job.id, "status": job.status.value, "error": job.error_message}
    show.echo_members({**members, "result": answers.raw(job.result)})


_WARNINGS = {"no_worker": "no worker that lives runs this job type; the job waits until one comes"}
