"""Connections to Postgres: made with safe settings, watched by a deadline, made again when they break.

A psycopg await is never cancelled (its cancel request can turn a commit that was not replicated into a
false success): a deadline shuts the socket down instead, and the statement ends with an error.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import socket
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo
from psycopg.rows import TupleRow

from taskd.errors import BadRow, OutcomeUnknown, StoreUnavailable, Unforeseen
from taskd.store.sqlstate import closes, store_errors

Connection = psycopg.AsyncConnection[TupleRow]
T = TypeVar("T")

CONNECT_TIMEOUT_S = 5
MAX_AGE_S = 600.0
"""A connection is made anew at this age, so that a moved server address is noticed."""
READ_ONLY_AGE_S = 5.0
"""The same for one to a server that takes no writes: the primary may be elsewhere by now."""

_NOT_REPLICATED = "wait for synchronous replication"
_REPLICATION_WAIT = "SyncRepWaitForLSN"
"""The function of the server that gives that warning: the same in every language of messages."""
_KEEPALIVE = {
    "keepalives_idle": "3",
    "keepalives_interval": "2",
    "keepalives_count": "2",
    "tcp_user_timeout": "4000",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to connect; `url` may name several hosts, the primary among them is taken."""

    url: str
    application: str = "taskd"
    statement_timeout_s: float = 5.0

    def parameters(self, *, options: bool = True) -> dict[str, Any]:
        """Return libpq's parameters; `options` False for a pooler that refuses them."""
        given = conninfo.conninfo_to_dict(self.url)
        wanted: dict[str, Any] = {**_KEEPALIVE, "connect_timeout": CONNECT_TIMEOUT_S}
        wanted["application_name"] = self.application
        if "," in str(given.get("host", "")):
            wanted["target_session_attrs"] = "read-write"
        wanted.update({key: value for key, value in given.items() if value is not None})
        if options:
            ours = f"-c jit=off -c statement_timeout={round(self.statement_timeout_s * 1000)}"
            wanted["options"] = f"{ours} {wanted.get('options', '')}".strip()
        return wanted


async def connect(target: Target) -> Connection:
    """Open one connection in autocommit mode.

    Prepared statements stay off: poolers in transaction mode lose them, and the hot statements are
    functions whose plans the server keeps anyway.

    Raises:
        StoreUnavailable: no connection within `CONNECT_TIMEOUT_S`.
    """
    with store_errors():
        try:
            return await _open(target.parameters())
        except psycopg.OperationalError as error:
            if "unsupported startup parameter" not in str(error):
                raise
            return await _open(target.parameters(options=False))


async def _open(parameters: dict[str, Any]) -> Connection:
    conn: Connection = await psycopg.AsyncConnection.connect(
        **parameters, autocommit=True, prepare_threshold=None
    )
    return conn


class NotConnected(StoreUnavailable):
    """There was no connection: nothing was sent, so nothing can have been done."""


def may_be_done(error: StoreUnavailable | BadRow | Unforeseen) -> bool:
    """Whether what failed with `error` may have been committed all the same."""
    if isinstance(error, NotConnected | BadRow | Unforeseen):
        return False
    cause = error.__cause__
    refused = isinstance(cause, psycopg.Error) and cause.sqlstate is not None and not closes(cause)
    return not refused or isinstance(error, OutcomeUnknown)


