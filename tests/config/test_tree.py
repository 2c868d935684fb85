"""Sections, their ranges, and the checks between keys."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from taskd.config.read import Config, read
from taskd.config.tree import Pool, Tree
from taskd.errors import ConfigError
from tests.config.samples import ADMIN, TOKEN, only, problems, read_text


def test_the_defaults_are_those_of_the_manual() -> None:
    tree = read_text(ADMIN).tree

    assert (tree.workers.lease, tree.workers.heartbeat) == (timedelta(seconds=30), timedelta(seconds=3))
    assert (tree.workers.sweep, tree.workers.drain_timeout) == (timedelta(seconds=5), timedelta(seconds=30))
    assert (tree.workers.processes, tree.workers.concurrency, tree.workers.max_crashes) == (2, 20, 3)
    assert tree.workers.job_timeout == timedelta(minutes=5)
    assert (tree.api.host, tree.api.port, tree.api.workers, tree.api.max_body) == (
        "127.0.0.1",
        8080,
        2,
        1 << 20,
    )
    assert (tree.api.request_timeout, tree.api.max_wait) == (timedelta(seconds=10), timedelta(seconds=60))
    assert (float(tree.rate_limit.rate), tree.rate_limit.burst) == (50.0, 100)
    assert (tree.retry.max_attempts, tree.retry.backoff) == (3, "exponential")
    assert (tree.retry.backoff_base, tree.retry.backoff_cap) == (timedelta(seconds=2), timedelta(hours=1))
    days = [tree.retention.completed, tree.retention.failed, tree.retention.cancelled, tree.retention.logs]
    assert [span.days for span in [*days, tree.retention.audit]] == [7, 30, 7, 7, 365]
    assert (tree.limits.result, tree.limits.error, tree.limits.log_lines) == (65_536, 8_192, 1_000)


@pytest.mark.parametrize(
    ("path", "value", "contains"),
    [
        pytest.param("api.port", "99999", "1 to 65535", id="port"),
        pytest.param("api.workers", "0", "1 to", id="no API process"),
        pytest.param("api.max_body", "1MB", "size", id="decimal unit"),
        pytest.param("api.max_body", "1048576", "unit", id="size without unit"),
        pytest.param("api.max_body", "0B", "greater than", id="size of zero"),
        pytest.param("api.max_wait", "61s", "0s to 1m", id="wait beyond a minute"),
        pytest.param("api.request_timeout", "10", "unit", id="duration without unit"),
        pytest.param("api.host", "999.1.1.1", "IPv4", id="no address"),
        pytest.param("api.host", "http://x", "host name", id="URL for host"),
        pytest.param("api.host", '""', "empty", id="empty host"),
        pytest.param("api.host", "a_list: 1", "mapping values", id="colon in value"),
        pytest.param("api.allow_plaintext", "yes", "true or false", id="yes"),
        pytest.param("api.allow_plaintext", '"true"', "true or false", id="quoted truth"),
        pytest.param("database.pool_max", "0", "1 to", id="no connection"),
        pytest.param("database.statement_timeout", "0s", "greater than", id="no timeout"),
        pytest.param("database.statement_timeout", "-1s", "greater than", id="negative timeout"),
        pytest.param("database.schema", "Taskd", "schema name", id="schema in capitals"),
        pytest.param("database.schema", '"a;drop"', "schema name", id="schema with a statement"),
        pytest.param("database.schema", "pg_taskd", "schema name", id="schema of Postgres"),
        pytest.param("database.schema", "public", "schema name", id="schema of everybody"),
        pytest.param("database.bindir", "bin", "absolute", id="relative folder"),
        pytest.param("database.listen_url", "http://x", "postgresql://", id="URL to listen on"),
        pytest.param("rate_limit.rate", "0", "greater than", id="no request at all"),
        pytest.param("rate_limit.rate", "fast", "rate", id="no rate"),
        pytest.param("rate_limit.burst", "0", "1 to 1000000", id="no burst"),
        pytest.param("rate_limit.burst", "1000001", "1 to 1000000", id="burst beyond the limit"),
        pytest.param("workers.processes", "0", "1 to", id="no process"),
        pytest.param("workers.concurrency", "many", "integer", id="concurrency in words"),
        pytest.param("workers.lease", "soon", "duration", id="lease in words"),
        pytest.param("workers.lease", "1s", "5s to 1h", id="lease too short"),
        pytest.param("workers.node", "a b", "name", id="node with a space"),
        pytest.param("workers.types", "echo", "list", id="text for a list"),
        pytest.param("workers.types", "[Echo]", "job type", id="no name of a type"),
        pytest.param("workers.max_crashes", "0", "1 to", id="no crash"),
        pytest.param("retry.backoff", "quadratic", "fixed, linear, exponential", id="backoff"),
        pytest.param("retry.max_attempts", "101", "1 to 100", id="attempts"),
        pytest.param("retention.completed", "0d", "greater than", id="kept for no time"),
        pytest.param("retention.failed", "forever", "duration", id="kept forever"),
        pytest.param("limits.result", "1GiB", "1KiB to 16MiB", id="result"),
        pytest.param("limits.log_lines", "-1", "0 to", id="lines"),
        pytest.param("log.level", "verbose", "debug, info, warning, error", id="level"),
        pytest.param("log.level", "INFO", "did you mean info?", id="level in capitals"),
        pytest.param("log.format", "xml", "json, text", id="format"),
        pytest.param("metrics.port", "0", "1 to 65535", id="metrics port"),
        pytest.param("webhooks.ports", "[70000]", "1 to 65535", id="webhook port"),
        pytest.param("webhooks.allow_hosts", "[https://x]", "host name", id="webhook host"),
        pytest.param("webhooks.ports", "[]", "empty", id="no webhook port"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_the_range(path: str, value: str, contains: str) -> None:
    section, key = path.split(".")

    problem = only(f"{ADMIN}{section}:\n  {key}: {value}\n")

    inside = path + "[0]" if value.startswith("[") and value != "[]" else path
    assert (problem.line, problem.path) == (4, "" if "mapping values" in contains else inside)
    assert contains in problem.message


@pytest.mark.parametrize(
    ("text", "path", "contains"),
    [
        pytest.param("databse: {}", "databse", "did you mean database?", id="section"),
        pytest.param("api: {prot: 1}", "api.prot", "did you mean port?", id="key"),
        pytest.param("api: {PORT: 1}", "api.PORT", "did you mean port?", id="capitals"),
        pytest.param("api: {max-body: 1}", "api.max-body", "did you mean max_body?", id="hyphen"),
        pytest.param("api: {colour: 1}", "api.colour", "known here: host, port", id="nothing near"),
        pytest.param(
            "job_types: {echo: {retry: {max_attempt: 1}}}",
            "job_types.echo.retry.max_attempt",
            "did you mean max_attempts?",
            id="nested",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(text: str, path: str, contains: str) -> None:
    problem = only(f"{ADMIN}{text}\n")

    assert (problem.line, problem.path) == (3, path)
    assert "unknown key" in problem.message
    assert contains in problem.message


@pytest.mark.parametrize(
    ("text", "path", "contains"),
    [
        pytest.param("api: 5", "api", "mapping", id="number for a section"),
        pytest.param("api: []", "api", "mapping", id="list for a section"),
        pytest.param("api: port:80", "api", "space after the colon", id="no space after the colon"),
        pytest.param("plugins: {}", "plugins", "list", id="mapping for a list"),
        pytest.param("plugins: [taskd_email]", "plugins[0]", "mapping", id="name for a plugin"),
        pytest.param("schedules: x", "schedules", "list", id="text for a list"),
        pytest.param("job_types: [echo]", "job_types", "mapping", id="list for names"),
        pytest.param("pools: {a: 5}", "pools.a", "mapping", id="number for a pool"),
    ],
)
def test_a_section_has_its_form(text: str, path: str, contains: str) -> None:
    problem = only(f"{ADMIN}{text}\n")

    assert (problem.line, problem.path) == (3, path)
    assert contains in problem.message


@pytest.mark.parametrize("section", [name for name in Tree.__dataclass_fields__ if name != "admin"])
def test_a_section_without_keys_is_all_defaults(section: str) -> None:
    assert problems(f"{ADMIN}{section}:\n") == []


@pytest.mark.parametrize(
    ("text", "path"),
    [
        pytest.param("workers: {lease: 20s, heartbeat: 10s}", "workers.heartbeat", id="both given"),
        pytest.param("workers: {heartbeat: 11s}", "workers.heartbeat", id="heartbeat given"),
        pytest.param("workers: {lease: 6s}", "workers.lease", id="a default is never at fault"),
    ],
)
def test_a_heartbeat_is_at_most_a_third_of_the_lease(text: str, path: str) -> None:
    problem = only(f"{ADMIN}{text}\n")

    assert (problem.line, problem.path) == (3, path)
    assert "workers.heartbeat" in problem.message
    assert "workers.lease" in problem.message


def test_a_heartbeat_of_just_a_third_is_fine() -> None:
    assert problems(f"{ADMIN}workers: {{lease: 30s, heartbeat: 10s}}\n") == []


@pytest.mark.parametrize(
    ("text", "path"),
    [
        pytest.param("retry: {backoff_cap: 1s}", "retry.backoff_cap", id="cap given"),
        pytest.param("retry: {backoff_base: 2h}", "retry.backoff_base", id="base given"),
        pytest.param("retry: {backoff_base: 2h, backoff_cap: 1h}", "retry.backoff_cap", id="both given"),
    ],
)
def test_the_longest_wait_is_not_shorter_than_the_first(text: str, path: str) -> None:
    problem = only(f"{ADMIN}{text}\n")

    assert problem.path == path
    assert "retry.backoff_base" in problem.message


def test_a_refused_value_is_not_compared() -> None:
    assert only(f"{ADMIN}workers: {{lease: soon, heartbeat: 20m}}\n").path == "workers.lease"
    assert only(f"{ADMIN}retry: {{backoff_base: 5, backoff_cap: 1ms}}\n").path == "retry.backoff_base"


@pytest.mark.parametrize("host", ["0.0.0.0", '"::"', "10.0.0.1", "taskd.example.org"])
def test_plain_http_for_other_machines_must_be_asked_for(host: str) -> None:
    text = f"{ADMIN}api:\n  host: {host}\n"

    problem = only(text)

    assert (problem.line, problem.path) == (4, "api.host")
    assert "allow_plaintext" in problem.message
    assert problems(f"{text}  allow_plaintext: true\n") == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", '"::1"', "localhost"])
def test_plain_http_for_this_machine_is_fine(host: str) -> None:
    assert problems(f"{ADMIN}api:\n  host: {host}\n") == []


@pytest.mark.parametrize(
    ("value", "contains"),
    [
        pytest.param("0.0.0.0/0", "every address", id="IPv4"),
        pytest.param("::/0", "every address", id="IPv6"),
        pytest.param("::ffff:0:0/96", "every address", id="IPv4 inside IPv6"),
        pytest.param("*", "every address", id="star"),
        pytest.param("10.0.0.1/8", "10.0.0.0/8", id="host bits"),
        pytest.param("proxy", "IP address", id="name"),
        pytest.param("10.0.0.0/33", "IP address", id="prefix too long"),
    ],
)
def test_a_proxy_is_an_address_or_a_network(value: str, contains: str) -> None:
    problem = only(f'{ADMIN}api:\n  trusted_proxies:\n    - 10.0.0.0/8\n    - "{value}"\n')

    assert (problem.line, problem.path) == (6, "api.trusted_proxies[1]")
    assert contains in problem.message


def test_networks_that_together_are_every_address_are_refused() -> None:
    problem = only(f"{ADMIN}api: {{trusted_proxies: [0.0.0.0/1, 128.0.0.0/1]}}\n")

    assert "every address" in problem.message


def test_tls_needs_both_files_and_a_private_key_that_is_private(tmp_path: Path) -> None:
    cert, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    for file, mode in ((cert, 0o644), (private, 0o644), (tmp_path / "good.pem", 0o640)):
        file.write_text("x")
        file.chmod(mode)

    missing = only(f"{ADMIN}api:\n  tls:\n    cert: {cert}\n")
    absent = only(f"{ADMIN}api:\n  tls: {{cert: /nonexistent, key: {tmp_path}/good.pem}}\n")
    public = only(f"{ADMIN}api:\n  tls: {{cert: {cert}, key: {private}}}\n")

    assert (missing.line, missing.path) == (4, "api.tls")
    assert "key is missing" in missing.message
    assert (absent.path, "does not exist" in absent.message) == ("api.tls.cert", True)
    assert (public.path, "0644" in public.message) == ("api.tls.key", True)
    good = f"tls: {{cert: {cert}, key: {tmp_path}/good.pem}}"
    assert problems(f"{ADMIN}api:\n  host: 0.0.0.0\n  {good}\n") == []


def test_the_workers_section_is_the_pool_default() -> None:
    tree = read_text(f"{ADMIN}workers: {{processes: 3}}\npools: {{reports: {{concurrency: 1}}}}\n").tree

    assert tree.all_pools == {
        "default": Pool(processes=3, concurrency=20),
        "reports": Pool(processes=2, concurrency=1),
    }
    assert "workers" in only(f"{ADMIN}pools: {{default: {{}}}}\n").message


@pytest.mark.parametrize(
    ("entry", "path", "contains"),
    [
        pytest.param("{name: n, cron: 61 2 * * *, type: echo}", ".cron", "cron", id="no such minute"),
        pytest.param("{name: n, cron: 0 0 30 2 *, type: echo}", ".cron", "cron", id="no such date"),
        pytest.param("{name: n, cron: 0 0 2 * * *, type: echo}", ".cron", "five fields", id="seconds"),
        pytest.param('{name: n, cron: "@noon", type: echo}', ".cron", "@daily", id="no such alias"),
        pytest.param("{name: n, cron: 5, type: echo}", ".cron", "string", id="number"),
        pytest.param('{name: n, cron: "@daily", type: echo, timezone: Mars}', ".timezone", "zone", id="zone"),
        pytest.param(
            '{name: n, cron: "@daily", type: echo, timezone: Europe/Berln}',
            ".timezone",
            "Berlin?",
            id="near",
        ),
        pytest.param('{name: n, cron: "@daily", type: echo, timezone: ../x}', ".timezone", "zone", id="path"),
        pytest.param('{name: n, cron: "@daily", type: Echo}', ".type", "job type", id="type"),
        pytest.param(
            '{name: n, cron: "@daily", type: echo, overlap: x}', ".overlap", "skip, allow", id="lap"
        ),
        pytest.param(
            '{name: n, cron: "@daily", type: echo, payload: []}', ".payload", "mapping", id="payload"
        ),
        pytest.param('{name: n, cron: "@daily"}', "", "type is missing", id="missing key"),
    ],
)
def test_a_schedule_is_checked(entry: str, path: str, contains: str) -> None:
    problem = only(f"{ADMIN}schedules:\n  - {entry}\n")

    assert (problem.line, problem.path) == (4, f"schedules[0]{path}")
    assert contains in problem.message


def test_a_schedules_name_is_used_once() -> None:
    entry = '  - {name: n, cron: "@daily", type: echo}\n'

    assert only(f"{ADMIN}schedules:\n{entry}{entry}").path == "schedules[1].name"


def test_sections_that_do_nothing_yet_are_warned_about_and_webhooks_are_on_when_empty() -> None:
    config = read_text(f"{ADMIN}schedules: []\nwebhooks:\nmetrics: {{}}\n")

    assert [warning.split()[0] for warning in config.warnings[:2]] == ["schedules", "webhooks"]
    assert not any("metrics" in warning for warning in config.warnings)
    assert config.tree.webhooks is not None
    assert read_text(ADMIN).tree.webhooks is None


def test_interpolation_is_refused_with_the_key_to_use() -> None:
    assert "url_env" in only(f"{ADMIN}database: {{url: 'a${{X}}'}}\n").message
    assert "token_env" in only("admin:\n  token: ${ADMIN_TOKEN}\n").message
    assert "alone" in only("admin:\n  token_env: ${ADMIN_TOKEN}\n").message


def test_errors_come_sorted_by_line() -> None:
    found = problems(f"{ADMIN}log:\n  level: loud\napi:\n  port: 0\n  workers: 0\n")

    assert [problem.line for problem in found] == [4, 6, 7]


def test_where_finds_the_line_of_a_key_or_of_what_holds_it() -> None:
    config = read_text(f"{ADMIN}plugins:\n  - module: a\n    config:\n      x:\n        y: 1\n")

    assert config.where("plugins[0].module") == 4
    assert config.where("plugins[0].config") == 5
    assert config.where("plugins[0].config.x.y") == 7
    assert config.where("plugins[0].config.z") == 5
    assert config.where("api.port") == 0


@pytest.mark.parametrize(
    ("make", "contains"),
    [
        pytest.param(lambda path: None, "does not exist", id="missing"),
        pytest.param(lambda path: path.mkdir(), "directory", id="directory"),
        pytest.param(os.mkfifo, "not a regular file", id="FIFO"),
        pytest.param(lambda path: path.write_bytes(b"#" * (1 << 21)), "too large", id="too large"),
        pytest.param(lambda path: path.symlink_to(path), "can't be read", id="a link to itself"),
    ],
)
def test_what_is_no_readable_file_is_refused_in_line_0(tmp_path: Path, make: object, contains: str) -> None:
    file = tmp_path / "taskd.yaml"
    make(file)  # type: ignore[operator]

    with pytest.raises(ConfigError) as caught:
        read(file, env={})

    assert [problem.line for problem in caught.value.problems] == [0]
    assert contains in str(caught.value)
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 78


def test_read_names_the_file_as_given(tmp_path: Path) -> None:
    file = tmp_path / "taskd.yaml"
    file.write_text(ADMIN)
    file.chmod(0o600)

    config: Config = read(file, env={})

    assert config.file == str(file)
    assert TOKEN not in repr(config)


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        pytest.param("postgresql://u@db.example/d", True, id="another host"),
        pytest.param("postgresql://u@db.example/d?sslmode=prefer", True, id="prefer gives way"),
        pytest.param("postgresql://u@db.example:5432/d?sslmode=verify-full", False, id="verified"),
        pytest.param("postgresql://u@127.0.0.1:5432/d", False, id="this machine"),
        pytest.param("postgresql://u@/d?host=/run/postgresql", False, id="socket"),
        pytest.param("postgresql://u@a.example,127.0.0.1/d", True, id="one of several"),
    ],
)
def test_a_database_url_that_leads_over_a_network_without_tls_is_warned_about(url: str, warned: bool) -> None:
    config = read_text(f"{ADMIN}database:\n  url: {url}\n")

    assert any("sslmode" in warning for warning in config.warnings) is warned
