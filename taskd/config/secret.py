"""Secrets: from the file itself, a secret file, a systemd credential or the environment.

The rules and their order are SPEC part 11; those of the admin token RELIABILITY part 4. No message here
repeats a value: not the secret, and not a path or a name that may be one pasted into the wrong key.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MAX_SECRET_FILE = 4096
"""Bytes read of a secret file; the path may be a device that never ends."""
MIN_TOKEN = 32
"""Characters of an admin token."""
MIN_PEPPER = 32
"""Bytes of a pepper."""

_LONGEST_PATTERN = 32
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_SECRET_NAME = re.compile(
    r"(^|_)(key|apikey|token|secret|password|passwd|pass|passphrase|pepper|dsn|credentials?)$"
)
_URL_PASSWORD = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://[^/?#@]*:[^@]+@")

# What manuals, tutorials and this project's own pages show, without case and punctuation.
_EXAMPLES = frozenset({"mysupersecretadmintoken", "supersecretadmintoken", "mysupersecrettoken"})
_PLACEHOLDER_WORDS = re.compile(
    r"changeme|changethis|change|replaceme|replacethis|replace|placeholder|secret|password|passwd|admin|"
    r"token|default|example|sample|dummy|insert|please|required|todo|fixme|taskd|enter|your|super|"
    r"apikey|api|key|test|none|null|here|goes|value|string|random|long|very|strong|with|this|some|"
    r"set|put|my|me|at|least|characters|chars|x{3,}|"
    r"must|should|not|use|used|only|new|own|bearer|auth|authorization|production|prod|development|dev|"
    r"local|localhost|staging|server|service|user|root|master|private|public|generated?|letters|"
    r"foo|bar|baz|qwerty(?:uiop)?|letmein|welcome|insecure|unsafe|demo|temporary|temp|tmp|fake|"
    r"abcdefghijklmnopqrstuvwxyz|something|anything|thing|and|or|of|for|to|from|is|in|it|the|min|more|than"
)
_ARTICLE = re.compile(r"(?:^|(?<=[-_ .]))an?(?=[-_ .])", re.IGNORECASE)
_FEWEST = 6
"""Different characters of a token; what is drawn at random has a dozen and more."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A value that is never shown: `repr`, `str` and every dataclass around it print `***`."""

    value: str = field(repr=False)

    def __repr__(self) -> str:
        return "Secret(***)"

    def __str__(self) -> str:
        return "***"


def read_secret_file(path: Path, env: Mapping[str, str]) -> bytes:
    """Return what the secret file holds, without line ends at its end.

    `env` may name `CREDENTIALS_DIRECTORY`: below it systemd keeps the files, whatever their mode says.

    Raises:
        ValueError: it does not exist, is a directory, is longer than 4 KiB, may be read by others, or
            is empty, in this order; the message is meant for the sysadmin.
    """
    named = f" ({path})" if path.is_absolute() else ""
    try:
        # A FIFO without a writer would hold up the start for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise ValueError(_why_unreadable(error, named)) from None
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"is a directory, and must be a file that holds the secret{named}")
        content = _read(handle, MAX_SECRET_FILE + 1)
    except OSError as error:
        raise ValueError(_why_unreadable(error, named)) from None
    finally:
        os.close(handle)
    if len(content) > MAX_SECRET_FILE:
        raise ValueError(f"is too large: a secret file may hold at most 4 KiB{named}")
    if stat.S_ISREG(mode) and mode & 0o077 and not _is_credential(path, env):
        raise ValueError(
            f"has mode {stat.S_IMODE(mode):04o}, so that its group or the world may use it{named}; "
            "take that away: chmod 0600"
        )
    content = content.rstrip(b"\r\n")
    if not content.strip():
        raise ValueError(f"is empty, and must be a file that holds the secret{named}")
    return content


def text_of(content: bytes) -> str:
    """Return the one line of text that a secret file holds.

    Raises:
        ValueError: it is no UTF-8, or has a NUL or several lines.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("names a file that is not valid UTF-8 text") from None
    if "\0" in text:
        raise ValueError("names a file that contains U+0000; a secret is one line of text")
    if "\n" in text or "\r" in text:
        raise ValueError("names a file with several lines; a secret is one line of text")
    return text


def variable_problem(name: str) -> str | None:
    """Return why `name` can't be a name of an environment variable, or None."""
    if _VARIABLE.fullmatch(name):
        return None
    return "must be the name of an environment variable (letters, digits and _), without $"


def show_variable(name: str) -> str:
    """Return how to speak of the variable `name`: a token pasted in its place is not repeated."""
    return f"environment variable {name}" if _PLAIN_VARIABLE.fullmatch(name) else "environment variable"


def token_problem(token: str) -> str | None:
    """Return why `token` can't be an admin token, without repeating any of it, or None."""
    fix = "; make a new one: openssl rand -base64 32"
    if not token.strip():
        return f"is empty: the admin token must have at least {MIN_TOKEN} characters{fix}"
    if not token.isascii():
        return f"must be ASCII: it has non-ASCII characters{fix}"
    if any(character.isspace() for character in token):
        return f"must not contain white space{fix}"
    if not token.isprintable():
        return f"must be printable ASCII: it has control characters{fix}"
    short = len(token) < MIN_TOKEN
    also = f", and it must have at least {MIN_TOKEN} characters" if short else ""
    if len(set(token)) == 1 and len(token) > 1:
        return f"is one repeated character{also}{fix}"
    # An `a` is a word where it stands alone; within hexadecimal digits it is none.
    bare = re.sub(r"[^a-z]", "", _ARTICLE.sub("", token).lower())
    if bare in _EXAMPLES or (bare and not _PLACEHOLDER_WORDS.sub("", bare)):
        return f"is a known example or placeholder and protects nothing{also}{fix}"
    longest = min(len(token) // 2, _LONGEST_PATTERN)
    if any(token[n:] == token[:-n] for n in range(2, longest + 1)):
        return f"repeats one short pattern{also}{fix}"
    if short:
        return f"must have at least {MIN_TOKEN} characters, this one has {len(token)} (too short){fix}"
    if len(set(token)) < _FEWEST:
        return f"is made of {len(set(token))} repeated characters{fix}"
    return None


def is_secret_option(key: str, value: object) -> bool:
    """Whether a plugin's option is a secret by its name or form; no schema is known at this point."""
    return isinstance(value, str) and bool(
        value and (_SECRET_NAME.search(key.lower()) or _URL_PASSWORD.match(value))
    )


def _read(handle: int, limit: int) -> bytes:
    content = b""
    while len(content) < limit:
        try:
            piece = os.read(handle, limit - len(content))
        except BlockingIOError:
            break
        if not piece:
            break
        content += piece
    return content


def _is_credential(path: Path, env: Mapping[str, str]) -> bool:
    folder = env.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return False
    try:
        return path.resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError):
        return False


def _why_unreadable(error: OSError | ValueError, named: str) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code in {errno.ENOENT, errno.ENOTDIR}:
        return f"names a file that does not exist{named}: no such file"
    if code in {errno.EACCES, errno.EPERM}:
        return f"names a file that this user must not read{named}: permission denied"
    if code == errno.EISDIR:
        return f"is a directory, and must be a file that holds the secret{named}"
    reason = os.strerror(code) if code else "no usable path"
    return f"names a file that can't be read{named}: {reason}"
