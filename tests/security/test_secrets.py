"""Canary secrets through a whole run: every way out is searched, and none of them is found anywhere.

One run of the daemons as their unit starts them: hostile configurations, hostile requests, jobs that fail
and quote what they know, a provider that sends the key back in its error.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.api.cases import World, furnish, load, send
from tests.api.server import ADMIN, ROOT, Server

CANARIES = {
    "resend": "re_Cn4ryR3s3ndKeyQ8wE2rT6yU1iO9pA",
    "database": "Cn4ryDbPassw0rdZ7xC3vB9nM2kJ",
    "pepper": "Cn4ryP3pp3rL5kJ8hG2fD6sA0qW4eR7tY",
    "command": "Cn4ryC0mmandM1nB4vC7xZ2lK5jH",
    "shout": "Cn4ryShoutOpt10nQ9wE3rT7yU2iO5p",
}
OPTION = "shout"
FORGED = '\n{"time":"2026-01-01T00:00:00Z","event":"forged"}\r\x1b[31m\u2028{"event":"forged"}\u0085\x00x'

PLUGIN = '''
from dataclasses import dataclass
from taskd.plugin import Context, hookimpl, job

@dataclass
class Options:
    api_token: str

@hookimpl
def taskd_options_schema():
    return Options

@job("shout")
def shout(text: str, *, ctx: Context) -> None:
    """Say it in every way there is."""
    print(text)
    ctx.log.error(text, extra={text: text, "authorization": text})
    ctx.progress(1, text)
    raise ValueError(text)

@hookimpl
def taskd_job_types(options):
    return [shout]
'''

CONFIG = """\
database: {{url: "{url}", allow_unsafe: true}}
api: {{port: {port}, workers: 2, request_timeout: 1s}}
admin: {{token_env: CANARY_ADMIN}}
keys: {{pepper_file: {folder}/pepper}}
workers: {{node: canary, drain_timeout: 1s}}
metrics: {{port: {metrics}}}
log: {{level: debug}}
pools:
  mail: {{processes: 1, concurrency: 2}}
  loud: {{processes: 1, concurrency: 2}}
plugins:
  - name: email
    config: {{api_key_file: {folder}/resend, base_url: "{provider}"}}
  - module: canary_plugin
    config: {{api_token: {shout}}}
job_types:
  send_email: {{pool: mail, retry: {{max_attempts: 1}}}}
  shout: {{pool: loud, retry: {{max_attempts: 1}}}}
  resize:
    command: [/usr/bin/false, "{{file}}"]
    params: {{file: "^[A-Za-z0-9][A-Za-z0-9._-]{{0,99}}$"}}
    env: {{TOOL_TOKEN: {command}}}
    retry: {{max_attempts: 1}}
"""


class Provider(http.server.BaseHTTPRequestHandler):
    """Refuses every mail and sends back what it was sent, the key too."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said = {"name": "validation_error", "message": f"{self.headers} {body.decode()}", "statusCode": 422}
        answer = json.dumps(said).encode()
        self.send_response(422)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@dataclass
