"""A primary and its standby: made by pg_basebackup, promoted, made anew, frozen; each on a port of its own.

The two places are `a` and `b`. Whichever is the primary of the moment is `Twins.server`, so that all that
the rig does with a cluster goes there; the proxies stay before their places.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from taskd.embedded import EmbeddedPG
from taskd.embedded.account import as_account, choose_account, make_private
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.keeper import Process, tree, until
from tests.faults.rig.proxy import Proxy, proxy
from tests.postgres import DURABLE

JOIN_S = 30.0
_SETTINGS = (
    *DURABLE,
    "max_connections=150",  # a commit that waits for a frozen standby keeps its backend, whoever hung up
    "max_wal_size=1GB",
    "wal_keep_size=256MB",
    "log_min_error_statement=panic",
)
_FAKETIME = "libfaketimeMT.so.1"


class Twins(Cluster):
    """Two servers, one of them the primary. Made by `twins`, which removes both."""

    def __init__(self, home: Path) -> None:
        super().__init__(home / "a", _SETTINGS)
        self._home = home
        self._settings = _SETTINGS
        self._places = {"a": self.server}
        self.primary = "a"
        """The place of the primary."""
        self.standby: EmbeddedPG | None = None
        self._bindir: Path | None = None
        """Of the first primary: a later one may run from a folder that shifts its clock."""

    @property
    def spare(self) -> str:
        """The place where the standby is, or was, or is to be."""
        return "b" if self.primary == "a" else "a"

    def socket_at(self, place: str) -> str:
        """The path of the socket file of a place, whether or not a server is there."""
        return str(self._home / place / "s" / ".s.PGSQL.5432")

    async def add_standby(self, *settings: str, clock: str = "") -> None:
        """Copy the primary to the spare place and start the copy as its standby; return once it streams.

        What was there is removed. `clock` is the shift of its clock as libfaketime reads it, `-4s`.
        """
        home = self._home / self.spare
        self._bindir = self._bindir or self.server.bindir
        await asyncio.to_thread(self._copy, home)
        bindir = _shifted(home, self._bindir, clock) if clock else self._bindir
        standby = EmbeddedPG(home, settings=(*self._settings, *settings), bindir=bindir)
        self._places[self.spare] = self.standby = standby
        await asyncio.to_thread(standby.start)
        await until(self._streams, JOIN_S, lambda: f"the standby streams: {_words(standby)}")

    def _copy(self, home: Path) -> None:
        if (old := self._places.get(self.spare)) is not None:
            old.stop()
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(mode=0o755)
        account = choose_account(self.server.data)
        make_private(home / "data", account)
        where = ["-h", str(self.server.socket_dir), "-p", "5432", "-U", "taskd"]
        how = ["-D", str(home / "data"), "-c", "fast", "-X", "stream", "-R"]
        program = [str(self.server.bindir / "pg_basebackup"), *where, *how]
        made = subprocess.run(program, capture_output=True, text=True, **as_account(account))
        assert made.returncode == 0, f"pg_basebackup: {made.stderr}"

    async def _streams(self) -> bool:
        rows = await self.ask("postgres", "select pid from pg_stat_replication where state = 'streaming'")
        return bool(rows)

    async def synchronous(self, on: bool) -> None:
        """Have each commit wait for the standby from now on, or no longer."""
        names = "*" if on else ""
        await self.ask("postgres", f"alter system set synchronous_standby_names = '{names}'")
        await self.ask("postgres", "select pg_reload_conf()")

        async def as_wanted() -> bool:
            rows = await self.ask("postgres", "select sync_state from pg_stat_replication")
            return not on or ("sync",) in rows

        await until(as_wanted, JOIN_S, "the standby is synchronous")

    async def promote(self) -> None:
        """Make the standby the primary, whatever became of the old one; return once it takes writes."""
        standby = self.standby
        assert standby is not None
        self.server, self.standby, self.primary = standby, None, self.spare
        await self.ask("postgres", "select pg_promote(true, 60)")

    async def read_only(self, on: bool) -> None:
        """Have the primary refuse writes on all its connections, as one that was demoted; it stays up."""
        await self.ask(
            "postgres",
            f"alter system set default_transaction_read_only = {'on' if on else 'off'}",
        )
        await self.ask("postgres", "select pg_reload_conf()")

    @contextmanager
    def frozen_standby(self) -> Iterator[None]:
        """Stop all processes of the standby for the time of the block."""
        assert self.standby is not None
        assert self.standby.pid is not None
        stopped: list[Process] = []
        try:
            for one in tree(self.standby.pid):
                one.signal(signal.SIGSTOP)
                stopped.append(one)
            yield
        finally:
            for one in stopped:
                one.signal(signal.SIGCONT)

    def server_at(self, place: str) -> EmbeddedPG:
        """Return the server of a place."""
        return self._places[place]

    def log_at(self, place: str) -> str:
        """Return what the server of a place has logged."""
        return self._places[place].log.read_text(errors="replace")

    def drop(self, name: str) -> None:
        """Leave it: both servers are removed, and a commit may be waiting for a standby that is gone."""

    def stop(self) -> None:
        """Stop both servers."""
        for server in self._places.values():
            server.stop()


def _shifted(home: Path, bindir: Path, clock: str) -> Path:
    """Return a folder of binaries whose server's wall clock goes `clock` wrong."""
    found = sorted(Path("/usr/lib").glob(f"*/faketime/{_FAKETIME}"))
    assert found, "libfaketime is not installed"
    folder = home / "shifted"
    folder.mkdir(mode=0o755)
    for program in bindir.iterdir():
        (folder / program.name).symlink_to(program)
    server = folder / "postgres"
    server.unlink()
    preset = f"LD_PRELOAD={found[0]} FAKETIME={clock} FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_DONT_RESET=1"
    server.write_text(f'#!/bin/sh\nexec env {preset} {bindir / "postgres"} "$@"\n')
    server.chmod(0o755)
    return folder


def shifts_clocks() -> bool:
    """Whether this machine has what shifts a server's clock."""
    return any(Path("/usr/lib").glob(f"*/faketime/{_FAKETIME}"))


def _words(server: EmbeddedPG) -> str:
    return server.log.read_text(errors="replace")[-1500:] if server.log.exists() else "(nothing)"


@asynccontextmanager
async def twins() -> AsyncIterator[Twins]:
    """Run a primary with a template and room for a standby; stop and remove both whatever happens."""
    home = Path(tempfile.mkdtemp(prefix="taskd-faults-"))
    home.chmod(0o755)
    made = Twins(home)
    try:
        await asyncio.to_thread(made.server.start)
        await asyncio.to_thread(made.make_template)
        yield made
    finally:
        await asyncio.to_thread(made.stop)
        if os.environ.get("TASKD_FAULT_KEEP"):
            print(f"kept: {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)


@asynccontextmanager
async def proxies(made: Twins, seed: int) -> AsyncIterator[dict[str, Proxy]]:
    """Run a proxy before each place."""
    async with AsyncExitStack() as stack:
        yield {
            place: await stack.enter_async_context(proxy(made.socket_at(place), random.Random(seed)))
            for place in ("a", "b")
        }


def url_of(database: str, ports: Sequence[int]) -> str:
    """Return the URL that names the ports of several servers and asks for the one that takes writes."""
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    options = "target_session_attrs=read-write&sslmode=disable&gssencmode=disable"
    return f"postgresql://taskd@{hosts}/{database}?{options}"
