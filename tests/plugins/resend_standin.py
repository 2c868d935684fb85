"""A stand-in for Resend's HTTP API, on loopback: for the tests of the e-mail plugin and for `make demo`.

It is a real HTTP server that refuses what Resend would refuse (authorization, media type, missing
fields, addresses, base64, idempotency keys) and keeps the mails that it accepts. A test can also tell it
to misbehave for the next requests, see `Answer`. It imports nothing of taskd or of the plugin, so a
mistake there can't hide here.

    with ResendStandIn() as resend:
        ...  # point the plugin's `base_url` at resend.url, `api_key` is resend.api_key
        print(resend.sent)

Or by hand, until Ctrl-C: `python resend_standin.py --port 8025`; `GET /sent` then shows the mails, too.

Source: resend.com/docs, API reference (send-email, errors, rate-limit) and "Idempotency Keys".
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import json
import re
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parseaddr
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar
from uuid import uuid4

API_KEY = "re_standin_0123456789abcdef"
"""Accepted unless another is given; no secret: it opens nothing."""

KEY_LIFE_S = 24 * 3600.0
"""How long an idempotency key is remembered, as at Resend."""

MAX_BODY = 40 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to say to one request instead of the truth.

    `accept` takes the mail before misbehaving: what a lost answer looks like from outside. `hang` never
    answers (until the stand-in closes), `drop` closes the connection without a byte, `drip_s` sends the
    body byte by byte with that pause in seconds between.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    accept: bool = False
    hang: bool = False
    drop: bool = False
    drip_s: float = 0.0

    @classmethod
    def error(cls, status: int, name: str, message: str = "", **headers: str) -> Answer:
        """Return a refusal in Resend's form; `headers` with `_` for `-`: `retry_after="7"`."""
        body = json.dumps({"statusCode": status, "name": name, "message": message or name})
        return cls(
            status=status,
            body=body.encode(),
            headers={key.replace("_", "-"): value for key, value in headers.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """One accepted mail: its id, the idempotency key it came under (None without) and the JSON body."""

    id: str
    key: str | None
    body: Mapping[str, object]
    at: float
    """Unix time in seconds, by the stand-in's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it came in, whatever was answered; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float
    peer: tuple[str, int]
    """Address and port it came from: the same for all requests of one connection."""


class Refused(Exception):
    """A request that Resend would refuse, with its status and the name of the error."""

    def __init__(self, status: int, name: str, message: str) -> None:
        self.answer = Answer.error(status, name, message)
        super().__init__(message)


class ResendStandIn:
    """The server with its memory; a context manager that serves from a thread of its own.

    `sent` has the accepted mails, `requests` everything that came in, both in order. They are safe to
    read from any thread.
    """

    def __init__(
        self,
        *,
        api_key: str = API_KEY,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
        on_mail: Callable[[Mail], None] = lambda mail: None,
    ) -> None:
        """`port` 0 takes a free one; `on_mail` is called for each accepted mail."""
        self.api_key = api_key
        self.sent: list[Mail] = []
        self.requests: list[Request] = []
        self._clock = clock
        self._on_mail = on_mail
        self._script: deque[Answer] = deque()
        self._keys: dict[str, _Remembered] = {}
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._closing = threading.Event()
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = _Server((host, port), handler)
        self._tls = tls is not None
        if tls is not None:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """What the plugin's `base_url` is set to."""
        host, port = self._server.server_address[:2]
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{host if isinstance(host, str) else host.decode()}:{port}"

    def script(self, *answers: Answer) -> None:
        """Give these answers to the next requests, one each; after that it behaves again."""
        with self._lock:
            self._script.extend(answers)

    def wait_for_requests(self, count: int, *, timeout_s: float = 10.0) -> None:
        """Return when `count` requests have come in.

        Raises:
            TimeoutError: fewer came within `timeout_s`.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.requests) >= count, timeout_s):
                raise TimeoutError(f"{len(self.requests)} of {count} requests came")

    def __enter__(self) -> ResendStandIn:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving; requests that hang are let go without an answer."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _take(self, request: Request) -> Answer:
        """Return the answer to `request`, scripted or true."""
        with self._arrived:
            self.requests.append(request)
            scripted = self._script.popleft() if self._script else None
            self._arrived.notify_all()
        if scripted is None:
            return self._truth(request)
        if scripted.accept:
            self._truth(request)
        if scripted.hang:
            self._closing.wait()
        return scripted

    def _truth(self, request: Request) -> Answer:
        try:
            if request.path == "/sent" and request.method == "GET":
                return _json(200, [{"id": mail.id, "at": mail.at, **mail.body} for mail in self.sent])
            self._authorize(request)
            if request.path == "/domains" and request.method == "GET":
                # As for a key that may only send; the plugin's check must take that as a good sign.
                raise Refused(401, "restricted_api_key", "This API key is restricted to only send emails")
            if request.path != "/emails":
                raise Refused(404, "not_found", "The requested endpoint does not exist")
            if request.method != "POST":
                raise Refused(405, "method_not_allowed", "This endpoint does not support this method")
            return _json(200, {"id": self._accept(request, check_mail(request))})
        except Refused as refused:
            return refused.answer

    def _authorize(self, request: Request) -> None:
        if not request.headers.get("user-agent"):
            raise Refused(403, "validation_error", "error code: 1010")  # what the proxy before Resend says
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not key:
            raise Refused(401, "missing_api_key", "Missing API key in the authorization header")
        if key != self.api_key:
            raise Refused(403, "invalid_api_key", "API key is invalid")

    def _accept(self, request: Request, body: Mapping[str, object]) -> str:
        key = request.headers.get("idempotency-key")
        if key is not None and not 1 <= len(key) <= 256:
            raise Refused(400, "invalid_idempotency_key", "The key must be between 1-256 chars")
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._lock:
            known = self._keys.get(key) if key is not None else None
            if known is not None and request.at - known.at < KEY_LIFE_S:
                if known.digest != digest:
                    raise Refused(
                        409,
                        "invalid_idempotent_request",
                        "This idempotency key has been used with another request",
                    )
                return known.id
            mail = Mail(id=str(uuid4()), key=key, body=body, at=request.at)
            if key is not None:
                self._keys[key] = _Remembered(mail.id, digest, request.at)
            self.sent.append(mail)
        self._on_mail(mail)
        return mail.id


@dataclass(frozen=True, slots=True)
class _Remembered:
    id: str
    digest: str
    at: float


# What a request must hold --------------------------------------------------------------------------

_KNOWN = {
    *("from", "to", "subject", "bcc", "cc", "reply_to", "html", "text", "headers", "attachments", "tags"),
    *("scheduled_at", "template", "topic_id"),
}
_MAX_RECIPIENTS = 50


def check_mail(request: Request) -> Mapping[str, object]:
    """Return the JSON body of a `POST /emails`.

    Raises:
        Refused: something that Resend would refuse. Unknown fields too, where Resend may be lenient:
            a misspelt field is a mistake of the plugin.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(400, "validation_error", "The content type must be application/json")
    try:
        body = json.loads(request.body)
    except ValueError:
        raise Refused(400, "validation_error", "The request body is no JSON") from None
    if not isinstance(body, dict):
        raise Refused(400, "validation_error", "The request body is no object")
    if unknown := sorted(set(body) - _KNOWN):
        raise Refused(422, "validation_error", f"Unknown fields: {unknown}")
    for name in ("from", "to", "subject"):
        if not body.get(name):
            raise Refused(422, "missing_required_field", f"Missing `{name}` field.")
    if not body.get("html") and not body.get("text"):
        raise Refused(422, "validation_error", "Missing `html` or `text` field.")
    for name in ("subject", "html", "text"):
        if not isinstance(body.get(name, ""), str):
            raise Refused(422, "validation_error", f"The `{name}` field must be a string.")
    if re.search(r"[\r\n]", body["subject"]):
        raise Refused(422, "validation_error", "The `\\n` is not allowed in the `subject` field.")
    if not isinstance(body["from"], str) or not is_address(body["from"]):
        raise Refused(422, "invalid_from_address", "Invalid `from` field.")
    recipients = sum(len(_addresses(body, name)) for name in ("to", "cc", "bcc"))
    if recipients > _MAX_RECIPIENTS:
        raise Refused(422, "validation_error", f"More than {_MAX_RECIPIENTS} recipients.")
    _addresses(body, "reply_to")
    _check_headers(body.get("headers", {}))
    _check_tags(body.get("tags", []))
    _check_attachments(body.get("attachments", []))
    return body


def is_address(text: object) -> bool:
    """Return whether `text` is `a@b.c` or `Name <a@b.c>`, one address and no line end."""
    if not isinstance(text, str) or re.search(r"[\r\n\x00]", text):
        return False
    _, address = parseaddr(text)
    mailbox = r"[^\s@<>,;]+@[^\s@<>,;.]+(\.[^\s@<>,;.]+)+"
    return text.count("@") == 1 and re.fullmatch(mailbox, address) is not None


def _addresses(body: Mapping[str, object], name: str) -> list[str]:
    value = body.get(name, [])
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(is_address(address) for address in found):
        raise Refused(422, "validation_error", f"Invalid `{name}` field.")
    return found


def _check_headers(headers: object) -> None:
    if not isinstance(headers, dict):
        raise Refused(422, "validation_error", "The `headers` field must be an object.")
    for name, value in headers.items():
        if not re.fullmatch(r"[!-9;-~]+", name) or not isinstance(value, str) or re.search(r"[\r\n]", value):
            raise Refused(422, "validation_error", "Invalid `headers` field.")


def _check_tags(tags: object) -> None:
    word = re.compile(r"[A-Za-z0-9_-]{1,256}")
    if not isinstance(tags, list):
        raise Refused(422, "validation_error", "The `tags` field must be an array.")
    for tag in tags:
        texts = [tag.get("name"), tag.get("value")] if isinstance(tag, dict) else [None]
        if not all(isinstance(text, str) and word.fullmatch(text) for text in texts):
            raise Refused(422, "validation_error", "Tags should only contain ASCII letters, numbers, _ or -.")


def _check_attachments(attachments: object) -> None:
    if not isinstance(attachments, list):
        raise Refused(422, "invalid_attachment", "The `attachments` field must be an array.")
    for attachment in attachments:
        content = attachment.get("content") if isinstance(attachment, dict) else None
        if not isinstance(content, str) or not content:
            raise Refused(422, "invalid_attachment", "Attachment must have either a `content` or `path`.")
        try:
            base64.b64decode(content, validate=True)
        except binascii.Error:
            raise Refused(422, "invalid_attachment", "The `content` is no base64.") from None


# HTTP ------------------------------------------------------------------------------------------------


def _json(status: int, value: object) -> Answer:
    return Answer(status=status, body=json.dumps(value).encode())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Threads that serve an idle kept-alive connection end with their client, or with the process.
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Be silent about a client that went away in the middle of an answer: some tests want that."""
        if not isinstance(sys.exc_info()[1], ConnectionError | ssl.SSLError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    """Translates between the socket and `ResendStandIn`, and nothing else."""

    stand_in: ClassVar[ResendStandIn]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms between its header and its body

    def handle_any(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            self.close_connection = True
            return
        request = Request(
            method=self.command,
            path=self.path,
            headers={name.lower(): value for name, value in self.headers.items()},
            body=self.rfile.read(int(length)),
            at=self.stand_in._clock(),
            peer=self.client_address[:2],
        )
        answer = self.stand_in._take(request)
        if answer.drop or answer.hang:
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if answer.drip_s:
            for byte in answer.body:
                self.wfile.write(bytes([byte]))
                if self.stand_in._closing.wait(answer.drip_s):
                    break
            return
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: what came in is in `requests`."""


def main() -> None:
    """Serve until interrupted; each accepted mail is one line of JSON on standard output."""
    parser = argparse.ArgumentParser(description="A stand-in for Resend's HTTP API.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8025, help="0 takes a free one (default: 8025)")
    parser.add_argument("--api-key", default=API_KEY, help=f"the key to accept (default: {API_KEY})")
    options = parser.parse_args()

    def show(mail: Mail) -> None:
        print(json.dumps({"id": mail.id, "key": mail.key, **mail.body}), flush=True)

    with ResendStandIn(
        api_key=options.api_key, host=options.host, port=options.port, on_mail=show
    ) as stand_in:
        print(f"listening on {stand_in.url}", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
