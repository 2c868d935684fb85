"""Texts that the tests of the configuration share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskd.config.read import Config, parse
from taskd.errors import ConfigError, Problem

TOKEN = "Zq3vT8mB1xW6nK0pR5sY2uL9dF4hJ7cA"
ADMIN = f"admin:\n  token: {TOKEN}\n"
"""The smallest valid file: two lines, so that what is added begins in line 3."""


def read_text(text: str | bytes, *, env: Mapping[str, str] | None = None, **kwargs: Any) -> Config:
    """Return the configuration that `text` is."""
    return parse(text, file="taskd.yaml", env=env or {}, **kwargs)


def problems(text: str | bytes, *, env: Mapping[str, str] | None = None, **kwargs: Any) -> list[Problem]:
    """Return what is wrong with `text`."""
    try:
        read_text(text, env=env, **kwargs)
    except ConfigError as error:
        return list(error.problems)
    return []


def only(text: str | bytes, **kwargs: Any) -> Problem:
    """Return the one thing that is wrong with `text`."""
    found = problems(text, **kwargs)
    assert len(found) == 1, found
    return found[0]
