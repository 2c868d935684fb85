"""Which workloads there are, of whom, how large, and in which length of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from bench import load, raw
from bench.cluster import Cluster
from bench.peers import HttpPeer, JobPeer, Peer
from bench.system import System
from bench.workloads import churn, drain, idle, latency, submit

Figures = dict[str, float]


class Length(IntEnum):
    """How much is measured; a longer one has all that a shorter one has."""

    SHORT = 0
    FULL = 1
    LONG = 2


@dataclass(slots=True)
class Bench:
    """What measurements need: the server, taskd on it, and what earlier ones found."""

    cluster: Cluster
    run: System
    length: Length
    capacity_per_s: float = 4000.0
    """Submit and work together, as measured last; loads are parts of it."""
    key: Mapping[str, str] = field(default_factory=dict)

    def size(self, short: int, full: int) -> int:
        """Return how many, by the length."""
        return short if self.length is Length.SHORT else full

    @contextmanager
    def api(self) -> Iterator[Mapping[str, str]]:
        """Run an API process while the block runs; gives the header with a key."""
        with self.run.daemon("api"):
            if not self.key:
                self.key = self.run.key()
            yield self.key


Measure = Callable[[Bench], Figures]

PEER = "peer"
"""The database that peers get, made anew each time."""


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement of one subject; cases of the same workload are compared, and measured in turns."""

    workload: str
    subject: str
    measure: Measure
    length: Length = Length.FULL
    """The shortest in which it is measured."""
    rounds: int = 3
    short_rounds: int = 3
    """In the short form, if these are fewer."""


def _http(measure: Callable[..., Figures], *arguments: Any) -> Measure:
    def with_api(bench: Bench) -> Figures:
        with bench.api() as key:
            return measure(bench.run, key, *arguments)

    return with_api


def _submit(short: int, full: int, connections: int) -> Measure:
    def measure(bench: Bench) -> Figures:
        with bench.api() as key:
            return submit.http(bench.run, key, bench.size(short, full), connections)

    return measure


def _together(bench: Bench) -> Figures:
    with bench.api() as key:
        found = submit.together(bench.run, key, bench.size(15_000, 50_000))
    bench.capacity_per_s = found["done_per_s"]
    return found


def _bulk(bench: Bench) -> Figures:
    with bench.api() as key:
        return submit.bulk(bench.run, key, bench.size(50_000, 100_000))


def _latency_http(bench: Bench) -> Figures:
    with bench.api() as key:
        return latency.http(bench.run, key, bench.size(150, 300))


def _loaded(bench: Bench) -> Figures:
    with bench.api() as key:
        return latency.loaded(bench.run, key, 0.5 * bench.capacity_per_s, bench.size(5, 10))


def _steady(bench: Bench) -> Figures:
    with bench.api() as key:
        return latency.steady(bench.run, key, 0.7 * bench.capacity_per_s, 300)


_S, _F, _L = Length.SHORT, Length.FULL, Length.LONG

