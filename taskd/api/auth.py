"""Who asks: API keys, admin tokens, and the address behind trusted proxies.

Everything is compared as bytes in constant time; header bytes above 127 reach Python as lone surrogates.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Sequence

from taskd.api.http1 import DoorRequest
from taskd.api.settings import admin_digest
from taskd.api.strikes import Strikes, Verdict
from taskd.errors import Refused
from taskd.service.keyring import Key, KeyRing

WRONG_KEYS = 300
"""Wrong keys from one address in a minute; right ones go on beyond it."""
WRONG_TOKENS = 10
"""Wrong admin tokens from one address in a minute."""
WRONG_IN_ALL = 6000
"""Wrong keys and tokens from all addresses together in a minute."""

Clock = Callable[[], float]

_BEARER = "bearer "


class Addresses:
    """Finds the client's address: the peer's, or what trusted proxies say, counting from the right."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self._trusted = [ipaddress.ip_network(one, strict=False) for one in trusted]

    def of(self, request: DoorRequest) -> str:
        """Return the address of the nearest host that is no trusted proxy."""
        address: str = request.conn_info.client_ip if request.conn_info is not None else ""
        if not self._trusted or not self._is_trusted(address):
            return address
        hops = ",".join(request.headers.getall("x-forwarded-for", [])).split(",")
        for hop in reversed(hops):
            hop = hop.strip(" \t")
            try:
                address = str(ipaddress.ip_address(hop))
            except ValueError:
                break  # what stands left of it can't be believed either
            if not self._is_trusted(address):
                break
        return address

    def _is_trusted(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._trusted)


class Guard:
    """Recognises keys and admin tokens, and counts the wrong ones."""

    def __init__(
        self, ring: KeyRing, strikes: Strikes, addresses: Addresses, digests: Sequence[bytes], clock: Clock
    ) -> None:
        """`digests` are those of the admin tokens; `clock` gives Unix time."""
        self._ring = ring
        self._strikes = strikes
        self._addresses = addresses
        self._digests = tuple(digests)
        self._clock = clock

    async def key(self, request: DoorRequest, until: float) -> Key:
        """Return the key of the request.

        Raises:
            Refused: `unauthorized`, or `rate_limited` after too many wrong keys.
            StoreUnavailable: no answer until `until`.
        """
        given = request.headers.getall("x-api-key", [])
        if not given:
            raise _unauthorized("the header X-API-Key is missing", "ApiKey")
        if len(given) == 1 and given[0]:
            key = await self._ring.check(given[0].encode("utf-8", "surrogateescape"), until)
            if key is not None:
                return key
        self._strike("key", request, WRONG_KEYS)
        raise _unauthorized("the API key is wrong, expired or revoked", "ApiKey")

    def admin(self, request: DoorRequest) -> None:
        """Return when the request has an admin token.

        Raises:
            Refused: `unauthorized`, or `rate_limited` after too many wrong tokens.
        """
        given = request.headers.getall("authorization", [])
        if len(given) != 1 or given[0][: len(_BEARER)].lower() != _BEARER:
            raise _unauthorized("the header Authorization: Bearer TOKEN is missing", "Bearer")
        digest = admin_digest(given[0][len(_BEARER) :].strip(" "))
        right = [hmac.compare_digest(digest, one) for one in self._digests]  # all of them, always
        if any(right):
            return
        self._strike("token", request, WRONG_TOKENS)
        raise _unauthorized("the admin token is wrong", "Bearer")

    def address(self, request: DoorRequest) -> str:
        """Return the address that asks."""
        return self._addresses.of(request)

    def _strike(self, kind: str, request: DoorRequest, limit: int) -> None:
        now = self._clock()
        verdict = self._strikes.count(kind, self._addresses.of(request), limit, now)
        if verdict.within:
            verdict = self._strikes.count("all", "", WRONG_IN_ALL, now)
        if not verdict.within:
            raise _too_many(verdict)


def _too_many(verdict: Verdict) -> Refused:
    after = str(verdict.retry_after_s)
    return Refused("rate_limited", "too many wrong keys from this address", headers={"Retry-After": after})


def _unauthorized(message: str, scheme: str) -> Refused:
    return Refused("unauthorized", message, headers={"WWW-Authenticate": f'{scheme} realm="taskd"'})
