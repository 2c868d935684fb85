"""What a route is, and what its function is handed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import parse_qsl, unquote

from taskd.api.answers import Answer
from taskd.api.http1 import DoorRequest
from taskd.api.throttle import Throttle
from taskd.errors import Refused
from taskd.service.audit import Audit
from taskd.service.backlog import Backlog
from taskd.service.health import Health
from taskd.service.jobs import Jobs
from taskd.service.keyring import Key
from taskd.service.keys import Actor, Keys

MAX_PARAMETERS = 100
PATIENCE_S = 4.6
"""How long the database may take over one request, in seconds: its 503 comes within 5 s (P10)."""


class Flight:
    """Requests at work in this process, at most `most`; those that wait for a body or an outcome are not."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._now = 0

    @property
    def empty(self) -> bool:
        """Whether nothing is at work."""
        return self._now == 0

    def enter(self) -> None:
        """Count one more.

        Raises:
            Refused: `overloaded`.
        """
        if self._now >= self._most:
            raise Refused("overloaded", "too many requests are at work", headers={"Retry-After": "1"})
        self._now += 1

    def back(self) -> None:
        """Count one that was let out and has been accepted already: never refused."""
        self._now += 1

    def leave(self) -> None:
        """Count one less."""
        self._now -= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the routes may ask. `now` is the wall clock in UTC."""

    jobs: Jobs
    keys: Keys
    audit: Audit
    health: Health
    throttle: Throttle
    backlog: Backlog
    openapi: bytes
    """The document of `/openapi.json`."""
    max_wait_s: float
    now: Callable[[], datetime]


@dataclass(slots=True)
class Call:
    """A request and what follows from its head; kept with it, for the next one with the same head.

    `key` and `ndjson` are set once that was checked: a handler runs after all checks of its route.
    """

    request: DoorRequest
    services: Services
    route: Route
    parts: Mapping[str, str]
    """The named parts of the path, as they stand in it."""
    address: str
    flight: Flight
    key: Key | None = None
    """The key of a route that has a scope."""
    body: bytes = b""
    ndjson: bool | None = None
    """Whether the body is NDJSON."""

    @property
    def until(self) -> float:
        """Until when the database may take, by the loop's clock."""
        return self.request.answer_by

    @property
    def client_key(self) -> Key:
        """The key of a route that has a scope."""
        assert self.key is not None
        return self.key

    @property
    def operator(self) -> Actor:
        """Who asks on an admin route."""
        return Actor(name="admin", address=self.address, request_id=self.request.door_id)

    def part(self, name: str) -> str:
        """Return a named part of the path, decoded; half a character becomes U+FFFD, which no name has."""
        return unquote(self.parts[name], errors="replace")

    def query(self) -> dict[str, str]:
        """Return the parameters after the `?`.

        Raises:
            Refused: `invalid_field` for one that stands there twice, `bad_request` for what is no query.
        """
        if b"?" not in self.request.raw_url:
            return {}
        text = self.request.raw_url.partition(b"?")[2].decode("ascii")
        try:
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS)
        except ValueError:
            raise Refused("bad_request", "the query is malformed") from None
        found: dict[str, str] = {}
        for name, value in pairs:
            if name in found:
                raise Refused.field("invalid_field", name[:64], "stands there twice")
            found[name] = value
        return found

    async def hold(self, waiting: Awaitable[None]) -> None:
        """Await `waiting`, but no longer than the client is there; the database has its time anew then."""
        task = asyncio.ensure_future(waiting)
        protocol = self.request.door.protocol
        protocol.on_end = task.cancel
        self.flight.leave()
        try:
            if not protocol.ended:
                await asyncio.wait({task})
        finally:
            self.flight.back()
            protocol.on_end = None
            task.cancel()
        self.renew()

    def renew(self) -> None:
        """Give the database its time from now on."""
        self.request.answer_by = asyncio.get_running_loop().time() + PATIENCE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row of SPEC part 3. A route has a `scope` (and then a rate limit), or is `admin`, or open."""

    method: str
    path: str
    """With named parts like `<id:str>`."""
    run: Callable[[Call], Awaitable[Answer]]
    scope: str | None = None
    admin: bool = False
    body: bool = False
    """Whether it takes a JSON body."""
    ndjson: bool = False
    """Whether that may be NDJSON too."""

    @property
    def shown_path(self) -> str:
        """The path as people write it: `/jobs/{id}`."""
        return _PART.sub(r"{\1}", self.path)


_PART = re.compile(r"<(\w+):\w+>")
