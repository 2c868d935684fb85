from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.process.sdnotify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """What systemd is to a daemon: a datagram socket and its address in the environment."""
    abstract = request.param == "abstract"
    address = f"@taskd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if abstract else address)
        listener.settimeout(5)
        yield listener, address


def test_the_manager_hears_what_it_is_told(manager: tuple[socket.socket, str]) -> None:
    listener, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})

    notifier.ready("2 children\nWATCHDOG=trigger")
    notifier.watchdog()
    notifier.extend(1.5)
    notifier.status("draining")
    notifier.stopping()

    assert [listener.recv(999).decode() for _ in range(5)] == [
        "READY=1\nSTATUS=2 children WATCHDOG=trigger",
        "WATCHDOG=1",
        "EXTEND_TIMEOUT_USEC=1500000",
        "STATUS=draining",
        "STOPPING=1",
    ]


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/no/such/socket"}], ids=["absent", "unreachable"])
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    Notifier(environ).ready()


def test_a_manager_that_does_not_read_never_holds_the_daemon(manager: tuple[socket.socket, str]) -> None:
    _, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})

    for _ in range(10_000):  # far more than its queue holds
        notifier.watchdog()


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        pytest.param({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0, id="ours"),
        pytest.param({"WATCHDOG_USEC": "30000000"}, 30.0, id="for whoever reads it"),
        pytest.param({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None, id="for another process"),
        pytest.param({"WATCHDOG_USEC": "junk"}, None, id="no number"),
        pytest.param({}, None, id="none"),
    ],
)
def test_watchdog(environ: dict[str, str], watchdog_s: float | None) -> None:
    assert Notifier(environ, pid=7).watchdog_s == watchdog_s
