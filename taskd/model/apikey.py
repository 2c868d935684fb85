"""API keys as text: how one is made, recognised and digested.

The form is `PREFIX-ID_SECRET_CRC`: a 12-character public id for look-up and logs, 32 random bytes as 43
base62 characters, and a CRC-32 as 6, so that typing errors and secret scanners are served without the
database. Everything works on bytes: header bytes above 127 reach Python as lone surrogates, and
`hmac.compare_digest` takes no such text.

A plain digest is enough, because a secret of 256 bits can't be guessed; the pepper adds that a stolen
or written-to database yields no usable key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import zlib
from dataclasses import dataclass, field

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DICE_BYTES = 48
"""How many random bytes one key takes: 16 for its public id, 32 for its secret."""
MAX_BYTES = 16 + 1 + 12 + 1 + 43 + 1 + 6
"""Length of the longest key; whatever is longer needs no look."""

_ID, _SECRET, _CHECK = 12, 43, 6
_FORM = re.compile(rb"([a-z][a-z0-9]{1,15})-([0-9A-Za-z]{12})_([0-9A-Za-z]{43})_([0-9A-Za-z]{6})")
_VALUE = {character: value for value, character in enumerate(ALPHABET)}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key of the right form. Only `text` is secret, and it stays out of `repr`."""

    prefix: str
    public_id: str
    text: bytes = field(repr=False)


def make(prefix: str, dice: bytes) -> ApiKey:
    """Return a new key; `dice` are `DICE_BYTES` random bytes from `secrets`, `prefix` was checked.

    Raises:
        ValueError: `dice` has another length; a key from fewer bytes must never come to be.
    """
    if len(dice) != DICE_BYTES:
        raise ValueError(f"a key takes {DICE_BYTES} random bytes, not {len(dice)}")
    # 128 bits before the remainder: the bias of 62 ** 12 then is below 2 ** -56.
    public_id = base62(int.from_bytes(dice[:16], "big") % 62**_ID, _ID)
    secret = base62(int.from_bytes(dice[16:], "big"), _SECRET)
    unchecked = f"{prefix}-{public_id}_{secret}".encode("ascii")
    return ApiKey(prefix, public_id, unchecked + b"_" + _check(unchecked))


def parse(text: bytes) -> ApiKey | None:
    """Return the key that `text` is, or None when its form or its checksum is wrong. Hashes nothing.

    A header comes as `str`: hand it over as `.encode("utf-8", "surrogateescape")`.
    """
    if len(text) > MAX_BYTES:
        return None
    match = _FORM.fullmatch(text)
    if match is None or match[4] != _check(text[: match.end(3)]):
        return None
    return ApiKey(match[1].decode("ascii"), match[2].decode("ascii"), text)


def digest(text: bytes, pepper: bytes | None) -> bytes:
    """Return the 32 bytes that are stored for a key: HMAC-SHA-256 with a pepper, SHA-256 without."""
    if pepper is None:
        return hashlib.sha256(text).digest()
    return hmac.digest(pepper, text, "sha256")


def matches(text: bytes, stored: bytes, pepper: bytes | None) -> bool:
    """Whether `stored` is the digest of `text`, compared in constant time."""
    return hmac.compare_digest(digest(text, pepper), stored)


def fingerprint(stored: bytes) -> str:
    """Return what lists show as `key_hash`: `fp_` and 12 hex digits of a second digest.

    >>> fingerprint(bytes(32))
    'fp_66687aadf862'
    """
    return "fp_" + hashlib.sha256(stored).hexdigest()[:12]


def base62(number: int, width: int) -> str:
    """Return `number` in base 62 with leading zeros, `width` characters.

    Raises:
        ValueError: the number is negative or does not fit.

    >>> base62(3843, 3)
    '0zz'
    """
    if not 0 <= number < 62**width:
        raise ValueError(f"{number} does not fit {width} characters")
    characters = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        characters.append(ALPHABET[digit])
    return "".join(reversed(characters))


def from_base62(text: str) -> int:
    """Return the number that `text` is in base 62.

    Raises:
        ValueError: a character outside the alphabet.
    """
    number = 0
    for character in text:
        if character not in _VALUE:
            raise ValueError(f"{character!r} is no base62 character")
        number = number * 62 + _VALUE[character]
    return number


def _check(unchecked: bytes) -> bytes:
    """Return the six characters that end a key whose other bytes are `unchecked`."""
    return base62(zlib.crc32(unchecked), _CHECK).encode("ascii")
