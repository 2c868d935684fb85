"""A PostgreSQL of the case's own, with fsync on, that may be stopped, killed and frozen."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from taskd.embedded import EmbeddedPG
from taskd.store import migrate
from tests.postgres import DURABLE, chosen_bindir

TEMPLATE = "faults_template"
PATIENCE_S = 15.0
"""How long the rig's own statements wait for a server that is down or starts."""

# Grows with each final move of a job; a final row that changes is an error. One may go only by a retry by
# hand, and the checker looks for that in the history.
_TRIGGER = """
create table public.terminal_changes (
    job_id uuid not null, status text not null, at timestamptz not null default clock_timestamp());
create function public.note_outcome() returns trigger language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        insert into public.terminal_changes (job_id, status) values (new.id, new.status);
        return new;
    end if;
    if tg_op = 'DELETE' then
        return old;
    end if;
    raise exception 'a final row was changed: % of job %', tg_op, old.id;
end $$;
create trigger note_outcome before insert or update or delete on taskd.outcomes
    for each row execute function public.note_outcome();
"""


class Cluster:
    """One server and its databases; everything is removed when the `with` block of `cluster` ends."""

    def __init__(self, home: Path, settings: Sequence[str]) -> None:
        self.server = EmbeddedPG(home, settings=settings, bindir=chosen_bindir(os.environ), prefer="wheel")
        self._database = 0

    @property
    def socket(self) -> str:
        """The path of the server's socket file."""
        return str(self.server.socket_dir / ".s.PGSQL.5432")

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None while it is down."""
        return self.server.pid

    def make_template(self) -> None:
        """Make the migrated database that `database` copies, with the trigger of invariant I5."""
        self.query("postgres", f"create database {TEMPLATE}")
        url = self.server.url(TEMPLATE)
        migrate.up(url)
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute(_TRIGGER)

    def database(self) -> str:
        """Make a fresh migrated database and return its name."""
        self._database += 1
        name = f"faults_{self._database}"
        self.query("postgres", f"create database {name} template {TEMPLATE}")
        return name

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected."""
        with suppress(psycopg.Error):
            self.query("postgres", f"drop database if exists {name} with (force)")

    def query(self, database: str, statement: str, **args: object) -> list[tuple[Any, ...]]:
        """Return the rows of a statement on a connection made for it; a server that starts is waited for."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._query(database, statement, args)
            except psycopg.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def _query(self, database: str, statement: str, args: dict[str, object]) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.server.url(database), autocommit=True, connect_timeout=5) as conn:
            cursor = conn.execute(sql.SQL(statement), args or None)
            return cursor.fetchall() if cursor.description else []

    async def ask(self, database: str, statement: str, **args: object) -> list[tuple[Any, ...]]:
        """The same beside the loop."""
        return await asyncio.to_thread(self.query, database, statement, **args)

    # -- faults ------------------------------------------------------------------------------------------

    async def stop_immediate(self) -> None:
        """Stop as `pg_ctl stop -m immediate`: no checkpoint, connections break."""
        await self._end(signal.SIGQUIT)

    async def kill(self) -> None:
        """Kill -9 the postmaster; its processes notice and go."""
        await self._end(signal.SIGKILL)

    async def start(self) -> float:
        """Start, and return how many seconds that took until connections are taken."""
        began = time.monotonic()
        await asyncio.to_thread(self.server.start)
        return time.monotonic() - began

    async def restart_immediate(self) -> float:
        """Stop in the immediate way and start at once; returns the seconds until connections are taken."""
        began = time.monotonic()
        await self.stop_immediate()
        await self.start()
        return time.monotonic() - began

    async def kill_backend(self, database: str, application: str) -> bool:
        """Kill -9 one backend that serves `application` (a LIKE pattern); the server then resets itself."""
        pid = await self._backend(database, application)
        if pid is None or not self._is_backend(pid):
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return True

    @contextmanager
    def frozen(self, pid: int) -> Iterator[None]:
        """Stop one backend of this server for the time of the block."""
        assert self._is_backend(pid), f"{pid} is no process of this server"
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def _backend(self, database: str, application: str) -> int | None:
        rows = await self.ask(
            database,
            "select pid from pg_stat_activity where application_name like %(a)s and datname = %(d)s "
            "order by random() limit 1",
            a=application,
            d=database,
        )
        return int(rows[0][0]) if rows else None

    async def _end(self, number: int) -> None:
        process = self.server._process
        assert process is not None
        assert process.poll() is None, "the server is not running"
        process.send_signal(number)
        await asyncio.to_thread(process.wait, 60)

    def _is_backend(self, pid: int) -> bool:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        match = re.match(r"\d+ \(.*\) \S (\d+)", stat)
        return match is not None and int(match[1]) == self.pid


@contextmanager
def cluster(*settings: str) -> Iterator[Cluster]:
    """Run a durable server in a scratch folder with a template; stop and remove it whatever happens."""
    home = Path(tempfile.mkdtemp(prefix="taskd-faults-"))
    home.chmod(0o755)
    made = Cluster(home / "pg", (*DURABLE, "max_wal_size=1GB", *settings))
    try:
        made.server.start()
        made.make_template()
        yield made
    finally:
        made.server.stop()
        shutil.rmtree(home, ignore_errors=True)
