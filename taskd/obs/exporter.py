"""Serves the metrics of a process tree to Prometheus on a listener of its own.

One route, no keys: bind it to an address that only the monitoring reaches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

_REQUEST_S = 5.0
_LINE = 8 * 1024

log = logging.getLogger("taskd.obs.exporter")


class Exporter:
    """A listener that answers `GET /metrics` with what `render` returns then."""

    def __init__(self, host: str, port: int, render: Callable[[], str]) -> None:
        self._host = host
        self._port = port
        self._render = render
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that it listens on; 0 while it does not."""
        return 0 if self._server is None else int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listen; a port that is taken is logged and does not stop the daemon."""
        try:
            self._server = await asyncio.start_server(self._answer, self._host, self._port, limit=_LINE)
        except OSError as error:
            extra = {"host": self._host, "port": self._port, "error": str(error)}
            log.error("metrics are not served: set metrics.port to a free one", extra=extra)

    async def stop(self) -> None:
        """Close the listener."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _REQUEST_S)
            method, path, *_ = [*head.split(b" ", 2), b"", b""]
            if path.partition(b"?")[0] != b"/metrics":
                status, body = "404 Not Found", "GET /metrics\n"
            elif method not in (b"GET", b"HEAD"):
                status, body = "405 Method Not Allowed", "GET /metrics\n"
            else:
                status, body = "200 OK", self._render()
            content = body.encode()
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
            )
            if method != b"HEAD":
                writer.write(content)
            await asyncio.wait_for(writer.drain(), _REQUEST_S)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # it went away, or never said what it wants
        finally:
            writer.close()
