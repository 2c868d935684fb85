"""Request lines and headers: what is ambiguous is refused."""

from __future__ import annotations

import pytest

from taskd.api.head import check_begun, read_head
from taskd.errors import Refused

LINE = b"POST /jobs HTTP/1.1\r\nHost: t\r\n"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET  /jobs HTTP/1.1\r\nHost: t", id="two spaces"),
        pytest.param(b"GET /jobs HTTP/1.1 \r\nHost: t", id="space at the end"),
        pytest.param(b"GET /jobs\r\nHost: t", id="no version"),
        pytest.param(b"GET /jobs HTTP/2.0\r\nHost: t", id="other version"),
        pytest.param(b"GET /a\x00b HTTP/1.1\r\nHost: t", id="NUL in the path"),
        pytest.param(b"G@T /jobs HTTP/1.1\r\nHost: t", id="method is no token"),
        pytest.param(b"GET jobs HTTP/1.1\r\nHost: t", id="target is no path"),
        pytest.param(b"GET /jobs HTTP/1.1", id="no Host"),
        pytest.param(b"GET /jobs HTTP/1.1\r\nHost: t\r\nHost: u", id="two Hosts"),
        pytest.param(LINE + b"X-API-Key : a", id="space before the colon"),
        pytest.param(LINE + b": a", id="no name"),
        pytest.param(LINE + b"X-A", id="no colon"),
        pytest.param(LINE + b"X-A: a\nX-B: b", id="bare LF"),
        pytest.param(LINE + b"X-A: a\rX-B: b", id="bare CR"),
        pytest.param(LINE + b"X-A: a\x00", id="NUL in a value"),
        pytest.param(LINE + b" X-A: a", id="folded"),
        pytest.param(LINE + b"Content-Length: 2\r\nContent-Length: 2", id="length twice, equal"),
        pytest.param(LINE + b"Content-Length: 2, 2", id="length list"),
        pytest.param(LINE + b"Content-Length: -1", id="negative length"),
        pytest.param(LINE + b"Content-Length: 0x2", id="hexadecimal length"),
        pytest.param(LINE + b"Content-Length:", id="empty length"),
        pytest.param(LINE + b"Content-Length: 2\r\nTransfer-Encoding: chunked", id="length and coding"),
        pytest.param(LINE + b"Transfer-Encoding: gzip, chunked", id="two codings"),
        pytest.param(LINE + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", id="coding twice"),
        pytest.param(b"POST /jobs HTTP/1.0\r\nTransfer-Encoding: chunked", id="coding in HTTP/1.0"),
        pytest.param(LINE + b"Expect: tea", id="unknown expectation"),
    ],
)
def test_is_refused(head: bytes) -> None:
    with pytest.raises(Refused) as refused:
        read_head(head)

    assert refused.value.error == "bad_request"


def test_is_read() -> None:
    head = read_head(
        b"POST /jobs?wait=1 HTTP/1.1\r\nHost: [::1]:80\r\nX-A:  a b \t\r\n"
        b"Content-Length: 7\r\nConnection: Close"
    )

    assert (head.method, head.target, head.length, head.chunked) == ("POST", "/jobs?wait=1", 7, False)
    assert ("x-a", "a b") in head.headers
    assert not head.keep_alive


def test_an_absolute_target_is_its_path() -> None:
    assert read_head(b"GET http://t.example/health HTTP/1.1\r\nHost: t").target == "/health"
    assert read_head(b"GET /health HTTP/1.0\r\nConnection: keep-alive").keep_alive


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(b"\x16\x03\x01\x02\x00", id="TLS"),
        pytest.param(b"GET /health HTTP/1.1\nHost: t\n\n", id="bare line feeds"),
        pytest.param(b"EHLO mail\r\n", id="another protocol"),
        pytest.param(b"GET /health HTTP/1.1\r\nX-A: \x1b", id="a control character"),
    ],
)
def test_a_head_that_can_not_become_one_is_refused_at_once(begun: bytes) -> None:
    with pytest.raises(Refused, match=r"request line|line is not ended"):
        check_begun(begun)


@pytest.mark.parametrize("digits", ["9" * 21, "1" + "0" * 5000])
def test_a_length_of_any_number_of_digits_is_a_length(digits: str) -> None:
    head = read_head(f"POST /jobs HTTP/1.1\r\nHost: t\r\nContent-Length: {digits}".encode())

    assert head.length is not None
    assert head.length > 1 << 60
