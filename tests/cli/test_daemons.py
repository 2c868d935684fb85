from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.cli.conftest import TOKEN, StartDaemon, WriteConfig, taskd


@pytest.fixture
def worker_file(write_config: WriteConfig, database_url: str) -> Path:
    return write_config(
        f'database: {{url: "{database_url}", allow_unsafe: true}}\n'
        "workers: {node: n1, drain_timeout: 1s}\nlog: {format: text}\n"
    )


def ask(url: str, body: object = None, **headers: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **named})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def test_a_worker_runs_jobs_and_drains(start_daemon: StartDaemon, worker_file: Path, tmp_path: Path) -> None:
    env = {"RUNTIME_DIRECTORY": str(tmp_path)}
    worker = start_daemon("worker", "--config", worker_file, env=env)
    worker.until("node is ready")

    done = taskd("submit", "echo", "-p", "a=1", "--wait", "--config", worker_file)

    assert done.returncode == 0, done.stderr
    assert 'result: {"a":1}' in done.stdout
    assert worker.end() == 0
    assert any("node has ended" in line for line in worker.seen)


def test_a_failed_job_is_told_by_the_exit_status(
    start_daemon: StartDaemon, write_config: WriteConfig, database_url: str, tmp_path: Path
) -> None:
    file = write_config(
        f'database: {{url: "{database_url}", allow_unsafe: true}}\nlog: {{format: text}}\n'
        "job_types:\n  brief: {handler: sleep, timeout: 100ms, retry: {max_attempts: 1}}\n"
    )
    worker = start_daemon("worker", "--config", file, env={"RUNTIME_DIRECTORY": str(tmp_path)})
    worker.until("node is ready")

    done = taskd("submit", "brief", "-p", "seconds=60", "--wait=20", "--config", file)

    assert done.returncode == 1
    assert "status: failed" in done.stdout


def test_a_second_worker_of_one_name_is_refused(
    start_daemon: StartDaemon, worker_file: Path, tmp_path: Path
) -> None:
    env = {"RUNTIME_DIRECTORY": str(tmp_path)}
    start_daemon("worker", "--config", worker_file, env=env).until("node is ready")

    second = taskd("worker", "--config", worker_file, env=env)

    assert second.returncode == 1
    assert "already runs as node 'n1'" in second.stderr


def test_a_worker_refuses_a_database_that_loses_jobs(
    write_config: WriteConfig, database_url: str, tmp_path: Path
) -> None:
    file = write_config(f'database: {{url: "{database_url}"}}\n')

    done = taskd("worker", "--config", file, env={"RUNTIME_DIRECTORY": str(tmp_path)})

    assert done.returncode == 78
    assert "fsync is off" in done.stderr


def test_an_api_refuses_a_database_that_loses_jobs(
    write_config: WriteConfig, database_url: str, free_port: int
) -> None:
    file = write_config(
        f'database: {{url: "{database_url}"}}\n'
        f"api: {{port: {free_port}, workers: 2}}\nadmin: {{token: {TOKEN}}}\n"
    )

    done = taskd("api", "--config", file)

    assert done.returncode == 78
    assert "fsync is off" in done.stderr


@pytest.mark.parametrize("command", ["worker", "api"])
def test_a_configuration_that_is_wrong_is_told_once_and_ends_a_daemon(
    write_config: WriteConfig, tmp_path: Path, command: str
) -> None:
    file = write_config("database: {url: 'postgresql://127.0.0.1:1/none', pool_maxx: 3}\n")

    done = taskd(command, "--config", file, env={"RUNTIME_DIRECTORY": str(tmp_path)})

    assert done.returncode == 78
    assert done.stderr.count("pool_maxx") == 1
    assert list(tmp_path.glob("node-*")) == []


def test_what_only_the_start_of_a_daemon_needs_does_not_stay_in_its_memory(
    start_daemon: StartDaemon,
    worker_file: Path,
    write_config: WriteConfig,
    database_url: str,
    tmp_path: Path,
    free_port: int,
) -> None:
    worker = start_daemon("worker", "--config", worker_file, env={"RUNTIME_DIRECTORY": str(tmp_path)})
    worker.until("node is ready")
    file = write_config(
        f'database: {{url: "{database_url}", allow_unsafe: true}}\n'
        f"api: {{port: {free_port}, workers: 1}}\nadmin: {{token: {TOKEN}}}\nlog: {{format: text}}\n"
    )
    api = start_daemon("api", "--config", file, env={})
    api.until("serving")

    for pid, unwanted in (
        (worker.process.pid, ("yaml/", "jsonschema_rs")),
        (api.process.pid, ("yaml/", "jsonschema_rs", "psycopg", "uvloop")),
    ):
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert [name for name in unwanted if name in loaded] == []


