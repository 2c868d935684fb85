"""Peers that take a job a request over HTTP: `POST /jobs`, answered with its `job_id`, as taskd does."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg

from bench.peers import install
from bench.peers.jobs import LIMIT_S
from bench.peers.program import Program

_TABLE = """
create table if not exists jobs (
    id uuid primary key default gen_random_uuid(), type text not null, payload jsonb not null,
    status text not null default 'pending', created_at timestamptz not null default now()
)
"""


class HttpPeer:
    """A server of one process. `prepare` comes first."""

    def __init__(
        self, name: str, version: str, *, packages: Sequence[str], program: str, pool_size: int = 0
    ) -> None:
        """Describe a peer.

        `packages` are exact, `program` is a file of bench/peers/js or a module of bench/programs, `pool_size`
        is its number of database connections; without any it stores nothing.
        """
        self.name = name
        self.version = version
        self.stores = pool_size > 0
        self.packages = packages
        self._program = program
        self._pool_size = pool_size
        self._command: Sequence[str] = ()
        self._environment: dict[str, str] = {}

    def prepare(self, cache: Path) -> None:
        """Install what the peer needs under `cache`.

        Raises:
            Unavailable: it can't be had here; the message says why.
        """
        command = install.command(cache, f"{self.name}-{self.version}", self.packages, self._program)
        self._command, self._environment = command

    @contextmanager
    def serve(self, url: str) -> Iterator[int]:
        """Run the server on a free port of loopback while the block runs; jobs go into the table `jobs`."""
        if self.stores:
            with psycopg.connect(url, autocommit=True) as conn:
                conn.execute(_TABLE.encode())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        arguments = json.dumps({"url": url, "port": port, "pool_size": self._pool_size})
        with Program([*self._command, arguments], self._environment) as program:
            program.answer(LIMIT_S)
            yield port
