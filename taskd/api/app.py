"""The application of one process: what answers requests, and what it is made of."""

from __future__ import annotations

import itertools
import os
import resource
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sanic import Sanic
from sanic.exceptions import MethodNotAllowed, NotFound

from taskd.api import answers, openapi
from taskd.api.answers import Answer
from taskd.api.auth import Addresses, Guard
from taskd.api.body import Bodies, check_media_type
from taskd.api.http1 import DoorRequest, Ended
from taskd.api.route import PATIENCE_S, Call, Flight, Route, Services
from taskd.api.routes import audit, docs, health, jobs, keys
from taskd.api.settings import ApiSettings
from taskd.api.strikes import Strikes
from taskd.api.throttle import Throttle
from taskd.errors import Refused, StoreUnavailable
from taskd.model.bucket import Limit
from taskd.model.job import NewJob
from taskd.service.audit import Audit
from taskd.service.backlog import Backlog
from taskd.service.batch import Reads
from taskd.service.bulk import Bulks
from taskd.service.health import Health
from taskd.service.jobs import Jobs
from taskd.service.keyring import KeyRing, listen
from taskd.service.keys import Keys
from taskd.service.submitter import Hints, Submitter
from taskd.service.types import KnownTypes
from taskd.service.waiting import Waiting
from taskd.store import nodes
from taskd.store.pool import Connection, Link, Pace, Target
from taskd.store.queries import SQL

ROUTES: tuple[Route, ...] = (*health.ROUTES, *docs.ROUTES, *jobs.ROUTES, *keys.ROUTES, *audit.ROUTES)
MAX_CONNECTIONS = 16_384
"""Connections of one process, or what its limit of open files leaves."""


class Links:
    """The connections of this process, each for one kind of work; they connect when they are first used.

    INSERTs; keys and tokens, which every request needs; reads of clients; the rest; and one that only
    listens. With a `pool_max` below that one does several kinds.
    """

    def __init__(self, settings: ApiSettings) -> None:
        target = Target(
            url=settings.database_url,
            application="taskd api",
            statement_timeout_s=settings.statement_timeout_s,
        )
        pace = Pace()
        wanted = min(3 + settings.submit_links, settings.pool_max)
        links = [Link(target, pace, deadline_s=PATIENCE_S) for _ in range(wanted)]
        self.ears: Link | None = None
        """Hears of keys that changed; a `pool_max` without room for it makes do with what is believed."""
        if settings.pool_max > wanted:
            heard = replace(target, url=settings.listen_url or target.url, application="taskd api ears")
            self.ears = Link(heard, pace, deadline_s=PATIENCE_S)
        self.side = links[-1]
        self.reads = links[-2] if wanted > 2 else links[-1]
        self.quick = links[-3] if wanted > 3 else links[-1]
        self.submits = links[: max(1, wanted - 3)]
        self._all = [*links, *([self.ears] if self.ears else [])]
        if not settings.allow_unsafe:
            for link in self.submits:
                link.on_connect = _refuse_unsafe

    async def close(self) -> None:
        """Close what is open."""
        for link in self._all:
            await link.close()


async def _refuse_unsafe(conn: Connection) -> None:
    """Keep a connection from being used whose commits may be lost: a 2xx would be no promise."""
    if found := (await nodes.server_facts(conn)).unsafe():
        raise StoreUnavailable(f"the database can lose accepted jobs: {'; '.join(found)}")


