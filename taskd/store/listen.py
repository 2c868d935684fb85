"""Hints from other processes: NOTIFY on the channel of the schema. A hint lost costs a poll, nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psycopg
from psycopg import sql

from taskd.store.pool import Connection
from taskd.store.queries import SQL


def channel() -> str:
    """Return the channel's name: that of the schema."""
    return SQL.schema


class Ears:
    """Hears hints on an idle connection. Arm it between statements, disarm it before the next one."""

    def __init__(
        self,
        hear: Callable[[str], None],
        broken: Callable[[], None],
        name: Callable[[], str] = channel,
    ) -> None:
        """`hear` gets each hint's text; `broken` is called once when the connection ends.

        `name` gives the channel's name, when it connects.
        """
        self._hear = hear
        self._broken = broken
        self._name = name
        self._conn: Connection | None = None
        self._fd = -1

    async def listen(self, conn: Connection) -> None:
        """Start listening on a new connection (`Link.on_connect`)."""
        conn.add_notify_handler(lambda note: self._hear(note.payload))
        await conn.execute(sql.SQL("listen {}").format(sql.Identifier(self._name())))
        self._conn = conn

    def arm(self) -> None:
        """Call back when a hint comes in, as long as no statement runs."""
        conn = self._conn
        if conn is None or conn.closed:
            return
        self._fd = conn.fileno()
        asyncio.get_running_loop().add_reader(self._fd, self._readable, conn)
        # What came in with the last answer is in libpq's buffer already and makes nothing readable.
        self._drain(conn)

    def disarm(self) -> None:
        """Leave the connection to a statement."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._fd = -1

    def _readable(self, conn: Connection) -> None:
        try:
            conn.pgconn.consume_input()
        except psycopg.Error:
            self.disarm()
            self._conn = None
            self._broken()
            return
        self._drain(conn)

    def _drain(self, conn: Connection) -> None:
        while (note := conn.pgconn.notifies()) is not None:
            self._hear(note.extra.decode(errors="replace"))
