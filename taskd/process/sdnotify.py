"""Tells systemd how the daemon is: ready, stopping, alive, needs more time.

Without `NOTIFY_SOCKET` everything is a no-op, and a socket that can't be reached never harms the
daemon.

Source: sd_notify(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress


class Notifier:
    """The way to the service manager of one process, from its `environ`."""

    def __init__(self, environ: Mapping[str, str], pid: int | None = None) -> None:
        """`pid` is this process' own id, which `WATCHDOG_PID` must name if it is set."""
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        owner = environ.get("WATCHDOG_PID", "")
        usec = environ.get("WATCHDOG_USEC", "")
        mine = owner in ("", str(os.getpid() if pid is None else pid))
        self.watchdog_s = int(usec) / 1_000_000 if mine and usec.isdecimal() and int(usec) else None
        """Seconds within which `watchdog` must be called again, best in half of them; None: no watchdog."""

    def ready(self, status: str = "") -> None:
        """Startup is finished; `status` is shown by `systemctl status`."""
        self._send("READY=1", status)

    def stopping(self, status: str = "") -> None:
        """Shutdown has begun."""
        self._send("STOPPING=1", status)

    def watchdog(self) -> None:
        """The daemon is alive and does its work."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Starting or stopping needs `seconds` more from now on."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}")

    def status(self, text: str) -> None:
        """Show one line in `systemctl status`."""
        self._send("", text)

    def _send(self, state: str, status: str = "") -> None:
        if not self._address:
            return
        lines = [state] if state else []
        if status:
            lines.append("STATUS=" + " ".join(status.split()))  # a line break would begin another assignment
        message = "\n".join(lines).encode("utf-8", "replace")
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.setblocking(False)
            notify.sendto(message, self._address)
