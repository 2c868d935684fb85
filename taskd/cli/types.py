"""`taskd types`: the job types that nodes have published."""

from __future__ import annotations

from typing import Any

import click

from taskd.cli.session import Group, Session, json_option
from taskd.errors import Refused


@click.group("types", cls=Group)
def types() -> None:
    """List and show job types."""


@types.command("list")
@json_option
@click.pass_obj
def list_(session: Session, /) -> None:
    """List the job types that were published, and how many workers run each."""
    from taskd.cli import show

    found = _known(session)
    if session.json:
        show.echo_json(found)
        return
    columns = ["type", "workers_online", "state", "timeout", "plugin", "description"]
    show.echo_table(
        [column.replace("_", " ") for column in columns],
        [
            [
                one["type"],
                one["workers_online"],
                _state(one),
                f"{one['timeout']:g}s",
                one["plugin"],
                (one["description"].splitlines() or [""])[0],
            ]
            for one in found
        ],
    )


@types.command("show")
@click.argument("type_", metavar="TYPE")
@json_option
@click.pass_obj
def show_(session: Session, /, type_: str) -> None:
    """Show a job type: its limits, the JSON Schema of its payload, an example."""
    from taskd.cli import show

    found = next((one for one in _known(session) if one["type"] == type_), None)
    if found is None:
        raise Refused("not_found", f"no job type {show.cell(type_)} was ever published")
    if session.json:
        show.echo_json(found)
    else:
        show.echo_members(found)


def _known(session: Session, /) -> list[dict[str, Any]]:
    import msgspec

    from taskd.store.types import known

    found = []
    for one in session.run(known):
        info = msgspec.to_builtins(one.info) | {
            "description": one.info.description,
            "enabled": one.info.enabled,
        }
        del info["name"]
        found.append(
            {
                "type": one.info.name,
                "workers_online": len(one.live),
                "paused": one.paused,
                "paused_reason": one.paused_reason,
                "retired": one.retired,
                "timeout": one.info.timeout,
                "max_attempts": one.info.retry.max_attempts,
                **info,
            }
        )
    return found


def _state(one: dict[str, Any]) -> str:
    if one["retired"]:
        return "retired"
    return "paused" if one["paused"] else "on" if one["enabled"] else "off"
