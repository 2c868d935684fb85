"""What the plugin's `config:` may say, and how it is told apart from what it may not."""

from __future__ import annotations

from datetime import timedelta

import jsonschema_rs
import pytest

from taskd_email.options import OPTIONS_SCHEMA, Options

KEY = "re_0123456789_secret"


def test_a_key_is_enough() -> None:
    assert Options.read({"api_key": KEY}) == Options(
        api_key=KEY,
        base_url="https://api.resend.com",
        default_from=None,
        timeout=timedelta(seconds=10),
    )


def test_the_schema_knows_every_option() -> None:
    full = {"api_key": KEY, "base_url": "http://[::1]:1/x/", "default_from": "a@example.com", "timeout": "5s"}

    assert jsonschema_rs.is_valid(OPTIONS_SCHEMA, full)
    assert Options.read(full) == Options(
        api_key=KEY,
        base_url="http://[::1]:1/x",
        default_from="a@example.com",
        timeout=timedelta(seconds=5),
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="no key"),
        pytest.param({"api_key": KEY, "api_kye": "x"}, id="misspelt option"),
        pytest.param({"api_key": 7}, id="key is a number"),
    ],
)
def test_the_schema_refuses(options: dict[str, object]) -> None:
    assert not jsonschema_rs.is_valid(OPTIONS_SCHEMA, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"api_key": None}, "api_key is missing", id="no key"),
        pytest.param({"api_key": ""}, "api_key must be", id="empty key"),
        pytest.param({"api_key": f"{KEY}\r\nX: y"}, "api_key must be", id="header injection by key"),
        pytest.param({"api_key": f"{KEY}\n"}, "api_key must be", id="line end of a key file"),
        pytest.param({"base_url": "http://api.resend.com"}, "https://", id="key in the clear"),
        pytest.param({"base_url": "http://127.0.0.1.example.com"}, "https://", id="looks like loopback"),
        pytest.param({"base_url": "http://localhost@example.com"}, "user", id="host hidden by a user"),
        pytest.param({"base_url": "https://re_k:@example.com"}, "user or password", id="user in URL"),
        pytest.param({"base_url": "ftp://example.com"}, "must be like", id="other scheme"),
        pytest.param({"base_url": "api.resend.com"}, "must be like", id="no scheme"),
        pytest.param({"base_url": "https://h/?a"}, "without", id="query"),
        pytest.param({"base_url": "https://h:99999"}, "no URL", id="port out of range"),
        pytest.param({"base_url": 7}, "must be like", id="number"),
        pytest.param({"default_from": "Shop"}, "default_from must be", id="sender is no address"),
        pytest.param({"default_from": "a@example.com\n"}, "default_from must be", id="newline at the end"),
        pytest.param({"timeout": "0s"}, "1s to 60s", id="no time"),
        pytest.param({"timeout": "5m"}, "1s to 60s", id="too long"),
        pytest.param({"timeout": True}, "1s to 60s", id="bool is no number"),
        pytest.param({"timeout": "soon"}, "1s to 60s", id="no duration"),
    ],
)
def test_a_bad_value_is_named_without_the_key(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Options.read({"api_key": KEY, **options})

    assert KEY not in str(caught.value)


def test_the_key_is_not_in_the_repr() -> None:
    assert KEY not in repr(Options(api_key=KEY))
