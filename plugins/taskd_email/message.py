"""What a `send_email` job holds: the JSON Schema of its payload, and the mail that is made of it.

The schema is checked at the door, in a process that has never seen this plugin, so every rule that JSON
Schema can say is said there. What only code can tell (the sum of all recipients) is checked by `mail`.
Nothing here knows HTTP, the clock or the API key.

Sources: RFC 5322 (addresses, lines of at most 998 characters), RFC 2045 (media types), Resend's API
reference for `POST /emails` (names of the fields, 50 recipients, tags), looked up in 2026.
"""

from __future__ import annotations

from collections.abc import Mapping

MAX_RECIPIENTS = 50
"""Addresses in `to`, `cc` and `bcc` together; Resend takes no more in one mail."""

MAX_LINE = 998
"""Characters in a subject or header value: the longest line that RFC 5322 allows."""

# Line ends would start a header of their own; the other control characters have no business in one.
_CONTROL = r"\u0000-\u001f\u007f-\u009f\u2028\u2029"
_LINE = rf"^[^{_CONTROL}]+$"

# All patterns are made of character classes, without lookaround or backreference, so that the engine
# needs time linear in the text. `$` is the end of the text in JSON Schema (ECMA-262), never "before the
# last newline" as in Python's `re`: whoever uses them in Python takes `re.fullmatch`.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_MAILBOX = rf"{_ATOM}(?:\.{_ATOM})*@{_LABEL}(?:\.{_LABEL})+"
# No `@` in a display name, quoted or not: then no text holds a second address behind the recipient cap,
# however the receiver cuts it up. Other specials (`,` `;` `:`) only in quotes.
_PLAIN_NAME = rf'[^{_CONTROL} <>@,;:"\\][^{_CONTROL}<>@,;:"\\]*'
_QUOTED_NAME = rf'"[^{_CONTROL}<>@"\\]+" ?'
ADDRESS_PATTERN = rf"^(?:{_MAILBOX}|(?:{_PLAIN_NAME}|{_QUOTED_NAME})<{_MAILBOX}>)$"
"""`a@example.com`, `Ann Lee <a@example.com>` or `"Lee, Ann" <a@example.com>`, in ASCII but for the name."""

ADDRESS: Mapping[str, object] = {
    "type": "string",
    "minLength": 3,
    "maxLength": 500,
    "pattern": ADDRESS_PATTERN,
}


def _any_case(name: str) -> str:
    """Return a pattern for `name` in any case; ECMA-262 has no flag inside a pattern."""
    return "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in name)


# Headers that have a field of their own here, or that are the sending system's to write. `Bcc` as a
# header would walk around the recipient cap.
_RESERVED_HEADERS = (
    *("from", "to", "cc", "bcc", "reply-to", "subject", "sender", "return-path", "date", "message-id"),
    *("received", "mime-version", "dkim-signature"),
)
_RESERVED_FAMILIES = ("content-", "resent-")
_RESERVED_PATTERN = "|".join(
    [f"^{_any_case(name)}$" for name in _RESERVED_HEADERS]
    + [f"^{_any_case(start)}" for start in _RESERVED_FAMILIES]
)


def _one_or_many(description: str) -> dict[str, object]:
    """Return the schema of a field that is one address or a list of them.

    The keywords for texts and for lists stand side by side and not in an `anyOf`: so a refusal names what
    is wrong (too many, no address, wrong type) and points at the field or at the one bad address.
    """
    return {
        "description": description,
        **ADDRESS,
        "type": ["string", "array"],
        "minItems": 1,
        "maxItems": MAX_RECIPIENTS,
        "items": ADDRESS,
    }


_TAG_TEXT = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,256}$"}

