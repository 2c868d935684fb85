"""The whole of taskd as its user meets it: `taskd up`, a key, jobs over HTTP, what became of them."""

from __future__ import annotations

import asyncio
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

import psycopg
import pytest

from taskd.process.prctl import supervised
from tests.faults.rig.driver import Driver, Ledger, Wire
from tests.faults.rig.keeper import ROOT, Process, children, until
from tests.plugins.resend_standin import ResendStandIn

START_S = 60.0
JOBS, CONNECTIONS = 5000, 32

CONFIG = """\
database:
  url_env: TASKD_FLOWS_URL
api:
  port: {port}
admin:
  token: {token}
rate_limit:
  rate: 100000
  burst: 100000
workers:
  node: flows
  lease: 5s
  heartbeat: 1s
  sweep: 1s
  drain_timeout: 5s
plugins:
  - name: email
    config:
      api_key: {resend_key}
      base_url: {resend_url}
  - module: tests.faults.rig.jobs
    config:
      ledger: {folder}/runs.txt
job_types:
  ledger:
    retry: {{max_attempts: 5, delays: [100ms]}}
  wordcount:
    description: Count the words of a text
    command: [/usr/bin/env, printf, "%s", "{{text}}"]
    params:
      text: "[A-Za-z0-9 ,.!]{{1,200}}"
"""


@dataclass(frozen=True, slots=True)
class Taskd:
    """A running `taskd up`."""

    folder: Path
    port: int
    pid: int
    key: str
    resend: ResendStandIn

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        wire = Wire(self.port)
        try:
            return await wire.request(method, path, {"X-API-Key": self.key}, body)
        finally:
            wire.close()

    async def submit(self, type_: str, payload: Mapping[str, object], **more: object) -> Any:
        status, answer = await self.call("POST", "/jobs", {"type": type_, "payload": payload, **more})
        assert status == 200, answer
        return answer

    async def finished(self, job_id: str) -> Any:
        status, job = await self.call("GET", f"/jobs/{job_id}?wait=10")
        assert status == 200, job
        return job

    async def run(self, type_: str, payload: Mapping[str, object], **more: object) -> Any:
        return await self.finished((await self.submit(type_, payload, **more))["job_id"])

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        url = f"host={self.folder / 'state' / 'pg' / 's'} port=5432 user=taskd dbname=postgres"
        with psycopg.connect(url, autocommit=True) as conn:
            return conn.execute(statement.encode()).fetchall()

    @property
    def worker(self) -> Process:
        """The worker daemon below `taskd up`."""
        for one in children(self.pid):
            words = Path(f"/proc/{one.pid}/cmdline").read_bytes().split(b"\0")
            if b"worker" in words:
                return one
        raise AssertionError("no worker runs")


@pytest.fixture(scope="module")
def taskd() -> Iterator[Taskd]:
    folder = Path(tempfile.mkdtemp(prefix="taskd-flows-"))
    folder.chmod(0o755)  # the embedded PostgreSQL of root runs as somebody else
    token = secrets.token_urlsafe(32)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        with ResendStandIn() as resend:
            config = folder / "taskd.yaml"
            config.touch(mode=0o600)
            config.write_text(
                CONFIG.format(
                    port=port, token=token, folder=folder, resend_key=resend.api_key, resend_url=resend.url
                )
            )
            process = _up(folder, config)
            try:
                key = _key(port, token, process, folder)
                yield Taskd(folder, port, process.pid, key, resend)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0, (folder / "log").read_text()[-3000:]
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _up(folder: Path, config: Path) -> subprocess.Popen[bytes]:
    environ = {
        **supervised(os.environ),
        "XDG_RUNTIME_DIR": str(folder),
        "STATE_DIRECTORY": str(folder / "state"),
        "PYTHONPATH": str(ROOT),
    }
    environ.pop("RUNTIME_DIRECTORY", None)
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "taskd", "--config", str(config), "up"],
            env=environ,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _key(port: int, token: str, process: subprocess.Popen[bytes], folder: Path) -> str:
    """Wait until all of it is ready, and make an API key."""
    end = time.monotonic() + START_S
    while b"taskd is ready" not in (folder / "log").read_bytes():
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
        time.sleep(0.05)
    request = Request(
        f"http://127.0.0.1:{port}/admin/api-keys",
        method="POST",
        data=json.dumps({"name": "flows"}).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=10) as answer:
            return str(json.load(answer)["key"])
    except URLError as error:
        raise AssertionError((folder / "log").read_text()[-3000:]) from error


async def test_an_echo_is_seen_completed_by_who_waits_for_it(taskd: Taskd) -> None:
    status, job = await taskd.call("POST", "/jobs?wait=10", {"type": "echo", "payload": {"hello": "world"}})

    assert status == 200
    assert (job["status"], job["result"]) == ("completed", {"hello": "world"})


