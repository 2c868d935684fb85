"""The body of a request: its media type, its size, and how much of all bodies is held in memory."""

from __future__ import annotations

import re
from typing import Any

from taskd.api.http1 import DoorRequest
from taskd.errors import Refused
from taskd.model import payload

HELD = 64 << 20
"""Bytes of unfinished bodies in one process; beyond it further ones are refused."""

_KIND = re.compile(
    r"application/(json|x-ndjson)[ \t]*(?:;[ \t]*charset[ \t]*=[ \t]*(?:utf-8|\"utf-8\")[ \t]*)?;?[ \t]*",
    re.IGNORECASE,
)


def check_media_type(request: DoorRequest, *, ndjson: bool = False) -> bool:
    """Return whether the body is said to be NDJSON, which it may be if `ndjson`; else it is JSON.

    Raises:
        Refused: `unsupported_media_type`.
    """
    kinds = request.headers.getall("content-type", [])
    codings = request.headers.getall("content-encoding", [])
    kind = _KIND.fullmatch(kinds[0]) if len(kinds) == 1 else None
    if kind is None or (len(kind[1]) > 4 and not ndjson):
        wanted = "application/json or application/x-ndjson" if ndjson else "application/json"
        raise Refused("unsupported_media_type", f"the Content-Type must be {wanted}, in UTF-8")
    if codings and [coding.lower() for coding in codings] != ["identity"]:
        raise Refused("unsupported_media_type", "a Content-Encoding is not understood")
    return len(kind[1]) > 4


class Bodies:
    """Reads bodies, and refuses to hold more than `held` bytes of unfinished ones."""

    def __init__(self, max_body: int, held: int = HELD) -> None:
        self._max_body = max_body
        self._free = held

    def arrived(self, request: DoorRequest) -> bytes | None:
        """Return the body of a request if all of it is here already, else None.

        Raises:
            Refused: `too_large`.
        """
        return request.door.arrived_body(self._max_body)

    async def read(self, request: DoorRequest) -> bytes:
        """Return the whole body, of which some is still to come.

        Raises:
            Refused: `too_large`, `request_timeout`, `bad_request`, or `overloaded` when the memory for
                bodies is taken.
        """
        door = request.door
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
