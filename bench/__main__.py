"""Measure taskd, PostgreSQL alone and the peers in one run: `make bench`, `python -m bench`.

Starts its own PostgreSQL with fsync and synchronous_commit on, measures in turns, and writes every result
at once to a file of JSON. Ctrl-C ends it, and what was measured is kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import report
from bench.cluster import SETTINGS, Cluster, cluster
from bench.peers import PEERS, Peer, Unavailable, default_cache
from bench.plan import OWN, Bench, Length, cases
from bench.rounds import Record, load_record, measure, turns
from bench.system import install

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the page if asked."""
    options = _parser().parse_args(words)
    if options.report:
        options.page.write_text(report.page(load_record(options.report)), encoding="utf-8")
        return 0
    now = datetime.now(UTC)
    path = options.json or ROOT / "bench" / "results" / f"{now:%Y-%m-%d-%H%M}.json"
    record = Record(path, {"when": now.isoformat(timespec="seconds"), "length": options.length.name.lower()})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped, the rest is told
    try:
        with cluster() as server:
            _measure(server, record, options)
    except KeyboardInterrupt:
        _say(f"interrupted; what was measured is in {path}")
    record.save()
    print(report.summary(record))
    _say(f"figures: {path}")
    if options.write:
        options.page.write_text(report.page(record), encoding="utf-8")
        _say(f"page: {options.page}")
    return 1 if any(result.error for result in record.results) else 0


def _measure(server: Cluster, record: Record, options: argparse.Namespace) -> None:
    length: Length = options.length
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    if length is not Length.SHORT and not options.own:
        peers, missing = _peers(options.cache)
    record.about |= _about(server, peers, missing)
    chosen = cases(length, peers)
    if options.only:
        chosen = [case for case in cases(Length.LONG, peers) if case.workload in options.only]
    bench = Bench(server, install(server), length)
    measure(bench, list(turns(chosen, options.rounds)), record, _say)


def _peers(cache: Path) -> tuple[list[Peer], dict[str, str]]:
    """Install the peers; return those that can be had, and why the others can't."""
    found: list[Peer] = []
    missing: dict[str, str] = {}
    for peer in PEERS:
        try:
            peer.prepare(cache)
            found.append(peer)
        except Unavailable as reason:
            _say(f"{peer.name} is left out: {reason}")
            missing[peer.name] = str(reason)
    return found, missing


def _about(server: Cluster, peers: Sequence[Peer], missing: dict[str, str]) -> dict[str, Any]:
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": {
            "cores": os.cpu_count(),
            "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
            "memory_gib": round(pages / 2**30),
            "kernel": platform.release().partition("-")[0],
        },
        "versions": {
            "taskd": version("taskd"),
            "python": platform.python_version(),
            "postgresql": server.version(),
            **{peer.name: peer.version for peer in peers},
        },
        "settings": list(SETTINGS),
        "missing": missing,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    for one, help_ in (
        (Length.SHORT, "taskd and PostgreSQL alone, smaller: 3 minutes"),
        (Length.LONG, "all, and 5 minutes at 70 %%, a snapshot held for 10 minutes, 10 000 000 rows"),
    ):
        length.add_argument(
            f"--{one.name.lower()}", dest="length", action="store_const", const=one, help=help_
        )
    names = list(dict.fromkeys(case.workload for case in OWN))
    parser.add_argument(
        "--only", action="append", choices=names, metavar="WORKLOAD", help=f"of {names}".replace("%", "%%")
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="in place of three")
    parser.add_argument("--own", action="store_true", help="no peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/DATE.json")
    parser.add_argument("--write", action="store_true", help="write the manual's page too")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="measure nothing: write the page of the figures in FILE"
    )
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help="the page (default: docs/performance.md)"
    )
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder of the peers' packages (%(default)s)"
    )
    parser.set_defaults(length=Length.FULL)
    return parser


if __name__ == "__main__":
    sys.exit(main())
