"""The one strict JSON parser of taskd, and what may be stored of what it reads.

Python's `json` takes NaN, duplicate keys, lone surrogates and UTF-16; Postgres then refuses, or stores
what no worker can read back. So every body passes `parse`. It has two halves that must agree: `_exact`
reads and judges everything and says where, `parse` decodes at the speed of msgspec and proves with a few
counts that nothing can be wrong; whatever it can't prove goes to `_exact`. A property test holds the two
together.

Pure: bytes in, values or `Refused` out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NoReturn

import msgspec

from taskd.errors import Refused

MAX_DEPTH = 64
"""Levels of objects and arrays in a payload, the payload itself counted."""
MAX_KEYS = 10_000
"""Members of one object."""
MAX_DIGITS = 300
"""Digits of an integer; Python refuses to read 4300 and more, jsonb to store 131072 and more."""

Json = dict[str, Any] | list[Any] | str | int | float | bool | None

_decoder = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()
_sorted_encoder = msgspec.json.Encoder(order="sorted")

# All digits become 0: then "some number of many digits" is one fixed text to look for.
_ZEROS = bytes(ord("0") if chr(byte) in "123456789" else byte for byte in range(256))
_DIGIT_RUN = b"0" * (MAX_DIGITS + 1)
_CONTAINERS = frozenset({dict, list})
_SOUND = frozenset({int, float, bool, type(None)})
_PLAIN_STEP = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_MAX_PATH = 200


class _Member(msgspec.Struct, gc=False):
    payload: msgspec.Raw


class _Bulk(msgspec.Struct, gc=False):
    jobs: list[_Member]


_line_decoder = msgspec.json.Decoder(msgspec.Raw)
_member_decoder = msgspec.json.Decoder(_Member)
_bulk_decoder = msgspec.json.Decoder(_Bulk)


def parse(
    body: bytes, *, above: int = 1, max_depth_payload: int = MAX_DEPTH, max_keys: int = MAX_KEYS
) -> dict[str, Any]:
    """Return the JSON object that `body` is; integers of any allowed length are exact.

    `above` is how many levels stand around a payload object: 1 in a submit, 3 in `{"jobs": [{..}]}`.
    The whole body may be `above + max_depth_payload` levels deep.

    Raises:
        Refused: 400. `invalid_json` (syntax, an empty body, no UTF-8, NaN), `invalid_body` (no object),
            `duplicate_key`, `unsupported_value` (U+0000, half a surrogate pair), `number_out_of_range`,
            `too_deep`, `too_many_keys`; `fields` names the first place.
    """
    try:
        value = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        value = None
    max_depth = above + max_depth_payload
    if type(value) is dict and _proved(body, value, max_depth, max_keys):
        return value
    exact = _exact(body, max_depth, max_keys, object_only=True)
    assert isinstance(exact, dict)  # object_only says so
    return exact


def bulk_of_lines(body: bytes) -> bytes:
    """Return the body `{"jobs": [..]}` that says the same as `body`, lines of one JSON value each (NDJSON).

    Empty lines don't count. What is wrong inside a line is left to `parse`.

    Raises:
        Refused: `invalid_json`, a line is no JSON value of its own, or there is none.
    """
    lines = [line for line in body.split(b"\n") if not line.isspace() and line]
    if not lines:
        raise Refused("invalid_json", "the body is empty")
    for place, line in enumerate(lines):
        # Each by itself: two halves of an object would make a whole one when they are joined.
        try:
            _line_decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            try:
                _exact(line, 3 + MAX_DEPTH, MAX_KEYS, object_only=False)
            except Refused as refused:
                if refused.error == "invalid_json":
                    raise Refused.field("invalid_json", f"jobs[{place}]", str(refused)) from None
    return b'{"jobs":[' + b",".join(lines) + b"]}"


def payload_text(body: bytes, payload: Mapping[str, Any]) -> str:
    """Return the JSON text to store for the member `payload` of a `body` that `parse` has accepted.

    It is the client's own text, so decimals beyond a double and the order of members survive. Only a
    text with numbers of hundreds of digits, which jsonb can't be trusted with, is written anew from
    `payload`, the parsed member.
    """
    try:
        raw = bytes(_member_decoder.decode(body).payload)
    except msgspec.MsgspecError:  # what only `_exact` could read
        return _encoder.encode(payload).decode()
    return _text(raw, payload)


def payload_texts(body: bytes, payloads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what `payload_text` does for each job of a bulk body `{"jobs": [..]}`, in order."""
    try:
        raws = [bytes(member.payload) for member in _bulk_decoder.decode(body).jobs]
    except msgspec.MsgspecError:
        return [_encoder.encode(payload).decode() for payload in payloads]
    if not _has_long_number(body):  # then no part of it has one
        return [raw.decode() for raw in raws]
    return [_text(raw, payload) for raw, payload in zip(raws, payloads, strict=True)]


