"""Job types as nodes publish them and as the door reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from taskd.model.jobtype import TypeInfo
from taskd.store.jobs import array
from taskd.store.pool import Connection
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownType:
    """A type that was ever published: the newest publication, and those of the nodes that live now."""

    info: TypeInfo
    live: tuple[TypeInfo, ...]
    paused: bool
    paused_reason: str | None
    retired: bool


async def publish(conn: Connection, infos: Sequence[TypeInfo], *, node: int | None) -> None:
    """Publish `infos` as the newest, as what `node` accepts (None: no node), and renew the limits."""
    args = {
        "types": array(info.name for info in infos),
        "infos": array(msgspec.json.encode(info).decode() for info in infos),
        "node": node,
    }
    with store_errors():
        async with conn.transaction():
            await conn.execute(SQL["publish_types"], args)
            await conn.execute(SQL["set_limits"])


async def renew_limits(conn: Connection) -> None:
    """Set the limits anew: the strictest of the nodes that live now, after one has gone."""
    with store_errors():
        await conn.execute(SQL["set_limits"])


async def known(conn: Connection) -> list[KnownType]:
    """Return all published types."""
    with store_errors():
        cursor = await conn.execute(SQL["known_types"])
        rows = await cursor.fetchall()
    return [
        KnownType(
            info=msgspec.json.decode(info, type=TypeInfo),
            live=tuple(msgspec.json.decode(one, type=TypeInfo) for one in live),
            paused=paused,
            paused_reason=reason,
            retired=retired,
        )
        for _, info, paused, reason, retired, live in rows
    ]
