"""All expected failures of taskd, each with the code that people see.

Nothing here knows how an error is shown: the HTTP handler makes an answer of it, the command line an
exit status, a log line its `error` member. It imports nothing, so every layer may raise from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

# A secret in the place of a name (its own key was forgotten): letters and digits that change places more
# often than in any word, or the login of a URL. Parts of a file's path are no such word.
_WORD = re.compile(r"(?<![/\w-])[\w+=-]{16,}", re.ASCII)
_CHANGES = re.compile(r"[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])|[a-z](?=[A-Z])")
_MOST_CHANGES = 3
_LOGIN = re.compile(r"://(?!USER:PASSWORD@)[^\s/@]*@")


class TaskdError(Exception):
    """An expected failure: shown as its message, without a traceback."""

    code: ClassVar[str] = "error"
    """Its name in HTTP answers, logs and metrics. Once released, it never changes."""

    exit_code: ClassVar[int] = 1
    """What the command line exits with when this ends a command."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong in a configuration file.

    `line` counts from 1; 0 means something is missing from the file. `path` is the dotted place of the
    key (`api.port`, `plugins[0].config`), empty when there is none.
    """

    line: int
    path: str
    message: str

    def show(self, file: str) -> str:
        """Return `FILE:LINE: PATH: MESSAGE`, without the path and its colon when there is none.

        What looks like a secret that stands in the place of a name becomes `***`.
        """
        text = f"{self.path}: {self.message}" if self.path else self.message
        return f"{file}:{self.line}: {_veiled(text)}"


def _veiled(text: str) -> str:
    r"""Return `text` without what looks like a secret.

    >>> _veiled("admin.Zq3vT8mB1xW6nK0pR5sY2uL9dF4hJ7cA: unknown key")
    'admin.***: unknown key'
    """
    text = _LOGIN.sub("://***@", text)
    return _WORD.sub(lambda word: word[0] if _changes(word[0]) <= _MOST_CHANGES else "***", text)


def _changes(word: str) -> int:
    return len(_CHANGES.findall(word))


class ConfigError(TaskdError):
    """A configuration file that can't be used; holds every problem found, sorted by line."""

    code = "bad_config"
    exit_code = 78  # EX_CONFIG: a systemd unit stops restarting on it

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        self.file = file
        self.problems = tuple(sorted(problems))
        super().__init__("\n".join(problem.show(file) for problem in self.problems))


class StoreUnavailable(TaskdError):
    """Postgres gave no usable answer: unreachable, shutting down, read-only, out of resources, too slow.

    What was sent may have been done all the same; whoever sends again must be able to bear that.
    """

    code = "database_unavailable"
    exit_code = 69  # EX_UNAVAILABLE


class OutcomeUnknown(StoreUnavailable):
    """The commit was reported, but replication was given up (FACTS: a success tag is no acknowledgement)."""


class SchemaMismatch(StoreUnavailable):
    """The database has no taskd schema, or one that this version can't work with."""

    code = "database_unavailable"


class UnsafeDatabase(TaskdError):
    """The server's settings would lose accepted jobs (`fsync`, `synchronous_commit`, ...)."""

    code = "unsafe_database"
    exit_code = 78


class BadRow(TaskdError):
    """Postgres refused one row for its content (SQLSTATE class 22, 23 or 54)."""

    code = "unsupported_value"

    def __init__(self, message: str, *, sqlstate: str) -> None:
        self.sqlstate = sqlstate
        super().__init__(message)


class Unforeseen(TaskdError):
    """Postgres refused a statement for a reason that taskd knows nothing of: a defect, or somebody's trigger.

    Nothing was written. Whether it passes by itself nobody knows.
    """

    code = "internal_error"


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One member of a request that can't be accepted; `path` like `payload.to` or `jobs[3].type`."""

    path: str
    problem: str


class Refused(TaskdError):
    """A request that is answered with an error: the code decides the HTTP status.

    `headers` go out with the answer; `extra` are further members of the body (`job_id` of a conflict).
    """

    code = "bad_request"

    def __init__(
        self,
        code: str,
        message: str,
        *,
        fields: Sequence[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        self.error = code
        self.fields = tuple(fields)
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})
        super().__init__(message)

    @classmethod
    def field(cls, code: str, path: str, problem: str) -> Refused:
        """Return a refusal that names one member: the message is `PATH: PROBLEM`."""
        return cls(code, f"{path}: {problem}", fields=[FieldProblem(path, problem)])


class PluginError(TaskdError):
    """A plugin can't be loaded or described; says which, and the exception's type and text."""

    code = "bad_plugin"
    exit_code = 78
