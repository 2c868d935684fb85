"""`taskd bench`, against a taskd that runs."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from taskd.cli import main
from taskd.cli.bench import worked_off
from tests.cli.conftest import TOKEN, StartDaemon, WriteConfig, taskd


@pytest.fixture
def file(write_config: WriteConfig, database_url: str, free_port: int) -> Path:
    return write_config(
        f'database: {{url: "{database_url}", allow_unsafe: true}}\nadmin: {{token: {TOKEN}}}\n'
        f"api: {{port: {free_port}, workers: 1}}\nlog: {{format: text}}\n"
        "workers: {node: n1, processes: 1, drain_timeout: 1s}\n"
    )


@pytest.fixture
def running(start_daemon: StartDaemon, file: Path, tmp_path: Path) -> Path:
    """The configuration of an API and a worker that run."""
    env = {"RUNTIME_DIRECTORY": str(tmp_path)}
    start_daemon("worker", "--config", file, env=env).until("node is ready")
    start_daemon("api", "--config", file, env=env).until("serving")
    return file


def key(file: Path, *words: str) -> str:
    made = taskd("keys", "create", "bench", *words, "--json", "--config", file)
    return str(json.loads(made.stdout)["key"])


def test_jobs_are_submitted_and_looked_at(running: Path, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text(key(running, "--rate", "100000", "--burst", "100000") + "\n")
    words = ("-n", "300", "-c", "4", "--payload", '{"a": 1}', "--config", running)

    done = taskd("--json", "bench", "--key-file", secret, *words)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["submitted"], found["refused"]) == (300, {})
    assert found["submits_per_s"] > 0
    assert 0 < found["submit_p50_ms"] <= found["submit_p99_ms"]
    assert found["looked_at"] == found["ended"] == found["completed"] > 100
    assert 0 <= found["start_p50_ms"] <= found["start_p99_ms"]
    assert found["done_per_s"] > 0


def test_a_rate_limit_is_kept_and_told(running: Path) -> None:
    env = {"TASKD_KEY": key(running, "--rate", "1", "--burst", "5")}

    done = taskd("bench", "-n", "50", "-c", "1", "--for", "2", "--config", running, env=env)

    assert done.returncode == 1
    assert "submitted:  5 in" in done.stdout or "submitted:  6 in" in done.stdout, done.stdout
    assert "x 429; the last one: " in done.stdout
    assert env["TASKD_KEY"] not in done.stdout + done.stderr


def test_a_submit_that_can_never_do_is_not_repeated(running: Path) -> None:
    env = {"TASKD_KEY": key(running, "--rate", "100000", "--burst", "100000")}

    done = taskd("bench", "--type", "no-such", "-n", "500", "-c", "2", "--config", running, env=env)

    assert done.returncode == 1
    refused = done.stdout.partition("refused:")[2].split()[0]
    assert int(refused) <= 2


def test_the_key_is_asked_for(runner: CliRunner, file: Path) -> None:
    result = runner.invoke(main, ["bench", "--config", str(file)], env={"TASKD_KEY": ""})

    assert result.exit_code == 2
    assert "--key-file FILE, or the environment variable TASKD_KEY" in result.output


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://h:99999", "x", "http://h?a=1"])
def test_a_url_that_is_none_is_refused(runner: CliRunner, url: str) -> None:
    result = runner.invoke(main, ["bench", "--url", url], env={"TASKD_KEY": "tk_x"})

    assert result.exit_code == 2
    assert "write http://HOST:PORT" in result.output


def test_an_api_that_is_not_there_is_told(runner: CliRunner, free_port: int) -> None:
    url = f"http://127.0.0.1:{free_port}"

    result = runner.invoke(main, ["bench", "--url", url], env={"TASKD_KEY": "tk_x"})

    assert result.exit_code == 1
    assert url in result.output


@pytest.fixture
def hangs_up() -> Iterator[int]:
    """A server that reads a request and closes; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(2):
                with server.accept()[0] as one:
                    one.recv(65536)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])


def test_a_lost_connection_is_told(runner: CliRunner, hangs_up: int) -> None:
    url = f"http://127.0.0.1:{hangs_up}"

    result = runner.invoke(main, ["bench", "--url", url, "-c", "1"], env={"TASKD_KEY": "tk_x"})

    assert result.exit_code == 1
    assert "the connection was lost" in result.output


def job(second: int, started: int | None, ended: int | None) -> dict[str, Any]:
    at = "2026-01-01T00:00:{:02}Z"
    return {
        "created_at": at.format(second),
        "started_at": None if started is None else at.format(started),
        "finished_at": None if ended is None else at.format(ended),
        "status": "pending" if ended is None else "completed",
    }


def test_done_a_second_is_that_of_all_jobs_from_the_first_start_to_the_last_end() -> None:
    found = worked_off([job(0, 1, 2), job(0, 2, 6)], submitted=100)

    assert found["done_per_s"] == 20
    assert (found["start_p50_ms"], found["start_p99_ms"]) == (2000, 2000)


def test_done_a_second_is_not_guessed_while_jobs_are_under_way() -> None:
    found = worked_off([job(0, 1, 2), job(0, 1, None), job(0, None, None)], submitted=3)

    assert found["done_per_s"] is None
    assert (found["looked_at"], found["ended"], found["completed"]) == (3, 1, 1)
