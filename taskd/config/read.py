"""A YAML file to a `Config`, or every reason why not, at once.

No socket, no database, no import of a plugin: only the file, the secret files that it names, and the
environment that is handed in.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from taskd.config.convert import FAILED, Converter
from taskd.config.cross import cross_checks
from taskd.config.nodes import Node, compose
from taskd.config.resolve import Resolver
from taskd.config.tree import Tree
from taskd.errors import ConfigError, Problem

MAX_FILE = 1 << 20
"""Bytes; a longer file is no configuration."""

_LATER = {
    "schedules": "schedules do nothing yet: they come with a later version",
    "webhooks": "webhooks do nothing yet: they come with a later version",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A configuration that can be used."""

    tree: Tree
    file: str
    """As given, for messages."""
    warnings: tuple[str, ...]
    """What an operator should know though the file is valid; each is one line of the log."""
    digest: str
    """SHA-256 of the file's bytes, hexadecimal: two processes that show the same one read the same file."""
    lines: Mapping[str, int] = field(repr=False)
    """The line of each key and list member that the file has, by its path; all others are defaults."""

    def where(self, path: str) -> int:
        """Return the line of `path`, or of what holds it when the file does not have it; 0 for the file."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return 0


def read(
    path: Path, *, env: Mapping[str, str], need_admin: bool = True, need_pepper: bool | None = None
) -> Config:
    """Return the configuration in the file at `path`.

    `env` is the environment for the `*_env` keys and `CREDENTIALS_DIRECTORY`. A process without admin
    routes (the worker) gives `need_admin=False`: then no token has to be there, and the token's file and
    variable are not read. `need_pepper` tells the same of `keys.pepper_file`; as `need_admin` by default.

    Raises:
        ConfigError: the file is missing, unreadable or wrong; holds every problem.
    """
    file = str(path)
    try:
        content, mode = _load(path)
    except ValueError as error:
        raise ConfigError(file, [Problem(0, "", str(error))]) from None
    return parse(
        content,
        file=file,
        folder=path.parent,
        mode=mode,
        env=env,
        need_admin=need_admin,
        need_pepper=need_pepper,
    )


def parse(
    content: bytes | str,
    *,
    file: str,
    env: Mapping[str, str],
    folder: Path | None = None,
    mode: int | None = None,
    need_admin: bool = True,
    need_pepper: bool | None = None,
) -> Config:
    """Return the configuration that the text `content` of the file called `file` is.

    `folder` is where relative paths begin (default: the working directory), `mode` the file's permission
    bits: a text that holds a secret must not be readable by the world. The rest is as for `read`.

    Raises:
        ConfigError: as for `read`.
    """
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if len(raw) > MAX_FILE:
        raise ConfigError(file, [Problem(0, "", _too_large())])
    root, problems = compose(_decode(file, raw))
    if root is None:
        raise ConfigError(file, sorted(set(problems)))
    if root.kind != "mapping":
        message = "the file must be a mapping: sections such as `database:` and `admin:`, each with its keys"
        raise ConfigError(file, [*problems, Problem(1, "", message)])
    converter = Converter(folder or Path())
    tree = converter.section(root, Tree)
    if tree is FAILED:  # a tag on the top mapping: the problem is already known
        raise ConfigError(file, problems)
    lines = _lines_of(root)
    resolver = Resolver(
        converter,
        root=root,
        env=env,
        need_admin=need_admin,
        need_pepper=need_admin if need_pepper is None else need_pepper,
    )
    tree = resolver.resolve(tree)
    cross_checks(converter, tree, lines)
    problems += converter.problems
    if mode is not None and mode & 0o006:
        problems += _open_to_all(mode, resolver.literal_secrets(tree))
    if problems:
        raise ConfigError(file, sorted(set(problems)))
    return Config(
        tree=tree,
        file=file,
        warnings=(*_later(root), *resolver.warnings),
        digest=hashlib.sha256(raw).hexdigest(),
        lines=lines,
    )


def _load(path: Path) -> tuple[bytes, int]:
    try:
        # A FIFO without a writer would hold up the start for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise ValueError("the configuration file does not exist: no such file") from None
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no usable path"
        raise ValueError(f"the configuration file can't be read: {reason}") from None
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError("this is a directory and not a configuration file")
        if not stat.S_ISREG(mode):
            raise ValueError("this is not a regular file, and so no configuration file")
        with os.fdopen(handle, "rb", closefd=False) as opened:
            return opened.read(MAX_FILE + 1), stat.S_IMODE(mode)
    except OSError as error:
        raise ValueError(f"the configuration file can't be read: {error.strerror}") from None
    finally:
        os.close(handle)


def _too_large() -> str:
    return "the file is too large: it is bigger than the size limit of 1 MiB"


def _decode(file: str, raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(file, [Problem(1, "", "the file is UTF-16: save it as UTF-8")])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1
        message = "there is a byte that is not valid UTF-8: save the file as UTF-8"
        raise ConfigError(file, [Problem(line, "", message)]) from None


def _lines_of(root: Node) -> dict[str, int]:
    lines: dict[str, int] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.path:
            lines.setdefault(node.path, node.line)
        waiting += [*node.entries.values(), *node.items]
    return lines


def _open_to_all(mode: int, secrets: list[tuple[int, str]]) -> list[Problem]:
    if not secrets:
        return []
    held = ", ".join(f"{path} in line {line}" for line, path in secrets)
    message = (
        f"the file mode is {mode:04o}, so that the world may use it, and it holds a secret itself ({held}): "
        "chmod 0640 it, or move the secret to a file of its own"
    )
    return [Problem(0, "", message)]


def _later(root: Node) -> list[str]:
    return [message for name, message in _LATER.items() if name in root.entries]
