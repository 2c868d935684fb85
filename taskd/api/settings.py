"""What a process of the API is told at its start, as plain values: it never sees the configuration."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from taskd.errors import ConfigError, Problem

if TYPE_CHECKING:
    from taskd.config.tree import Tree

FLIGHT = 256
"""Requests at work in one process; a further one is refused at once (P15)."""
BACKLOG = 1024
LINGER_S = 3.0
"""How long open connections are still answered (503) in a drain when nothing else holds it up."""
GRACE_S = 20.0
"""How long requests that have begun may take in a drain."""
SERVING, UNSAFE = b"r", b"u"
"""What a process tells its parent: that it serves, or that the database would lose jobs, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """The settings of one API. Times are seconds, sizes bytes. Goes to the children over a pipe."""

    database_url: str = field(repr=False)
    listen_url: str | None = field(default=None, repr=False)
    """Where hints are heard, if `database_url` leads through a pooler."""
    schema: str = "taskd"
    pool_max: int = 10
    statement_timeout_s: float = 5.0
    allow_unsafe: bool = False
    submit_links: int = 1
    """INSERTs in flight at once in a process."""
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 2
    max_body: int = 1 << 20
    request_timeout_s: float = 10.0
    max_wait_s: float = 60.0
    flight: int = FLIGHT
    trusted_proxies: tuple[str, ...] = ()
    tls_certificate: str | None = None
    tls_key: str | None = None
    admin_digests: tuple[bytes, ...] = field(default=(), repr=False)
    """SHA-256 of each admin token: the tokens themselves stay behind."""
    pepper: bytes | None = field(default=None, repr=False)
    rate: float = 50.0
    burst: int = 100
    log_level: str = "info"
    log_format: str = "json"

    def encode(self) -> bytes:
        """Return the settings as JSON, secrets and all: for a pipe, never for a file or an argument."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> ApiSettings:
        """Return what `encode` was made from.

        Raises:
            msgspec.MsgspecError: `data` is something else.
        """
        return msgspec.json.decode(data, type=cls)


def admin_digest(token: str) -> bytes:
    """Return what is kept of an admin token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def settings_of(tree: Tree, *, file: str, database_url: str | None = None) -> ApiSettings:
    """Return the settings that a configuration gives; `database_url` stands in for an absent `database.url`.

    Raises:
        ConfigError: there is no database URL, or no admin token.
    """
    given = tree.database.url
    url = database_url if database_url is not None else None if given is None else given.value
    problems = []
    if url is None:
        problems.append(
            Problem(0, "database.url", "is missing: set url, url_file or url_env, or use `taskd up`")
        )
    if not tree.admin.tokens:
        problems.append(Problem(0, "admin.token_file", "is missing: an API needs an admin token"))
    if problems or url is None:
        raise ConfigError(file, problems)
    tls = tree.api.tls
    listen = tree.database.listen_url
    return ApiSettings(
        database_url=url,
        listen_url=None if listen is None or given is None else listen.value,
        schema=tree.database.schema,
        pool_max=tree.database.pool_max,
        statement_timeout_s=tree.database.statement_timeout.total_seconds(),
        allow_unsafe=tree.database.allow_unsafe,
        host=tree.api.host,
        port=tree.api.port,
        workers=tree.api.workers,
        max_body=tree.api.max_body,
        request_timeout_s=tree.api.request_timeout.total_seconds(),
        max_wait_s=tree.api.max_wait.total_seconds(),
        trusted_proxies=tree.api.trusted_proxies,
        tls_certificate=None if tls is None else str(tls.cert),
        tls_key=None if tls is None else str(tls.key),
        admin_digests=tuple(admin_digest(token.value) for token in tree.admin.tokens),
        pepper=tree.keys.pepper,
        rate=float(tree.rate_limit.rate),
        burst=tree.rate_limit.burst,
        log_level=tree.log.level,
        log_format=tree.log.format,
    )
