"""What goes wrong with the embedded PostgreSQL."""

from __future__ import annotations

from taskd.errors import TaskdError


class EmbeddedError(TaskdError):
    """The embedded PostgreSQL can't be started; says why and what to do instead."""

    code = "embedded_postgres"
    exit_code = 69  # EX_UNAVAILABLE
