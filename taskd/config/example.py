"""The tree as people see it: `conf/taskd.yaml`, and the tables of the manual.

Both are made from the fields and the docstrings under them, so neither can fall behind the reader.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from datetime import timedelta
from itertools import pairwise
from typing import Any

from taskd.config import scalars
from taskd.config.keys import REQUIRED, default_of, keys_of
from taskd.config.tree import Tree
from taskd.config.units import Rate, Size, show_duration, show_size

_HEADER = """\
# The configuration of taskd: every key with its default. A key behind a # is absent by default and shows
# an example. Times are written 250ms 5s 10m 2h 7d, sizes 64KiB 1MiB. See taskd.yaml(5).
# Check it with: taskd check-config FILE
"""

# The shipped file sets these; they keep the environment names of the service that taskd replaces.
_SHIPPED = {
    "database.url_env": "DATABASE_URL",
    "admin.token_env": "ADMIN_TOKEN",
    "plugins.module": "taskd_email",
}
_SHIPPED_OPTIONS = "api_key_env: RESEND_API_KEY"

_OFF = {"pools", "job_types", "schedules", "webhooks", "metrics"}
"""Sections that say something by being there."""

_NAMES = {"pools": "reports", "job_types": "thumbnail"}
"""What the example calls the members of sections whose keys are names."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One key as the manual shows it."""

    path: str
    default: str
    """Empty: absent by default."""
    range: str
    restart: bool
    """A reload can't change it."""
    text: str


def example() -> str:
    """Return the text of `conf/taskd.yaml`."""
    sections = [_section(name, hint) for name, hint in typing.get_type_hints(Tree).items()]
    return "\n".join([_HEADER, *sections])


def rows() -> list[Row]:
    """Return every key of the file, in its order; members of lists and named sections as `[N]` and `NAME`."""
    return [row for name, hint in typing.get_type_hints(Tree).items() for row in _rows(name, hint)]


def table() -> str:
    """Return the keys as a table in Markdown."""
    head = "| Key | Default | Range | Reload | Meaning |\n|---|---|---|---|---|"
    lines = [
        f"| `{row.path}` | {_code(row.default)} | {row.range} | {_reload(row)} | {_cell(row.text)} |"
        for row in rows()
    ]
    return "\n".join([head, *lines]) + "\n"


def comments(section: Any) -> dict[str, str]:
    """Return the docstring under each field of `section`."""
    module = sys.modules[section.__module__]
    tree = ast.parse(inspect.getsource(module))
    body = next(
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == section.__name__
    )
    found: dict[str, str] = {}
    for field, text in pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = str(text.value.value)
    return found


def _section(name: str, hint: Any) -> str:
    section, form = _inner(hint)
    lines = [f"# {(section.__doc__ or '').splitlines()[0]}"]
    body = _lines(name, section)
    if form == "list":
        body = _member(body)
    elif form == "names":
        body = [f"  {_NAMES[name]}:", *_indented(body, 4)]
    else:
        body = _indented(body, 2)
    block = [f"{name}:", *body]
    return "\n".join([*lines, *(_off(block) if name in _OFF else block)]) + "\n"


def _lines(path: str, section: type[Any]) -> list[str]:
    """Return the comment and the line of each key."""
    lines: list[str] = []
    hints, texts = typing.get_type_hints(section), comments(section)
    for name, (field, facts) in keys_of(section).items():
        lines.append(f"# {texts[name]}")
        inner = _inner(hints[name])[0]
        shipped = _SHIPPED.get(f"{path}.{name}")
        default = default_of(field)
        if _is_section(inner):
            block = [f"{name}:", *_indented(_lines(f"{path}.{name}", inner), 2)]
        elif f"{path}.{name}" == "plugins.config":
            block = [f"{name}:", f"  {_SHIPPED_OPTIONS}"]
        elif default is None or default is REQUIRED:
            block = [f"{name}: {shipped or facts.example}"]
        else:
            block = [f"{name}: {show(default, inner)}"]
        absent = default is None and shipped is None and path.partition(".")[0] not in _OFF
        lines += _off(block) if absent else block
    return lines


def _off(block: list[str]) -> list[str]:
    """Comment a block out: taking the first # of each line away brings it back."""
    return [f"#{line}" for line in block]


def _indented(lines: list[str], width: int) -> list[str]:
    return [f"{' ' * width}{line}" for line in lines]


def _member(lines: list[str]) -> list[str]:
    """Indent the keys of a list's one member; the dash stands at its first key."""
    comment, first, *rest = lines
    return [f"  {comment}", f"  - {first}", *_indented(rest, 4)]


def show(value: Any, hint: Any = None) -> str:
    """Return a value of the tree as YAML on one line; `hint` is its type where the value does not tell.

    >>> show(timedelta(minutes=5))
    '5m'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, timedelta):
        return show_duration(value)
    if isinstance(value, Rate):
        return value.text
    if hint is Size:
        return show_size(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {show(member)}' for name, member in value.items())}}}"
    text = str(value)
    return text if isinstance(value, int) or scalars.reads_as(text) == "string" else f'"{text}"'


def _inner(hint: Any) -> tuple[Any, str]:
    """Return the section or type inside `hint`, and whether it stands in a list or under names."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return arguments[0], "list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return arguments[1], "names"
    return (arguments[0] if arguments and origin is not typing.Literal else hint), ""


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and bool(keys_of(hint))


def _rows(path: str, hint: Any) -> Iterator[Row]:
    section, form = _inner(hint)
    path += {"list": "[N]", "names": ".NAME", "": ""}[form]
    hints, texts = typing.get_type_hints(section), comments(section)
    for name, (field, facts) in keys_of(section).items():
        inner = _inner(hints[name])[0]
        if _is_section(inner):
            yield from _rows(f"{path}.{name}", hints[name])
            continue
        default = default_of(field)
        yield Row(
            path=f"{path}.{name}",
            default="required" if default is REQUIRED else "" if default is None else show(default, inner),
            range=facts.span(sizes=inner is Size) or _choices(hints[name]),
            restart=facts.restart,
            text=texts[name],
        )


def _choices(hint: Any) -> str:
    for part in (hint, *typing.get_args(hint)):
        if typing.get_origin(part) is typing.Literal:
            return ", ".join(typing.get_args(part))
    return ""


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _reload(row: Row) -> str:
    return "restart" if row.restart else "yes"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
