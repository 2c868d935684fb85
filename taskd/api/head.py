"""The request line and the headers of HTTP/1.1, read strictly.

Two readers of one byte stream that disagree where a request ends are a hole, so what is ambiguous is
refused: doubled or signed lengths, a length beside a transfer coding, folded lines, bare line ends.
Pure: bytes in, a `Head` or `Refused` out. Source: RFC 9112, sections 2 to 7.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from taskd.errors import Refused

MAX_HEAD = 16 * 1024
"""Bytes of request line and headers together; more is 413."""

_REQUEST = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}) ([\x21-\x7e]+) HTTP/1\.([01])")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_UNSAFE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_LENGTH = re.compile(rb"[0-9]+")
_MOST_DIGITS = 20
"""Digits of a length that are read: as many make any body too large."""
_HOPELESS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
_HOST = re.compile(rb"[0-9A-Za-z._~!$&'()*+,;=%:\[\]-]*")
_ABSOLUTE = re.compile(r"[hH][tT][tT][pP][sS]?://[^/?]*")


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before a body. Header names are lower case; `length` None means there is no body."""

    method: str
    target: str
    minor: int
    headers: list[tuple[str, str]]
    length: int | None
    chunked: bool
    keep_alive: bool
    waits: bool
    """Whether the client waits for `100 Continue` before it sends the body."""


def check_begun(data: bytes | bytearray, seen: int = 0) -> None:
    """Return when `data`, the beginning of a head, can still become one, whatever follows.

    A client that speaks another protocol, or ends its lines in another way, is told so at once instead
    of after its time is over. `seen` bytes of it were checked before: a head that comes byte by byte is
    looked at once.

    Raises:
        Refused: `bad_request`.
    """
    end = data.find(b"\r\n", max(0, seen - 1))
    if end >= 0 and data.rfind(b"\r\n", 0, seen) < 0 and not _REQUEST.fullmatch(data, 0, end):
        raise _bad(_about(data[:end]))
    if _HOPELESS.search(data, max(0, seen - 1)):
        raise _bad("a line is not ended by CRLF, or has a control character")


def read_head(head: bytes) -> Head:
    """Return what `head`, the bytes up to the empty line, says.

    Raises:
        Refused: `bad_request`, with what is wrong; it repeats nothing of the request.
    """
    first, *lines = head.split(b"\r\n")
    request = _REQUEST.fullmatch(first)
    if request is None:
        raise _bad(_about(first))
    headers: list[tuple[str, str]] = []
    length: bytes | None = None
    coding: bytes | None = None
    host: bytes | None = None
    minor = request[3][0] - 48
    keep_alive = minor == 1
    waits = False
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name):
            raise _bad(
                "a header line is folded" if line[:1] in (b" ", b"\t") else "a header name is malformed"
            )
        value = value.strip(b" \t")
        if _UNSAFE.search(value):
            raise _bad("a header value has a control character")
        name = name.lower()
        if name == b"content-length":
            if length is not None:
                raise _bad("there are two Content-Length headers")
            if not _LENGTH.fullmatch(value):
                raise _bad("Content-Length is not a number")
            length = value
        elif name == b"transfer-encoding":
            if coding is not None or value.lower() != b"chunked" or minor == 0:
                raise _bad("Transfer-Encoding is not `chunked`")
            coding = value
        elif name == b"connection":
            options = {option.strip() for option in value.lower().split(b",")}
            if b"close" in options:
                keep_alive = False
            elif minor == 0 and b"keep-alive" in options:
                keep_alive = True
        elif name == b"host":
            if host is not None:
                raise _bad("there are two Host headers")
            if not _HOST.fullmatch(value):
                raise _bad("the Host header is malformed")
            host = value
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise _bad("Expect is not `100-continue`")
            waits = minor == 1
        headers.append((name.decode("ascii"), value.decode("utf-8", "surrogateescape")))
    if length is not None and coding is not None:
        raise _bad("Content-Length stands beside Transfer-Encoding")
    if host is None and minor == 1:
        raise _bad("there is no Host header")
    target = request[2].decode("ascii")
    if target[0] != "/":
        target = _ABSOLUTE.sub("", target, count=1)
        if not target.startswith("/"):
            raise _bad("the request target is no path")
    return Head(
        request[1].decode("ascii"),
        target,
        minor,
        headers,
        None if length is None or coding is not None else _number(length),
        coding is not None,
        keep_alive,
        waits and (coding is not None or length is not None),
    )


def _number(digits: bytes) -> int:
    """Return a length; one of more digits than any body has bytes is cut, and still more than that."""
    return int(digits.lstrip(b"0")[:_MOST_DIGITS] or b"0")


def _about(line: bytes | bytearray) -> str:
    if any(byte > 126 or byte < 32 for byte in line):
        return "the request line has bytes that are not printable ASCII"
    return "the request line is malformed"


def _bad(problem: str) -> Refused:
    return Refused("bad_request", problem)
