"""The peers of the benchmark, each in the best configuration that its own manual recommends.

`python -m bench.peers [name ...] [--count N]` measures them alone, `bench` beside taskd in one run. Their
packages are installed at run time, into a cache folder and never into taskd's own environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bench.peers import (
    fastify,
    graphile_worker,
    pg_boss,
    pgqueuer,
    procrastinate,
    sanic_bare,
    sanic_insert,
)
from bench.peers.http import HttpPeer
from bench.peers.install import Unavailable, default_cache
from bench.peers.jobs import JobPeer

__all__ = ["HTTP", "JOBS", "PEERS", "HttpPeer", "JobPeer", "Peer", "Unavailable", "default_cache"]


class Peer(Protocol):
    """What all peers have; `JobPeer` and `HttpPeer` say what each kind can be measured with."""

    name: str
    version: str
    packages: Sequence[str]
    """With their exact versions; the first is the one that gives the peer its version."""

    def prepare(self, cache: Path) -> None:
        """Install what the peer needs under `cache`.

        Raises:
            Unavailable: it can't be had here; the message says why.
        """


JOBS: tuple[JobPeer, ...] = (graphile_worker.PEER, pg_boss.PEER, pgqueuer.PEER, procrastinate.PEER)
HTTP: tuple[HttpPeer, ...] = (fastify.PEER, sanic_insert.PEER, sanic_bare.PEER)
PEERS: tuple[Peer, ...] = (*JOBS, *HTTP)
