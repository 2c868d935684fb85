"""The PostgreSQL that a whole run is measured on: its own, with safe settings, removed at the end."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from bench.procs import cpu_s, family
from taskd.embedded import EmbeddedPG

SETTINGS = (
    "shared_buffers=256MB",
    "max_wal_size=4GB",
    "max_connections=300",
    "log_min_messages=fatal",
    "log_line_prefix=%a|%v|",
    "log_parameter_max_length=0",
)
"""Of the server; fsync, full_page_writes and synchronous_commit stay on."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running server."""

    folder: Path
    server: EmbeddedPG

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        return self.server.url(database)

    def fresh(self, database: str) -> str:
        """Make a database anew and return its URL."""
        name = sql.Identifier(database)
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(name))
            conn.execute(sql.SQL("create database {}").format(name))
        return self.url(database)

    def drop(self, database: str) -> None:
        """Remove a database, with whoever is connected to it."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(database)))

    def settle(self) -> None:
        """Write out what earlier measurements left dirty, so that the next one doesn't pay for it."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute("checkpoint")

    def cpu_s(self) -> float:
        """Return the CPU seconds that the server has used, ended backends included."""
        pid = int((self.server.data / "postmaster.pid").read_text().split()[0])
        return cpu_s(family(pid))

    def version(self) -> str:
        """Return the server's version."""
        with psycopg.connect(self.url("postgres")) as conn:
            return str(conn.execute("select current_setting('server_version')").fetchall()[0][0])


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a server in a scratch folder while the block runs; remove all of it."""
    folder = Path(tempfile.mkdtemp(prefix="taskd-bench-"))
    folder.chmod(0o755)  # as root the server runs as another account
    try:
        with EmbeddedPG(folder / "pg", settings=SETTINGS, prefer="system") as server:
            yield Cluster(folder, server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_LINE = re.compile(
    r"^(?P<application>[^|\n]*)\|(?P<transaction>[^|]*)\|LOG:  duration: (?P<ms>[0-9.]+) ms  (?P<text>.*)"
)


@dataclass(frozen=True, slots=True)
class Logged:
    """A statement of the log."""

    application: str
    transaction: str
    ms: float
    text: str


class StatementLog:
    """Collects the statements of a database's new sessions while the block runs, then in `statements`."""

    def __init__(self, server: Cluster, database: str) -> None:
        self._server = server
        self._database = sql.Identifier(database)
        self._start = 0
        self.statements: list[Logged] = []

    def __enter__(self) -> StatementLog:
        self._set("alter database {} set log_min_messages = 'log'")
        self._set("alter database {} set log_min_duration_statement = 0")
        self._start = self._server.server.log.stat().st_size
        return self

    def __exit__(self, *_: object) -> None:
        self._set("alter database {} reset log_min_messages")
        self._set("alter database {} reset log_min_duration_statement")
        self.statements = self.read()

    def read(self) -> list[Logged]:
        """Return what was logged up to now."""
        with self._server.server.log.open(errors="replace") as log:
            log.seek(self._start)
            found = [match for line in log if (match := _LINE.match(line))]
        return [
            Logged(one["application"], one["transaction"], float(one["ms"]), one["text"]) for one in found
        ]

    def _set(self, statement: str) -> None:
        with psycopg.connect(self._server.url("postgres"), autocommit=True) as conn:
            conn.execute(sql.SQL(statement).format(self._database))


def claim_p99_ms(statements: list[Logged]) -> float:
    """Return the 99th of 100 durations of taskd's claims, in ms."""
    ordered = sorted(
        one.ms for one in statements if "taskd.claim" in one.text and one.text.startswith("execute")
    )
    return round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2) if ordered else 0.0


def rows(url: str, statement: str, *arguments: object) -> list[Any]:
    """Return the rows of a statement."""
    with psycopg.connect(url, autocommit=True) as conn:
        return conn.execute(statement.encode(), arguments or None).fetchall()
