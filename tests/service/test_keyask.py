"""What an operator may say about a key, member by member."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from taskd.errors import Refused
from taskd.service.keyask import read_change, read_key, read_rotate

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime(2026, 2, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("body", "members"),
    [
        pytest.param({}, {}, id="nothing named, nothing changed"),
        pytest.param({"name": "shop"}, {"name": "shop"}, id="one member alone"),
        pytest.param({"description": None}, {"description": None}, id="no description any more"),
        pytest.param({"types": None}, {"types": None}, id="every type again"),
        pytest.param({"expires_at": None}, {"expires_at": None}, id="never expires any more"),
        pytest.param({"expires_at": "2026-02-01T00:00:00Z"}, {"expires_at": LATER}, id="a new end"),
        pytest.param({"max_pending": None}, {"max_pending": None}, id="no bound any more"),
        pytest.param({"rate_limit": None}, {"rate": None, "burst": None}, id="the default again"),
        pytest.param({"rate_limit": {"rate": 5}}, {"rate": 5.0}, id="the burst stays"),
        pytest.param({"rate_limit": {"burst": None}}, {"burst": None}, id="the default burst again"),
        pytest.param(
            {"rate_limit": {"burst": None, "rate": 0.5}}, {"rate": 0.5, "burst": None}, id="one of both reset"
        ),
        pytest.param(
            {"scopes": ["jobs:read", "jobs:read"]}, {"scopes": ("jobs:read",)}, id="a scope said twice"
        ),
    ],
)
def test_a_change_has_the_members_that_are_named(body: dict[str, Any], members: dict[str, Any]) -> None:
    assert read_change(body, now=NOW) == members


@pytest.mark.parametrize(
    ("body", "error", "path"),
    [
        pytest.param({"nam": "a"}, "unknown_field", "nam", id="misspelt"),
        pytest.param({"prefix": "tk"}, "unknown_field", "prefix", id="can't be changed"),
        pytest.param({"client": str(NOW)}, "unknown_field", "client", id="a key stays with its client"),
        pytest.param({"revoked_at": None}, "unknown_field", "revoked_at", id="no way back from a revoke"),
        pytest.param({"name": None}, "invalid_field", "name", id="a key has a name"),
        pytest.param({"name": "a\nb"}, "invalid_field", "name", id="no control characters"),
        pytest.param({"scopes": None}, "invalid_field", "scopes", id="a key has scopes"),
        pytest.param({"scopes": []}, "invalid_field", "scopes", id="at least one scope"),
        pytest.param({"types": ["a", 1]}, "invalid_field", "types[1]", id="a type is a text"),
        pytest.param({"expires_at": "2001-01-01T00:00:00Z"}, "invalid_field", "expires_at", id="passed"),
        pytest.param({"rate_limit": {}}, "invalid_field", "rate_limit", id="says nothing"),
        pytest.param({"rate_limit": 5}, "invalid_field", "rate_limit", id="no object"),
        pytest.param({"rate_limit": {"rate": 0}}, "invalid_field", "rate_limit.rate", id="never"),
        pytest.param({"rate_limit": {"rate": True}}, "invalid_field", "rate_limit.rate", id="no number"),
        pytest.param(
            {"rate_limit": {"burst": 1.5}}, "invalid_field", "rate_limit.burst", id="half a request"
        ),
        pytest.param({"rate_limit": {"per": 1}}, "unknown_field", "rate_limit.per", id="misspelt inside"),
        pytest.param({"max_pending": -1}, "invalid_field", "max_pending", id="below nothing"),
    ],
)
def test_a_wrong_change_is_refused_by_path(body: dict[str, Any], error: str, path: str) -> None:
    with pytest.raises(Refused) as refused:
        read_change(body, now=NOW)

    assert (refused.value.error, refused.value.fields[0].path) == (error, path)


def test_a_new_key_can_not_leave_a_rate_out_by_null() -> None:
    with pytest.raises(Refused) as refused:
        read_key({"name": "a", "rate_limit": {"rate": None}}, now=NOW)

    assert refused.value.fields[0].path == "rate_limit.rate"


def test_a_rotation_has_a_day_of_overlap_and_the_old_keys_span() -> None:
    ask = read_rotate({}, now=NOW)

    assert (ask.overlap, ask.keep_span) == (timedelta(hours=24), True)
    assert not read_rotate({"expires_at": None}, now=NOW).keep_span


@pytest.mark.parametrize(
    "overlap",
    [
        pytest.param(24, id="a number has no unit"),
        pytest.param("24", id="a text without a unit"),
        pytest.param("-1h", id="below nothing"),
        pytest.param("91d", id="longer than is allowed"),
    ],
)
def test_a_wrong_overlap_is_refused(overlap: object) -> None:
    with pytest.raises(Refused) as refused:
        read_rotate({"overlap": overlap}, now=NOW)

    assert refused.value.fields[0].path == "overlap"