async def test_a_job_that_fails_twice_shows_both_runs_in_its_history(taskd: Taskd) -> None:
    job = await taskd.run("ledger", {"n": 1, "fails": 2})

    assert (job["status"], job["attempts"]) == ("completed", 3)
    assert [(run["attempt"], run["cause"]) for run in job["history"]] == [(1, "error"), (2, "error")]
    assert "attempt 2" in job["history"][1]["error"]


async def test_a_command_that_only_yaml_knows_runs(taskd: Taskd) -> None:
    job = await taskd.run("wordcount", {"text": "a job without a line of code"})

    assert job["status"] == "completed", job


async def test_a_mail_reaches_the_provider_once(taskd: Taskd) -> None:
    mail = {"to": "one@example.com", "from": "two@example.com", "subject": "Hello", "text": "It works."}
    job = await taskd.run("send_email", mail)

    assert job["status"] == "completed", job
    assert [sent.body["subject"] for sent in taskd.resend.sent] == ["Hello"]


async def test_a_scheduled_job_starts_on_time(taskd: Taskd) -> None:
    job = await taskd.run("echo", {"when": "later"}, delay=1.5)

    late_s = (_time(job["started_at"]) - _time(job["scheduled_at"])).total_seconds()
    waited_s = (_time(job["started_at"]) - _time(job["created_at"])).total_seconds()
    print(f"{1000 * late_s:.1f} ms late")
    assert 0 <= late_s < 1
    assert waited_s >= 1.5


async def test_the_same_unique_key_is_the_same_job(taskd: Taskd) -> None:
    first = await taskd.submit("echo", {"n": 1}, unique_key="flows")
    again = await taskd.submit("echo", {"n": 1}, unique_key="flows")
    status, other = await taskd.call(
        "POST", "/jobs", {"type": "echo", "payload": {"n": 2}, "unique_key": "flows"}
    )

    assert (again["job_id"], again["duplicate"]) == (first["job_id"], True)
    assert (status, other["error"]) == (409, "conflict")


async def test_thousands_of_jobs_over_many_connections_all_complete_and_none_twice(taskd: Taskd) -> None:
    driver = Driver(taskd.port, taskd.key, Ledger(taskd.folder / "accepted.txt"))

    began = time.monotonic()
    tally = await driver.run(
        lambda n: {"type": "echo", "payload": {"n": n}, "tags": ["many"]},
        rate=1_000_000,
        seconds=JOBS / 1_000_000,
        connections=CONNECTIONS,
    )
    submitted_s = time.monotonic() - began

    async def ended() -> bool:
        rows = await asyncio.to_thread(taskd.query, "select count(*) from taskd.queue where type = 'echo'")
        return bool(rows[0][0] == 0)

    await until(ended, 30, "all jobs have ended")
    took_s = time.monotonic() - began
    rows = taskd.query(
        "select o.status, count(*), min((o.result->>'n')::integer), max((o.result->>'n')::integer), "
        "count(distinct o.result->>'n'), max(o.attempts) from taskd.outcomes as o "
        "join taskd.jobs as j on j.id = o.id where j.tags = '{many}' group by 1"
    )
    print(f"submitted at {JOBS / submitted_s:.0f}/s, all ended after {took_s:.2f} s")
    assert tally.statuses == {200: JOBS}
    assert len(set(tally.accepted.values())) == JOBS
    assert rows == [("completed", JOBS, 0, JOBS - 1, JOBS, 1)]


async def test_a_restart_of_the_worker_costs_a_running_job_nothing_but_time(taskd: Taskd) -> None:
    worker = taskd.worker
    drained = await taskd.submit("ledger", {"n": 10, "ms": 1500})
    await _is_running(taskd, drained["job_id"])
    worker.signal(signal.SIGTERM)
    job = await taskd.finished(drained["job_id"])
    assert (job["status"], job["attempts"], job["history"]) == ("completed", 1, [])

    await until(lambda: taskd.worker != worker, 20, "the worker is started again")


async def test_a_job_whose_worker_is_killed_runs_again_and_says_why(taskd: Taskd) -> None:
    killed = await taskd.submit("ledger", {"n": 11, "ms": 1500})
    await _is_running(taskd, killed["job_id"])
    taskd.worker.signal(signal.SIGKILL)
    job = await taskd.finished(killed["job_id"])
    if job["status"] != "completed":
        job = await taskd.finished(killed["job_id"])

    assert (job["status"], job["attempts"]) == ("completed", 2)
    assert [run["cause"] for run in job["history"]] == ["lease_expired"]
    # Not by its lease: the next start on this host knows that nothing of the earlier one lives.
    assert "started again" in job["history"][0]["error"]


async def _is_running(taskd: Taskd, job_id: str) -> None:
    async def running() -> bool:
        _, job = await taskd.call("GET", f"/jobs/{job_id}")
        return bool(job["status"] == "processing")

    await until(running, 20, "the job runs")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