_ATTACHMENT: Mapping[str, object] = {
    "type": "object",
    "properties": {
        "filename": {
            "description": "Name that the recipient sees; no path.",
            "type": "string",
            "maxLength": 255,
            "pattern": rf"^[^{_CONTROL}/\\]+$",
        },
        "content": {
            "description": "The file in base64, in one line, with its padding.",
            "type": "string",
            "contentEncoding": "base64",
            "minLength": 4,
            "pattern": "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
        },
        "content_type": {
            "description": "Media type; without it, Resend takes it from the file name.",
            "type": "string",
            "maxLength": 255,
            "pattern": "^[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+(?:; ?[A-Za-z0-9-]+=[A-Za-z0-9_.:-]+)*$",
        },
        "content_id": {
            "description": 'Name for `<img src="cid:...">` in the HTML; makes the attachment inline.',
            "type": "string",
            "maxLength": 127,
            "pattern": "^[A-Za-z0-9!#$%&'*+/=?^_`{|}~.@-]+$",
        },
    },
    # No `path`: Resend would fetch that URL, and a client of taskd must not choose what is fetched.
    "required": ["filename", "content"],
    "additionalProperties": False,
}


def payload_schema(*, from_optional: bool) -> dict[str, object]:
    """Return the JSON Schema (2020-12) of the payload.

    `from_optional` is whether the plugin's options name a sender for mails without `from`.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "to": _one_or_many("Recipient, or a list of them; at most 50 with `cc` and `bcc`."),
            "from": {
                "description": "Sender; its domain must be verified at Resend.",
                **ADDRESS,
            },
            "subject": {
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_LINE,
                "pattern": _LINE,
            },
            # `writeOnly` tells taskd to mask these members: they are the message itself.
            "html": {"description": "The message as HTML.", "type": "string", "writeOnly": True},
            "text": {
                "writeOnly": True,
                "description": "The message as plain text. With `html`, Resend makes one if this is absent.",
                "type": "string",
            },
            "cc": _one_or_many("Recipients of a copy, seen by all."),
            "bcc": _one_or_many("Recipients of a copy, seen by nobody."),
            "reply_to": _one_or_many("Where answers go."),
            "headers": {
                "description": "Further headers of the mail; not those that have a field here.",
                "type": "object",
                "maxProperties": 50,
                "propertyNames": {"pattern": "^[A-Za-z][A-Za-z0-9-]{0,75}$"},
                "patternProperties": {_RESERVED_PATTERN: False},
                "additionalProperties": {"type": "string", "maxLength": MAX_LINE, "pattern": _LINE},
            },
            "tags": {
                "description": "Labels for Resend's own dashboard and webhooks.",
                "type": "array",
                "maxItems": 50,
                "items": {
                    "type": "object",
                    "properties": {"name": _TAG_TEXT, "value": _TAG_TEXT},
                    "required": ["name", "value"],
                    "additionalProperties": False,
                },
            },
            "attachments": {"type": "array", "maxItems": 50, "items": _ATTACHMENT, "writeOnly": True},
        },
        "required": ["to", "subject"] if from_optional else ["to", "from", "subject"],
        "additionalProperties": False,
    }


EXAMPLE: dict[str, object] = {
    "to": "recipient@example.com",
    "from": "Example <sender@example.com>",
    "subject": "Hello",
    "text": "Hello from taskd.",
}


class Unsendable(ValueError):
    """A payload that fits the schema and still is no mail; its text holds nothing of the message."""


def mail(payload: Mapping[str, object], *, default_from: str | None) -> dict[str, object]:
    """Return the body for `POST /emails` that `payload` asks for.

    The same payload and sender always give the same body: Resend compares it when the job runs again
    under the same idempotency key. Lists stay lists and texts texts, nothing is reordered.

    Raises:
        Unsendable: more than `MAX_RECIPIENTS` in all, or no sender.
    """
    recipients = sum(_count(payload.get(field)) for field in ("to", "cc", "bcc"))
    if recipients > MAX_RECIPIENTS:
        raise Unsendable(
            f"{recipients} recipients in to, cc and bcc together; at most {MAX_RECIPIENTS} are allowed"
        )
    body = dict(payload)
    if "from" not in body:
        if default_from is None:
            raise Unsendable("there is no sender: the payload has no from, the plugin no default_from")
        body["from"] = default_from
    # Resend refuses a mail without a body, and an empty text counts as none (422, "Missing `html` or
    # `text` field"). A payload of to, from and subject is a documented one, so the subject is its text.
    if not body.get("html") and not body.get("text"):
        body.pop("html", None)
        body["text"] = body["subject"]
    return body


def _count(field: object) -> int:
    if field is None:
        return 0
    return len(field) if isinstance(field, list | tuple) else 1
