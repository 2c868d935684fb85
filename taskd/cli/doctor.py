"""`taskd doctor`: whether the database is one that taskd can keep its promises on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from taskd.cli.session import Command, Session, json_option
from taskd.errors import SchemaMismatch, StoreUnavailable

if TYPE_CHECKING:
    from taskd.store.nodes import ServerFacts
    from taskd.store.pool import Connection

OLDEST = 140_000
"""The oldest server, as `server_version_num` says it."""
SKEW = timedelta(seconds=2)
"""How far the clocks of this host and of the database may be apart."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `fix` says what to do when it is not `ok`."""

    name: str
    ok: bool
    found: str
    fix: str = ""


@click.command("doctor", cls=Command)
@json_option
@click.pass_context
def doctor(ctx: click.Context, /) -> None:
    """Check the database and its settings.

    Settings that could lose jobs, clock, schema; nothing is changed. Exits with 1 if a check fails, 69 if
    the database can't be reached.
    """
    from taskd.cli import show

    session = ctx.ensure_object(Session)
    config = session.config()
    checks = [Check("configuration", True, config.file)]
    unreachable = None
    try:
        checks += session.run(examine, config)
    except StoreUnavailable as error:
        unreachable = error
        checks.append(
            Check("database", False, str(error), "start the server, or correct the database section")
        )
    if session.json:
        show.echo_json({"ok": all(one.ok for one in checks), "checks": checks})
    else:
        show.echo_table(
            ["", "check", "found", "to do"],
            [("ok" if one.ok else "FAILED", one.name, one.found, one.fix) for one in checks],
        )
    if unreachable is not None:
        ctx.exit(unreachable.exit_code)
    if not all(one.ok for one in checks):
        ctx.exit(1)


async def examine(conn: Connection) -> list[Check]:
    """Return what is found on the server behind `conn`.

    Raises:
        StoreUnavailable: no answer came.
    """
    from taskd.store import health, nodes

    await nodes.server_facts(conn)  # the first statement is slow: the clock is read from the second
    before = datetime.now(UTC)
    facts = await nodes.server_facts(conn)
    after = datetime.now(UTC)
    checks = judge(facts, before, after)
    try:
        await health.check_schema(conn)
    except SchemaMismatch as error:
        checks.append(Check("schema", False, str(error), "taskd migrate"))
    else:
        checks.append(Check("schema", True, "that of this version"))
    return checks


def judge(facts: ServerFacts, before: datetime, after: datetime) -> list[Check]:
    """Return what `facts` mean, which were asked for at `before` and came at `after` by this host's clock."""
    skew = max(facts.clock - after, before - facts.clock, timedelta(0))
    standby = facts.in_recovery
    return [
        Check(
            "server version",
            facts.version >= OLDEST,
            facts.version_text,
            _unless(facts.version >= OLDEST, "PostgreSQL 14 or later"),
        ),
        _is_on("fsync", facts.fsync),
        _is_on("full_page_writes", facts.full_page_writes),
        Check(
            "synchronous_commit",
            facts.synchronous_commit != "off",
            facts.synchronous_commit,
            _unless(facts.synchronous_commit != "off", "set synchronous_commit = on for taskd's role"),
        ),
        Check(
            "tables",
            facts.persistence == "p",
            "kept over a crash" if facts.persistence == "p" else "unlogged",
            _unless(facts.persistence == "p", "alter table taskd.jobs set logged"),
        ),
        Check(
            "primary",
            not standby,
            "a standby" if standby else "yes",
            _unless(not standby, "name the primary in the database section"),
        ),
        Check(
            "writable",
            facts.read_only != "on",
            "read-only" if facts.read_only == "on" else "yes",
            _unless(facts.read_only != "on", "set default_transaction_read_only = off for taskd's role"),
        ),
        Check(
            "clock",
            skew <= SKEW,
            f"{skew.total_seconds():.3f} s apart",
            _unless(skew <= SKEW, "let NTP set the clocks of this host and of the database's"),
        ),
    ]


def _is_on(name: str, value: str) -> Check:
    return Check(name, value == "on", value, _unless(value == "on", f"set {name} = on"))


def _unless(ok: bool, fix: str) -> str:
    return "" if ok else fix
