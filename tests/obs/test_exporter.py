"""The listener for Prometheus."""

from __future__ import annotations

import asyncio

from taskd.obs.exporter import Exporter


async def ask(port: int, request: bytes) -> bytes:
    """Send `request` and return the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


async def served(request: bytes) -> bytes:
    """Return what a listener with one figure answers."""
    exporter = Exporter("127.0.0.1", 0, lambda: "taskd_fenced_total 7\n")
    await exporter.start()
    try:
        return await ask(exporter.port, request)
    finally:
        await exporter.stop()


async def test_metrics_are_served_as_prometheus_text() -> None:
    answer = await served(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"text/plain; version=0.0.4" in head
    assert body == b"taskd_fenced_total 7\n"


async def test_any_other_path_is_not_found() -> None:
    assert (await served(b"GET /health HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404 ")


async def test_what_is_no_request_is_answered_by_the_end_of_the_connection() -> None:
    assert await served(b"x" * 20_000) == b""


async def test_a_port_that_is_taken_does_not_stop_the_daemon() -> None:
    first = Exporter("127.0.0.1", 0, lambda: "")
    await first.start()
    second = Exporter("127.0.0.1", first.port, lambda: "")

    await second.start()

    assert second.port == 0
    await first.stop()
    await second.stop()
