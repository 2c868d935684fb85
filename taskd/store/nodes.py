"""Rows of worker nodes and facts about the server."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from psycopg.rows import class_row

from taskd.store import leases
from taskd.store.pool import Connection
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One start of a worker daemon. `info` is JSON text: slots, busy, versions."""

    id: int
    name: str
    host: str
    pid: int
    version: str
    state: str
    started_at: datetime
    heartbeat_at: datetime
    lease_until: datetime
    ended_at: datetime | None
    info: str
    types: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """Settings of the server that decide whether an accepted job can be lost, and its clock."""

    version: int
    version_text: str
    fsync: str
    full_page_writes: str
    synchronous_commit: str
    read_only: str
    in_recovery: bool
    clock: datetime
    numbers_left: int
    """How many transactions more can write before the server refuses all until it is vacuumed."""
    persistence: str

    def unsafe(self) -> list[str]:
        """Return what makes a 2xx worth less than a promise, each with what to set; empty is safe."""
        found = []
        if self.fsync != "on":
            found.append("fsync is off: set fsync = on")
        if self.full_page_writes != "on":
            found.append("full_page_writes is off: set full_page_writes = on")
        if self.synchronous_commit == "off":
            found.append("synchronous_commit is off: set synchronous_commit = on for this role")
        if self.persistence != "p":
            found.append("a table of taskd is not permanent: alter table ... set logged")
        return found


async def register(
    conn: Connection, *, name: str, host: str, pid: int, version: str, lease: timedelta, info: str
) -> int:
    """Make a new incarnation and return its number; its lease runs from now."""
    args = {"name": name, "host": host, "pid": pid, "version": version, "lease": lease, "info": info}
    with store_errors():
        cursor = await conn.execute(SQL["register_node"], args)
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def known(conn: Connection, *, node: int, name: str, host: str, pid: int) -> bool:
    """Whether `node` is registered as alive and was made by that process of that host under that name."""
    args = {"node": node, "name": name, "host": host, "pid": pid}
    with store_errors():
        cursor = await conn.execute(SQL["known_node"], args)
        return await cursor.fetchone() is not None


@dataclass(frozen=True, slots=True)
class Beat:
    """The answer to a heartbeat, `at` by the database clock: whether some node is to be rescued."""

    at: datetime
    overdue: bool


async def heartbeat(conn: Connection, *, node: int, state: str, info: str) -> Beat | None:
    """Renew the lease; None when the node was marked dead and must start again as a new one."""
    with store_errors():
        cursor = await conn.execute(SQL["heartbeat"], {"node": node, "state": state, "info": info})
        row = await cursor.fetchone()
    return None if row is None else Beat(*row)


async def end(conn: Connection, *, node: int, lost: Collection[int] = ()) -> int:
    """Say good-bye: the node runs nothing any more and nobody needs to wait for its lease.

    What the claims in `lost` took, whose answers never came, is put back; returns how many jobs that
    were. The order counts: once the node has ended no claim of it can succeed any more.
    """
    with store_errors():
        async with conn.transaction():
            await conn.execute(SQL["node_ended"], {"node": node})
            count = 0
            if lost:
                whole = 2**32 - 2
                count, _ = await leases.put_back_unanswered(conn, node=node, claims=lost, blocks=whole)
            await conn.execute(SQL["withdraw_types"], {"node": node})
            await conn.execute(SQL["set_limits"])
    return count


async def forget(conn: Connection, *, age: timedelta) -> None:
    """Delete rows of nodes that ended longer than `age` ago."""
    with store_errors():
        await conn.execute(SQL["forget_nodes"], {"age": age})


async def list_(conn: Connection) -> list[Node]:
    """Return the nodes that live or ended within a day, newest first."""
    with store_errors():
        async with conn.cursor(row_factory=class_row(Node)) as cur:
            await cur.execute(SQL["list_nodes"])
            return await cur.fetchall()


async def server_facts(conn: Connection) -> ServerFacts:
    """Return the settings and the clock of the server."""
    with store_errors():
        async with conn.cursor(row_factory=class_row(ServerFacts)) as cur:
            await cur.execute(SQL["server_facts"], {"schema": SQL.schema})
            facts = await cur.fetchone()
    assert facts is not None
    return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """Of the server: the share of its NOTIFY queue in use, the age in seconds of the oldest snapshot.

    `held_xid` is the oldest transaction that a standby or a replication slot holds vacuum back for; nobody
    says since when.
    """

    notify_usage: float
    oldest_snapshot_s: float
    held_xid: str | None


async def timeline(conn: Connection) -> str | None:
    """Return which life of the primary this is: it changes with each failover. None on a standby."""
    with store_errors():
        cursor = await conn.execute(SQL["timeline"])
        row = await cursor.fetchone()
    assert row is not None
    return None if row[0] is None else str(row[0])


async def ping(conn: Connection, *, channel: str, text: str) -> None:
    """Notify the channel, for whoever listens there on another connection.

    Raises:
        StoreUnavailable: among others because the server's NOTIFY queue is full.
    """
    with store_errors():
        await conn.execute(SQL["ping"], {"channel": channel, "text": text})


async def vitals(conn: Connection) -> Vitals:
    """Return how the server is."""
    with store_errors():
        async with conn.cursor(row_factory=class_row(Vitals)) as cur:
            await cur.execute(SQL["vitals"])
            row = await cur.fetchone()
    assert row is not None
    return row
