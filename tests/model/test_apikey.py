"""API keys as text: form, checksum, digests, and the number code beneath."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.model import apikey

DICE = bytes(range(apikey.DICE_BYTES))
KEY = apikey.make("tk", DICE)


def test_a_key_has_the_documented_form() -> None:
    assert re.fullmatch(rb"tk-[0-9A-Za-z]{12}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}", KEY.text)
    assert KEY.text.startswith(f"tk-{KEY.public_id}_".encode())


@given(st.binary(min_size=48, max_size=48), st.from_regex(r"[a-z][a-z0-9]{1,15}", fullmatch=True))
def test_every_key_that_is_made_is_recognised(dice: bytes, prefix: str) -> None:
    key = apikey.make(prefix, dice)

    assert apikey.parse(key.text) == key
    assert len(key.text) <= apikey.MAX_BYTES


@given(st.binary(min_size=32, max_size=32))
def test_all_256_bits_of_the_dice_are_in_the_secret(secret: bytes) -> None:
    text = apikey.make("tk", DICE[:16] + secret).text.decode()

    assert apikey.from_base62(text.split("_")[1]) == int.from_bytes(secret, "big")


@pytest.mark.parametrize("length", [0, 47, 49])
def test_a_key_is_never_made_from_other_dice(length: int) -> None:
    with pytest.raises(ValueError, match="random bytes"):
        apikey.make("tk", bytes(length))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(KEY.text[:-1], id="cut"),
        pytest.param(KEY.text + b"0", id="longer"),
        pytest.param(KEY.text + b"\n", id="line end"),
        pytest.param(b" " + KEY.text, id="space"),
        pytest.param(KEY.text + b"\0", id="NUL, which the server hands over"),
        pytest.param(KEY.text.upper(), id="upper case"),
        pytest.param(
            KEY.text[:-1] + (b"0" if KEY.text[-1:] != b"0" else b"1"), id="checksum off by one character"
        ),
        pytest.param(KEY.text.replace(b"tk-", b"xx-"), id="the checksum covers the prefix"),
        pytest.param(KEY.text[:3] + b"0" + KEY.text[4:], id="the checksum covers the id"),
        pytest.param(KEY.text[:20] + b"!" + KEY.text[21:], id="a character outside the alphabet"),
        pytest.param("tk-ключ".encode(), id="no ASCII"),
        pytest.param("\udcff\udcfe".encode("utf-8", "surrogateescape"), id="raw header bytes"),
        pytest.param(b"' or 1=1 --", id="SQL"),
        pytest.param(b"tk-", id="prefix only"),
        pytest.param(b"a" * 10_000_000, id="long"),
    ],
)
def test_what_is_no_key_is_told_without_a_hash(text: bytes) -> None:
    assert apikey.parse(text) is None


@given(st.integers(0, len(KEY.text) - 1), st.sampled_from(apikey.ALPHABET))
def test_every_typing_error_of_one_character_is_caught(place: int, character: str) -> None:
    text = KEY.text[:place] + character.encode() + KEY.text[place + 1 :]

    assert apikey.parse(text) == (KEY if text == KEY.text else None)


def test_the_secret_is_not_in_the_repr() -> None:
    assert KEY.text.decode()[16:] not in repr(KEY)


def test_the_digest_is_hmac_with_a_pepper_and_sha256_without() -> None:
    plain = apikey.digest(b"key", None)
    peppered = apikey.digest(b"key", b"pepper")

    # printf key | openssl dgst -sha256 [-hmac pepper]
    assert plain.hex() == "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"
    assert peppered != plain
    assert len(peppered) == 32


def test_a_key_matches_its_own_digest_only() -> None:
    stored = apikey.digest(KEY.text, b"pepper")

    assert apikey.matches(KEY.text, stored, b"pepper")
    assert not apikey.matches(KEY.text, stored, None)
    assert not apikey.matches(KEY.text, stored, b"other")
    assert not apikey.matches(KEY.text + b"\xff", stored, b"pepper")


def test_the_fingerprint_shows_nothing_of_the_digest() -> None:
    stored = apikey.digest(KEY.text, None)

    assert re.fullmatch(r"fp_[0-9a-f]{12}", apikey.fingerprint(stored))
    assert apikey.fingerprint(stored)[3:] not in stored.hex()


@given(st.integers(0, 62**43 - 1))
def test_base62_reads_back_what_it_writes(number: int) -> None:
    text = apikey.base62(number, 43)

    assert len(text) == 43
    assert apikey.from_base62(text) == number


@pytest.mark.parametrize("number", [-1, 62**3])
def test_base62_refuses_what_does_not_fit(number: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        apikey.base62(number, 3)


def test_base62_refuses_other_characters() -> None:
    with pytest.raises(ValueError, match="base62"):
        apikey.from_base62("a-b")
