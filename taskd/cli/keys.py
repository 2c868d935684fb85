"""`taskd keys`: the API keys, made, changed, rotated and revoked on the database itself."""

from __future__ import annotations

import getpass
import secrets
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from taskd.cli.session import ANSWER_S, Group, Session, json_option

if TYPE_CHECKING:
    from taskd.service.keys import Actor, Keys

T = TypeVar("T")

_expires = click.option(
    "--expires",
    "--expires-at",
    "expires_at",
    metavar="WHEN",
    help="From now, like 90d, or a time, like 2027-01-31T00:00:00Z.",
)


@click.group("keys", cls=Group)
def keys() -> None:
    """Make, list, change, rotate and revoke API keys."""


@keys.command("create")
@click.argument("name")
@click.option("--description", metavar="TEXT")
@click.option("--prefix", metavar="TEXT", help="What the key begins with (default: tk).")
@click.option("--client", metavar="ID", help="The client that the key belongs to (default: a new one).")
@click.option("--scope", "scopes", multiple=True, help="jobs:write, jobs:read or jobs:cancel; repeatable.")
@click.option("--type", "types", multiple=True, help="A job type that it may use; repeatable (default: all).")
@click.option("--rate", type=float, help="Requests a second.")
@click.option("--burst", type=int, help="Requests that may come at once.")
@click.option("--max-pending", type=int, help="Jobs of its client that may wait.")
@_expires
@json_option
@click.pass_obj
def create(
    session: Session,
    /,
    name: str,
    scopes: tuple[str, ...],
    types: tuple[str, ...],
    **given: str | float | None,
) -> None:
    """Make an API key called NAME and print it: this once, since only its digest is stored."""
    from taskd.api import answers
    from taskd.cli import show
    from taskd.service.keyask import read_key

    now = datetime.now(UTC)
    ask = read_key({"name": name, **_body(now, scopes, types, given)}, now=now)
    stored, text = _served(session, lambda keys, actor, until: keys.create(ask, actor, until))
    if session.json:
        show.echo_json(answers.new_key(stored, text))
        return
    click.echo(text)
    click.echo(f"key {stored.id} of client {stored.client}; save it now, it is never shown again", err=True)


@keys.command("list")
@json_option
@click.pass_obj
def list_(session: Session, /) -> None:
    """List all keys, newest first; revoked and expired ones too."""
    from taskd.api import answers
    from taskd.cli import show

    found = _served(session, lambda keys, actor, until: keys.list_(until))
    if session.json:
        show.echo_json([answers.key(one) for one in found])
        return
    show.echo_table(
        ["id", "name", "public id", "state", "scopes", "created", "last used", "expires"],
        [
            (
                one.id,
                one.name,
                f"{one.prefix}-{one.public_id}",
                "live" if one.live else "revoked" if one.revoked_at is not None else "expired",
                one.scopes,
                one.created_at,
                one.last_used_at,
                one.expires_at,
            )
            for one in found
        ],
    )


@keys.command("show")
@click.argument("key_id", metavar="ID", type=click.UUID)
@json_option
@click.pass_obj
def show_(session: Session, /, key_id: UUID) -> None:
    """Show one key and its limits."""
    from taskd.api import answers
    from taskd.cli import show

    members = answers.key(_served(session, lambda keys, actor, until: keys.get(key_id, until)))
    if session.json:
        show.echo_json(members)
    else:
        show.echo_members(members)


@keys.command("change")
@click.argument("key_id", metavar="ID", type=click.UUID)
@click.option("--name", metavar="TEXT")
@click.option("--description", metavar="TEXT")
@click.option("--scope", "scopes", multiple=True, help="jobs:write, jobs:read or jobs:cancel; repeatable.")
@click.option("--type", "types", multiple=True, help="A job type that it may use; repeatable.")
@click.option("--rate", type=float, help="Requests a second.")
@click.option("--burst", type=int, help="Requests that may come at once.")
@click.option("--max-pending", type=int, help="Jobs of its client that may wait.")
@_expires
@click.option(
    "--clear",
    "cleared",
    multiple=True,
    type=click.Choice(["description", "types", "rate", "burst", "max_pending", "expires_at"]),
    help="Set back to what a key has without it; repeatable.",
)
@json_option
@click.pass_obj
def change(
    session: Session,
    /,
    key_id: UUID,
    scopes: tuple[str, ...],
    types: tuple[str, ...],
    cleared: tuple[str, ...],
    **given: str | float | None,
) -> None:
    """Change what a key may do: within 2 seconds every API goes by it.

    What no option names stays as it is; --scope and --type replace the whole list.
    """
    from taskd.api import answers
    from taskd.cli import show
    from taskd.service.keyask import read_change

    now = datetime.now(UTC)
    body = _body(now, scopes, types, given)
    limit = body.get("rate_limit", {})
    for member in cleared:
        if member in body or member in limit:
            raise click.UsageError(f"{member} is both set and cleared")
        if member in ("rate", "burst"):
            limit = body["rate_limit"] = {**limit, member: None}
        else:
            body[member] = None
    if not body:
        raise click.UsageError("nothing to change was given")
    members = read_change(body, now=now)
    stored = _served(session, lambda keys, actor, until: keys.change(key_id, members, actor, until))
    if session.json:
        show.echo_json(answers.key(stored))
    else:
        show.echo_members(answers.key(stored))


