"""Applying the roles: by whom, again, in another schema, beside what others have in the database."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege

from taskd.errors import SchemaMismatch, StoreUnavailable
from taskd.store import migrate, roles

ROLES = [roles.OWNER, roles.API, roles.WORKER, roles.SUBMIT, roles.READ_ONLY]


def as_role(url: str, role: str) -> str:
    return make_conninfo(url, options=f"-c role={role}")


async def test_migrations_run_as_the_owner(empty_database_url: str) -> None:
    migrate.up(empty_database_url)
    roles.apply(empty_database_url)

    assert migrate.up(as_role(empty_database_url, roles.OWNER)) == []
    assert roles.apply(as_role(empty_database_url, roles.OWNER)) == []


def test_applied_again_it_keeps_what_an_operator_has_set(database_url: str) -> None:
    roles.apply(database_url)
    with psycopg.connect(database_url, autocommit=True) as conn:
        before = conn.execute("select rolconfig from pg_roles where rolname = 'taskd_ro'").fetchone()
        try:
            conn.execute("alter role taskd_ro connection limit 7 login")
            conn.execute("alter role taskd_ro set statement_timeout = '3min'")
            conn.execute("grant insert on taskd.audit to taskd_ro")

            assert roles.apply(database_url) == []

            after = conn.execute(
                "select rolconnlimit, rolcanlogin, 'statement_timeout=3min' = any(rolconfig),"
                " has_any_column_privilege('taskd_ro', 'taskd.audit', 'insert')"
                " from pg_roles where rolname = 'taskd_ro'"
            ).fetchone()
        finally:
            conn.execute("alter role taskd_ro connection limit 10 nologin")
            conn.execute("alter role taskd_ro set statement_timeout = '1min'")
    assert before is not None
    assert after == (7, True, True, False)


def test_it_is_known_whether_a_database_has_the_roles(database_url: str) -> None:
    before = roles.in_use(database_url)
    roles.apply(database_url)

    assert (before, roles.in_use(database_url)) == (False, True)


def test_another_schema_has_the_same_roles(empty_database_url: str) -> None:
    migrate.up(empty_database_url, schema="elsewhere")
    assert roles.apply(empty_database_url, schema="elsewhere") == []

    with psycopg.connect(empty_database_url, autocommit=True) as conn:
        conn.execute("set role taskd_ro")
        assert conn.execute("select from elsewhere.job_view").fetchall() == []
        with pytest.raises(InsufficientPrivilege):
            conn.execute("select digest from elsewhere.api_keys")


@pytest.fixture
def plain_login(empty_database_url: str) -> Iterator[str]:
    """The URL of the database as seen by its owner, who may make roles and is no superuser."""
    with psycopg.connect(empty_database_url, autocommit=True) as conn:
        [(base,)] = conn.execute("select quote_ident(current_database())").fetchall()
        [(me,)] = conn.execute("select quote_ident(current_user)").fetchall()
        conn.execute("create role deploy_for_test createrole")
        try:
            conn.execute(f"alter database {base} owner to deploy_for_test")
            yield as_role(empty_database_url, "deploy_for_test")
        finally:
            conn.execute(f"alter database {base} owner to {me}")
            conn.execute("drop owned by deploy_for_test cascade")
            conn.execute("drop role deploy_for_test")


def test_the_owner_of_a_database_needs_no_superuser(plain_login: str) -> None:
    migrate.up(plain_login)
    with psycopg.connect(make_conninfo(plain_login, options="")) as conn:
        there = conn.execute("select rolname from pg_roles where rolname = any(%s)", (ROLES,)).fetchall()
        for (name,) in there:
            conn.execute(f"alter role {name} rename to {name}_of_others")  # undone: others use them
        conn.execute("set local role deploy_for_test")

        conn.execute(roles.text().encode())
        conn.execute(roles.text().encode())

        owner = conn.execute("select nspowner::regrole::text from pg_namespace where nspname = 'taskd'")
        assert owner.fetchone() == ("taskd_owner",)
        conn.rollback()


# -- schema public -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True], ids=["empty", "with tables of others"])
def test_nobody_makes_anything_in_public_and_what_others_keep_there_is_still_found(
    empty_database_url: str, kept: bool
) -> None:
    migrate.up(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as conn:
        conn.execute("grant create, usage on schema public to public")  # as it was before PostgreSQL 15
        if kept:
            conn.execute("create table public.orders ()")

        assert roles.apply(empty_database_url) == []

        may = conn.execute(
            "select has_schema_privilege('public', 'public', 'create'),"
            " has_schema_privilege('public', 'public', 'usage')"
        ).fetchone()
    assert may == (False, kept)


def test_whoever_can_not_close_public_is_told_who_can(empty_database_url: str) -> None:
    migrate.up(empty_database_url)
    roles.apply(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as conn:
        conn.execute("grant create on schema public to public")

    [warning] = roles.apply(as_role(empty_database_url, roles.OWNER))

    assert "CREATE on schema public" in warning
    assert "pg_database_owner" in warning


def test_a_role_of_that_name_with_too_much_power_is_refused(database_url: str) -> None:
    roles.apply(database_url)
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("alter role taskd_submit createdb")
        try:
            with pytest.raises(StoreUnavailable, match="taskd_submit can do what no role of taskd may"):
                roles.apply(database_url)
        finally:
            conn.execute("alter role taskd_submit nocreatedb")


def test_without_a_schema_there_is_nothing_to_give_rights_on(empty_database_url: str) -> None:
    with pytest.raises(SchemaMismatch):
        roles.apply(empty_database_url)
