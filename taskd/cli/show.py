"""How answers look: aligned text for people, JSON for programs. No cell can disturb a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import click
import msgspec

from taskd.api.answers import moment
from taskd.obs.log import safe

NOTHING = "-"


def echo_json(value: Any) -> None:
    """Write `value` as JSON, indented; `msgspec.Raw` members stand as they are."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def echo_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows under their columns' names, in capitals."""
    click.echo(table(columns, rows))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a plain table: columns as wide as their widest cell, two spaces apart.

    >>> print(table(["name", "jobs"], [["mail", 3], ["x", None]]))
    NAME  JOBS
    mail  3
    x     -
    """
    lines = [[column.upper() for column in columns], *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def echo_members(members: Mapping[str, object]) -> None:
    """Write one thing, a member a line; members without a value are left out."""
    shown = {name: cell(value) for name, value in members.items() if value not in (None, "", [], (), {})}
    width = max(map(len, shown), default=0) + 1
    for name, text in shown.items():
        click.echo(f"{name + ':':<{width}} {text}")


def cell(value: object) -> str:
    """Return `value` on one line, without control characters."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, datetime):
        return moment(value) or NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, msgspec.Raw):
        return safe(bytes(value).decode())
    if isinstance(value, Mapping):
        return safe(msgspec.json.encode(value).decode())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(cell, value)) or NOTHING
    return safe(str(value))
