"""The strict parser: what it refuses, what it keeps, and that its two halves never disagree."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taskd.errors import Refused
from taskd.model import payload
from taskd.model.payload import body_hash, canonical, clean_text, parse, payload_text, payload_texts, storable


def refusal(body: bytes, **limits: int) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        parse(body, **limits)
    fields = caught.value.fields
    return caught.value.error, fields[0].path if fields else ""


def wrap(value: str) -> bytes:
    return b'{"type":"echo","payload":{"v":' + value.encode() + b"}}"


@pytest.mark.parametrize(
    ("body", "code", "path"),
    [
        pytest.param(b"", "invalid_json", "", id="empty"),
        pytest.param(b" \n", "invalid_json", "", id="white space only"),
        pytest.param(b'{"a":1', "invalid_json", "", id="cut off"),
        pytest.param(b'{"a":1,}', "invalid_json", "", id="trailing comma"),
        pytest.param(b"{}{}", "invalid_json", "", id="two values"),
        pytest.param(b"\xef\xbb\xbf{}", "invalid_json", "", id="byte order mark"),
        pytest.param('{"a":1}'.encode("utf-16"), "invalid_json", "", id="UTF-16, which json.loads takes"),
        pytest.param('{"a":1}'.encode("utf-32-le"), "invalid_json", "", id="UTF-32"),
        pytest.param(b'{"a":"\xff"}', "invalid_json", "", id="no UTF-8 in a text"),
        pytest.param(b'{"\xff":1}', "invalid_json", "", id="no UTF-8 in a name"),
        pytest.param(b'{"a":"\xed\xa0\xbd"}', "invalid_json", "", id="CESU bytes of a surrogate"),
        pytest.param(b'{"a":"\xc0\xaf"}', "invalid_json", "", id="overlong UTF-8"),
        pytest.param(b'{"a":"x\x00"}', "invalid_json", "", id="raw NUL"),
        pytest.param(b'{"a":"x\x1f"}', "invalid_json", "", id="raw control character"),
        pytest.param(wrap("NaN"), "invalid_json", "", id="NaN"),
        pytest.param(wrap("Infinity"), "invalid_json", "", id="Infinity"),
        pytest.param(wrap("-Infinity"), "invalid_json", "", id="-Infinity"),
        pytest.param(wrap("01"), "invalid_json", "", id="leading zero"),
        pytest.param(wrap("+1"), "invalid_json", "", id="plus sign"),
        pytest.param(wrap("1."), "invalid_json", "", id="point without digits"),
        pytest.param(wrap("0x10"), "invalid_json", "", id="hexadecimal"),
        pytest.param(b"[]", "invalid_body", "", id="array on top"),
        pytest.param(b"null", "invalid_body", "", id="null on top"),
        pytest.param(b'"x"', "invalid_body", "", id="text on top"),
        pytest.param(b'{"a":1,"a":1}', "duplicate_key", "a", id="duplicate with the same value"),
        pytest.param(wrap('{"x":1,"x":2}'), "duplicate_key", "payload.v.x", id="duplicate inside"),
        pytest.param(wrap('[1,{"x":1,"x":2}]'), "duplicate_key", "payload.v[1].x", id="inside an array"),
        pytest.param(rb'{"a":1,"\u0061":2}', "duplicate_key", "a", id="duplicate in disguise"),
        pytest.param(
            rb'{"a" :"\u003a","a":2}', "duplicate_key", "a", id="a colon escaped to balance the count"
        ),
        pytest.param(rb'{"a":1,"a":"\u003A:"}', "duplicate_key", "a", id="an escaped colon in upper case"),
        pytest.param(wrap(r'"a\u0000b"'), "unsupported_value", "payload.v", id="U+0000 in a text"),
        pytest.param(
            wrap(r'{"\u0000":1}'), "unsupported_value", r'payload.v."\u0000"', id="U+0000 in a name"
        ),
        pytest.param(wrap(r'"\\\u0000"'), "unsupported_value", "payload.v", id="U+0000 after a backslash"),
        pytest.param(wrap(r'"\ud83d"'), "unsupported_value", "payload.v", id="high surrogate alone"),
        pytest.param(wrap(r'"\udE00x"'), "unsupported_value", "payload.v", id="low surrogate alone"),
        pytest.param(
            wrap(r'"\ude00\ud83d"'), "unsupported_value", "payload.v", id="surrogates the wrong way"
        ),
        pytest.param(rb'{"\ud83d":1}', "unsupported_value", r'"\ud83d"', id="lone surrogate in a name"),
        pytest.param(wrap("9" * 301), "number_out_of_range", "payload.v", id="one digit too many"),
        pytest.param(wrap("-" + "9" * 301), "number_out_of_range", "payload.v", id="the sign is no digit"),
        pytest.param(wrap("9" * 5000), "number_out_of_range", "payload.v", id="more than Python reads"),
        pytest.param(wrap("1e400"), "number_out_of_range", "payload.v", id="beyond a double"),
        pytest.param(wrap("-1e400"), "number_out_of_range", "payload.v", id="below a double"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_place(body: bytes, code: str, path: str) -> None:
    assert refusal(body) == (code, path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("9007199254740993", 9007199254740993, id="beyond what a double can tell apart"),
        pytest.param("9223372036854775808", 2**63, id="one beyond 64 bits signed"),
        pytest.param(str(2**70), 2**70, id="beyond 64 bits"),
        pytest.param("-" + "9" * 300, -int("9" * 300), id="as long as it may be"),
        pytest.param("1.0", 1.0, id="point"),
        pytest.param("1e2", 100.0, id="exponent"),
        pytest.param("1.7976931348623157e308", 1.7976931348623157e308, id="largest double"),
        pytest.param("0." + "1" * 400, 1 / 9, id="many digits behind the point"),
        pytest.param(r'"\ud83d\ude00"', "\U0001f600", id="a whole surrogate pair"),
        pytest.param(r'"\\u0000"', r"\u0000", id="an escaped backslash makes no U+0000"),
        pytest.param(r'"\\ud83d"', r"\ud83d", id="an escaped backslash makes no surrogate"),
        pytest.param(r'{"\\u003a":1}', {r"\u003a": 1}, id="an escaped backslash makes no colon"),
        pytest.param('"12:30 :: https://x.example"', "12:30 :: https://x.example", id="colons in a text"),
        pytest.param('"' + "7" * 400 + '"', "7" * 400, id="digits in a text are no number"),
        pytest.param("\t[ ]\r\n", [], id="white space"),
    ],
)
def test_what_is_sound_comes_back_exactly(text: str, value: Any) -> None:
    found = parse(wrap(text))["payload"]["v"]

    assert found == value
    assert type(found) is type(value)


def test_depth_counts_from_the_payload() -> None:
    assert parse(wrap("[" * 63 + "]" * 63))
    assert refusal(wrap("[" * 64 + "]" * 64))[0] == "too_deep"


def test_depth_of_a_bulk_counts_from_each_payload() -> None:
    fits = b'{"jobs":[' + wrap("[" * 63 + "]" * 63) + b"]}"
    deeper = b'{"jobs":[' + wrap("[" * 64 + "]" * 64) + b"]}"

    assert parse(fits, above=3)
    assert refusal(deeper, above=3)[0] == "too_deep"
    assert refusal(deeper, above=3)[1].startswith("jobs[0].payload.v[0]")


def test_many_brackets_side_by_side_are_not_deep() -> None:
    assert len(parse(wrap("[" + "[]," * 500 + "{}]"))["payload"]["v"]) == 501


@pytest.mark.parametrize("levels", [500, 5_000, 100_000])
def test_no_depth_ends_in_a_recursion_error(levels: int) -> None:
    assert refusal(wrap("[" * levels + "]" * levels))[0] == "too_deep"
    assert refusal(wrap('{"":' * levels + "1" + "}" * levels))[0] == "too_deep"
    assert refusal(wrap("[" * levels))[0] in ("too_deep", "invalid_json")  # both are true


def test_an_object_has_at_most_ten_thousand_members() -> None:
    def members(count: int) -> str:
        return "{" + ",".join(f'"k{n}":1' for n in range(count)) + "}"

    assert parse(wrap(members(10_000)))
    assert refusal(wrap(members(10_001))) == ("too_many_keys", "payload.v")


def test_many_members_in_many_objects_are_fine() -> None:
    assert len(parse(wrap("[" + ",".join(['{"a":1,"b":2}'] * 8_000) + "]"))["payload"]["v"]) == 8_000


def test_a_path_shows_hostile_names_escaped_and_cut() -> None:
    code, path = refusal(b'{"a\\nb' + b"x" * 5_000 + b'":{"v":1,"v":1}}')

    assert code == "duplicate_key"
    assert path.isprintable()
    assert len(path) <= 200


def test_refusals_repeat_no_value_of_the_body() -> None:
    with pytest.raises(Refused) as caught:
        parse(b'{"payload":{"password":"hunter2","v":NaN}}')

    assert "hunter2" not in str(caught.value)


# -- both halves agree ----------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(
        [":", '":', '\\":', "\\u003a", "\\u0000", "\0", "\ud800", "\U0001f600", "a" * 310, "9" * 310]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """JSON as other people write it: white space, escapes, duplicates, and now and then a wound."""

    def write(value: Any) -> str:
        if isinstance(value, dict):
            members = [(key, member) for key, member in value.items()]
            if members and draw(st.integers(0, 9)) == 0:
                members.append(draw(st.sampled_from(members)))
            space = draw(st.sampled_from(["", " ", "\n", "\t"]))
            return (
                "{" + ",".join(f"{text(key)}{space}:{space}{write(member)}" for key, member in members) + "}"
            )
        if isinstance(value, list):
            return "[" + ", ".join(map(write, value)) + "]"
        return text(value) if isinstance(value, str) else json.dumps(value)

    def text(value: str) -> str:
        written = json.dumps(value, ensure_ascii=draw(st.booleans()))
        return written.replace(":", r"\u003a") if draw(st.booleans()) else written

    body = write({"type": draw(values), "payload": draw(values)}).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(body)))
        wound = draw(
            st.sampled_from([b"", b"9" * 310, b'"', b"\\", b"\x00", b"\xff", b"[" * 70, b",", b"e999"])
        )
        body = body[:at] + wound + body[at + draw(st.integers(0, 2)) :]
    return body


def told(read: Any) -> tuple[str, Any]:
    try:
        value = read()
    except Refused as refused:
        return refused.error, refused.fields
    return "", json.dumps(value)  # tells 1 from 1.0 and -0.0 from 0.0, and keeps the order


@given(texts())
@example(b'{"a":-0,"b":-0.0,"c":1E+2,"d":5e-324,"e":2.2250738585072011e-308}')
@example(b'{"a":0.1000000000000000055511151231257827021181583404541015625}')
@example(b'{"a":1e22,"b":1e23,"c":9007199254740993.0,"d":123456789012345678901234567890.5}')
@example(rb'{"a":"\/\b\f\n\r\t\"\\\u00e9"}')
def test_the_fast_half_never_disagrees_with_the_exact_one(body: bytes) -> None:
    exact = told(lambda: payload._exact(body, 65, 10_000, object_only=True))

    assert told(lambda: parse(body)) == exact


@given(st.binary(max_size=40).map(lambda tail: b'{"a":' + tail))
@example(b'{"a":1}\x00')
@example(b'{"a":\x0c1}')
@example(b'{"a":"\x7f"}')
@example(b'{"a":-}')
@example(b'{"a":1e}')
@example(b'{"a":.5}')
@example(b'{"a":-01}')
@example(b'{"a":tru}')
def test_any_bytes_end_in_a_value_or_a_refusal(body: bytes) -> None:
    assert told(lambda: parse(body)) == told(lambda: payload._exact(body, 65, 10_000, object_only=True))


# -- the text that is stored ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        pytest.param('{"b":1.10,"a" : [ ]}', '{"b":1.10,"a" : [ ]}', id="as the client wrote it"),
        pytest.param(
            '{"v":12345678901234567.123}', '{"v":12345678901234567.123}', id="more than a double holds"
        ),
        pytest.param('{"v":1e-5000}', '{"v":0.0}', id="5000 digits to jsonb"),
        pytest.param('{"v":0E+999999}', '{"v":0.0}', id="an exponent that means nothing"),
        pytest.param('{"v":1.' + "0" * 400 + "}", '{"v":1.0}', id="hundreds of digits behind the point"),
        pytest.param('{"v":"e1000"}', '{"v":"e1000"}', id="a text that looks like one stays"),
    ],
)
def test_the_stored_text_is_the_clients_own_unless_jsonb_cannot_be_trusted_with_it(
    text: str, stored: str
) -> None:
    body = b'{"type":"echo","payload":' + text.encode() + b',"priority":1}'

    assert payload_text(body, parse(body)["payload"]) == stored


@given(st.dictionaries(st.text(max_size=4), values, max_size=4))
def test_the_stored_text_means_the_parsed_payload(value: dict[str, Any]) -> None:
    body = json.dumps({"payload": value}).encode()
    try:
        parsed = parse(body)["payload"]
    except Refused:
        return

    assert json.loads(payload_text(body, parsed)) == parsed


def test_a_bulk_gives_each_payload_its_own_text() -> None:
    body = b'{"jobs":[{"type":"a","payload":{"x": 1}},{"payload":{"y":2.50},"type":"b"}]}'

    jobs = parse(body, above=3)["jobs"]

    assert payload_texts(body, [job["payload"] for job in jobs]) == ['{"x": 1}', '{"y":2.50}']


# -- one JSON value, one canonical form -----------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param('{"a":1,"b":[2]}', ' {"b" : [2], "a":1}', True, id="order and white space"),
        pytest.param('{"a":"\\u0041\\/"}', '{"a":"A/"}', True, id="escapes"),
        pytest.param('{"a":1}', '{"a":1.0}', True, id="a whole number with a point"),
        pytest.param('{"a":100}', '{"a":1e2}', True, id="with an exponent"),
        pytest.param('{"a":[{"b":-0.0}]}', '{"a":[{"b":0}]}', True, id="minus zero"),
        pytest.param('{"a":10000000000000000000000}', '{"a":1e22}', True, id="beyond 64 bits"),
        pytest.param('{"a":1}', '{"a":true}', False, id="true is no 1, though Python says so"),
        pytest.param('{"a":1}', '{"a":"1"}', False, id="text is no number"),
        pytest.param('{"a":9007199254740993}', '{"a":9007199254740992}', False, id="exact integers"),
        pytest.param('{"a":null}', "{}", False, id="null is not absent"),
        pytest.param('{"a":[1,2]}', '{"a":[2,1]}', False, id="arrays have an order"),
    ],
)
def test_canonical_is_equal_for_the_same_json_value_only(one: str, other: str, same: bool) -> None:
    assert (canonical(parse(one.encode())) == canonical(parse(other.encode()))) is same


def test_the_body_hash_covers_type_payload_and_options() -> None:
    same = body_hash("echo", {"a": 1}, {"priority": 5})

    assert body_hash("echo", {"a": 1.0}, {"priority": 5}) == same
    assert body_hash("sleep", {"a": 1}, {"priority": 5}) != same
    assert body_hash("echo", {"a": 2}, {"priority": 5}) != same
    assert body_hash("echo", {"a": 1}, {}) != same
    assert len(same) == 32


# -- texts and results of jobs --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit", "clean"),
    [
        pytest.param("fine\n\ttoo", 100, "fine\n\ttoo", id="lines and tabs stay"),
        pytest.param("a\0b", 100, "a\ufffdb", id="U+0000"),
        pytest.param("a\ud800b", 100, "a\ufffdb", id="lone surrogate"),
        pytest.param("\ud83d\ude00", 100, "\U0001f600", id="two halves are one character"),
        pytest.param("aé", 2, "a", id="cut at a character, not inside"),
        pytest.param("ééé", 4, "éé", id="the limit counts bytes"),
        pytest.param("\0\0", 4, "\ufffd", id="the limit holds after cleaning"),
        pytest.param("x", 0, "", id="nothing fits"),
    ],
)
def test_an_error_text_is_cleaned_and_cut(text: str, limit: int, clean: str) -> None:
    assert clean_text(text, limit) == clean


@given(st.text(st.characters(exclude_categories=[]), max_size=50), st.integers(0, 60))
def test_a_cleaned_text_always_fits_and_can_be_stored(text: str, limit: int) -> None:
    data = clean_text(text, limit).encode()

    assert len(data) <= limit
    assert b"\0" not in data


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(b"null", None, id="any JSON value will do"),
        pytest.param(b'"x"', None, id="text"),
        pytest.param(b'{"a":[1,2.5]}', None, id="object"),
        pytest.param(rb'"\\u0000"', None, id="no U+0000"),
        pytest.param(rb'{"a":"\u0000"}', "a: has the character U+0000", id="U+0000"),
        pytest.param(rb'["\ud800"]', "[0]: has half a surrogate pair", id="lone surrogate"),
        pytest.param(b"NaN", "NaN is no JSON value", id="NaN"),
        pytest.param(b"1e999", "number", id="beyond a double"),
        pytest.param(b"", "empty", id="nothing"),
        pytest.param(b"[" * 65 + b"]" * 65, "nested too deep", id="65 levels"),
        pytest.param(b"[" * 64 + b"]" * 64, None, id="64 levels"),
        pytest.param(b"[" * 100_000, "nested too deep", id="no recursion error"),
    ],
)
def test_storable_says_why_a_result_can_not_be_stored(raw: bytes, reason: str | None) -> None:
    found = storable(raw)

    assert found is None if reason is None else found is not None and reason in found


def test_a_double_is_read_as_python_reads_it() -> None:
    for text in (
        "0.1",
        "1.1e-7",
        "4.35",
        "8.41e21",
        "2.2250738585072014e-308",
        "5e-324",
        "1.7976931348623157e308",
    ):
        assert math.isclose(parse(wrap(text))["payload"]["v"], float(text), rel_tol=0, abs_tol=0)