OWN: tuple[Case, ...] = (
    Case("drain", "raw, 1 client", lambda b: raw.drain(b.cluster, 100_000, 1), _S),
    Case("drain", "raw", lambda b: raw.drain(b.cluster, 100_000, 2), _S),
    Case("drain", "taskd", lambda b: drain.drain(b.run, 50_000), _S),
    Case("drain of 500 000", "taskd", lambda b: drain.drain(b.run, 500_000)),
    Case("drain, processes", "taskd", lambda b: drain.process(b.run, b.size(15_000, 50_000)), _S),
    Case("drain, threads", "taskd", lambda b: drain.thread(b.run, 50_000)),
    Case("drain, 2 nodes", "taskd", lambda b: drain.nodes(b.run, 50_000, 2)),
    Case("drain, 4 nodes", "taskd", lambda b: drain.nodes(b.run, 50_000, 4)),
    Case("submit, 1 connection", "taskd", _submit(1000, 3000, 1)),
    Case("submit", "raw", lambda b: raw.submit(b.cluster, b.size(20_000, 40_000)), _S),
    Case("submit", "taskd", _submit(15_000, 30_000, 32), _S),
    Case("submit", "taskd by SQL", lambda b: submit.sql(b.run, b.size(20_000, 40_000)), _S),
    Case("submit, 128 connections", "taskd", _submit(15_000, 30_000, 128)),
    Case("bulk", "raw", lambda b: raw.bulk(b.cluster, b.size(100_000, 200_000)), _S),
    Case("bulk", "taskd", _bulk, _S),
    Case("bulk", "taskd by SQL", lambda b: submit.sql_many(b.run, b.size(50_000, 200_000)), _S),
    Case("together", "taskd", _together, _S),
    Case("latency", "taskd by SQL", lambda b: latency.sql(b.run, b.size(150, 300)), _S),
    Case("latency", "taskd", _latency_http, _S),
    Case("latency, half load", "taskd", _loaded),
    Case("scheduled", "taskd", lambda b: latency.scheduled(b.run, 500)),
    Case("idle", "taskd", lambda b: idle.idle(b.run, b.size(10, 20)), _S, short_rounds=1),
    Case("start", "taskd", lambda b: idle.start(b.run), _S, rounds=1),
    Case("64 KiB payloads", "taskd", _http(submit.large, 3000)),
    Case("20 types, 50 000", "taskd", lambda b: drain.backlog(b.run, 50_000, 50_000)),
    Case("20 types, 1 000 000", "taskd", lambda b: drain.backlog(b.run, 1_000_000, 250_000), rounds=2),
    Case("50 000 beside 1 000 000 for tomorrow", "taskd", lambda b: drain.future(b.run, 50_000, 1_000_000)),
    Case("churn", "taskd", lambda b: churn.churn(b.run, 60), rounds=1),
    Case("churn, snapshot held", "taskd", lambda b: churn.held(b.run, 60), rounds=1),
    Case("churn, pruning", "taskd", lambda b: churn.pruning(b.run, 60, 500_000), rounds=1),
    Case("churn of 10 minutes, snapshot held", "taskd", lambda b: churn.held(b.run, 600), _L, 1),
    *(
        Case(f"beside {kept:,} ended jobs".replace(",", " "), "taskd", measure, length, rounds)
        for kept, measure, length, rounds in (
            (10_000, lambda b: drain.growth(b.run, 10_000, 50_000), _F, 2),
            (100_000, lambda b: drain.growth(b.run, 100_000, 50_000), _F, 2),
            (1_000_000, lambda b: drain.growth(b.run, 1_000_000, 50_000), _F, 2),
            (10_000_000, lambda b: drain.growth(b.run, 10_000_000, 50_000), _L, 1),
        )
    ),
    Case("5 minutes at 70 %", "taskd", _steady, _L, rounds=1),
)
"""Of taskd and of PostgreSQL alone, in the order of the report."""


def cases(length: Length, peers: Sequence[Peer]) -> list[Case]:
    """Return what is measured; `peers` are those that are installed.

    Cases of one workload stand together.
    """
    chosen = [case for case in OWN if case.length <= length]
    if length is Length.SHORT:
        chosen = [replace(case, rounds=min(case.rounds, case.short_rounds)) for case in chosen]
    else:
        for peer in peers:
            rounds = {"idle": 1}
            chosen += [
                Case(workload, peer.name, measure, rounds=rounds.get(workload, 3))
                for workload, measure in _of_peer(peer)
            ]
    order = {case.workload: place for place, case in reversed(list(enumerate(OWN)))}
    return sorted(chosen, key=lambda case: order.get(case.workload, len(OWN)))


def _of_peer(peer: Peer) -> Iterator[tuple[str, Measure]]:
    """Yield what a peer can be measured in."""
    if isinstance(peer, HttpPeer):
        yield "submit", lambda bench: _served(peer, bench.cluster.fresh(PEER))
    if isinstance(peer, JobPeer):
        calls: dict[str, Callable[[str], Figures]] = {
            "drain": lambda url: peer.drain(url, 50_000),
            "submit": lambda url: peer.submit(url, 10_000),
            "bulk": lambda url: peer.bulk(url, 100_000),
            "together": lambda url: peer.together(url, 10_000),
            "latency": lambda url: peer.latency(url, 200),
            "idle": lambda url: peer.idle(url, 20),
        }
        for name, call in calls.items():
            yield name, lambda bench, call=call: call(bench.cluster.fresh(PEER))  # type: ignore[misc]


def _served(peer: HttpPeer, url: str) -> Figures:
    count = 30_000
    with peer.serve(url) as port:
        outcome = load.run(load.Plan(port, "/jobs", submit.BODY, count, 32))
    outcome.expect(count)
    return {
        "jobs": count,
        "connections": 32,
        "per_s": round(outcome.rate),
        "p50_ms": round(outcome.quantile_ms(0.5), 2),
        "p99_ms": round(outcome.quantile_ms(0.99), 2),
    }
