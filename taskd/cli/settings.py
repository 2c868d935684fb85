"""The configuration as values for the parts that start: nobody below the commands sees the tree."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from taskd.config.jobtypes import JobTypeOverride, RetryOverride
from taskd.config.read import Config
from taskd.config.secret import is_secret_option
from taskd.config.tree import Tree
from taskd.embedded import EmbeddedPG
from taskd.errors import ConfigError, Problem
from taskd.obs.redact import hide
from taskd.process.environment import child_env
from taskd.process.runtime import NodeLock, node_file, runtime_folder, state_folder
from taskd.registry import Registry

if TYPE_CHECKING:
    from taskd.engine.daemon import DaemonSettings

CHILD = (sys.executable, "-m", "taskd.child")
"""Starts a process for plugin code; an option comes after it."""


def database_url(config: Config, environ: Mapping[str, str], embedded: str | None = None) -> str:
    """Return the URL of the database that is in force; `embedded` stands in for an absent one.

    Raises:
        ConfigError: there is none; the message says what to set, and where an embedded server runs now.
    """
    database = config.tree.database
    if database.url is not None:
        return database.url.value
    if embedded is not None:
        return embedded
    unset = f" (the variable {database.url_env} is not set)" if database.url_env else ""
    message = f"no database URL is in force{unset}: set one of url, url_file and url_env"
    running = EmbeddedPG(embedded_home(environ))
    if running.pid is not None:
        variable = database.url_env or "DATABASE_URL"
        message += f"; for the PostgreSQL of the `taskd up` that runs here: {variable}='{running.url()}'"
    raise ConfigError(config.file, [Problem(config.where("database"), "database", message)])


def embedded_home(environ: Mapping[str, str]) -> Path:
    """Return the folder that `taskd up` keeps its PostgreSQL in."""
    return state_folder(environ, os.geteuid()) / "pg"


def node_name(tree: Tree, instance: str | None) -> str:
    """Return the node's name: that of the file, else the host's and, behind a `-`, the instance."""
    if tree.workers.node is not None:
        return tree.workers.node
    host = socket.gethostname()
    return f"{host}-{instance}" if instance else host


def refuse_second(tree: Tree, environ: Mapping[str, str]) -> None:
    """Return when no worker runs under this node's name on this host; asked before anything is started.

    Raises:
        NodeTaken: one does.
    """
    name = node_name(tree, None)
    with NodeLock(node_file(runtime_folder(environ, os.geteuid()), name, "lock")) as lock:
        lock.acquire(name)


def daemon_settings(
    config: Config,
    registry: Registry,
    environ: Mapping[str, str],
    *,
    name: str,
    embedded: str | None = None,
) -> DaemonSettings:
    """Return what a worker called `name` is told.

    Raises:
        ConfigError: no database URL is in force and `embedded` is None.
    """
    from taskd.engine.children import PoolSettings
    from taskd.engine.daemon import DaemonSettings
    from taskd.store.jobs import Retention

    tree = config.tree
    url = database_url(config, environ, embedded)
    listen = tree.database.listen_url
    workers, keep, limits = tree.workers, tree.retention, tree.limits
    return DaemonSettings(
        node_name=name,
        url=url,
        listen_url=url if listen is None or tree.database.url is None else listen.value,
        schema=tree.database.schema,
        allow_unsafe=tree.database.allow_unsafe,
        registry=registry,
        pools={
            pool: PoolSettings(processes=one.processes, concurrency=one.concurrency)
            for pool, one in tree.all_pools.items()
        },
        lease_s=workers.lease.total_seconds(),
        heartbeat_s=workers.heartbeat.total_seconds(),
        sweep_s=workers.sweep.total_seconds(),
        drain_s=workers.drain_timeout.total_seconds(),
        max_crashes=workers.max_crashes,
        child_max_jobs=workers.max_jobs,
        child_max_memory=workers.max_memory,
        metrics=(tree.metrics.host, tree.metrics.port) if "metrics" in config.lines else None,
        retention=Retention(completed=keep.completed, failed=keep.failed, cancelled=keep.cancelled),
        result_bytes=limits.result,
        error_bytes=limits.error,
        log_lines=limits.log_lines,
        child_argv=CHILD,
        child_env=child_env(environ, name),
    )


def changes(tree: Tree) -> dict[str, dict[str, object]]:
    """Return what `job_types:` says about each type, as members of `TypeInfo`: seconds and bytes."""
    return {name: _change(entry) for name, entry in tree.job_types.items()}


def _change(entry: JobTypeOverride) -> dict[str, object]:
    spans = {"timeout": entry.timeout, "grace": entry.grace, "retention": entry.retention}
    change: dict[str, object | None] = {
        "description": entry.description,
        "handler": entry.handler,
        "enabled": entry.enabled,
        "pool": entry.pool,
        "concurrency": entry.concurrency,
        "max_running": entry.max_running,
        "rate": None if entry.rate is None else float(entry.rate),
        "rate_burst": entry.rate_burst,
        "priority": entry.priority,
        "retry": None if entry.retry is None else _retry(entry.retry),
        "restartable": entry.restartable,
        "max_backlog": entry.max_backlog,
        "isolation": entry.isolation,
        "max_memory": entry.max_memory,
        "options": None if entry.options is None else plain(entry.options),
        **{name: None if span is None else span.total_seconds() for name, span in spans.items()},
    }
    return {name: value for name, value in change.items() if value is not None}


def _retry(entry: RetryOverride) -> dict[str, object]:
    base, cap = entry.backoff_base, entry.backoff_cap
    change: dict[str, object | None] = {
        "max_attempts": entry.max_attempts,
        "backoff": entry.backoff,
        "backoff_base": None if base is None else base.total_seconds(),
        "backoff_cap": None if cap is None else cap.total_seconds(),
        "jitter": entry.jitter,
        "delays": None if entry.delays is None else tuple(delay.total_seconds() for delay in entry.delays),
    }
    return {name: value for name, value in change.items() if value is not None}


def plain(value: Any) -> Any:
    """Return a value of the tree as plain data that can be encoded."""
    if isinstance(value, Mapping):
        return {name: plain(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def hide_secrets(tree: Tree) -> None:
    """Have log lines mask the secrets of this file from now on, whatever they stand in."""
    for secret in secrets_of(tree):
        hide(secret)


def secrets_of(tree: Tree) -> Iterator[str]:
    """Yield what this file holds that must not be in a log line."""
    for url in (tree.database.url, tree.database.listen_url):
        if url is not None and (password := _password(url.value)):
            yield password
    yield from (token.value for token in tree.admin.tokens)
    options: list[Mapping[str, Any]] = [entry.config for entry in tree.plugins]
    for job_type in tree.job_types.values():
        options += [job_type.env or {}, job_type.options or {}]
    yield from (value for one in options for name, value in one.items() if is_secret_option(name, value))


def _password(url: str) -> str | None:
    try:
        return urlsplit(url).password
    except ValueError:  # a list of hosts with ports, which libpq reads and urllib does not
        return None