def encode(value: object) -> str:
    """Return compact JSON text of plain values."""
    return _encoder.encode(value).decode()


def canonical(value: object) -> bytes:
    """Return bytes that are equal exactly for values that are the same JSON value.

    The order of members, white space and escapes don't matter. Numbers compare as numbers: 1, 1.0 and
    1e0 are one value, as they are in jsonb. A number with a point or an exponent is the double it
    denotes, an integer is exact: 9007199254740993 differs from 9007199254740993.0, which is ...992.
    """
    text = _sorted_encoder.encode(value)
    zeros = text.translate(_ZEROS)
    if b"0." in zeros or b"0e" in zeros:
        return _sorted_encoder.encode(_whole(value))
    return text


def body_hash(type_: str, payload: Mapping[str, Any], options: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 by which two submits with one `unique_key` are told to be the same.

    `options` are the further members as submitted, without the unique key itself.
    """
    return hashlib.sha256(canonical([type_, payload, options])).digest()


def clean_text(text: str, limit: int) -> str:
    """Return `text` as Postgres takes it, at most `limit` bytes of UTF-8, cut at a character.

    U+0000 and lone surrogates become U+FFFD. For error texts and log lines, which nobody can refuse.
    """
    # Characters beyond `limit` can't be part of the answer, so a text of 50 MB is not encoded whole.
    text = text[:limit].replace("\0", "\ufffd")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
    return data.decode() if len(data) <= limit else data[:limit].decode("utf-8", "ignore")


def storable(raw: bytes) -> str | None:
    """Return why the JSON text `raw` (a result, any JSON value) can't be stored, or None when it can."""
    try:
        value = _decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        value = NotImplemented  # no JSON value: never proved
    if value is not NotImplemented and _proved(raw, value, MAX_DEPTH, MAX_KEYS):
        return None
    try:
        _exact(raw, MAX_DEPTH, MAX_KEYS, object_only=False)
    except Refused as refusal:
        return str(refusal)
    return None


def _proved(body: bytes, value: Json, max_depth: int, max_keys: int) -> bool:
    """Whether a few counts show that `body`, which msgspec decoded to `value`, is beyond reproach.

    msgspec is strict about syntax, UTF-8, surrogates and doubles. Left are U+0000, long integers,
    depth, the number of keys, and duplicate keys, of which it keeps the last.
    """
    colons = body.count(b":")
    if b"\\" in body:
        if b"\\u0000" in body:
            return False
        # A colon may be written as an escape; an escaped backslash before it only makes this too many.
        colons += body.count(b"\\u003a") + body.count(b"\\u003A")
    if len(body) > MAX_DIGITS and _DIGIT_RUN in body.translate(_ZEROS):
        return False
    if (body.count(b"{") + body.count(b"[") > max_depth or colons > max_keys) and not _shallow(
        value, max_depth, max_keys
    ):
        return False
    # Each member has one colon, strings have theirs in both texts, and nothing else has any: a member
    # that was dropped for a later one is missing from the new text.
    return colons == _encoder.encode(value).count(b":")


def _shallow(value: Json, max_depth: int, max_keys: int) -> bool:
    """Whether `value` keeps both limits; goes level by level, so that no depth can exhaust the stack."""
    level: list[Any] = [value] if type(value) in _CONTAINERS else []
    for _ in range(max_depth):
        objects = [item for item in level if type(item) is dict]
        if any(len(item) > max_keys for item in objects):
            return False
        arrays = (item for item in level if type(item) is list)
        below = chain(chain.from_iterable(map(dict.values, objects)), chain.from_iterable(arrays))
        level = [item for item in below if type(item) in _CONTAINERS]
        if not level:
            return True
    return False


class _Pairs(list[tuple[str, Any]]):
    """The members of an object as they stand, duplicates too."""


class _OutOfRange:
    """Stands for a number that was refused, until the walk knows its place."""


_OUT_OF_RANGE = _OutOfRange()


def _exact(body: bytes, max_depth: int, max_keys: int, *, object_only: bool) -> Json:
    """Return the value of `body` or raise `Refused`: the whole truth, slowly."""
    if not body:
        raise Refused("invalid_json", "the body is empty")
    try:
        text = body.decode()
        read = json.loads(
            text,
            object_pairs_hook=_Pairs,
            parse_int=_integer,
            parse_float=_double,
            parse_constant=_constant,
        )
    except UnicodeDecodeError as error:
        raise Refused("invalid_json", f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        # Its wording ends in ": line 1 column 2 (char 1)", and names nothing of the body.
        raise Refused("invalid_json", f"the body is not JSON: {error}") from None
    except RecursionError:
        raise _too_deep(max_depth).refusal() from None
    if object_only and not isinstance(read, _Pairs):
        raise Refused("invalid_body", "the body must be a JSON object")
    try:
        return _walk(read, 1, max_depth, max_keys)
    except _Found as found:
        raise found.refusal() from None


class _Found(Exception):
    """Something that can't be had; on its way up each level adds the step to its place.

    So the walk over a sound body builds no paths, which would be most of its time.
    """

    def __init__(self, code: str, problem: str) -> None:
        self.code = code
        self.problem = problem
        self.steps: list[str | int] = []

    def refusal(self) -> Refused:
        path = ""
        for step in reversed(self.steps):
            path = f"{path}[{step}]" if isinstance(step, int) else _join(path, step)
        if len(path) > _MAX_PATH:
            path = path[: _MAX_PATH - 3] + "..."
        if not path:
            return Refused(self.code, f"the body {self.problem}")
        return Refused.field(self.code, path, self.problem)


def _walk(value: Any, depth: int, max_depth: int, max_keys: int) -> Json:
    """Return `value` as plain values, or raise `_Found` for the first thing in it that can't be had."""
    kind = type(value)
    if kind is str:
        _check_text(value)
    elif kind is _Pairs:
        if depth > max_depth:
            raise _too_deep(max_depth)
        if len(value) > max_keys:
            raise _Found("too_many_keys", f"has more than {max_keys} members")
        members: dict[str, Any] = {}
        for key, member in value:
            try:
                _check_text(key)
                if key in members:
                    raise _Found("duplicate_key", "stands there twice")
                members[key] = (
                    member if type(member) in _SOUND else _walk(member, depth + 1, max_depth, max_keys)
                )
            except _Found as found:
                found.steps.append(key)
                raise
        return members
    elif kind is list:
        if depth > max_depth:
            raise _too_deep(max_depth)
        items: list[Any] = []
        for item in value:
            try:
                items.append(item if type(item) in _SOUND else _walk(item, depth + 1, max_depth, max_keys))
            except _Found as found:
                found.steps.append(len(items))
                raise
        return items
    elif kind is _OutOfRange:
        raise _Found(
            "number_out_of_range",
            f"is no integer of up to {MAX_DIGITS} digits and no other number that fits a double",
        )
    return value  # type: ignore[no-any-return]


def _check_text(text: str) -> None:
    if "\0" in text:
        raise _Found("unsupported_value", "has the character U+0000, which can't be stored")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Found("unsupported_value", "has half a surrogate pair, which can't be stored") from None


def _integer(digits: str) -> int | _OutOfRange:
    return int(digits) if len(digits) - digits.startswith("-") <= MAX_DIGITS else _OUT_OF_RANGE


def _double(text: str) -> float | _OutOfRange:
    value = float(text)
    return value if math.isfinite(value) else _OUT_OF_RANGE


def _constant(word: str) -> NoReturn:
    raise Refused("invalid_json", f"the body is not JSON: {word} is no JSON value")


def _too_deep(max_depth: int) -> _Found:
    return _Found("too_deep", f"is nested too deep: a body has at most {max_depth} levels")


def _join(path: str, key: str) -> str:
    """Return the path of member `key`; a name that is no plain word is quoted, and cut."""
    if not _PLAIN_STEP.fullmatch(key):
        key = json.dumps(key[:64])
    return f"{path}.{key}" if path else key


def _text(raw: bytes, payload: Mapping[str, Any]) -> str:
    return _encoder.encode(payload).decode() if _has_long_number(raw) else raw.decode()


def _has_long_number(raw: bytes) -> bool:
    """Whether jsonb may be unable to take a number of this JSON text; now and then it is only a string."""
    zeros = raw.translate(_ZEROS)
    return _DIGIT_RUN in zeros or (b"000" in zeros and _LONG_EXPONENT.search(zeros) is not None)


_LONG_EXPONENT = re.compile(rb"[eE][+-]?000")
"""In a text whose digits are all 0: 1e-5000 is a double (0.0), but 5000 digits to jsonb."""


def _whole(value: Any) -> Any:
    """Return `value` with each double that is a whole number as that integer."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {key: _whole(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    return value