def test_a_daemon_that_is_told_to_end_while_it_starts_leaves_nothing(
    start_daemon: StartDaemon, write_config: WriteConfig, tmp_path: Path
) -> None:
    fifo = tmp_path / "token"
    os.mkfifo(fifo, 0o600)  # reading it waits until somebody writes
    file = write_config(
        f"database: {{url: 'postgresql://127.0.0.1:1/none'}}\nadmin: {{token_file: {fifo}}}\n"
    )
    api = start_daemon("api", "--config", file, env={})
    with open(fifo, "w"):  # opened once the copy of the process reads
        copies = children(api.process.pid)
        assert len(copies) == 1

        assert api.end() == 0

    assert not any(Path(f"/proc/{pid}").exists() for pid in copies)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_up_runs_all_on_a_server_of_its_own_and_stops_it(
    start_daemon: StartDaemon, write_config: WriteConfig, folder: Path, free_port: int
) -> None:
    file = write_config(
        "database: {url_env: NOT_SET_AT_ALL}\n"
        f"api: {{port: {free_port}, workers: 1}}\nadmin: {{token: {TOKEN}}}\nlog: {{format: text}}\n"
        "workers: {processes: 1, drain_timeout: 1s}\n"
    )
    env = {"STATE_DIRECTORY": str(folder), "RUNTIME_DIRECTORY": str(folder)}
    up = start_daemon("up", "--config", file, env=env)
    up.until(f"export NOT_SET_AT_ALL='postgresql://taskd@/postgres?host={folder}/pg/s", stdout=True)
    url = f"http://127.0.0.1:{free_port}"

    assert ask(f"{url}/health") == {"message": "ok"}
    key = ask(f"{url}/admin/api-keys", {"name": "k"}, Authorization=f"Bearer {TOKEN}")["key"]
    job = ask(f"{url}/jobs?wait=10", {"type": "echo", "payload": {"a": 1}}, X_API_Key=key)
    assert ask(f"{url}/jobs/{job['job_id']}?wait=10", X_API_Key=key)["result"] == {"a": 1}
    hint = taskd("jobs", "list", "--config", file, env=env)
    assert hint.returncode == 78
    assert "for the PostgreSQL of the `taskd up` that runs here: NOT_SET_AT_ALL=" in hint.stderr

    pid = int((folder / "pg" / "data" / "postmaster.pid").read_text().splitlines()[0])
    gone = os.pidfd_open(pid)
    assert up.end() == 0
    assert os.get_blocking(gone)
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(gone, 0)
    os.close(gone)


def test_up_starts_its_server_again_when_it_dies(
    start_daemon: StartDaemon, write_config: WriteConfig, folder: Path, free_port: int
) -> None:
    file = write_config(
        f"api: {{port: {free_port}, workers: 1}}\nadmin: {{token: {TOKEN}}}\nlog: {{format: text}}\n"
        "workers: {processes: 1, drain_timeout: 1s}\n"
    )
    env = {"STATE_DIRECTORY": str(folder), "RUNTIME_DIRECTORY": str(folder)}
    up = start_daemon("up", "--config", file, env=env)
    up.until("taskd is ready", stdout=True)

    os.kill(int((folder / "pg" / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)

    up.until("embedded PostgreSQL runs again")
    assert up.end() == 0
    assert not (folder / "pg" / "data" / "postmaster.pid").exists()


def test_up_gives_up_when_its_address_is_taken(
    write_config: WriteConfig, database_url: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        file = write_config(
            f'database: {{url: "{database_url}", allow_unsafe: true}}\n'
            f"api: {{port: {taken.getsockname()[1]}}}\nadmin: {{token: {TOKEN}}}\n"
        )

        done = taskd("up", "--config", file, env={"RUNTIME_DIRECTORY": str(tmp_path)})

    assert done.returncode == 1
    assert "can't listen on 127.0.0.1" in done.stderr


def test_an_api_starts_without_its_database(
    start_daemon: StartDaemon, write_config: WriteConfig, free_port: int
) -> None:
    file = write_config(
        "database: {url: 'postgresql://127.0.0.1:1/none'}\n"
        f"api: {{port: {free_port}, workers: 1}}\nadmin: {{token: {TOKEN}}}\nlog: {{format: text}}\n"
    )
    api = start_daemon("api", "--config", file, env={})
    api.until("serving")

    assert ask(f"http://127.0.0.1:{free_port}/health") == {"message": "ok"}
    with pytest.raises(urllib.error.HTTPError, match="503"):
        ask(f"http://127.0.0.1:{free_port}/ready")
    assert api.end() == 0


def test_up_uses_the_database_of_the_file_and_migrates_it(
    start_daemon: StartDaemon,
    write_config: WriteConfig,
    empty_database_url: str,
    tmp_path: Path,
    free_port: int,
) -> None:
    file = write_config(
        f'database: {{url: "{empty_database_url}", allow_unsafe: true}}\n'
        f"api: {{port: {free_port}, workers: 1}}\nadmin: {{token: {TOKEN}}}\nworkers: {{drain_timeout: 1s}}\n"
    )
    up = start_daemon("up", "--config", file, env={"RUNTIME_DIRECTORY": str(tmp_path)})
    up.until("taskd is ready", stdout=True)

    with psycopg.connect(empty_database_url) as conn:
        found = conn.execute("select count(*) from taskd.nodes").fetchone()

    assert found == (1,)
    assert up.end(signal.SIGINT) == 0


def test_up_ends_when_a_daemon_cannot_work_with_the_configuration(
    start_daemon: StartDaemon, write_config: WriteConfig, database_url: str, tmp_path: Path, free_port: int
) -> None:
    file = write_config(
        f'database: {{url: "{database_url}"}}\n'
        f"api: {{port: {free_port}, workers: 1}}\nadmin: {{token: {TOKEN}}}\n"
    )

    done = taskd("up", "--config", file, env={"RUNTIME_DIRECTORY": str(tmp_path)})

    assert done.returncode == 78
    assert "fsync is off" in done.stderr
