from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator

import pytest

from taskd.obs.log import LineHandler, render_json, render_text
from taskd.obs.redact import LONGEST, RedactFilter, Redactor

CANARY = "c4naryC4NARYc4nary"
SECRET_43 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"
KEY = f"tk-Public0Id012_{SECRET_43}_a1B2c3"

TEXTS = {
    "dsn": f"can't connect to postgresql://taskd:{CANARY}@db.example:5432/taskd",
    "dsn with an at sign in the password": f"postgresql://taskd:x@{CANARY}@db/taskd",
    "dsn without a user": f"postgresql://:{CANARY}@db/taskd",
    "dsn in its other form": f"host=db password={CANARY} user=taskd",
    "quoted": f"host=db password = 'two words \\' {CANARY}' user=taskd",
    "dsn with the password as a parameter": f"postgresql://db/taskd?sslpassword={CANARY}&a=b",
    "authorization": f"Authorization: Bearer {CANARY}",
    "authorization of another kind": f"got authorization=Token {CANARY}",
    "bearer alone": f"sent Bearer {CANARY} to the provider",
    "basic": f"Basic {CANARY}==",
    "api key header": f"X-API-Key: {CANARY}",
    "cookie": f'Cookie: a="b"; session={CANARY}; c=d',
    "set-cookie": f"Set-Cookie: s={CANARY}; HttpOnly",
    "headers as a dict": f"{{'host': 'x', 'authorization': 'Bearer {CANARY}'}}",
    "headers as pairs": f"[(b'x-api-key', b'{CANARY}')]",
    "headers as json": f'{{"cookie":"a=\\"b\\"; s={CANARY}"}}',
    "headers as json in json": f'"{{\\"cookie\\":\\"s={CANARY}\\"}}"',
    "json": f'{{"admin_token": "{CANARY}", "a": 1}}',
    "signing secret": f"whsec_{CANARY}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_known_shapes_are_masked(text: str) -> None:
    masked = Redactor().text(text)

    assert CANARY not in masked
    assert "***" in masked


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(KEY, id="a key"),
        pytest.param(KEY.replace("_", "-"), id="with dashes"),
        pytest.param(KEY.replace("_", ""), id="without separators"),
        pytest.param(KEY[:-10], id="cut short"),
        pytest.param(KEY + "x", id="with a character too many"),
        pytest.param("abcdefghijklmnop" + KEY[2:], id="longest prefix"),
    ],
)
def test_api_keys_are_masked_and_their_public_id_stays(key: str) -> None:
    masked = Redactor().text(f"wrong key {key}, sorry")

    assert SECRET_43[:30] not in masked
    assert "Public0Id012" in masked
    assert masked.endswith(", sorry")


@pytest.mark.parametrize(
    "text",
    [
        "job 6f1b0c1e-6a1f-4c55-9a39-6a4f0a2d1c11 settled",
        "https://example.org:8080/path?to=a%40b",
        "admin.token: is missing. Set admin.token_file.",
        "taskd-worker-node-1 claimed 12 jobs of send_email",
        "2026-11-24T22:33:01.123Z",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert Redactor().text(text) == text


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param("p w/d'n\u00e4\\x", id="as it is"),
        pytest.param("p%20w%2Fd%27n%C3%A4%5Cx", id="quoted for a url"),
        pytest.param(repr("p w/d'n\u00e4\\x"), id="by repr"),
    ],
)
def test_registered_values_are_masked_in_every_spelling(shown: str) -> None:
    redactor = Redactor()
    redactor.hide("p w/d'n\u00e4\\x")

    assert redactor.text(f"<{shown}>").strip("\"'<>") == "***"


def test_every_line_of_a_registered_value_is_masked() -> None:
    redactor = Redactor()
    redactor.hide(f"first-{CANARY}\nsecond-{CANARY}\n")

    assert redactor.text(f"second-{CANARY} first-{CANARY}") == "*** ***"


def test_the_longer_of_two_registered_values_wins() -> None:
    redactor = Redactor()
    redactor.hide(CANARY)
    redactor.hide(f"{CANARY}-and-more")

    assert redactor.text(f"{CANARY}-and-more") == "***"


