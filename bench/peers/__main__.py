"""Measure peers alone, each on a fresh database of an own server, and print JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import load
from bench.cluster import cluster
from bench.peers import PEERS, HttpPeer, JobPeer, Peer, Unavailable, default_cache
from bench.peers.jobs import PAYLOAD

WORKLOADS = ("drain", "bulk", "submit", "together", "latency", "idle")


def jobs(peer: JobPeer, workload: str, url: str, count: int) -> dict[str, float]:
    """Run one workload of a queue."""
    measures: dict[str, Callable[[], dict[str, float]]] = {
        "drain": lambda: peer.drain(url, count),
        "bulk": lambda: peer.bulk(url, count),
        "submit": lambda: peer.submit(url, max(1, count // 10)),
        "together": lambda: peer.together(url, max(1, count // 10)),
        "latency": lambda: peer.latency(url, 200),
        "idle": lambda: peer.idle(url, 10),
    }
    return measures[workload]()


def http(peer: HttpPeer, url: str, count: int, connections: int = 32) -> dict[str, float]:
    """Submit over HTTP with the benchmark's own client."""
    body = json.dumps({"type": "echo", "payload": PAYLOAD})
    with peer.serve(url) as port:
        outcome = load.run(load.Plan(port, "/jobs", body, count, connections))
    outcome.expect(count)
    return {
        "jobs": count,
        "per_s": round(outcome.rate),
        "p50_ms": round(outcome.quantile_ms(0.5), 2),
        "p99_ms": round(outcome.quantile_ms(0.99), 2),
    }


def figures(peers: Sequence[Peer], workloads: Sequence[str], count: int, cache: Path) -> dict[str, Any]:
    """Measure these peers; one that can't be installed has the reason in place of figures."""
    found: dict[str, Any] = {}
    with cluster() as server:
        for peer in peers:
            found[peer.name] = {"version": peer.version}
            try:
                peer.prepare(cache)
            except Unavailable as reason:
                found[peer.name]["unavailable"] = str(reason)
                continue
            if isinstance(peer, JobPeer):
                for workload in workloads:
                    found[peer.name][workload] = jobs(peer, workload, server.fresh("peer"), count)
            elif isinstance(peer, HttpPeer):
                found[peer.name]["http"] = http(peer, server.fresh("peer"), count)
    return found


def main() -> int:
    """Measure and print."""
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--count", type=int, default=20_000, help="jobs to drain (default: %(default)s)")
    parser.add_argument(
        "--only", action="append", choices=WORKLOADS, help="this workload of the queues alone"
    )
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder of the installed packages"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    peers = [peer for peer in PEERS if not options.names or peer.name in options.names]
    found = figures(peers, options.only or WORKLOADS, options.count, options.cache.resolve())
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
