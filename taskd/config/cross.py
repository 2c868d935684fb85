"""Checks between keys: each names the key to change, the other one, and the way out.

A key that was refused on its own is not compared. A default is never at fault: when only one of two keys
stands in the file, the problem is at that one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema_rs

from taskd.config import checks
from taskd.config.checks import suggestion
from taskd.config.convert import Converter
from taskd.config.jobtypes import PARAM_TYPES, JobTypeOverride, job_type_problems
from taskd.config.tree import Api, PluginEntry, Retry, Tree, Workers
from taskd.config.units import show_duration

Found = Iterator[tuple[tuple[str, ...], str]]
"""Paths, the one to change first, and the message."""


def cross_checks(to: Converter, tree: Tree, lines: Mapping[str, int]) -> None:
    """Write into `to` what is wrong between the keys of `tree`; `lines` has the paths of the file."""
    found = [
        *_workers(tree.workers),
        *_retry(tree.retry),
        *_api(tree.api),
        *_listeners(tree, lines),
        *_plugins(tree.plugins, lines),
        *_schedules(tree),
    ]
    for name, entry in tree.job_types.items():
        found += _job_type(f"job_types.{name}", entry, tree)
    for paths, message in found:
        if not to.fine(*paths):
            continue
        path = next((path for path in paths if path in lines), paths[0])
        to.add(_line(path, lines), path, message)


def _line(path: str, lines: Mapping[str, int]) -> int:
    while path and path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return lines.get(path, 0)


def _workers(workers: Workers) -> Found:
    if workers.heartbeat * 3 > workers.lease:
        heartbeat, lease = show_duration(workers.heartbeat), show_duration(workers.lease)
        third = workers.lease // timedelta(seconds=3) * timedelta(seconds=1)
        most, least = show_duration(third), show_duration(workers.heartbeat * 3)
        message = (
            f"workers.heartbeat ({heartbeat}) is more than a third of workers.lease ({lease}): "
            f"set the heartbeat to {most} or less, or the lease to {least} or more"
        )
        yield ("workers.heartbeat", "workers.lease"), message


def _retry(retry: Retry) -> Found:
    if retry.backoff_cap < retry.backoff_base:
        cap, base = show_duration(retry.backoff_cap), show_duration(retry.backoff_base)
        message = (
            f"retry.backoff_cap ({cap}) is less than retry.backoff_base ({base}): "
            "the longest wait can't be shorter than the first"
        )
        yield ("retry.backoff_cap", "retry.backoff_base"), message


def _api(api: Api) -> Found:
    if not checks.is_loopback(api.host) and api.tls is None and not api.allow_plaintext:
        message = (
            "other machines reach this address, and there is no TLS (plaintext): set api.tls, "
            "or api.allow_plaintext: true behind a proxy that does TLS"
        )
        yield ("api.host", "api.tls", "api.allow_plaintext"), message
    if checks.covers_all(api.trusted_proxies):
        yield ("api.trusted_proxies",), "together these trust every address: list the proxies' addresses"
    if api.tls is not None:
        for name, path in (("cert", api.tls.cert), ("key", api.tls.key)):
            if (problem := _pem_problem(path, private=name == "key")) is not None:
                yield (f"api.tls.{name}",), problem


def _pem_problem(path: Path, *, private: bool) -> str | None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return "names a file that does not exist: no such file"
        return "names a file that can't be read"
    except ValueError:
        return "names a file that can't be read: no usable path"
    if stat.S_ISDIR(mode):
        return "is a directory, and must be a PEM file"
    if private and mode & 0o007:
        return f"has mode {stat.S_IMODE(mode):04o}, so that the world may use the private key: chmod 0640"
    return None


def _listeners(tree: Tree, lines: Mapping[str, int]) -> Found:
    same = tree.metrics.port == tree.api.port and tree.metrics.host == tree.api.host
    if same and "metrics" in lines:
        message = f"metrics.port and api.port are both {tree.api.port} on the same host: choose another"
        yield ("metrics.port", "api.port"), message


def _plugins(plugins: tuple[PluginEntry, ...], lines: Mapping[str, int]) -> Found:
    seen: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(plugins):
        path = f"plugins[{index}]"
        if entry.module is not None and entry.name is not None:
            later = max(("name", "module"), key=lambda name: lines.get(f"{path}.{name}", 0))
            yield (f"{path}.{later}", path), "exactly one of module and name may be given: remove one"
        elif entry.module is None and entry.name is None:
            yield (path,), "module is missing (or name): exactly one of module and name is required"
        for kind, name in (("module", entry.module), ("name", entry.name)):
            if name is None:
                continue
            first = seen.setdefault((kind, name), index)
            if first != index:
                yield (f"{path}.{kind}",), f"is listed twice (duplicate): plugins[{first}] is the same plugin"


def _schedules(tree: Tree) -> Found:
    seen: dict[str, int] = {}
    for index, schedule in enumerate(tree.schedules):
        first = seen.setdefault(schedule.name, index)
        if first != index:
            yield (
                (f"schedules[{index}].name",),
                f"is used twice (duplicate): schedules[{first}] has the same name",
            )


def _job_type(path: str, entry: JobTypeOverride, tree: Tree) -> Found:
    if entry.http is not None:
        message = "HTTP job types come with a later version of taskd: remove this one for now"
        yield (f"{path}.http",), message
    for inside, message in job_type_problems(entry):
        yield (f"{path}.{inside}",), message
    pools = tree.all_pools
    if entry.pool is not None and entry.pool not in pools:
        message = f"is an unknown pool; known here: {', '.join(pools)}{suggestion(entry.pool, pools)}"
        yield (f"{path}.pool", "pools"), message
    for name, form in (entry.params or {}).items():
        if (problem := _param_problem(form)) is not None:
            yield (f"{path}.params.{name}",), problem


def _param_problem(form: Any) -> str | None:
    if isinstance(form, str):
        try:
            jsonschema_rs.validator_for({"pattern": form})  # the engine that will match it, not Python's
        except ValueError:
            return "must be a regular expression as JSON Schema has them"
        return None
    if not isinstance(form, dict):
        return "must be a pattern (string) that matches the whole value, or a JSON Schema (mapping)"
    if form.get("type") not in PARAM_TYPES:
        return f"must be a JSON Schema whose type is one of {', '.join(PARAM_TYPES)}"
    try:
        # The retriever refuses: a schema must never make this process open a connection.
        jsonschema_rs.validator_for(form, retriever=_refuse_reference)
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        return f"must be a valid JSON Schema without outside references: {str(error).splitlines()[0][:200]}"
    return None


def _refuse_reference(uri: str) -> Any:
    raise ValueError("references out of the schema are not followed")