class Pace:
    """When the next connect of this process may begin; one for all of its links.

    At most `MOST` connects begin within any `WITHIN_S`, those of links that never failed among them. Only
    the very first one of each link does not wait, for a process that starts must not be slow, unless the
    server is known to be away. Between the tries of one link lies full jitter, 0.1 s to 5 s; it is cut
    short when another link to the same place has been answered, for then the server is back.
    """

    MOST = 2
    WITHIN_S = 1.01
    """A second, and a little: who counts them elsewhere sees them closer together than they were begun."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, dice: random.Random | None = None
    ) -> None:
        self._clock = clock
        self._dice = dice or random.Random()
        self._begun: deque[float] = deque(maxlen=self.MOST)
        self._answered: dict[str, float] = {}
        self._away: set[str] = set()
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()

    def join(self, link: Link) -> None:
        """Take in a link that connects at this pace."""
        self._links.add(link)

    def demoted(self, url: str) -> None:
        """Have all links leave the server behind `url`: it was the primary, and takes no writes any more.

        Those that only read or listen would not notice, and go on believing what it says.
        """
        for link in list(self._links):
            if link.url == url:
                link.leave()

    @property
    def wait_s(self) -> float:
        """Seconds until another connect may begin; 0 when it is now."""
        if len(self._begun) < self.MOST:
            return 0.0
        return max(0.0, self._begun[0] + self.WITHIN_S - self._clock())

    def book(self, *, at_once: bool = False) -> float:
        """Book a connect; return the seconds after which it begins. Those booked earlier come first."""
        wait_s = 0.0 if at_once else self.wait_s
        self._begun.append(self._clock() + wait_s)
        return wait_s

    def jitter_s(self, failures: int) -> float:
        """Return how long a link waits after `failures` failures in a row before it tries again."""
        return self._dice.uniform(0.1, min(5.0, 0.1 * 2.0 ** min(failures, 10)))

    def answered(self, url: str) -> None:
        """Note that the server behind `url` has answered on a new connection, or again after failures."""
        self._answered[url] = self._clock()
        self._away.discard(url)

    def failed(self, url: str) -> None:
        """Note that the server behind `url` could not be reached, or went away."""
        self._away.add(url)

    def is_away(self, url: str) -> bool:
        """Whether the last that was heard of the server behind `url` is that it can't be reached."""
        return url in self._away

    def answered_since(self, url: str, at: float) -> bool:
        """Whether the server behind `url` has answered anybody here after `at`."""
        return self._answered.get(url, -math.inf) > at

    def now(self) -> float:
        """Return the time by this pace's clock."""
        return self._clock()


