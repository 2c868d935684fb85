from __future__ import annotations

import socket

import pytest

from taskd.cli import settings
from taskd.config.read import parse
from taskd.engine.children import PoolSettings
from taskd.obs.redact import Redactor
from taskd.registry import Registry

NOTHING = Registry(infos={}, plugins={})


def test_node_is_called_after_its_host_and_instance() -> None:
    tree = parse("{}", file="f", env={}, need_admin=False).tree

    assert settings.node_name(tree, None) == socket.gethostname()
    assert settings.node_name(tree, "2") == f"{socket.gethostname()}-2"


def test_a_node_that_has_a_name_keeps_it() -> None:
    tree = parse("workers: {node: n1}", file="f", env={}, need_admin=False).tree

    assert settings.node_name(tree, "2") == "n1"


def test_daemon_is_told_seconds_and_bytes() -> None:
    config = parse(
        "database: {url: postgresql://h/d, schema: s}\n"
        "workers: {lease: 20s, heartbeat: 500ms, processes: 3, concurrency: 9}\n"
        "pools: {slow: {processes: 1, concurrency: 2}}\n"
        "limits: {result: 2KiB}\n",
        file="f",
        env={},
        need_admin=False,
    )

    told = settings.daemon_settings(config, NOTHING, {"HOME": "/h", "DATABASE_URL": "x"}, name="n")

    assert (told.url, told.listen_url, told.schema) == ("postgresql://h/d", "postgresql://h/d", "s")
    assert (told.lease_s, told.heartbeat_s, told.result_bytes) == (20.0, 0.5, 2048)
    assert told.pools == {
        "default": PoolSettings(processes=3, concurrency=9),
        "slow": PoolSettings(processes=1, concurrency=2),
    }
    assert told.child_env["TASKD_NODE"] == "n"
    assert "DATABASE_URL" not in told.child_env


def test_an_embedded_server_stands_in_for_an_absent_url_only() -> None:
    absent = parse("{}", file="f", env={}, need_admin=False)
    given = parse("database: {url: postgresql://h/d}", file="f", env={}, need_admin=False)

    assert settings.database_url(absent, {}, "postgresql://e/d") == "postgresql://e/d"
    assert settings.database_url(given, {}, "postgresql://e/d") == "postgresql://h/d"


def test_secrets_of_the_file_are_masked_in_what_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Redactor()
    monkeypatch.setattr(settings, "hide", mine.hide)
    tree = parse(
        "database: {url: 'postgresql://u:canary-of-the-url@h/d'}\n"
        "plugins:\n  - module: m\n    config: {api_key: canary-of-the-plugin, base_url: https://example.org}\n"
        "job_types:\n  c: {command: [/bin/c], env: {MY_TOKEN: canary-of-the-command}}\n",
        file="f",
        env={},
        need_admin=False,
    ).tree

    settings.hide_secrets(tree)

    assert "canary" not in mine.text("canary-of-the-url canary-of-the-plugin canary-of-the-command")
    assert mine.text("https://example.org") == "https://example.org"
