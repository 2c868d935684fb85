"""Whether the database is one that this package can work with, asked on a connection that is there."""

from __future__ import annotations

from taskd.errors import SchemaMismatch
from taskd.store.migrate import migrations
from taskd.store.pool import Connection
from taskd.store.queries import SQL
from taskd.store.sqlstate import store_errors


async def check_schema(conn: Connection) -> None:
    """Return when every migration of this package is there.

    Migrations that this package does not know are fine: the next version may run beside this one.

    Raises:
        SchemaMismatch: one is missing, or its file was edited.
        StoreUnavailable: no answer came.
    """
    with store_errors():
        cursor = await conn.execute(SQL["applied_migrations"])
        applied = {int(version): str(digest) for version, digest in await cursor.fetchall()}
    missing = [migration for migration in migrations() if migration.version not in applied]
    if missing:
        raise SchemaMismatch(f"{len(missing)} migration(s) are missing: run `taskd migrate`")
    for migration in migrations():
        if applied[migration.version] != migration.digest:
            raise SchemaMismatch(
                f"migration {migration.version} in the database is not the file of this package: "
                "reinstall taskd"
            )


async def live_nodes(conn: Connection) -> int:
    """Return how many worker nodes live now.

    Raises:
        StoreUnavailable: no answer came.
    """
    with store_errors():
        cursor = await conn.execute(SQL["live_nodes"])
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])
