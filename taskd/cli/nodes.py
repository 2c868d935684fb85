"""`taskd nodes`: the workers, as they report themselves."""

from __future__ import annotations

import click

from taskd.cli.session import Group, Session, json_option


@click.group("nodes", cls=Group)
def nodes() -> None:
    """List worker nodes."""


@nodes.command("list")
@json_option
@click.pass_obj
def list_(session: Session, /) -> None:
    """List the nodes that live, and those that ended within a day; newest first."""
    from taskd.api.answers import moment, raw
    from taskd.cli import show
    from taskd.store import nodes

    found = session.run(nodes.list_)
    if session.json:
        show.echo_json(
            [
                {
                    "id": one.id,
                    "name": one.name,
                    "host": one.host,
                    "pid": one.pid,
                    "version": one.version,
                    "state": one.state,
                    "started_at": moment(one.started_at),
                    "heartbeat_at": moment(one.heartbeat_at),
                    "lease_until": moment(one.lease_until),
                    "ended_at": moment(one.ended_at),
                    "info": raw(one.info),
                    "types": list(one.types),
                }
                for one in found
            ]
        )
        return
    show.echo_table(
        ["id", "name", "state", "host", "pid", "version", "started", "heartbeat", "types"],
        [
            (
                one.id,
                one.name,
                one.state,
                one.host,
                one.pid,
                one.version,
                one.started_at,
                one.heartbeat_at,
                one.types,
            )
            for one in found
        ],
    )
