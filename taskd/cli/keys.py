"""`taskd keys`: the API keys, made and revoked on the database itself."""

from __future__ import annotations

import getpass
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import click

from taskd.cli.session import ANSWER_S, Group, Session, json_option

if TYPE_CHECKING:
    from taskd.service.keys import Actor, Keys

T = TypeVar("T")


@click.group("keys", cls=Group)
def keys() -> None:
    """Make, list and revoke API keys."""


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
@click.option("--expires-at", metavar="TIME", help="Like 2027-01-31T00:00:00Z.")
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

    limit = {name: given.pop(name) for name in ("rate", "burst") if given[name] is not None}
    body: dict[str, object] = {
        "name": name,
        **{key: value for key, value in given.items() if value is not None},
    }
    body |= {key: list(value) for key, value in (("scopes", scopes), ("types", types)) if value}
    if limit:
        body["rate_limit"] = limit
    ask = read_key(body, now=datetime.now(UTC))
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