@pytest.mark.parametrize("value", ["", "taskd", "\n"])
def test_a_short_value_does_not_blot_out_the_log(value: str) -> None:
    redactor = Redactor()
    redactor.hide(value)

    assert redactor.text("taskd starts\n") == "taskd starts\n"


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"password": CANARY}, id="by name"),
        pytest.param({"options": {"RESEND_API_KEY": CANARY}}, id="by the end of a name"),
        pytest.param({"token": [CANARY, CANARY]}, id="in a list"),
        pytest.param({"headers": [("Authorization", CANARY)]}, id="pairs"),
        pytest.param([(b"cookie", CANARY.encode())], id="pairs of bytes"),
        pytest.param({"a": {"b": {"c": {"d": {"e": {"f": {"password": CANARY}}}}}}}, id="too deep"),
    ],
)
def test_named_members_are_masked(value: object) -> None:
    assert CANARY not in str(Redactor().value(value))


class Log:
    """A logger with the redacting handler, in both formats."""

    def __init__(self) -> None:
        self.redactor = Redactor()
        self.stream = io.StringIO()
        self.log = logging.Logger("canary")
        self.handlers = [LineHandler(self.stream, render_json), LineHandler(self.stream, render_text)]
        for handler in self.handlers:
            handler.addFilter(RedactFilter(self.redactor))
            self.log.addHandler(handler)

    def read(self) -> str:
        for handler in self.handlers:
            handler.flush()
        return self.stream.getvalue()


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    yield log
    for handler in log.handlers:
        handler.close()


class Opaque:
    def __repr__(self) -> str:
        return f"<Opaque {CANARY}>"


def test_no_canary_reaches_a_line_by_any_way(log: Log) -> None:
    log.redactor.hide(CANARY)

    log.log.info("in the message: %s", CANARY)
    log.log.info("in an argument: %(it)s", {"it": CANARY})
    log.log.info("in the facts", extra={"fact": CANARY, "deep": [{CANARY: CANARY}], "bytes": CANARY.encode()})
    log.log.info("in an object", extra={"fact": Opaque()})
    log.log.info("in the stack", stack_info=True, extra={"fact": CANARY})
    try:
        try:
            raise KeyError(CANARY)
        except KeyError as cause:
            error = RuntimeError(f"postgresql://taskd:{CANARY}@db/taskd")
            error.add_note(CANARY)
            raise error from cause
    except RuntimeError:
        log.log.exception("in an error and its cause")

    text = log.read()
    assert len(text.splitlines()) == 12
    assert CANARY not in text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_shapes_are_masked_in_all_parts_of_a_line(log: Log, text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        log.log.exception(text, extra={"fact": text, "deep": {"x": [text]}})

    assert CANARY not in log.read()


def test_a_secret_where_a_text_is_cut_is_not_shown_by_half(log: Log) -> None:
    log.redactor.hide(CANARY)
    masked_away = f"{CANARY} " * (LONGEST // (len(CANARY) + 1) + 1)

    log.log.info(masked_away)

    assert CANARY[:4] not in log.read()


HOSTILE = {
    "letters": "a" * LONGEST,
    "schemes": "a://" * (LONGEST // 4),
    "colons": "a://" + ":" * LONGEST,
    "quotes": '"' * LONGEST,
    "backslashes": "cookie\\" + "\\" * LONGEST,
    "cookies": "cookie" * (LONGEST // 6),
    "blanks": "password" + " " * LONGEST,
    "passwords": "password='" * (LONGEST // 10),
    "key-like": "abcdefghijklmnop-" * (LONGEST // 17),
    "bearers": "bearer " * (LONGEST // 7),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_masked_quickly(text: str) -> None:
    start = time.process_time()

    Redactor().brief(text)

    assert time.process_time() - start < 1.0


def test_the_record_is_masked_for_other_handlers_too(log: Log) -> None:
    record = logging.makeLogRecord({"msg": "%s", "args": (KEY,), "levelno": logging.INFO, "fact": KEY})

    log.handlers[0].handle(record)

    assert SECRET_43 not in json.dumps({"msg": record.getMessage(), "fact": record.__dict__["fact"]})
