"""The payload's schema, as the door applies it, and the mail that is made of a payload."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jsonschema_rs
import pytest

from taskd_email.message import EXAMPLE, MAX_RECIPIENTS, Unsendable, mail, payload_schema

DOCUMENTED = {"to": "recipient@example.com", "from": "sender@example.com", "subject": "Test Email"}
DOOR = jsonschema_rs.validator_for(payload_schema(from_optional=False))


def refused_at(**changed: object) -> set[str]:
    """Return where the documented payload, so changed, is refused: `to`, `to.3`, empty for the whole."""
    errors = DOOR.iter_errors({**DOCUMENTED, **changed})
    return {".".join(str(step) for step in error.instance_path) for error in errors}


def attachment(**changed: object) -> list[dict[str, object]]:
    return [{"filename": "a.txt", "content": "QUJD", **changed}]


def test_the_schema_is_valid_json_schema() -> None:
    jsonschema_rs.meta.validate(payload_schema(from_optional=True))
    jsonschema_rs.meta.validate(payload_schema(from_optional=False))


def test_the_schema_survives_the_way_through_the_database() -> None:
    schema = payload_schema(from_optional=False)

    assert json.loads(json.dumps(schema)) == schema


def test_the_example_is_accepted() -> None:
    assert DOOR.is_valid(EXAMPLE)


def test_the_documented_three_fields_are_accepted() -> None:
    assert refused_at() == set()


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"to": ["a@example.com", "b@example.com"]}, id="list of recipients"),
        pytest.param({"to": "Ann Lee <ann@example.com>"}, id="display name"),
        pytest.param({"to": "Änne Ölz <ann@example.com>"}, id="display name beyond ASCII"),
        pytest.param({"to": '"Lee, Ann" <ann@example.com>'}, id="quoted display name with a comma"),
        pytest.param({"to": "o'neil+news@mail.example-shop.co.uk"}, id="less common letters"),
        pytest.param({"to": [f"r{n}@example.com" for n in range(MAX_RECIPIENTS)]}, id="as many as allowed"),
        pytest.param({"cc": "c@example.com", "bcc": ["d@example.com"]}, id="copies"),
        pytest.param({"reply_to": ["c@example.com"]}, id="where answers go"),
        pytest.param({"html": "<b>hi</b>", "text": ""}, id="no plain text wanted"),
        pytest.param({"subject": "s" * 998}, id="longest subject"),
        pytest.param({"headers": {"List-Unsubscribe": "<https://example.com/u>"}}, id="own header"),
        pytest.param({"headers": {"X-To": "x", "Topic": "y"}}, id="headers that begin like reserved ones"),
        pytest.param({"tags": [{"name": "kind", "value": "receipt_1"}]}, id="tags"),
        pytest.param({"attachments": attachment()}, id="attachment"),
        pytest.param({"attachments": attachment(content="QUI=")}, id="base64 with one pad"),
        pytest.param({"attachments": attachment(content="QQ==")}, id="base64 with two pads"),
        pytest.param({"attachments": attachment(content_type="text/csv; charset=utf-8")}, id="media type"),
        pytest.param({"attachments": attachment(content_id="logo@mail")}, id="inline image"),
    ],
)
def test_a_proper_payload_is_accepted(changed: dict[str, object]) -> None:
    assert refused_at(**changed) == set()


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        pytest.param({"to": 1}, "to", id="number"),
        pytest.param({"to": None}, "to", id="null"),
        pytest.param({"to": ""}, "to", id="empty text"),
        pytest.param({"to": []}, "to", id="nobody"),
        pytest.param({"to": ["a@example.com", "b"]}, "to.1", id="one bad address of two"),
        pytest.param({"to": "r@example.com\r\nBcc: all@example.com"}, "to", id="header injection"),
        pytest.param({"to": "r@example.com\n"}, "to", id="newline at the end"),
        pytest.param({"to": "A\nB <r@example.com>"}, "to", id="newline in the name"),
        pytest.param({"to": "A\u2028B <r@example.com>"}, "to", id="Unicode line separator in the name"),
        pytest.param({"to": "A\x85B <r@example.com>"}, "to", id="C1 next line in the name"),
        pytest.param({"to": "a@example.com, b@example.com"}, "to", id="two addresses in one text"),
        pytest.param({"to": "a@example.com b <b@example.com>"}, "to", id="address hidden in the name"),
        pytest.param({"to": '"a@example.com," <b@example.com>'}, "to", id="address hidden in quotes"),
        pytest.param({"to": "all: a@example.com;"}, "to", id="group syntax"),
        pytest.param({"to": "a@localhost"}, "to", id="domain without a dot"),
        pytest.param({"to": "a@-example.com"}, "to", id="label begins with a hyphen"),
        pytest.param({"to": "a..b@example.com"}, "to", id="two dots"),
        pytest.param({"to": "ä@example.com"}, "to", id="local part beyond ASCII"),
        pytest.param({"to": [f"r{n}@example.com" for n in range(1000)]}, "to", id="1000 recipients"),
        pytest.param({"cc": [f"r{n}@example.com" for n in range(51)]}, "cc", id="51 copies"),
        pytest.param({"from": ["a@example.com"]}, "from", id="list of senders"),
        pytest.param({"from": "a"}, "from", id="sender is no address"),
        pytest.param({"subject": "s" * 2000}, "subject", id="long subject"),
        pytest.param({"subject": ""}, "subject", id="empty subject"),
        pytest.param({"subject": "a\r\nBcc: b@example.com"}, "subject", id="injection by subject"),
        pytest.param({"html": 1}, "html", id="html is a number"),
        pytest.param({"reply_to": "x"}, "reply_to", id="answers to nowhere"),
        pytest.param({"headers": {"bCC": "b@example.com"}}, "headers.bCC", id="recipient by header"),
        pytest.param({"headers": {"content-TYPE": "x"}}, "headers.content-TYPE", id="structure by header"),
        pytest.param({"headers": {"X-A": "1\r\nBcc: b"}}, "headers.X-A", id="injection by header value"),
        pytest.param({"headers": {"X: A": "1"}}, "headers", id="colon in header name"),
        pytest.param({"tags": [{"name": "a", "value": "b c"}]}, "tags.0.value", id="space in a tag"),
        pytest.param({"attachments": attachment(content="QUJD\n")}, "attachments.0.content", id="newline"),
        pytest.param({"attachments": attachment(content="QUI")}, "attachments.0.content", id="no padding"),
        pytest.param({"attachments": attachment(path="http://h/")}, "attachments.0", id="URL to fetch"),
        pytest.param({"attachments": attachment(filename="../x")}, "attachments.0.filename", id="path"),
        pytest.param(
            {"attachments": attachment(content_type="a/b\r\nX: y")},
            "attachments.0.content_type",
            id="injection by media type",
        ),
        pytest.param({"scheduled_at": "in 1 hour"}, "", id="scheduling is taskd's"),
        pytest.param({"body": "hi"}, "", id="unknown field"),
    ],
)
def test_what_is_no_mail_is_refused_at_its_place(changed: dict[str, object], place: str) -> None:
    assert refused_at(**changed) == {place}


def test_every_email_case_of_the_corpus_gets_its_answer() -> None:
    corpus = Path(__file__).parents[2] / "data" / "cases" / "bad_http.json"
    cases = [case for case in json.loads(corpus.read_text())["cases"] if case["id"].startswith("em-")]

    for case in cases:
        payload = json.loads(case["request"]["body_text"])["payload"]
        places = {f"payload.{error.instance_path[0]}" for error in DOOR.iter_errors(payload)}
        assert case["expect"]["field"] in places, case["id"]
    assert cases


@pytest.mark.parametrize("field", ["to", "subject", "from"])
@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param("a" * 500_000, id="one letter"),
        pytest.param("a@" + "a." * 250_000, id="labels"),
        pytest.param('"' + "a " * 250_000, id="open quote"),
        pytest.param("<" * 500_000, id="brackets"),
    ],
)
def test_no_text_makes_the_door_slow(field: str, hostile: str) -> None:
    start = time.process_time()

    refused_at(**{field: hostile})

    assert time.process_time() - start < 0.5  # a backtracking engine would take hours; this takes 10 ms


def test_from_may_be_left_out_only_if_the_options_name_a_sender() -> None:
    payload = {"to": "a@example.com", "subject": "hi"}

    assert jsonschema_rs.is_valid(payload_schema(from_optional=True), payload)
    assert not jsonschema_rs.is_valid(payload_schema(from_optional=False), payload)


def test_a_mail_without_text_says_its_subject() -> None:
    assert mail(DOCUMENTED, default_from=None) == {**DOCUMENTED, "text": "Test Email"}


def test_empty_bodies_count_as_none() -> None:
    assert mail({**DOCUMENTED, "html": "", "text": ""}, default_from=None) == {
        **DOCUMENTED,
        "text": "Test Email",
    }


def test_an_empty_text_beside_html_is_kept() -> None:
    payload = {**DOCUMENTED, "html": "<b>hi</b>", "text": ""}

    assert mail(payload, default_from=None) == payload


def test_the_payloads_own_sender_wins() -> None:
    assert mail(DOCUMENTED, default_from="Shop <shop@example.com>")["from"] == "sender@example.com"


def test_the_options_sender_fills_in() -> None:
    body = mail({"to": "a@example.com", "subject": "hi"}, default_from="Shop <shop@example.com>")

    assert body["from"] == "Shop <shop@example.com>"


def test_without_any_sender_there_is_no_mail() -> None:
    with pytest.raises(Unsendable, match="no sender"):
        mail({"to": "a@example.com", "subject": "hi"}, default_from=None)


def test_recipients_are_capped_over_all_fields() -> None:
    payload = {**DOCUMENTED, "cc": ["c@example.com"] * 25, "bcc": ["b@example.com"] * 25}

    with pytest.raises(Unsendable, match="51 recipients"):
        mail(payload, default_from=None)
    assert mail({**payload, "cc": ["c@example.com"] * 24}, default_from=None)["bcc"] == payload["bcc"]


def test_the_payload_itself_is_left_alone() -> None:
    payload = {"to": "a@example.com", "subject": "hi"}

    mail(payload, default_from="s@example.com")

    assert payload == {"to": "a@example.com", "subject": "hi"}
