"""The processes: start, drain, death, and requests that dawdle."""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.api.server import ADMIN, Server, make_key, publish, running, send_on, settings

ECHO: dict[str, Any] = {"type": "echo", "payload": {}}


def connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)


async def test_a_drain_answers_what_has_begun_and_refuses_the_rest(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1)) as server, ThreadPoolExecutor(1) as pool:
        opened = connect(server)
        assert send_on(opened, "GET", "/health").status == 200
        late = connect(server)
        late.connect()
        job = server.send("POST", "/jobs", key=key, body=ECHO).body["job_id"]
        begun = pool.submit(server.send, "GET", f"/jobs/{job}?wait=30", key=key)
        while server.process.poll() is None:  # until the wait has begun
            if send_on(opened, "GET", f"/jobs/{job}", key=key).status == 200:
                break
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionError):
            while True:  # until it no longer listens
                socket.create_connection(("127.0.0.1", server.port)).close()

        refused = send_on(opened, "POST", "/jobs", key=key, body=ECHO)
        refused_too = send_on(late, "POST", "/jobs", key=key, body=ECHO)
        status = begun.result(20).status

        assert (refused.status, refused.body["error"]) == (503, "shutting_down")
        assert refused.headers["connection"] == "close"
        assert refused_too.status == 503
        assert status == 200
        assert server.process.wait(15) == 0


async def test_a_dead_child_is_replaced_and_children_die_with_their_parent(database_url: str) -> None:
    with running(settings(database_url, workers=2)) as server:
        first = server.children()[0]
        os.kill(first, signal.SIGKILL)
        end = time.monotonic() + 15
        while time.monotonic() < end and (len(server.children()) < 2 or first in server.children()):
            assert server.send("GET", "/health").status == 200
        watched = [os.pidfd_open(pid) for pid in server.children()]
        server.process.kill()
        for pidfd in watched:
            assert select.select([pidfd], [], [], 5)[0]
            os.close(pidfd)


async def test_no_secret_is_an_argument_or_in_the_environment_of_a_child(database_url: str) -> None:
    with running(settings(database_url, workers=1, pepper=b"pepper-of-the-tests")) as server:
        for pid in server.children():
            shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            assert ADMIN.encode() not in shown
            assert b"pepper-of" not in shown
            assert database_url.encode() not in shown


async def test_slow_requests_are_cut_and_quick_ones_go_on(database_url: str) -> None:
    heads = {
        "a body": b"POST /admin/api-keys HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        + f"Authorization: Bearer {ADMIN}\r\nContent-Length: 9\r\n\r\n{{".encode(),
        "a head": b"GET /health HTTP/1.1\r\nHo",
    }
    with running(settings(database_url, workers=1, request_timeout_s=1.0)) as server:
        for what, head in heads.items():
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
                sock.sendall(head)
                sock.setblocking(False)
                answer = b""
                while time.monotonic() - began < 8:
                    readable, _, _ = select.select([sock], [], [], 0.2)
                    if readable:
                        part = sock.recv(65536)
                        answer += part
                        if not part:
                            break
                    else:
                        with contextlib.suppress(OSError):
                            sock.send(b" ")  # dripping does not help
                    assert server.send("GET", "/health").status == 200
            assert answer.startswith(b"HTTP/1.1 408 "), what
            assert b'"request_timeout"' in answer
            assert time.monotonic() - began < 5


async def test_an_api_starts_without_its_database() -> None:
    url = "postgresql://taskd@/none?host=/nowhere"
    key = "tk-000000000000_0000000000000000000000000000000000000000000_000000"
    with running(settings(url, workers=1)) as server:
        assert server.send("GET", "/health").body == {"message": "ok"}
        ready = server.send("GET", "/ready")
        assert ready.status == 503
        assert ready.body["checks"]["database"] == "does not answer"
        began = time.monotonic()
        refused = server.admin("GET", "/admin/api-keys")
        assert (refused.status, refused.body["error"]) == (503, "database_unavailable")
        assert time.monotonic() - began < 5.2
        assert b"/nowhere" not in refused.raw + ready.raw
        assert server.send("GET", "/jobs", key=key).status == 401


async def test_an_api_starts_on_an_unmigrated_database(empty_database_url: str) -> None:
    with running(settings(empty_database_url, workers=1)) as server:
        ready = server.send("GET", "/ready")
        refused = server.admin("GET", "/admin/api-keys")

    assert ready.status == 503
    assert "taskd migrate" in ready.body["checks"]["schema"]
    assert (refused.status, refused.body["error"]) == (503, "database_unavailable")


async def test_more_requests_than_fit_are_refused_at_once(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1, flight=0)) as server:
        began = time.monotonic()
        reply = server.send("POST", "/jobs", key=key, body=ECHO)

    assert (reply.status, reply.body["error"]) == (503, "overloaded")
    assert reply.headers["retry-after"] == "1"
    assert time.monotonic() - began < 1


async def test_a_large_body_is_refused_before_it_is_read(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1)) as server:
        reply = server.send("POST", "/jobs", key=key, body=b"x" * 10_000_000)

    assert (reply.status, reply.body["error"]) == (413, "too_large")


async def test_head_pipelines_and_chunks_are_understood(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1)) as server:
        head = server.raw(b"HEAD /health HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
        one = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"
        two = one + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        chunked = (
            f"POST /jobs HTTP/1.1\r\nHost: t\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
            "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            'a;x=y\r\n{"type":"e\r\n17\r\ncho","payload":{"a":1}}\r\n0\r\n\r\n'
        ).encode()
        answers = server.raw(two)
        stored = server.raw(chunked)

    assert head.startswith(b"HTTP/1.1 200 ")
    assert head.endswith(b"\r\n\r\n")
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert stored.startswith(b"HTTP/1.1 200 "), stored


@pytest.mark.parametrize("path", ["/health/", "//health", "/jobs/", "/nope", "/%6aobs", "/JOBS"])
def test_another_path_is_not_found(path: str) -> None:
    from sanic import Sanic

    from taskd.api.app import create_app
    from taskd.api.strikes import Strikes, make_table
    from taskd.errors import Refused

    Sanic._app_registry.clear()
    app = create_app(settings("postgresql://none"), Strikes(make_table()))
    app.finalize()
    with pytest.raises(Refused, match="no such path"):
        app.ctx.door._find(path, "GET")


def test_the_parent_loads_neither_web_framework_nor_driver() -> None:
    code = (
        "import sys, taskd.api.serve\n"
        "heavy = {'sanic', 'psycopg', 'uvloop', 'jsonschema_rs', 'taskd.store', 'taskd.service'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_process_does_not_load_pages_that_it_never_shows() -> None:
    code = (
        "import sys\nfrom taskd.api.lean import leave_out_pages\nleave_out_pages()\nimport taskd.api.app\n"
        "print(sorted({'sanic', 'tracerite', 'html5tagger'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert ran.stdout == "['sanic']\n", ran.stderr
