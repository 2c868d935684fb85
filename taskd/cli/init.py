"""`taskd init`: a configuration to start with."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import click

from taskd.cli.session import Command, Session
from taskd.errors import TaskdError

_TEXT = """\
# taskd's configuration; `taskd config example` prints every key, `taskd check-config` checks this file.

# Without a URL `taskd up` runs a PostgreSQL of its own.
database:
  #url: postgresql://taskd@127.0.0.1:5432/taskd
  url_env: DATABASE_URL

api:
  host: 127.0.0.1
  port: 8080

# The token that opens the admin routes. Better in a file of its own: token_file.
admin:
  token: {token}

log:
  level: info
  format: text
"""


class NotWritten(TaskdError):
    """The starter configuration can't be written."""

    code = "not_written"


@click.command("init", cls=Command)
@click.argument("file", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@click.pass_obj
def init(session: Session, /, file: Path | None) -> None:
    """Write a configuration to start with.

    It has an admin token of its own. FILE is the one that the other commands read, if it is not given. A
    file that exists is left as it is.
    """
    path = file or session.path
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise NotWritten(f"{path} exists already: it is left as it is") from None
    except OSError as error:
        raise NotWritten(f"{path}: {error.strerror}; name another file: taskd init FILE") from None
    with os.fdopen(fd, "w", encoding="utf-8") as out:
        out.write(_TEXT.format(token=secrets.token_urlsafe(32)))
    click.echo(f"{path} is written; go on with: taskd up --config {path}")
