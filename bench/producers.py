"""Many database clients that each run one prepared statement again and again, from one process of their own.

On libpq itself with one loop over epoll, so that what is measured is the server. `python -m bench.producers`
reads a plan as JSON and writes the outcome; `run` calls it.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from psycopg import pq

ROOT = Path(__file__).resolve().parents[1]
STUCK_S = 30.0
GOOD = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)


@dataclass(frozen=True, slots=True)
class Plan:
    """`count` executions in all, each a transaction, over so many connections."""

    url: str
    statement: str
    argument: str
    count: int
    connections: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How long it took, and what the clients cost."""

    seconds: float
    client_us: float
    """CPU of the clients an execution, in µs."""
    per_s: float


def run(plan: Plan, timeout_s: float = 120.0) -> Outcome:
    """Run the plan in a process of its own.

    Raises:
        RuntimeError: a statement failed, or it did not end in time.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench.producers"],
        cwd=ROOT,
        input=json.dumps(asdict(plan)),
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError("the producers failed; they wrote why above")
    return Outcome(**json.loads(done.stdout))


def drive(plan: Plan) -> Outcome:
    """Run the plan from here."""
    argument = [plan.argument.encode()]
    clients: dict[int, pq.abc.PGconn] = {}
    poll = select.epoll()
    for _ in range(min(plan.connections, plan.count)):
        client = pq.PGconn.connect(plan.url.encode())
        prepared = client.prepare(b"s", plan.statement.encode())
        if prepared.status != pq.ExecStatus.COMMAND_OK:
            raise RuntimeError(prepared.error_message.decode(errors="replace"))
        client.nonblocking = 1
        clients[client.socket] = client
        poll.register(client.socket, select.EPOLLIN)
    cpu, start = time.process_time(), time.perf_counter()
    for client in clients.values():
        _send(client, argument)
    sent, done = len(clients), 0
    while done < plan.count:
        events = poll.poll(STUCK_S)
        if not events:
            raise TimeoutError(f"no answer for {STUCK_S:.0f} s")
        for fd, _ in events:
            client = clients[fd]
            client.consume_input()
            if client.is_busy():
                continue
            result = client.get_result()
            if result is None or result.status not in GOOD:
                raise RuntimeError(client.error_message.decode(errors="replace"))
            while client.get_result() is not None:
                pass
            done += 1
            if sent < plan.count:
                _send(client, argument)
                sent += 1
    seconds = time.perf_counter() - start
    used = time.process_time() - cpu
    for client in clients.values():
        client.finish()
    return Outcome(seconds, used / plan.count * 1e6, plan.count / seconds)


def _send(client: pq.abc.PGconn, argument: list[bytes]) -> None:
    client.send_query_prepared(b"s", argument)
    while client.flush():  # a long argument: the server reads on
        select.select([], [client.socket], [], STUCK_S)


if __name__ == "__main__":
    print(json.dumps(asdict(drive(Plan(**json.load(sys.stdin))))))