class Door:
    """Answers the requests of this process: checks in their order (SPEC part 3), then the route."""

    def __init__(self, settings: ApiSettings, strikes: Strikes, links: Links, app: Sanic[Any, Any]) -> None:
        def now() -> datetime:
            return datetime.now(UTC)

        default = Limit.of(settings.rate, settings.burst)
        reads, side = Reads(links.reads), Reads(links.side)
        self.ring = KeyRing(links.quick, side, pepper=settings.pepper, default=default)
        self.backlog = Backlog(side)
        self.types = KnownTypes(side, self.backlog)
        self.waiting = Waiting(reads)
        self._throttle = Throttle(links.quick)
        hints = Hints(links.side)

        def stored(jobs: Sequence[NewJob]) -> None:
            hints.tell(jobs)
            self.backlog.stored(jobs)

        self.services = Services(
            jobs=Jobs(
                types=self.types,
                submitter=Submitter(links.submits, stored=stored),
                bulks=Bulks(links.submits, stored=stored),
                reads=reads,
                waiting=self.waiting,
                now=now,
                dice=_dice(),
            ),
            keys=Keys(side, pepper=settings.pepper, now=now, dice=secrets.token_bytes),
            audit=Audit(side),
            openapi=openapi.encoded(ROUTES),
            health=Health(side, allow_unsafe=settings.allow_unsafe),
            throttle=self._throttle,
            backlog=self.backlog,
            max_wait_s=settings.max_wait_s,
            now=now,
        )
        addresses = Addresses(settings.trusted_proxies)
        self._guard = Guard(self.ring, strikes, addresses, settings.admin_digests, time.time)
        self._bodies = Bodies(settings.max_body)
        self._router = app.router
        self._ears = links.ears
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self.flight = Flight(settings.flight)
        self.draining_at: float | None = None
        """When the drain began, by the loop's clock."""
        self.hsts = settings.tls_certificate is not None
        self.max_connections = _max_connections()

    def chores(self) -> list[Coroutine[Any, Any, None]]:
        """Return what runs beside the requests, each until it is cancelled."""
        work = [self.types.run(), self.ring.run()]
        if self._ears is not None:
            work.append(listen(self._ears, self.ring.forget))
        return work

    def request_id(self) -> str:
        """Return a new id: the same for nobody, and no guess at how many there were before."""
        return f"{self._prefix}{next(self._numbers):08x}"

    async def handle(self, request: DoorRequest) -> Answer:
        """Answer one request."""
        try:
            call: Call | None = request.kept
            if call is None:
                call = request.kept = self._recognise(request)
            route = call.route
            if self.draining_at is not None and request.started_at >= self.draining_at:
                return self._shut(request)
            now = request.door.protocol.loop.time()
            request.answer_by = now + PATIENCE_S
            if route.scope is None and not route.admin:
                return await route.run(call)
            self.flight.enter()
            try:
                if route.admin:
                    self._guard.admin(request)
                else:
                    await self._check_key(call, route.scope, now)
                if route.body:
                    await self._read_body(call)
                return await route.run(call)
            finally:
                self.flight.leave()
                call.body = b""  # what is kept of the request is its head
        except Ended:
            raise
        except Exception as problem:  # the edge: every error becomes an answer here
            return answers.error(problem, request.door_id)

    def _recognise(self, request: DoorRequest) -> Call:
        path = request.raw_url.partition(b"?")[0].decode("ascii")
        route, parts = self._find(path, request.method)
        return Call(request, self.services, route, parts, self._guard.address(request), self.flight)

    def _shut(self, request: DoorRequest) -> Answer:
        refused = Refused("shutting_down", "this server is shutting down", headers={"Retry-After": "1"})
        answer = answers.error(refused, request.door_id)
        answer.close = True
        return answer

    async def _check_key(self, call: Call, scope: str | None, now: float) -> None:
        request = call.request
        key = call.key  # of the last request with this head: the bytes of its key are the same
        if key is None or not self.ring.still(key, now):
            call.key = None
            key = call.key = await self._guard.key(request, request.answer_by)
        if not self._throttle.from_hand(key, request, request.answer_by):
            await self._throttle.take(key, request, request.answer_by)
        if scope not in key.scopes:
            raise Refused("forbidden", f"this key does not have the scope {scope}")
        if scope == "jobs:write" and key.max_pending is not None:
            await self.backlog.admit_client(key.client, key.max_pending, call.until)

    async def _read_body(self, call: Call) -> None:
        if call.ndjson is None:
            call.ndjson = check_media_type(call.request, ndjson=call.route.ndjson)
        body = self._bodies.arrived(call.request)
        if body is not None:
            call.body = body
            return
        self.flight.leave()
        try:
            call.body = await self._bodies.read(call.request)
        finally:
            self.flight.back()
        call.renew()

    def _find(self, path: str, method: str) -> tuple[Route, dict[str, str]]:
        """Return the route, and the named parts of the path.

        Raises:
            Refused: `not_found`, or `method_not_allowed` with the methods that there are.
        """
        if path.endswith("/") or "//" in path:  # no route has these; the router strips them one by one
            raise Refused("not_found", "there is no such path")
        try:
            found, _, parts = self._router.get(path, "GET" if method == "HEAD" else method, None)
        except NotFound:
            raise Refused("not_found", "there is no such path") from None
        except MethodNotAllowed as error:
            allowed = str(error.headers.get("Allow", ""))
            raise Refused(
                "method_not_allowed", f"this path takes {allowed}", headers={"Allow": allowed}
            ) from None
        return found.ctx.route, parts


def create_app(settings: ApiSettings, strikes: Strikes) -> Sanic[Any, Any]:
    """Return the application of this process; `app.ctx.door` is its `Door`, `app.ctx.links` its `Links`."""
    SQL.use_schema(settings.schema)
    app: Sanic[Any, Any] = Sanic(
        "taskd", strict_slashes=True, configure_logging=False, request_class=DoorRequest
    )
    app.config.update(
        AUTO_EXTEND=False,
        ACCESS_LOG=False,
        MOTD=False,
        KEEP_ALIVE_TIMEOUT=75,
        REQUEST_MAX_SIZE=settings.max_body,
    )
    for route in ROUTES:
        name = f"{route.method} {route.path}".lower()
        app.add_route(
            _unused,
            route.path,
            methods=[route.method],
            name="".join(c if c.isalnum() else "_" for c in name),
            ctx_route=route,
            stream=True,
        )
    app.ctx.links = Links(settings)
    app.ctx.door = Door(settings, strikes, app.ctx.links, app)
    return app


async def _unused(request: Any, **parts: str) -> None:
    """Stand in Sanic's table of routes; `Door` runs them."""
    raise AssertionError


def _dice() -> Callable[[int], bytes]:
    """Return what gives random bytes for ids, taken from the system for many ids at a time.

    A system call for each takes as long as all else that makes an id. Not for secrets.
    """
    drawn, used = b"", 0

    def draw(count: int) -> bytes:
        nonlocal drawn, used
        if used + count > len(drawn):
            drawn, used = os.urandom(max(count, 4096)), 0
        used += count
        return drawn[used - count : used]

    return draw


def _max_connections() -> int:
    """Raise this process' limit of open files as far as it may, and return what it leaves for clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 256
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft - 128))
