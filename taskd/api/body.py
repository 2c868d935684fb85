"""The body of a request: its media type, its size, and how much of all bodies is held in memory."""

from __future__ import annotations

import re
from typing import Any

from taskd.api.http1 import DoorRequest
from taskd.errors import Refused
from taskd.model import payload

HELD = 64 << 20
"""Bytes of unfinished bodies in one process; beyond it further ones are refused."""

_JSON = re.compile(
    r"application/json[ \t]*(?:;[ \t]*charset[ \t]*=[ \t]*(?:utf-8|\"utf-8\")[ \t]*)?;?[ \t]*", re.IGNORECASE
)


def check_media_type(request: DoorRequest) -> None:
    """Return when the body is said to be JSON.

    Raises:
        Refused: `unsupported_media_type`.
    """
    kinds = request.headers.getall("content-type", [])
    codings = request.headers.getall("content-encoding", [])
    if len(kinds) != 1 or not _JSON.fullmatch(kinds[0]):
        raise Refused("unsupported_media_type", "the Content-Type must be application/json, in UTF-8")
    if codings and [coding.lower() for coding in codings] != ["identity"]:
        raise Refused("unsupported_media_type", "a Content-Encoding is not understood")


class Bodies:
    """Reads bodies, and refuses to hold more than `held` bytes of unfinished ones."""

    def __init__(self, max_body: int, held: int = HELD) -> None:
        self._max_body = max_body
        self._free = held

    async def read(self, request: DoorRequest) -> bytes:
        """Return the whole body.

        Raises:
            Refused: `too_large`, `request_timeout`, `bad_request`, or `overloaded` when the memory for
                bodies is taken.
        """
        door = request.door
        if door.arrived:
            return await door.read_body(self._max_body)
        wanted = self._max_body if door.rest == "chunked" else min(door.left, self._max_body)
        if wanted > self._free:
            raise Refused("overloaded", "too many bodies are on their way", headers={"Retry-After": "1"})
        self._free -= wanted
        try:
            return await door.read_body(self._max_body)
        finally:
            self._free += wanted


def read_object(body: bytes, *, above: int = 1) -> dict[str, Any]:
    """Return the JSON object that a body is; see `payload.parse`."""
    return payload.parse(body, above=above)