class Link:
    """One connection for one kind of work, made again when it breaks; owned by one task at a time."""

    def __init__(self, target: Target, pace: Pace, *, deadline_s: float = 5.0) -> None:
        self._target = target
        self._pace = pace
        self._deadline_s = deadline_s
        self._conn: Connection | None = None
        self._born = 0.0
        self._failures = 0
        self._unreplicated = False
        self._aborted = False
        self._fresh = True
        """The connection has not answered yet, or has failed since it last did."""
        self._writable = True
        """Whether its server took writes when the connection was made."""
        self._leaving = False
        """The connection is not to be used again."""
        self._first = True
        """It has never tried to connect."""
        self._failed_at = 0.0
        self._retry_at = 0.0
        self._turn = asyncio.Lock()
        self.on_connect: Callable[[Connection], Awaitable[None]] | None = None
        """Called with each new connection before anything else uses it (`LISTEN`)."""
        self.on_use: Callable[[], None] | None = None
        """Called before each use: whoever reads the idle connection lets go of it."""
        pace.join(self)

    @property
    def url(self) -> str:
        """Where it connects."""
        return self._target.url

    @property
    def failures(self) -> int:
        """Failures in a row; 0 while all is well."""
        return self._failures

    @property
    def connected(self) -> bool:
        """Whether a connection is open, as far as is known."""
        return self._conn is not None and not self._conn.closed and not self._leaving

    @property
    def busy(self) -> bool:
        """Whether somebody is using the connection or making it."""
        return self._turn.locked()

    async def run(self, work: Callable[[Connection], Awaitable[T]], *, deadline_s: float | None = None) -> T:
        """Run `work` on the connection; further callers wait for their turn.

        Raises:
            StoreUnavailable: no connection could be made, it broke, or `deadline_s` (default: that of
                the link) passed. What was sent may have been done.
            OutcomeUnknown: the server said that it gave up replicating what was committed.
            BadRow: Postgres refused a row for its content; the connection is fine.
            Unforeseen: Postgres refused the statement for a reason that nobody thought of; as `BadRow`.
        """
        async with self._turn:
            return await self._run(work, self._deadline_s if deadline_s is None else deadline_s)

    async def _run(self, work: Callable[[Connection], Awaitable[T]], deadline_s: float) -> T:
        if self.on_use is not None:
            self.on_use()
        conn = await self._ready(deadline_s)
        self._unreplicated = False
        self._aborted = False
        timer = asyncio.get_running_loop().call_later(deadline_s, self._abort, conn)
        try:
            with store_errors():
                answer = await work(conn)
        except StoreUnavailable as error:
            cause = error.__cause__
            if conn.closed or self._aborted or not isinstance(cause, psycopg.Error) or closes(cause):
                self._failed()
                await self.close()
            if isinstance(cause, psycopg.errors.ReadOnlySqlTransaction):
                self._pace.demoted(self.url)
            if self._unreplicated:
                raise OutcomeUnknown("the server gave up replicating; the outcome is unknown") from error
            if self._aborted:
                raise StoreUnavailable(f"Postgres did not answer within {deadline_s:g} s") from error
            raise
        except BaseException:
            # Left in the middle of a statement, by a defect or by the loop's end: not to be used again.
            if conn.pgconn.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                await self.close()
            raise
        finally:
            timer.cancel()
        if self._fresh:
            self._fresh = False
            self._failures = 0
            self._pace.answered(self._target.url)
        self._look_at_role(conn)
        if self._unreplicated:
            raise OutcomeUnknown("the server gave up replicating; the outcome is unknown")
        return answer

    async def _ready(self, deadline_s: float) -> Connection:
        conn = self._conn
        if conn is not None and not conn.closed and not self._leaving:
            if time.monotonic() - self._born <= MAX_AGE_S or self._pace.wait_s:
                return conn
            await self.close()
        at_once = self._first and not self._pace.is_away(self._target.url)
        if not at_once and (self.wait_s or self._pace.wait_s > deadline_s / 2):
            raise NotConnected("Postgres is not reachable; trying again shortly")
        await self.close()
        self._first = False
        await asyncio.sleep(self._pace.book(at_once=at_once))
        try:
            self._conn = await self._connect(deadline_s)
        except StoreUnavailable as error:
            self._failed()
            raise NotConnected(str(error)) from error
        except Unforeseen:
            self._failed()
            raise
        self._born = time.monotonic()
        self._fresh = True
        self._leaving = False
        self._writable = not takes_no_writes(self._conn)
        return self._conn

    async def _connect(self, deadline_s: float) -> Connection:
        conn = await connect(self._target)
        conn.add_notice_handler(self._noticed)
        if self.on_connect is not None:
            # A server that froze just now answers the connect and nothing after it.
            timer = asyncio.get_running_loop().call_later(deadline_s, shut, conn)
            try:
                with store_errors():
                    await self.on_connect(conn)
            except BaseException:
                await conn.close()
                raise
            finally:
                timer.cancel()
        return conn

    def _look_at_role(self, conn: Connection) -> None:
        """Leave a server that was demoted under this connection, and after a while one that was all along."""
        if not takes_no_writes(conn):
            return
        if self._writable:
            self._pace.demoted(self.url)
        elif time.monotonic() - self._born > READ_ONLY_AGE_S:
            self._leaving = True

    def leave(self) -> None:
        """Never use the present connection again; an idle one ends now, another with its statement."""
        self._leaving = True
        if self._conn is not None and not self.busy:
            shut(self._conn)

    @property
    def wait_s(self) -> float:
        """Seconds until a connect is worth trying again; 0 when it is now."""
        if self._pace.answered_since(self._target.url, self._failed_at):
            return 0.0
        return max(0.0, self._retry_at - self._pace.now())

    def _failed(self) -> None:
        self._fresh = True
        self._failures += 1
        self._failed_at = self._pace.now()
        self._pace.failed(self._target.url)
        self._retry_at = self._failed_at + self._pace.jitter_s(self._failures)

    def _noticed(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.source_function == _REPLICATION_WAIT or _NOT_REPLICATED in (notice.message_primary or ""):
            self._unreplicated = True

    def abort(self) -> None:
        """End the statement that is under way, if any, without a cancel request."""
        if self._conn is not None:
            shut(self._conn)

    def _abort(self, conn: Connection) -> None:
        self._aborted = True
        shut(conn)

    async def renew(self) -> None:
        """Have the next `run` make a new connection; who is using this one ends first."""
        async with self._turn:
            if self.on_use is not None:
                self.on_use()
            await self.close()

    async def close(self) -> None:
        """Close the connection if there is one; the next `run` makes a new one. Nobody may be using it."""
        conn, self._conn = self._conn, None
        if conn is not None:
            await conn.close()


def takes_no_writes(conn: Connection) -> bool:
    """Whether the server has said, with an earlier answer, that it is a standby or refuses writes."""
    said = conn.pgconn.parameter_status
    return b"on" in (said(b"in_hot_standby"), said(b"default_transaction_read_only"))


def shut(conn: Connection) -> None:
    """End whatever `conn` waits for by shutting its socket down; safe at any moment."""
    try:
        twin = socket.socket(fileno=os.dup(conn.fileno()))
    except (psycopg.Error, OSError):
        return
    with twin, suppress(OSError):
        twin.shutdown(socket.SHUT_RDWR)
