"""What `POST /jobs` may hold, member by member, with the code and the path of each refusal."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from taskd.errors import Refused
from taskd.model.submit import Submit, read_retry, read_submit

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
LEAST: dict[str, Any] = {"type": "echo", "payload": {}}


def read(header_key: str | None = None, **members: Any) -> Submit:
    return read_submit(LEAST | members, now=NOW, header_key=header_key)


def refused(body: dict[str, Any], **more: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        read_submit(body, now=NOW, **more)
    return caught.value


def test_the_least_submit_leaves_everything_to_the_type() -> None:
    assert read() == Submit(type="echo", payload={})


def test_every_member_arrives() -> None:
    submit = read(
        payload={"a": 1},
        priority=-100,
        run_at="2026-11-25T00:00:00+05:30",
        max_attempts=100,
        timeout=2,
        expires_in=0.5,
        unique_key="k 1",
        unique_while="unfinished",
        tags=["a", "b"],
        meta={"x": [1, "ü"]},
    )

    assert submit.body_hash is not None
    assert submit == Submit(
        type="echo",
        payload={"a": 1},
        priority=-100,
        run_at=datetime(2026, 11, 24, 18, 30, tzinfo=UTC),
        max_attempts=100,
        timeout_s=2.0,
        expires_in_s=0.5,
        unique_key="k 1",
        unique_while="unfinished",
        tags=("a", "b"),
        meta='{"x":[1,"ü"]}',
        body_hash=submit.body_hash,
    )


@pytest.mark.parametrize("delay", [0, 0.5, 31_536_000])
def test_a_delay_may_be_any_number_of_a_year(delay: float) -> None:
    assert read(delay=delay).delay_s == delay


def test_a_past_run_at_is_no_mistake() -> None:
    assert read(run_at="2001-01-01T00:00:00Z").run_at == datetime(2001, 1, 1, tzinfo=UTC)


def test_scheduled_at_is_another_name_of_run_at() -> None:
    assert read(scheduled_at="2026-12-24T00:00:00Z").run_at == datetime(2026, 12, 24, tzinfo=UTC)


def test_run_at_may_lie_365_days_ahead_and_no_more() -> None:
    edge = NOW + timedelta(days=365)

    assert read(run_at=edge.isoformat()).run_at == edge
    refusal = refused(LEAST | {"run_at": (edge + timedelta(seconds=1)).isoformat()})
    assert (refusal.error, refusal.fields[0].path) == ("invalid_field", "run_at")


@pytest.mark.parametrize(
    ("member", "value"),
    [
        pytest.param("type", 7, id="type is a number"),
        pytest.param("type", None, id="type is null"),
        pytest.param("type", "", id="type is empty"),
        pytest.param("type", " echo ", id="type with spaces"),
        pytest.param("type", "ECHO", id="type in upper case"),
        pytest.param("type", "a" * 65, id="type too long"),
        pytest.param("type", "../../etc/passwd", id="type is a path"),
        pytest.param("type", "os.system('id')", id="type is code"),
        pytest.param("type", "taskd.notify", id="type of taskd's own"),
        pytest.param("payload", [1], id="payload is an array"),
        pytest.param("payload", False, id="payload is false"),
        pytest.param("payload", None, id="payload is null"),
        pytest.param("payload", "{}", id="payload is text"),
        pytest.param("priority", True, id="true is no number"),
        pytest.param("priority", 1.0, id="a priority is whole"),
        pytest.param("priority", -101, id="below"),
        pytest.param("priority", 101, id="above"),
        pytest.param("priority", 2**63, id="beyond 64 bits"),
        pytest.param("priority", "5", id="text"),
        pytest.param("max_attempts", None, id="null is not absent"),
        pytest.param("max_attempts", 0, id="no attempt at all"),
        pytest.param("max_attempts", 101, id="too many attempts"),
        pytest.param("delay", -0.001, id="a little negative"),
        pytest.param("delay", 1e18, id="huge"),
        pytest.param("delay", 1e308, id="overflows a timedelta"),
        pytest.param("delay", 10**300, id="overflows a double when multiplied"),
        pytest.param("delay", 31_536_001, id="more than a year"),
        pytest.param("delay", False, id="false is no 0"),
        pytest.param("delay", "5", id="text for seconds"),
        pytest.param("run_at", 1_700_000_000, id="Unix time"),
        pytest.param("run_at", None, id="null"),
        pytest.param("run_at", "infinity", id="a word"),
        pytest.param("run_at", "2026-12-24", id="a date"),
        pytest.param("run_at", "2026-12-24T24:00:00Z", id="hour 24"),
        pytest.param("scheduled_at", "tomorrow", id="the alias is checked the same"),
        pytest.param("timeout", 0, id="no time at all"),
        pytest.param("timeout", -1, id="negative timeout"),
        pytest.param("timeout", 1e300, id="timeout without end"),
        pytest.param("expires_in", 0, id="expired at once"),
        pytest.param("expires_in", True, id="true is no 1"),
        pytest.param("unique_key", "", id="empty key"),
        pytest.param("unique_key", "x" * 256, id="long key"),
        pytest.param("unique_key", "a\r\nb", id="line ends in the key"),
        pytest.param("unique_key", {}, id="key is an object"),
        pytest.param("unique_key", None, id="key is null"),
        pytest.param("unique_while", "forever", id="another word"),
        pytest.param("unique_while", [], id="no text, and not hashable"),
        pytest.param("tags", "a", id="tags is text"),
        pytest.param("tags", ["a"] * 11, id="eleven tags"),
        pytest.param("tags", {}, id="tags is an object"),
        pytest.param("meta", [], id="meta is an array"),
        pytest.param("meta", None, id="meta is null"),
        pytest.param("meta", {"a": "x" * 4096}, id="meta too large"),
        pytest.param("notify", {"url": "https://x.example/"}, id="webhooks are not configured"),
        pytest.param("notify", None, id="nor with null"),
    ],
)
def test_a_wrong_member_is_refused_by_its_name(member: str, value: Any) -> None:
    refusal = refused(LEAST | {member: value})

    assert refusal.error == "invalid_field"
    assert [problem.path for problem in refusal.fields] == [member]


@pytest.mark.parametrize("tag", ["", "x" * 65, "a\nb", 1, None])
def test_a_wrong_tag_is_named_by_its_place(tag: Any) -> None:
    refusal = refused(LEAST | {"tags": ["fine", tag]})

    assert (refusal.error, refusal.fields[0].path) == ("invalid_field", "tags[1]")


def test_meta_is_measured_as_compact_json() -> None:
    fits = {"a": "x" * (4096 - len('{"a":""}'))}

    assert read(meta=fits).meta == json.dumps(fits, separators=(",", ":"))
    assert refused(LEAST | {"meta": {"a": fits["a"] + "x"}}).fields[0].path == "meta"


@pytest.mark.parametrize("member", ["type", "payload"])
def test_what_is_required_is_missed(member: str) -> None:
    refusal = refused({name: value for name, value in LEAST.items() if name != member})

    assert (refusal.error, refusal.fields[0].path) == ("missing_field", member)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        pytest.param("api_key_id", 1, id="somebody else's job"),
        pytest.param("queue", None, id="null is no way to hide one"),
        pytest.param("status", "completed", id="a member of the answer"),
        pytest.param("Priority", 1, id="another case"),
        pytest.param("", 1, id="no name"),
    ],
)
def test_an_unknown_member_is_refused(member: str, value: Any) -> None:
    refusal = refused(LEAST | {member: value})

    assert (refusal.error, refusal.fields[0].path) == ("unknown_field", member)


def test_a_misspelt_member_is_answered_with_the_right_name() -> None:
    assert "did you mean max_attempts?" in str(refused(LEAST | {"max_atempts": 3}))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"delay": 1}, {"run_at": "2026-12-24T00:00:00Z"}, id="delay and run_at"),
        pytest.param({"delay": 1}, {"scheduled_at": "2026-12-24T00:00:00Z"}, id="delay and the alias"),
        pytest.param(
            {"run_at": "2026-12-24T00:00:00Z"},
            {"scheduled_at": "2026-12-24T00:00:00Z"},
            id="both names, same time",
        ),
    ],
)
def test_members_that_exclude_each_other(one: dict[str, Any], other: dict[str, Any]) -> None:
    refusal = refused(LEAST | one | other)

    assert (refusal.error, refusal.fields[0].path) == ("exclusive_fields", next(iter(other)))


def test_the_header_is_the_unique_key() -> None:
    assert read(header_key="k1").unique_key == "k1"
    assert read(header_key="k1").body_hash == read(unique_key="k1").body_hash


def test_header_and_member_together_are_refused_even_when_equal() -> None:
    refusal = refused(LEAST | {"unique_key": "k1"}, header_key="k1")

    assert (refusal.error, refusal.fields[0].path) == ("exclusive_fields", "unique_key")


@pytest.mark.parametrize("header", ["", "a\tb", "x" * 256, "\udcff"])
def test_the_header_is_checked_like_the_member(header: str) -> None:
    refusal = refused(LEAST, header_key=header)

    assert (refusal.error, refusal.fields[0].path) == ("invalid_field", "Idempotency-Key")


def test_all_problems_are_told_and_the_first_decides_the_code() -> None:
    refusal = refused({"type": "echo", "priority": True, "delay": -1, "quue": 1})

    assert refusal.error == "missing_field"
    assert [problem.path for problem in refusal.fields] == ["payload", "priority", "delay", "quue"]
    assert str(refusal) == "payload: is required"


def test_a_bulk_puts_the_place_of_the_job_before_each_member() -> None:
    refusal = refused({"type": "echo"}, path="jobs[3].")

    assert refusal.fields[0].path == "jobs[3].payload"


@pytest.mark.parametrize(
    ("members", "same"),
    [
        pytest.param({}, True, id="the same body"),
        pytest.param({"payload": {"b": [1.0], "a": 1}}, True, id="the payload as JSON value"),
        pytest.param({"payload": {"a": 1, "b": [2]}}, False, id="another payload"),
        pytest.param({"type": "sleep"}, False, id="another type"),
        pytest.param({"priority": 4}, False, id="another option"),
        pytest.param({"tags": []}, False, id="one more option"),
        pytest.param({"run_at": "2026-12-24T01:00:00+01:00"}, True, id="the same moment at another offset"),
        pytest.param({"run_at": "2026-12-24T00:00:01Z"}, False, id="another moment"),
        pytest.param({"unique_key": "other"}, True, id="the key itself is not in its own comparison"),
    ],
)
def test_the_body_hash_tells_whether_a_submit_is_the_same(members: dict[str, Any], same: bool) -> None:
    first: dict[str, Any] = {
        "payload": {"a": 1, "b": [1]},
        "priority": 5,
        "run_at": "2026-12-24T00:00:00Z",
        "unique_key": "k",
    }

    assert (read(**first).body_hash == read(**first | members).body_hash) is same


def test_both_names_of_the_due_time_hash_the_same() -> None:
    due = "2026-12-24T00:00:00Z"

    assert read(run_at=due, unique_key="k").body_hash == read(scheduled_at=due, unique_key="k").body_hash


def test_without_a_unique_key_nothing_is_hashed() -> None:
    assert read(unique_while="retained").body_hash is None


def test_a_retry_may_bring_a_payload_and_a_time() -> None:
    assert read_retry({}, now=NOW) == (None, None)
    assert read_retry({"payload": {"a": 1}, "run_at": "2026-12-24T00:00:00Z"}, now=NOW) == (
        {"a": 1},
        datetime(2026, 12, 24, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("body", "code", "path"),
    [
        pytest.param({"payload": None}, "invalid_field", "payload", id="null payload"),
        pytest.param({"run_at": "soon"}, "invalid_field", "run_at", id="no time"),
        pytest.param({"type": "echo"}, "unknown_field", "type", id="the type can't change"),
    ],
)
def test_a_wrong_retry_is_refused(body: dict[str, Any], code: str, path: str) -> None:
    with pytest.raises(Refused) as caught:
        read_retry(body, now=NOW)

    assert (caught.value.error, caught.value.fields[0].path) == (code, path)
