"""Forms of names, ids and moments: full matches, and nothing that Python's parsers take besides."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.model import names

ID = "018f3a5e-7c1b-7d2e-8f4a-0123456789ab"


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        pytest.param("echo", True, id="plain"),
        pytest.param("a.b_c-9", True, id="every sign that may follow"),
        pytest.param("a" * 64, True, id="longest"),
        pytest.param("a" * 65, False, id="too long"),
        pytest.param("", False, id="empty"),
        pytest.param("9a", False, id="a digit first"),
        pytest.param("Echo", False, id="upper case"),
        pytest.param("echo\n", False, id="a line end, which $ would let through"),
        pytest.param("éa", False, id="a letter, but not ours"),
        pytest.param("a/b", False, id="path"),
    ],
)
def test_type(text: str, fits: bool) -> None:
    assert names.is_type(text) is fits


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        pytest.param("tk", True, id="shortest"),
        pytest.param("a" * 16, True, id="longest"),
        pytest.param("a" * 17, False, id="too long"),
        pytest.param("t", False, id="one letter"),
        pytest.param("t_k", False, id="the key's own separators may not be in it"),
        pytest.param("tk\n", False, id="line end"),
    ],
)
def test_prefix(text: str, fits: bool) -> None:
    assert names.is_prefix(text) is fits


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        pytest.param("order 17/ü", True, id="spaces and letters of any script"),
        pytest.param("x" * 255, True, id="longest"),
        pytest.param("x" * 256, False, id="too long"),
        pytest.param("", False, id="empty"),
        pytest.param("a\r\nb", False, id="line ends"),
        pytest.param("a\u2028b", False, id="line separator"),
        pytest.param("a\u202eb", False, id="turns the text around"),
        pytest.param("a\ud800", False, id="header bytes above 127 come so"),
        pytest.param("a\x7f", False, id="delete"),
    ],
)
def test_unique_key(text: str, fits: bool) -> None:
    assert names.is_unique_key(text) is fits


def test_tags_and_key_names_have_their_own_lengths() -> None:
    assert names.is_tag("x" * 64)
    assert not names.is_tag("x" * 65)
    assert names.is_key_name("x" * 100)
    assert not names.is_key_name("x" * 101)
    assert not names.is_key_name("a\nb")
    assert not names.is_key_name("")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param(ID, UUID(ID), id="lower case"),
        pytest.param(ID.upper(), UUID(ID), id="upper case"),
        pytest.param(f"Message of id: {ID}", UUID(ID), id="the documented text"),
        pytest.param("{" + ID + "}", None, id="braces"),
        pytest.param(f"urn:uuid:{ID}", None, id="urn"),
        pytest.param(ID.replace("-", ""), None, id="no dashes"),
        pytest.param("0-18f3a5e7c1b7d2e8f4a0123456789ab---", None, id="dashes anywhere"),
        pytest.param(ID + "\n", None, id="line end"),
        pytest.param(" " + ID, None, id="space"),
        pytest.param(ID[:-1] + "g", None, id="no hex digit"),
        pytest.param(ID[:-1] + "٣", None, id="a digit, but not ours"),
        pytest.param("-1", None, id="number"),
        pytest.param("", None, id="empty"),
        pytest.param(f"Message of id: Message of id: {ID}", None, id="the text twice"),
        pytest.param("a" * 100_000, None, id="long"),
    ],
)
def test_job_id(text: str, found: UUID | None) -> None:
    assert names.job_id(text) == found


def test_a_plain_uuid_has_no_text_before_it() -> None:
    assert names.uuid(f"Message of id: {ID}") is None


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        pytest.param("2026-01-31T09:00:00Z", datetime(2026, 1, 31, 9, tzinfo=UTC), id="Z"),
        pytest.param(
            "2026-01-31t09:00:00z", datetime(2026, 1, 31, 9, tzinfo=UTC), id="lower case, as the RFC has it"
        ),
        pytest.param(
            "2026-01-31T00:00:00+05:30", datetime(2026, 1, 30, 18, 30, tzinfo=UTC), id="offset east"
        ),
        pytest.param("2026-01-31T23:00:00-05:00", datetime(2026, 2, 1, 4, tzinfo=UTC), id="offset west"),
        pytest.param(
            "2026-01-31T09:00:00-00:00", datetime(2026, 1, 31, 9, tzinfo=UTC), id="unknown local offset"
        ),
        pytest.param(
            "2026-01-31T09:00:00.25Z", datetime(2026, 1, 31, 9, 0, 0, 250_000, UTC), id="short fraction"
        ),
        pytest.param(
            "2026-01-31T09:00:00.123456789Z", datetime(2026, 1, 31, 9, 0, 0, 123_456, UTC), id="nanoseconds"
        ),
        pytest.param("2024-02-29T00:00:00Z", datetime(2024, 2, 29, tzinfo=UTC), id="leap day"),
        pytest.param("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC), id="the first year"),
    ],
)
def test_instant_reads_rfc_3339(text: str, moment: datetime) -> None:
    assert names.instant(text) == moment
    assert names.instant(text).tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("2026-01-31", id="date"),
        pytest.param("2026-01-31T09:00:00", id="no offset"),
        pytest.param("2026-01-31 09:00:00Z", id="space"),
        pytest.param("2026-01-31T09:00Z", id="no seconds"),
        pytest.param("20260131T090000Z", id="basic form"),
        pytest.param("2026-W05-6T09:00:00Z", id="week date"),
        pytest.param("2026-01-31T24:00:00Z", id="hour 24"),
        pytest.param("2026-06-30T23:59:60Z", id="leap second"),
        pytest.param("2026-02-30T00:00:00Z", id="no such day"),
        pytest.param("2025-02-29T00:00:00Z", id="no leap year"),
        pytest.param("2026-13-01T00:00:00Z", id="no such month"),
        pytest.param("0000-01-01T00:00:00Z", id="year 0"),
        pytest.param("9999-12-31T23:59:59-01:00", id="beyond year 9999 in UTC"),
        pytest.param("0001-01-01T00:00:00+01:00", id="before year 1 in UTC"),
        pytest.param("2026-01-31T09:00:00+24:00", id="offset of a day"),
        pytest.param("2026-01-31T09:00:00+01:60", id="minutes of the offset"),
        pytest.param("2026-01-31T09:00:00+0100", id="offset without colon"),
        pytest.param("2026-01-31T09:00:00.Z", id="empty fraction"),
        pytest.param("2026-01-31T09:00:00,5Z", id="comma"),
        pytest.param("2026-01-31T09:00:00Z; select 1", id="something behind"),
        pytest.param("2026-01-31T09:00:00Z\n", id="line end"),
        pytest.param("٢٠٢٦-01-31T09:00:00Z", id="digits, but not ours"),
        pytest.param("infinity", id="a word that Postgres takes"),
        pytest.param("now", id="another"),
        pytest.param("", id="empty"),
    ],
)
def test_instant_refuses_what_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(must be|is a moment|has an offset)"):
        names.instant(text)


@given(
    st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 12, 31)),
    st.integers(-1439, 1439).map(lambda minutes: timedelta(minutes=minutes)),
)
def test_instant_reads_back_what_isoformat_writes(moment: datetime, offset: timedelta) -> None:
    sign = "-" if offset < timedelta() else "+"
    minutes = abs(offset) // timedelta(minutes=1)
    text = f"{moment.isoformat()}{sign}{minutes // 60:02}:{minutes % 60:02}"

    assert names.instant(text) == (moment - offset).replace(tzinfo=UTC)


@given(st.text(max_size=40))
def test_instant_raises_nothing_but_value_errors(text: str) -> None:
    with suppress(ValueError):
        names.instant(text)
