"""Configuration files, and the `taskd` command as a process whose lines are read with a deadline."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import pytest
from click.testing import CliRunner

from tests.postgres import scratch_folder

collect_ignore_glob = ["fixtures_path/*"]  # doctest would import them

FIXTURES = Path(__file__).parent / "fixtures_path"
TOKEN = "Zq3vT8mB1xW6nK0pR5sY2uL9dF4hJ7cA"
DEADLINE_S = 30.0

WriteConfig = Callable[[str], Path]


def clean_env(**more: str) -> dict[str, str]:
    """The environment of a process under test: nothing of ours, and the plugins of the tests."""
    root = str(Path(__file__).parents[2])
    return {
        "PATH": os.defpath,
        "HOME": "/nonexistent",
        "PYTHONPATH": os.pathsep.join([str(FIXTURES), root]),
        **more,
    }


def taskd(*words: str | Path, env: Mapping[str, str] | None = None, stdin: str = "") -> Done:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "taskd", *map(str, words)],
        env=clean_env(**(env or {})),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


Done = subprocess.CompletedProcess[str]


class Daemon:
    """A `taskd` command that runs on; its outputs are read line by line, never waited for without end."""

    def __init__(self, *words: str | Path, env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "taskd", *map(str, words)],
            env=clean_env(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._rest: dict[int, bytes] = {}
        self.seen: list[str] = []

    def until(self, fragment: str, *, stdout: bool = False) -> str:
        """Return the first line that has `fragment` in it."""
        stream = self.process.stdout if stdout else self.process.stderr
        assert stream is not None
        deadline = time.monotonic() + DEADLINE_S
        while (line := self._line(stream, deadline)) is not None:
            self.seen.append(line)
            if fragment in line:
                return line
        raise AssertionError(f"no line with {fragment!r} in:\n" + "\n".join(self.seen))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        try:
            _, rest = self.process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError("does not end; it said:\n" + "\n".join(self.seen)) from None
        self.seen += rest.decode().splitlines()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def _line(self, stream: IO[bytes], deadline: float) -> str | None:
        fd = stream.fileno()
        rest = self._rest.get(fd, b"")
        while b"\n" not in rest:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(fd, 65536) if ready else b""
            if not data:
                return None
            rest += data
        line, _, self._rest[fd] = rest.partition(b"\n")
        return line.decode()


StartDaemon = Callable[..., Daemon]


@pytest.fixture
def start_daemon() -> Iterator[StartDaemon]:
    daemons: list[Daemon] = []

    def start(*words: str | Path, env: Mapping[str, str]) -> Daemon:
        daemons.append(Daemon(*words, env=env))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the account of an embedded server may enter."""
    with scratch_folder() as made:
        yield made


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    def write(text: str) -> Path:
        path = tmp_path / "taskd.yaml"
        path.write_text(text)
        path.chmod(0o600)
        return path

    return write


@pytest.fixture
def config_file(write_config: WriteConfig, database_url: str) -> Path:
    """A configuration of the test's own database."""
    return write_config(f'database: {{url: "{database_url}"}}\nadmin: {{token: {TOKEN}}}\n')


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
