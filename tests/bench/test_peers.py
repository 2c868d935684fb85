"""The peers of the benchmark: their packages are pinned and installed once, their programs are bounded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bench.peers import PEERS, Unavailable, install, program
from bench.peers.program import Program

PINNED = re.compile(r"[a-z-]+(\[[a-z,]+\])?(==|@)\d+\.\d+\.\d+")


def _client(folder: Path, name: str, script: str) -> None:
    """Put an executable shell script on the path."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _python(source: str) -> Program:
    return Program([sys.executable, "-c", source], {})


def test_each_package_of_a_peer_is_pinned() -> None:
    packages = [package for peer in PEERS for package in peer.packages]

    assert packages
    assert [package for package in packages if not PINNED.fullmatch(package)] == []


def test_the_version_of_a_peer_is_that_of_its_package() -> None:
    wrong = [peer.name for peer in PEERS if not peer.packages[0].endswith(peer.version)]

    assert wrong == []


def test_a_peer_without_its_client_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(Unavailable, match="npm is not installed"):
        install.node_packages(tmp_path, "peer-1", ["peer@1.0.0"])


def test_packages_are_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _client(tmp_path, "npm", f"echo x >> {tmp_path}/calls")
    monkeypatch.setenv("PATH", str(tmp_path))

    for _ in range(2):
        install.node_packages(tmp_path, "peer-1", ["peer@1.0.0"])

    assert (tmp_path / "calls").read_text() == "x\n"


def test_other_packages_are_installed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _client(tmp_path, "npm", f"echo x >> {tmp_path}/calls")
    monkeypatch.setenv("PATH", str(tmp_path))
    install.node_packages(tmp_path, "peer-1", ["peer@1.0.0"])

    install.node_packages(tmp_path, "peer-1", ["peer@1.0.1"])

    assert (tmp_path / "calls").read_text() == "x\nx\n"


def test_a_failed_install_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _client(tmp_path, "npm", f"echo x >> {tmp_path}/calls; exit 7")
    monkeypatch.setenv("PATH", str(tmp_path))

    for _ in range(2):
        with pytest.raises(Unavailable, match="status 7"):
            install.node_packages(tmp_path, "peer-1", ["peer@1.0.0"])

    assert (tmp_path / "calls").read_text() == "x\nx\n"


def test_the_reason_tells_neither_an_installers_words_nor_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _client(tmp_path, "npm", "echo private.example >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(Unavailable) as reason:
        install.node_packages(tmp_path, "peer-1", ["peer@1.0.0"])

    assert str(reason.value) == "npm install peer@1.0.0 failed with exit status 1"


def test_a_program_that_ends_shows_why() -> None:
    with (
        _python("raise SystemExit('no such table')") as ended,
        pytest.raises(RuntimeError, match="no such table"),
    ):
        ended.answer(30)


def test_a_silent_program_is_not_waited_for() -> None:
    with _python("input()") as silent, pytest.raises(RuntimeError, match="no answer"):
        silent.answer(0.05)


def test_what_a_library_prints_is_no_answer() -> None:
    with _python("print('hello'); print('{\"ready\": true}')") as chatty:
        assert chatty.answer(30) == {"ready": True}


def test_a_program_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "STOP_S", 0.2)
    stubborn = _python(
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('{}', flush=True); input()"
    )
    stubborn.answer(30)

    stubborn.stop()

    assert not Path(f"/proc/{stubborn.pid}").exists()
