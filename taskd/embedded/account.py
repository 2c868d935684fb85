"""Whom the server runs as, and running programs as that account."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path
from typing import Any

from taskd.embedded.errors import EmbeddedError

ACCOUNTS = ("taskd", "postgres", "nobody")
"""Whom the server runs as when taskd is root: the first of these that the machine has."""


def choose_account(data: Path, *, wanted: str | None = None) -> pwd.struct_passwd:
    """Return the account that the server on the folder `data` runs as.

    An ordinary user's server runs as that user. As root it is the owner of `data`, if that exists, else
    `wanted`, else the first of `ACCOUNTS`.

    Raises:
        EmbeddedError: there is no such account, or PostgreSQL would not run as it.
    """
    uid = os.geteuid()
    if uid == 0 and data.exists():
        uid = data.stat().st_uid
    try:
        if uid != 0:
            return pwd.getpwuid(uid)
    except KeyError:
        raise EmbeddedError(
            f"user id {uid} has no line in the password file, and PostgreSQL does not run without one. "
            "Set database.url to a server that runs elsewhere."
        ) from None
    for name in (wanted, *ACCOUNTS):
        try:
            if name and (account := pwd.getpwnam(name)).pw_uid != 0:
                return account
        except KeyError:
            continue
    raise EmbeddedError(
        f"PostgreSQL does not run as root, and this machine has no account {', '.join(ACCOUNTS)}. "
        "Start taskd as an ordinary user, or set database.url to a server that runs elsewhere."
    )


def as_account(account: pwd.struct_passwd) -> dict[str, Any]:
    """Return the arguments that make `subprocess` run a program as `account`, in a clean environment."""
    common: dict[str, Any] = {"cwd": "/", "env": {"PATH": os.defpath, "LC_ALL": "C"}}
    if os.geteuid() != 0:
        return common
    return common | {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def can_run(account: pwd.struct_passwd, *words: str | Path) -> bool:
    """Return whether `account` can run this program, and it succeeds."""
    try:
        return subprocess.run(words, capture_output=True, **as_account(account)).returncode == 0
    except PermissionError:
        return False


def make_private(folder: Path, account: pwd.struct_passwd) -> None:
    """Make `folder`, if it is missing, for `account` alone.

    Raises:
        EmbeddedError: it is there and belongs to someone else.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        owner = os.fstat(fd).st_uid
        if owner == 0 and os.geteuid() == 0:
            os.fchown(fd, account.pw_uid, account.pw_gid)
        elif owner != account.pw_uid:
            raise EmbeddedError(f"{folder} belongs to {account_name(owner)}, not to {account.pw_name}.")
    finally:
        os.close(fd)


def account_name(uid: int) -> str:
    """Return the name of the account, or `user id 1234` when it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"
