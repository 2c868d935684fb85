"""Random input to the three parsers that strangers reach: never anything but a refusal, in bounded time.

`TASKD_FUZZ_INPUTS` is how many inputs each test tries; the long run takes 100 000 (`make fuzz`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskd.api.head import check_begun, read_head
from taskd.config.read import parse as read_yaml
from taskd.errors import ConfigError, Problem, Refused
from taskd.model import payload

INPUTS = int(os.environ.get("TASKD_FUZZ_INPUTS", "300"))
fuzz = settings(
    max_examples=INPUTS,
    deadline=timedelta(seconds=2),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
TOKEN = "Zq3vT8mB1xW6nK0pR5sY2uL9dF4hJ7cA"


def pieces(*parts: bytes) -> st.SearchStrategy[bytes]:
    """Texts of a language's own parts in any order, with a few bytes of no meaning between them."""
    return st.lists(st.one_of(st.sampled_from(parts), st.binary(max_size=4)), max_size=40).map(b"".join)


def mutated(*sound: bytes) -> st.SearchStrategy[bytes]:
    """Sound texts with a few bytes cut out, put in or doubled."""

    def change(text: bytes, cuts: Sequence[tuple[int, int, bytes]]) -> bytes:
        for at, length, new in cuts:
            at %= len(text) + 1
            text = text[:at] + new + text[at + length :]
        return text

    cuts = st.tuples(st.integers(0, 10_000), st.integers(0, 12), st.binary(max_size=6))
    return st.builds(change, st.sampled_from(sound), st.lists(cuts, max_size=4))


JSON = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\\ude00", b"\\u003a", b" "),
    *(
        b'"type"',
        b'"echo"',
        b'"payload"',
        b"{}",
        b"1e400",
        b"-0",
        b"1.5",
        b"9" * 301,
        b"NaN",
        b"true",
        b"null",
    ),
    *(b"[" * 70, b"]" * 70, b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"/*", b"\n", b'"a":1,"a":2'),
)
BODIES = (
    b'{"type":"echo","payload":{"a":[1,2.5e3,"x\\u00e9",null,{"b":{}}]},"unique_key":"k","tags":["t"]}',
    b'{"jobs":[{"type":"echo","payload":{}},{"type":"echo","payload":{"v":9007199254740993}}]}',
)


REFUSALS = (
    *("invalid_json", "invalid_body", "duplicate_key", "unsupported_value", "number_out_of_range"),
    *("too_deep", "too_many_keys"),
)


@fuzz
@given(st.one_of(st.binary(max_size=200), pieces(*JSON), mutated(*BODIES)))
def test_a_body_is_an_object_that_can_be_stored_or_refused(body: bytes) -> None:
    error = ""
    try:
        value = payload.parse(body)
    except Refused as refused:
        error = refused.error

    assert error in ("", *REFUSALS)
    if not error:
        assert json.loads(payload.encode(value)) == value
        assert "\0" not in json.dumps(value, ensure_ascii=False)


HEAD = (
    *(
        b"GET",
        b"POST",
        b" ",
        b"/jobs",
        b"/",
        b"http://t/",
        b"*",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"HTTP/2",
        b"\r\n",
    ),
    *(b"\n", b"\r", b":", b": ", b"Host: t", b"Content-Length: ", b"5", b"-1", b"9" * 30, b"\t", b"\0", b","),
    *(b"Transfer-Encoding: chunked", b"Connection: close", b"Expect: 100-continue", b"X-API-Key: ", b"\xff"),
)
HEADS = (
    b"GET /health?x=1 HTTP/1.1\r\nHost: t:8080\r\nAccept: */*",
    b"POST /jobs HTTP/1.1\r\nHost: t\r\nX-API-Key: k\r\nContent-Type: application/json\r\nContent-Length: 2",
    b"POST http://t/jobs HTTP/1.0\r\nConnection: keep-alive, x\r\nContent-Length: 0012",
    b"POST /jobs HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue",
)


@fuzz
@given(st.one_of(st.binary(max_size=200), pieces(*HEAD), mutated(*HEADS)), st.data())
def test_a_head_is_understood_or_a_bad_request(head: bytes, data: st.DataObject) -> None:
    head = head.replace(b"\r\n\r\n", b"\r\n")
    error = ""
    try:
        found = read_head(head)
    except Refused as refused:
        error = refused.error

    assert error in ("", "bad_request")
    if error:
        return
    assert found.target.startswith("/")
    assert found.length is None or found.length >= 0
    assert not (found.chunked and found.length is not None)
    # What is whole in the end must not be refused on its way, wherever the network cuts it.
    whole = head + b"\r\n\r\n"
    seen = 0
    for cut in sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6))):
        check_begun(whole[:cut], seen)
        seen = cut


YAML = (
    *(b"api:", b"admin:", b"workers:", b"plugins:", b"schedules:", b"job_types:", b"  ", b"\n", b"- ", b": "),
    *(b"{", b"}", b"[", b"]", b",", b"&a ", b"*a", b"!!str ", b"!x ", b"<<: ", b"? ", b"---\n", b"...\n"),
    *(b'"', b"'", b"|\n", b">-\n", b"#", b"\t", b"${X}", b"port", b"token", b"lease", b"30s", b"0600", b"no"),
    *(b"10:30", b"1_0", b"~", b"%YAML 1.1\n", b"\\x", b"\\ud800", b"\xff", b"\x07", b"\r", TOKEN.encode()),
)
FILES = (
    f"admin:\n  token: {TOKEN}\napi:\n  host: 127.0.0.1\n  port: 8080\n  trusted_proxies: [::1]\n".encode(),
    f'admin: {{token: {TOKEN}}}\nschedules:\n  - {{name: n, cron: "0 2 * * *", type: echo}}\n'.encode(),
    f"admin: {{token: {TOKEN}}}\nplugins:\n  - name: email\n    config: {{a: 1, b_env: X}}\n"
    'job_types:\n  x:\n    command: [/bin/true, "{f}"]\n    params: {f: "^a$"}\n    rate: 100/m\n'.encode(),
)


@fuzz
@given(st.one_of(st.binary(max_size=200), pieces(*YAML), mutated(*FILES)))
def test_a_file_is_a_configuration_or_has_problems(text: bytes) -> None:
    problems: Sequence[Problem] | None = None
    try:
        read_yaml(text, file="taskd.yaml", env={"X": "y"})
    except ConfigError as error:
        problems = error.problems

    assert problems is None or problems
    for problem in problems or ():
        line = problem.show("taskd.yaml")
        assert line.isprintable(), line
        assert 0 <= problem.line <= text.count(b"\n") + text.count(b"\r") + 1
        assert TOKEN not in line
