"""A whole taskd to measure: its own PostgreSQL with safe settings, API and worker as separate processes."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from taskd.embedded import EmbeddedPG
from taskd.store import migrate

SETTINGS = ("shared_buffers=256MB", "max_wal_size=4GB", "max_connections=100", "log_min_messages=fatal")
"""Of the server; fsync, full_page_writes and synchronous_commit stay on."""

CONFIG = """\
database:
  url: "{url}"
api:
  port: {port}
  workers: {api_workers}
admin:
  token: {token}
rate_limit:
  rate: 1000000
  burst: 1000000
workers:
  node: bench
  processes: 2
  concurrency: {concurrency}
log:
  level: warning
"""

READY_S = 30.0


@dataclass(frozen=True, slots=True)
class System:
    """What a measurement needs to know."""

    folder: Path
    url: str
    port: int
    token: str
    config: Path

    def query(self, sql: str) -> Any:
        """Return the rows of a statement."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            return conn.execute(sql.encode()).fetchall()

    def http(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Any:
        """Send one request and return the JSON of its answer."""
        data = None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, method=method, headers=sent
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return json.load(answer)

    def key(self) -> str:
        """Make an API key with no limit that matters."""
        made = self.http(
            "POST", "/admin/api-keys", {"name": "bench"}, {"Authorization": f"Bearer {self.token}"}
        )
        return str(made["key"])

    @contextmanager
    def daemon(self, command: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run `taskd COMMAND` while the block runs."""
        log = (self.folder / f"{command}.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "taskd", "--config", str(self.config), command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.folder)},
            start_new_session=True,
        )
        try:
            if command == "api":
                self._await(lambda: self.http("GET", "/health"))
            else:
                self._await(lambda: self.query("select 1 / count(*) from taskd.nodes where state = 'live'"))
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise

    def _await(self, works: Any) -> None:
        end = time.monotonic() + READY_S
        while True:
            try:
                works()
                return
            except (OSError, psycopg.Error):
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)


@contextmanager
def system(*, concurrency: int = 100, api_workers: int = 1) -> Iterator[System]:
    """Make a scratch folder with a server, a migrated database and a configuration; remove all of it."""
    folder = Path(tempfile.mkdtemp(prefix="taskd-bench-"))
    folder.chmod(0o755)
    try:
        with EmbeddedPG(folder / "pg", settings=SETTINGS, prefer="system") as server:
            url = server.url("postgres")
            migrate.up(url)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            token = secrets.token_urlsafe(32)
            config = folder / "taskd.yaml"
            config.touch(mode=0o600)
            config.write_text(
                CONFIG.format(
                    url=url, port=port, token=token, concurrency=concurrency, api_workers=api_workers
                )
            )
            yield System(folder, url, port, token, config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
