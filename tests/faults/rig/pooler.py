"""PgBouncer in transaction mode before a cluster, on a port of loopback."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from taskd.embedded.account import as_account, choose_account
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.keeper import until
from tests.faults.rig.system import free_port

START_S = 10.0
POOL = 10
"""Connections to the server at most."""

_CONFIG = """\
[databases]
* = host={socket_dir} port=5432 user=taskd

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool}
max_client_conn = 200
logfile = {folder}/pgbouncer.log
pidfile = {folder}/pgbouncer.pid
"""


def program() -> str | None:
    """Return where PgBouncer is; None when it is not installed."""
    return shutil.which("pgbouncer", path=f"{os.defpath}:/usr/sbin:/sbin")


@dataclass(frozen=True, slots=True)
class Pooler:
    """A running PgBouncer."""

    port: int
    folder: Path
    version: str

    def url(self, database: str) -> str:
        """Return the URL of a database through it."""
        return f"postgresql://taskd@127.0.0.1:{self.port}/{database}?sslmode=disable&gssencmode=disable"

    @property
    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "pgbouncer.log").read_text(errors="replace")


@asynccontextmanager
async def pooler(cluster: Cluster) -> AsyncIterator[Pooler]:
    """Run one as the account of the server, which lets nobody else in; end and remove it."""
    found = program()
    assert found is not None, "PgBouncer is not installed"
    account = choose_account(cluster.server.data)
    folder = Path(tempfile.mkdtemp(prefix="taskd-faults-"))
    os.chown(folder, account.pw_uid, account.pw_gid)
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    port = free_port()
    config = folder / "pgbouncer.ini"
    config.write_text(
        _CONFIG.format(socket_dir=cluster.server.socket_dir, port=port, pool=POOL, folder=folder)
    )
    config.chmod(0o644)
    process = await asyncio.create_subprocess_exec(
        found, "-q", str(config), stdin=asyncio.subprocess.DEVNULL, **as_account(account)
    )
    made = Pooler(port, folder, said.split()[1])
    try:
        await until(lambda: process.returncode is not None or _listens(port), START_S, "PgBouncer listens")
        assert process.returncode is None, made.log
        yield made
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
