"""The plugin's `config:`: its JSON Schema, and the checked values that the rest of the plugin uses.

taskd has already put the content of `api_key_file` or the variable of `api_key_env` in place of `api_key`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit

from taskd.plugin import seconds
from taskd_email.message import ADDRESS_PATTERN

OPTIONS_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        # Only types are checked here: what a schema refuses, its message may quote, and a key is secret.
        "api_key": {"description": "Resend's API key.", "type": "string", "writeOnly": True},
        "base_url": {
            "description": "Where the API is; https, but on loopback.",
            "type": "string",
            "default": "https://api.resend.com",
        },
        "default_from": {"description": "Sender of mails whose payload has no `from`.", "type": "string"},
        "timeout": {
            "description": "For one call in all, as `10s` or seconds; 1s to 60s.",
            "type": ["string", "number"],
            "default": "10s",
        },
    },
    "required": ["api_key"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the configuration says, with defaults filled in."""

    api_key: str = field(repr=False)
    base_url: str = "https://api.resend.com"
    """Without a slash at its end."""
    default_from: str | None = None
    timeout: timedelta = timedelta(seconds=10)
    """For one call in all: connecting, sending and reading the answer."""

    @classmethod
    def read(cls, options: Mapping[str, object]) -> Options:
        """Return the options that `config:` gives; what it leaves out has its default.

        Raises:
            ValueError: names the option that can't be used and says why; never shows the key.
        """
        given: dict[str, object] = {}
        if "base_url" in options:
            given["base_url"] = _url(options["base_url"])
        if "default_from" in options:
            given["default_from"] = _sender(options["default_from"])
        if "timeout" in options:
            given["timeout"] = _timeout(options["timeout"])
        return cls(api_key=_key(options.get("api_key")), **given)  # type: ignore[arg-type]


def _key(value: object) -> str:
    if value is None:
        raise ValueError("api_key is missing. Set api_key_file, api_key_env or api_key")
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{1,512}", value):
        # It goes into a header: a line end in it would be a header more.
        raise ValueError("api_key must be 1 to 512 ASCII characters without space or line break")
    return value


def _url(value: object) -> str:
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"base_url is no URL: {error}") from None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise ValueError("base_url must be like https://api.resend.com, without ? and #")
    if parts.username is not None or parts.password is not None:
        raise ValueError("base_url must not hold a user or password. The key belongs in api_key")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError("base_url must begin with https:// (http:// would show the API key on the wire)")
    return parts.geturl().rstrip("/")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def _sender(value: object) -> str:
    if not isinstance(value, str) or len(value) > 500 or not re.fullmatch(ADDRESS_PATTERN, value):
        raise ValueError("default_from must be like a@example.com or Name <a@example.com>")
    return value


def _timeout(value: object) -> timedelta:
    try:
        found = seconds(value)  # type: ignore[arg-type]  # it refuses what is no duration
    except ValueError:
        found = 0.0
    if not 1 <= found <= 60:
        raise ValueError("timeout must be 1s to 60s")
    return timedelta(seconds=found)