class Run:
    """The daemons of the run, and all that came out of them."""

    folder: Path
    url: str
    config: Path
    env: dict[str, str]
    server: Server
    worker: subprocess.Popen[bytes]
    metrics: int
    out: dict[str, bytes] = field(default_factory=dict)

    def log(self, name: str) -> bytes:
        return (self.folder / f"{name}.log").read_bytes()

    def command(self, *words: str) -> None:
        """Run a command and keep what it says."""
        done = subprocess.run(
            [sys.executable, "-m", "taskd", *words], env=self.env, capture_output=True, timeout=60
        )
        self.out["taskd " + " ".join(words)] = done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree(pid: int) -> Iterator[int]:
    """Yield a process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


@contextmanager
def provider() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def run(database_url: str, tmp_path: Path) -> Iterator[Run]:
    url = database_url.replace("@/", f":{CANARIES['database']}@/")
    assert CANARIES["database"] in url
    for name in ("pepper", "resend"):
        (tmp_path / name).write_text(CANARIES[name])
        (tmp_path / name).chmod(0o600)
    (tmp_path / "canary_plugin.py").write_text(PLUGIN)
    port, metrics = free_port(), free_port()
    env = {
        "PATH": os.defpath,
        "HOME": str(tmp_path),
        "RUNTIME_DIRECTORY": str(tmp_path),
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "CANARY_ADMIN": ADMIN,
    }
    with provider() as provided:
        config = tmp_path / "taskd.yaml"
        config.write_text(
            CONFIG.format(url=url, port=port, metrics=metrics, folder=tmp_path, provider=provided, **CANARIES)
        )
        config.chmod(0o600)
        daemons: list[subprocess.Popen[bytes]] = []
        try:
            for name, ready in (("worker", b"node is ready"), ("api", b'"serving"')):
                with (tmp_path / f"{name}.log").open("wb") as log:
                    argv = [sys.executable, "-m", "taskd", name, "--config", str(config)]
                    daemons.append(subprocess.Popen(argv, env=env, stderr=log, stdin=subprocess.DEVNULL))
                end = time.monotonic() + 40
                while ready not in (tmp_path / f"{name}.log").read_bytes():
                    assert daemons[-1].poll() is None, (tmp_path / f"{name}.log").read_text()
                    assert time.monotonic() < end
            worker, api = daemons
            yield Run(tmp_path, url, config, env, Server(api, port), worker, metrics)
        finally:
            for daemon in daemons:
                daemon.send_signal(signal.SIGTERM)
                daemon.send_signal(signal.SIGTERM)
            for daemon in daemons:
                daemon.wait(30)


async def test_no_secret_comes_out_anywhere_and_no_log_line_is_forged(run: Run) -> None:
    pepper = CANARIES["pepper"].encode()
    world = await furnish(run.server, run.url, ADMIN, pepper)
    secret = {**CANARIES, "admin": ADMIN, **{name: world.fixtures[name] for name in KEYS}}
    hidden = {name: value.encode() for name, value in secret.items()}
    requests(world, run)
    jobs(world, run)
    injections(world, run)
    for words in (("config", "show", "--sources"), ("check-config",), ("doctor",), ("keys", "list")):
        run.command(*words, "--config", str(run.config))
    spoilt = run.config.read_text().replace("port: ", "prot: ").replace("mail: {", "mail: {procesess: 1, ")
    bad = run.folder / "bad.yaml"
    bad.write_text(spoilt)
    bad.chmod(0o600)
    run.command("check-config", str(bad))
    pids = [*tree(run.worker.pid), *tree(run.server.process.pid)]
    for pid in pids:
        run.out[f"arguments of {pid}"] = Path(f"/proc/{pid}/cmdline").read_bytes()
        if pid not in (run.worker.pid, run.server.process.pid):  # theirs is what the operator gave them
            run.out[f"environment of {pid}"] = Path(f"/proc/{pid}/environ").read_bytes()
    run.out["rows"] = await rows(run.url)
    children_know_their_own_pool_alone(run)
    assert b"Authorization: ***" in run.out["answer about send_email"]  # it was there to be found
    logs = {f"log of {name}": run.log(name) for name in ("worker", "api")}

    found = [
        f"{what}: {name}"
        for what, text in {**run.out, **logs}.items()
        for name, value in hidden.items()
        if value in text and (what, name) not in MAY
    ]
    assert found == []
    for name, log in logs.items():
        for line in log.decode().splitlines():
            assert line.isprintable(), (name, line)
            assert json.loads(line)["event"] != "forged"
    assert b"Traceback" not in b"".join(text for what, text in run.out.items() if what.startswith("answer"))


KEYS = ("{KEY}", "{KEY_RO}", "{KEY_WO}", "{KEY_OTHER}", "{KEY_EMAIL_ONLY}", "{KEY_EXPIRED}")
MAY: set[tuple[str, str]] = set()
"""What may be found where: nothing."""


def requests(world: World, run: Run) -> None:
    """Send every hostile request; only the time between them and their effects matter elsewhere."""
    for table in ("bad_http.json", "more_http.json"):
        for case in load(table).values():
            if not case["id"].startswith("tr2-half"):
                status, headers, raw = send(world, case["request"])
                run.out[f"answer to {case['id']}"] = f"{status} {headers}".encode() + raw


def jobs(world: World, run: Run) -> None:
    """Run jobs that fail and quote what they know, and keep all that is told of them."""
    mail: dict[str, object] = {"to": "a@example.com", "from": "b@example.com", "subject": "x"}
    asked: list[tuple[str, dict[str, object]]] = [("send_email", mail), ("resize", {"file": "a.png"})]
    asked += [("shout", {"text": text}) for text in (FORGED.replace("\0", ""), "x" * 100_000)]
    for type_, payload in asked:
        body = {"type": type_, "payload": payload}
        submitted = world.server.send("POST", "/jobs?wait=20", key=world.key, body=body)
        assert submitted.body["status"] == "failed", submitted.body
        run.out[f"answer about {type_}"] = submitted.raw
        for path in ("", "/logs"):
            shown = world.server.send("GET", f"/jobs/{submitted.body['job_id']}{path}", key=world.key)
            run.out[f"answer about {type_}{path}"] = shown.raw
    for path in ("/metrics", "/openapi.json", "/jobs?limit=200", "/health", "/ready"):
        run.out[f"answer to {path}"] = world.server.send("GET", path, key=world.key).raw
    run.out["metrics"] = Server(run.worker, run.metrics).send("GET", "/metrics").raw


def injections(world: World, run: Run) -> None:
    """Send what would forge or colour a log line, wherever a text goes in."""
    for text in ("a\nb", "a\r\nforged", "\x1b[31m", "a\u2028b", FORGED):
        escaped = json.dumps(text)
        for number, body in enumerate(
            (
                f'{{"type":{escaped},"payload":{{}}}}',
                f'{{"type":"echo","payload":{{{escaped}:1}},"unique_key":{escaped}}}',
                f'{{"type":"echo","payload":{{}},{escaped}:1}}',
            )
        ):
            reply = world.server.send("POST", "/jobs", key=world.key, body=body.encode())
            run.out[f"answer to {escaped} {number}"] = reply.raw
        reply = world.server.admin("POST", "/admin/api-keys", {"name": text, "description": text})
        run.out[f"answer to name {escaped}"] = reply.raw
    for header in (b"X-Forwarded-For: \x1b[31m", b"User-Agent: a\x0bb", b"X-Request-Id: a\xe2\x80\xa8b"):
        head = b"GET /jobs HTTP/1.1\r\nHost: t\r\nConnection: close\r\nX-API-Key: tk-x\r\n" + header
        run.out[f"answer to {header!r}"] = world.server.raw(head + b"\r\n\r\n")


async def rows(url: str) -> bytes:
    """Return every row of every table as text."""
    parts = []
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as db:
        tables = await db.execute(
            "select relname from pg_class where relnamespace = 'taskd'::regnamespace and relkind = 'r'"
        )
        for (name,) in await tables.fetchall():
            cursor = await db.execute(f'select row_to_json(t)::text from taskd."{name}" t'.encode())
            parts += [row[0] for row in await cursor.fetchall()]
    return "\n".join(parts).encode()


def children_know_their_own_pool_alone(run: Run) -> None:
    """Look into the memory of each job process for the secrets of the others."""
    known = {"resend": 0, "shout": 0, "command": 0}
    for pid in tree(run.worker.pid):
        if b"taskd.child" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            continue
        memory = memory_of(pid)
        if memory is None:
            return  # this machine lets nobody look
        own = [name for name in known if CANARIES[name].encode() in memory]
        assert len(own) <= 1, (pid, own)
        for name in own:
            known[name] += 1
        for name in ("database", "pepper"):
            assert CANARIES[name].encode() not in memory, (pid, name)
        assert ADMIN.encode() not in memory
    assert known["resend"]
    assert known["shout"]


def memory_of(pid: int) -> bytes | None:
    """Return what a process can write to in its memory; None where looking is not allowed."""
    parts = []
    try:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
                if match:
                    memory.seek(int(match[1], 16))
                    try:
                        parts.append(memory.read(int(match[2], 16) - int(match[1], 16)))
                    except OSError:
                        continue  # a page of a device
    except PermissionError:
        return None
    return b"".join(parts)
