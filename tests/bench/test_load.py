"""The load client: what it sends, what it counts, and that it is not led astray by pieces and lost lines."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.load import NUMBER, Plan, drive, run

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4\r\nX-A: b\r\n\r\n{..}"

Write = Callable[[bytes], None]


@contextmanager
def server(answer: Callable[[int, bytes, Write], bool]) -> Iterator[int]:
    """Serve requests with a body of 10 bytes; `answer` gets number and bytes, and says whether to go on."""
    lock = threading.Lock()
    count = 0

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            nonlocal count
            data = b""
            while True:
                while b"\r\n\r\n" not in data or len(data) < data.index(b"\r\n\r\n") + 14:
                    more = self.request.recv(65536)
                    if not more:
                        return
                    data += more
                end = data.index(b"\r\n\r\n") + 14
                with lock:
                    count += 1
                    number = count
                if not answer(number, data[:end], self.request.sendall):
                    return
                data = data[end:]

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield int(one.server_address[1])
        finally:
            one.shutdown()
            thread.join()


def plan(port: int, count: int, connections: int, rate: float | None = None) -> Plan:
    return Plan(port, "/jobs", NUMBER, count, connections, {"X-API-Key": "k"}, rate)


@pytest.mark.parametrize("rate", [None, 2000.0])
def test_each_request_is_sent_once_and_counted(rate: float | None) -> None:
    seen: list[bytes] = []

    def answer(_: int, request: bytes, write: Write) -> bool:
        seen.append(request)
        write(OK)
        return True

    with server(answer) as port:
        outcome = drive(plan(port, 50, 4, rate))

    assert outcome.statuses == {200: 50}
    assert sorted(int(one[-10:]) for one in seen) == list(range(50))
    assert all(one.startswith(b"POST /jobs HTTP/1.1\r\n") and b"\r\nX-API-Key: k\r\n" in one for one in seen)
    assert all(b"Content-Length: 10\r\n" in one for one in seen)
    assert len(outcome.latencies) == 50
    assert min(outcome.latencies) > 0
    outcome.expect(50)


def test_an_answer_in_pieces_is_one_answer() -> None:
    def answer(_: int, __: bytes, write: Write) -> bool:
        for at in range(0, len(OK), 30):
            write(OK[at : at + 30])
        return True

    with server(answer) as port:
        assert drive(plan(port, 20, 2)).statuses == {200: 20}


def test_a_lost_connection_is_counted_and_opened_again() -> None:
    def answer(number: int, _: bytes, write: Write) -> bool:
        if number == 3:
            return False
        write(OK)
        return True

    with server(answer) as port:
        outcome = drive(plan(port, 10, 1))

    assert outcome.statuses == {200: 9, 0: 1}
    with pytest.raises(RuntimeError, match="answers by status"):
        outcome.expect(10)


def test_refusals_are_counted_by_status_and_are_not_the_rate() -> None:
    def answer(number: int, _: bytes, write: Write) -> bool:
        refused = number % 2 == 0
        write(OK.replace(b"200 OK", b"429 No\r\nConnection: close") if refused else OK)
        return not refused

    with server(answer) as port:
        outcome = drive(plan(port, 10, 1))

    assert outcome.statuses == {200: 5, 429: 5}
    assert outcome.answered == 5


def test_a_pace_is_kept() -> None:
    def answer(_: int, __: bytes, write: Write) -> bool:
        write(OK)
        return True

    with server(answer) as port:
        outcome = drive(plan(port, 40, 4, rate=100.0))

    gaps = [later - earlier for earlier, later in zip(outcome.sent, outcome.sent[1:], strict=False)]
    assert gaps == pytest.approx([0.01] * 39, abs=1e-6)  # due times, not those of a tardy client


def test_a_process_of_its_own_brings_the_same() -> None:
    def answer(_: int, __: bytes, write: Write) -> bool:
        write(OK)
        return True

    with server(answer) as port:
        outcome = run(plan(port, 30, 3))

    assert outcome.statuses == {200: 30}
    assert len(outcome.sent) == len(outcome.latencies) == 30
    assert outcome.client_us > 0