@keys.command("rotate")
@click.argument("key_id", metavar="ID", type=click.UUID)
@click.option("--overlap", metavar="SPAN", help="How long the old key goes on, like 24h (the default) or 0s.")
@_expires
@json_option
@click.pass_obj
def rotate(session: Session, /, key_id: UUID, overlap: str | None, expires_at: str | None) -> None:
    """Make a key in place of another one of the same client, and print it: this once.

    The old key goes on until the overlap is over. The new one has its rights and limits; without
    --expires it lives as long as the old one was made for.
    """
    from taskd.api import answers
    from taskd.cli import show
    from taskd.service.keyask import read_rotate

    now = datetime.now(UTC)
    body = {"overlap": overlap, "expires_at": None if expires_at is None else _when(expires_at, now)}
    ask = read_rotate({name: value for name, value in body.items() if value is not None}, now=now)
    stored, text, old = _served(session, lambda keys, actor, until: keys.rotate(key_id, ask, actor, until))
    if session.json:
        show.echo_json(answers.rotated_key(stored, text, old))
        return
    click.echo(text)
    click.echo(
        f"key {stored.id} in place of {old.id}, which ends at {show.cell(old.expires_at)}; "
        "save it now, it is never shown again",
        err=True,
    )


@keys.command("revoke")
@click.argument("key_id", metavar="ID", type=click.UUID)
@json_option
@click.pass_obj
def revoke(session: Session, /, key_id: UUID) -> None:
    """Revoke a key: within 2 seconds no API takes it any more."""
    from taskd.api import answers
    from taskd.cli import show

    stored = _served(session, lambda keys, actor, until: keys.revoke(key_id, actor, until))
    if session.json:
        show.echo_json(answers.key(stored))
    else:
        click.echo(f"key {stored.id} ({show.cell(stored.name)}) is revoked")


def _body(
    now: datetime, scopes: tuple[str, ...], types: tuple[str, ...], given: Mapping[str, str | float | None]
) -> dict[str, Any]:
    """Return what options say as the body of a request."""
    body: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    limit = {name: body.pop(name) for name in ("rate", "burst") if name in body}
    if limit:
        body["rate_limit"] = limit
    if "expires_at" in body:
        body["expires_at"] = _when(body["expires_at"], now)
    return body | {name: list(value) for name, value in (("scopes", scopes), ("types", types)) if value}


def _when(text: str, now: datetime) -> str:
    """Return the time that `text` names; a span counts from `now`."""
    from taskd.api.answers import moment
    from taskd.model import units

    try:
        return moment(now + timedelta(seconds=units.duration(text))) or text
    except ValueError:
        return text  # a time, or what the reader of the body refuses


def _served(session: Session, ask: Callable[[Keys, Actor, float], Awaitable[T]]) -> T:
    """Return what `ask` gets from the service; it is given the service, who asks, and until when."""
    import asyncio

    from taskd.service.batch import Reads
    from taskd.service.keys import Actor, Keys
    from taskd.store.pool import Link

    config = session.config(need_pepper=True)

    async def work(link: Link) -> T:
        served = Keys(
            Reads(link),
            pepper=config.tree.keys.pepper,
            now=lambda: datetime.now(UTC),
            dice=secrets.token_bytes,
        )
        until = asyncio.get_running_loop().time() + ANSWER_S
        return await ask(served, Actor(name=f"cli:{_user()}"), until)

    return session.serve(work, config)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user id without a name
        return "unknown"
