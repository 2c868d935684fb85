"""How often each address came with a wrong key or token lately, counted over all processes of a tree.

A table in memory that the parent makes and its children share, because a client's connections are spread
over them. It is written for wrong keys alone, under a lock of the file, so right keys never touch it.

Counts slide: a minute is `SLICES` slices of 5 s, and one more while the present one fills, so that no
window of a minute ever holds more than the limit. A full table forgets whoever came first.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import mmap
import os
import struct
from dataclasses import dataclass

SLICE_S = 5
SLICES = 12
ROWS = 4096
PROBES = 8
"""Places in which an address may stand."""

_ROW = struct.Struct("<12sI13H")
SIZE = ROWS * _ROW.size


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one more is still within the limit, and else after how many seconds it is again."""

    within: bool
    retry_after_s: int = 0


class Strikes:
    """One process' view of the table. `fd` is an open file of `SIZE` bytes, all zeros at first."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._table = mmap.mmap(fd, SIZE)

    def count(self, kind: str, address: str, limit: int, now: float) -> Verdict:
        """Count one strike, unless there are `limit` in the last minute already.

        `now` is Unix time: all processes of the tree share that clock.
        """
        name = hashlib.blake2b(f"{kind} {network(address)}".encode(), digest_size=12).digest()
        slice_ = int(now // SLICE_S)
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            row, counts = self._find(name, slice_)
            total = sum(counts)
            if total >= limit:
                return Verdict(False, _retry_after_s(counts, limit, now))
            counts[0] += 1
            _ROW.pack_into(self._table, row * _ROW.size, name, slice_, *counts)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return Verdict(True)

    def _find(self, name: bytes, slice_: int) -> tuple[int, list[int]]:
        """Return the row of `name`, or of the one that it replaces, and its counts, newest slice first."""
        first = int.from_bytes(name[:4], "little")
        oldest, oldest_slice = 0, 2**32
        for probe in range(PROBES):
            row = (first + probe) % ROWS
            there, last, *counts = _ROW.unpack_from(self._table, row * _ROW.size)
            if there == name:
                passed = min(max(slice_ - last, 0), SLICES + 1)
                return row, [0] * passed + counts[: SLICES + 1 - passed]
            if last < oldest_slice:
                oldest, oldest_slice = row, last
        return oldest, [0] * (SLICES + 1)


def make_table() -> int:
    """Return the descriptor of a new table, to be inherited by children."""
    fd = os.memfd_create("taskd-strikes", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    return fd


def network(address: str) -> str:
    """Return what is counted as one address: of IPv6 the network of 64 bits that one host has to itself.

    >>> network("2001:db8:0:1::7"), network("192.0.2.7")
    ('2001:db8:0:1::/64', '192.0.2.7')
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def _retry_after_s(counts: list[int], limit: int, now: float) -> int:
    """Return the whole seconds until enough of the oldest slices have left."""
    total = sum(counts)
    for age in range(SLICES, -1, -1):
        total -= counts[age]
        if total < limit:
            leaves = (now // SLICE_S - age + SLICES + 1) * SLICE_S
            return max(1, int(leaves - now) + 1)
    return SLICE_S * (SLICES + 1)
