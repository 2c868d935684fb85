"""All sections of the configuration as frozen values: what keys there are, their defaults and ranges.

The docstring under a field is the one comment line of the key in `conf/taskd.yaml` and in the manual.
Fields declared with `made` are no keys: the reader fills them with what several keys come to.
"""

# ruff: noqa: RUF009 - key() returns a dataclass field

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from taskd.config import checks
from taskd.config.jobtypes import JobTypeOverride
from taskd.config.keys import REQUIRED, key, made
from taskd.config.secret import Secret
from taskd.config.units import Rate, Size, rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """`database:` - the PostgreSQL that holds the jobs; without a URL `taskd up` runs one of its own."""

    url: Secret | None = key(
        None,
        secret=True,
        restart=True,
        check=checks.database_url,
        example="postgresql://taskd@127.0.0.1:5432/taskd",
    )
    """Where the database is, as libpq reads it; at most one of url, url_file and url_env is in force."""
    url_file: Path | None = key(None, restart=True, example="/run/credentials/taskd.service/database_url")
    """A file of mode 0600, or a systemd credential, that holds the URL."""
    url_env: str | None = key(None, restart=True, example="DATABASE_URL")
    """The environment variable that holds the URL; when it is not set, this key counts as absent."""
    listen_url: Secret | None = key(
        None,
        secret=True,
        restart=True,
        check=checks.database_url,
        example="postgresql://taskd@127.0.0.1:5432/taskd",
    )
    """A URL past the pooler for LISTEN when database.url goes through PgBouncer."""
    schema: str = key("taskd", restart=True, check=checks.schema_name)
    """The schema that taskd makes and owns."""
    pool_max: int = key(10, min=1, max=1000, restart=True)
    """The most connections that one API process opens."""
    statement_timeout: timedelta = key(timedelta(seconds=5), min="100ms", max="1h", restart=True)
    """How long one statement of the API may take."""
    allow_unsafe: bool = key(False, restart=True)
    """Start although the server's settings (fsync, synchronous_commit) can lose accepted jobs."""
    bindir: Path | None = key(
        None, restart=True, check=checks.absolute_path, example="/usr/lib/postgresql/15/bin"
    )
    """Where the server programs of the PostgreSQL that `taskd up` runs are; absent: looked for."""
    source: Literal["url", "url_file", "url_env"] | None = made(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """`api.tls:` - certificate and key of the API's listener."""

    cert: Path = key(REQUIRED, restart=True, example="/etc/taskd/tls/cert.pem")
    """The certificate and its chain, PEM."""
    key: Path = key(REQUIRED, restart=True, example="/etc/taskd/tls/key.pem")
    """The private key, PEM; not readable by the world."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """`api:` - the HTTP door."""

    host: str = key("127.0.0.1", restart=True, check=checks.host)
    """The address to listen on; any but this machine's own needs tls or allow_plaintext."""
    port: int = key(8080, min=1, max=65535, restart=True)
    """The TCP port to listen on."""
    workers: int = key(2, min=1, max=256, restart=True)
    """How many processes serve HTTP."""
    max_body: Size = key(Size(1 << 20), min="1KiB", max="64MiB")
    """The longest request body that is read."""
    request_timeout: timedelta = key(timedelta(seconds=10), min="100ms", max="10m")
    """How long a client may take to send a request."""
    max_wait: timedelta = key(timedelta(seconds=60), min="0s", max="60s")
    """The longest time that ?wait= holds an answer back."""
    trusted_proxies: tuple[str, ...] = key((), check=checks.proxy, empty=True)
    """Addresses and networks whose X-Forwarded-For is believed."""
    tls: Tls | None = key(None, restart=True)
    """Certificate and key; absent: plain HTTP."""
    allow_plaintext: bool = key(False, restart=True)
    """Serve plain HTTP on an address that other machines reach, behind a proxy that does TLS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """`admin:` - the token that opens the admin routes; exactly one source is in force."""

    token: Secret | None = key(None, secret=True, example="change-me-change-me-change-me-change-me")
    """The token itself, at least 32 characters; better in a file or the environment."""
    token_file: Path | None = key(None, example="/run/credentials/taskd.service/admin_token")
    """A file of mode 0600, or a systemd credential, that holds the token; two lines while it is rotated."""
    token_env: str | None = key(None, example="ADMIN_TOKEN")
    """The environment variable that holds the token; when it is not set, this key counts as absent."""
    tokens: tuple[Secret, ...] = made(())
    source: Literal["token", "token_file", "token_env"] | None = made(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """`keys:` - how API keys are stored."""

    pepper_file: Path | None = key(None, example="/run/credentials/taskd.service/pepper")
    """A file of mode 0600, or a systemd credential, with 32 bytes or more; absent: plain SHA-256."""
    pepper: bytes | None = made(None)

    def __repr__(self) -> str:
        return f"Keys(pepper_file={self.pepper_file!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """`rate_limit:` - how often one API key may call, unless the key says otherwise."""

    rate: Rate = key(rate("50"))
    """Requests a second over all API processes: 50, or "100/m"."""
    burst: int = key(100, min=1, max=1_000_000)
    """Requests that may come at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """`workers:` - the daemon that claims jobs and the child processes that run them."""

    node: str | None = key(None, restart=True, check=checks.plain_name, example="worker-1")
    """This node's name; absent: host name and instance. Two daemons on one host need two names."""
    processes: int = key(2, min=1, max=1024)
    """Child processes for async handlers in the pool default."""
    concurrency: int = key(20, min=1, max=10_000)
    """Jobs at once in the pool default."""
    lease: timedelta = key(timedelta(seconds=30), min="5s", max="1h", restart=True)
    """How long a claim holds without a heartbeat; a dead host's jobs come back after this."""
    heartbeat: timedelta = key(timedelta(seconds=3), min="100ms", max="20m", restart=True)
    """How often the lease is renewed; at most a third of it."""
    sweep: timedelta = key(timedelta(seconds=5), min="100ms", max="10m", restart=True)
    """How often a node looks for claims of dead nodes and for rows to prune."""
    job_timeout: timedelta = key(timedelta(minutes=5), min="100ms", max="30d")
    """How long a job may run when neither its type nor its client says it."""
    drain_timeout: timedelta = key(timedelta(seconds=30), min="0s", max="1d")
    """How long running jobs may go on after SIGTERM before they are put back."""
    max_crashes: int = key(3, min=1, max=100)
    """Deaths of a process while a job ran alone in it, after which the job is failed."""
    max_jobs: int | None = key(None, min=1, max=1_000_000_000, example="10000")
    """Jobs after which a child process is replaced; absent: never."""
    max_memory: Size | None = key(None, min="16MiB", max="1024GiB", example="1GiB")
    """Memory after which a child process is replaced; absent: no limit."""
    types: tuple[str, ...] = key((), check=checks.type_name, empty=True)
    """The job types that this node runs; empty: all that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """`pools.NAME:` - a set of job processes of its own; job types choose it with `pool: NAME`."""

    processes: int = key(2, min=1, max=1024)
    """Child processes for async handlers."""
    concurrency: int = key(20, min=1, max=10_000)
    """Jobs at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """`retry:` - when a failed attempt runs again, unless its type says otherwise."""

    max_attempts: int = key(3, min=1, max=100)
    """Runs of a job before it is failed for good."""
    backoff: Literal["fixed", "linear", "exponential"] = key("exponential")
    """How the wait grows with each failure: fixed, linear or exponential."""
    backoff_base: timedelta = key(timedelta(seconds=2), min="1ms", max="7d")
    """The wait after the first failure, drawn evenly between zero and this."""
    backoff_cap: timedelta = key(timedelta(hours=1), min="1ms", max="30d")
    """The longest wait; at least backoff_base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """`retention:` - how long finished rows are kept before they are pruned."""

    completed: timedelta = key(timedelta(days=7), min="1m", max="3650d")
    """Completed jobs with their results."""
    failed: timedelta = key(timedelta(days=30), min="1m", max="3650d")
    """Failed jobs: the dead letters."""
    cancelled: timedelta = key(timedelta(days=7), min="1m", max="3650d")
    """Cancelled jobs."""
    logs: timedelta = key(timedelta(days=7), min="1m", max="3650d")
    """Lines that handlers wrote."""
    audit: timedelta = key(timedelta(days=365), min="1d", max="3650d")
    """Who did what: keys, retries, cancellations, reloads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`limits:` - how much of a job's outcome is stored."""

    result: Size = key(Size(64 << 10), min="1KiB", max="16MiB")
    """The longest result; a longer one is stored as null with a warning."""
    error: Size = key(Size(8 << 10), min="256B", max="1MiB")
    """The longest error text; the rest is cut."""
    log_lines: int = key(1000, min=0, max=1_000_000)
    """Lines kept of one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginEntry:
    """`plugins[N]:` - a plugin that is loaded into child processes, and its options."""

    module: str | None = key(None, check=checks.module_name, restart=False, example="taskd_email")
    """The dotted name of its module; exactly one of module and name."""
    name: str | None = key(None, check=checks.plain_name, example="email")
    """The name of its entry point in the group taskd."""
    enabled: bool = key(True)
    """False: not loaded, even when it is installed."""
    config: Mapping[str, Any] = key({}, empty=True)
    """Its options; for each option X also X_file and X_env."""
    written: Mapping[str, str] = made({})

    def __repr__(self) -> str:
        return f"PluginEntry(module={self.module!r}, name={self.name!r}, enabled={self.enabled!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`schedules[N]:` - a job that is made again and again by the calendar."""

    name: str = key(REQUIRED, check=checks.plain_name, example="nightly")
    """What people call it; unique."""
    cron: str = key(REQUIRED, check=checks.cron, example='"0 2 * * *"')
    """Minute, hour, day, month, weekday; or @daily and the like."""
    timezone: str = key("UTC", check=checks.timezone)
    """The zone whose clock is meant."""
    type: str = key(REQUIRED, check=checks.type_name, example="echo")
    """The job type to submit."""
    payload: Mapping[str, Any] = key({}, empty=True)
    """Its payload."""
    overlap: Literal["skip", "allow"] = key("skip")
    """What to do while the job before is unfinished: skip the occurrence, or allow two."""
    catch_up: bool = key(True)
    """Make up one missed occurrence after an outage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhooks:
    """`webhooks:` - deliveries to URLs of clients; the section, even empty, switches them on."""

    allow_hosts: tuple[str, ...] = key((), check=checks.allowed_host, empty=True)
    """Hosts that may be reached; empty: any public address."""
    ports: tuple[int, ...] = key((443,), min=1, max=65535)
    """Ports that may be reached."""
    allow_http: bool = key(False)
    """Deliver without TLS too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """`metrics:` - the listener for Prometheus; the section, even empty, switches it on for a worker."""

    host: str = key("127.0.0.1", restart=True, check=checks.host)
    """The address to listen on."""
    port: int = key(9464, min=1, max=65535, restart=True)
    """The TCP port to listen on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """`log:` - what is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = key("info")
    """The least important lines that are written: debug, info, warning or error."""
    format: Literal["json", "text"] = key("json")
    """One JSON object a line, or text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The whole file, defaults filled in."""

    database: Database = key(Database())
    api: Api = key(Api())
    admin: Admin = key(Admin())
    keys: Keys = key(Keys())
    rate_limit: RateLimit = key(RateLimit())
    workers: Workers = key(Workers())
    pools: Mapping[str, Pool] = key({}, name_check=checks.pool_name, empty=True)
    retry: Retry = key(Retry())
    retention: Retention = key(Retention())
    limits: Limits = key(Limits())
    job_types: Mapping[str, JobTypeOverride] = key({}, name_check=checks.type_name, empty=True)
    plugins: tuple[PluginEntry, ...] = key((), empty=True)
    schedules: tuple[Schedule, ...] = key((), empty=True)
    webhooks: Webhooks | None = key(None)
    metrics: Metrics = key(Metrics())
    log: Log = key(Log())

    @property
    def all_pools(self) -> dict[str, Pool]:
        """The named pools and the one that the workers section is, by name."""
        default = Pool(processes=self.workers.processes, concurrency=self.workers.concurrency)
        return {"default": default, **self.pools}
