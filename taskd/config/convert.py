"""Nodes to values by the types of the tree's fields, with every problem and no follow-up problems.

What can't be used becomes `FAILED`, is written down once, and takes its key's default for the rest of
the reading, so that one mistake gives one line.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from taskd.config import scalars, units
from taskd.config.checks import suggestion
from taskd.config.keys import Key, keys_of
from taskd.config.nodes import Node
from taskd.config.secret import Secret
from taskd.config.units import Rate, Size
from taskd.errors import Problem

FAILED: Final = object()
"""In place of a value that was refused."""

_INTERPOLATION = "values are not interpolated: ${ is refused"
_NEUTRAL = Key()


class Converter:
    """Turns the nodes of one file into values; owns the problems and the refused paths of this reading."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where relative paths of the file begin."""
        self.problems: list[Problem] = []
        self.folder = folder
        self._failed: set[str] = set()

    def refuse(self, node: Node, message: str, *, text: bool = False) -> object:
        """Write down why `node` can't be used and return `FAILED`.

        `text` tells that the value is free text, of which a comment may have cut off a part.
        """
        hint = " (text after a # is a comment: quote the value to keep it)" if text and node.cut else ""
        self.add(node.line, node.path, message + hint)
        return FAILED

    def add(self, line: int, path: str, message: str) -> None:
        """Write down a problem; `path` counts as refused from here on."""
        self._failed.add(path)
        self.problems.append(Problem(line, path, message))

    def fine(self, *paths: str) -> bool:
        """Whether nothing at, around or below these paths was refused: only then can they be compared."""
        return not any(_touches(path, failed) for path in paths for failed in self._failed)

    def section(self, node: Node, section: type[Any]) -> Any:
        """Return the section that the mapping `node` says, or `FAILED` when there is none to speak of."""
        if node.bad:
            return self._skip(node)
        if node.kind != "mapping" and not node.null:
            return self.refuse(node, f"must be a mapping (key: value), not {_kind(node)}{_colon_hint(node)}")
        keys, hints = keys_of(section), typing.get_type_hints(section)
        values: dict[str, Any] = {}
        for name, child in node.entries.items():
            if name not in keys:
                near = suggestion(name, keys) or f"; known here: {', '.join(keys)}"
                self.add(child.line, child.path, f"unknown key{near}")
                continue
            value = self.value(child, hints[name], keys[name][1])
            if value is not FAILED:
                values[name] = value
        required = [name for name, (_, facts) in keys.items() if facts.required]
        for name in [name for name in required if name not in node.entries and not node.incomplete]:
            self.add(node.line, node.path, f"{name} is missing: it is required here")
        if any(name not in values for name in required):
            return self._skip(node)
        return section(**values)

    def value(self, node: Node, hint: Any, facts: Key = _NEUTRAL) -> Any:
        """Return the value of `node` as the type `hint`, or `FAILED`."""
        if node.bad:
            return self._skip(node)
        hint = _without_none(hint)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in {Secret, Rate}:
            return self.section(node, hint)
        origin = typing.get_origin(hint)
        if origin is tuple:
            return self._list(node, typing.get_args(hint)[0], facts)
        if hint is Any:
            return self.free(node)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self._mapping(node, typing.get_args(hint)[1], facts)
        return self._scalar(node, hint, facts)

    def free(self, node: Node) -> Any:
        """Return the value of `node` where any value may stand: what JSON has, by YAML 1.2's rules."""
        if node.bad:
            return self._skip(node)
        if node.kind == "mapping":
            members = {name: self.free(child) for name, child in node.entries.items()}
            return {name: value for name, value in members.items() if value is not FAILED}
        if node.kind == "list":
            items = [self.free(item) for item in node.items]
            return [item for item in items if item is not FAILED]
        if (problem := _text_problem(node)) is not None:
            return self.refuse(node, problem)
        if not node.plain:
            return node.text
        try:
            return scalars.free(node.text)
        except ValueError as error:
            return self.refuse(node, str(error))

    def _list(self, node: Node, hint: Any, facts: Key) -> Any:
        if node.null and facts.empty:
            return ()
        if node.kind != "list":
            what = "is empty: it must be" if node.null else "must be"
            not_this = (
                "" if node.null else f", not {_kind(node)}: write each member on its own line after `- `"
            )
            return self.refuse(node, f"{what} a list{not_this}")
        if not node.items and not facts.empty:
            return self.refuse(node, "must not be empty: the list needs at least one member")
        values = [self.value(item, hint, facts) for item in node.items]
        return tuple(values) if FAILED not in values else self._skip(node)

    def _mapping(self, node: Node, hint: Any, facts: Key) -> Any:
        if node.null:
            return MappingProxyType({})
        if node.kind != "mapping":
            return self.refuse(node, f"must be a mapping (key: value), not {_kind(node)}{_colon_hint(node)}")
        values: dict[str, Any] = {}
        for name, child in node.entries.items():
            problem = facts.name_check(name) if facts.name_check else None
            if problem is not None:
                self.refuse(child, f"this name {problem}")
                continue
            member = Key(empty=True) if hint is str else _NEUTRAL
            values[name] = self.value(child, hint, member)
        return MappingProxyType({name: value for name, value in values.items() if value is not FAILED})

    def _scalar(self, node: Node, hint: Any, facts: Key) -> Any:
        wanted, convert = _reader_of(hint)
        if node.kind != "scalar":
            return self.refuse(node, f"must be {wanted}, not {_kind(node)}")
        if node.null:
            return self.refuse(node, f"is empty: it must be {wanted}; give it a value or remove the line")
        if (problem := _text_problem(node)) is not None:
            return self.refuse(node, problem)
        if node.plain and (name := scalars.trap(node.text)) is not None:
            fix = "put it in quotes" if hint is str or hint is Secret or hint is Path else "write it plainly"
            return self.refuse(
                node, f"is {name} to some readers and not to others: {fix}; it must be {wanted}"
            )
        try:
            value = convert(node, facts)
        except ValueError as error:
            return self.refuse(node, str(error), text=hint in {str, Secret, Path})
        if hint is Path:
            value = self.folder / value
        return value

    def _skip(self, node: Node) -> object:
        self._failed.add(node.path)
        return FAILED


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in {types.UnionType, typing.Union}:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _reader_of(hint: Any) -> tuple[str, Callable[[Node, Key], Any]]:
    """Return what a scalar of type `hint` is called, and what reads it (raises ValueError)."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return f"one of {', '.join(choices)}", lambda node, _: _choice(node, choices)
    readers: dict[Any, tuple[str, Callable[[Node, Key], Any]]] = {
        int: ("an integer", _integer),
        bool: ("a boolean: true or false", _boolean),
        str: ("a string", _string),
        Secret: ("a string", lambda node, facts: Secret(_string(node, facts))),
        Path: ("a path (string)", _string),
        timedelta: (units.DURATION, _duration),
        Size: (units.SIZE, _size),
        Rate: (units.RATE, lambda node, _: units.rate(node.text)),
    }
    return readers[hint]


def _choice(node: Node, choices: tuple[str, ...]) -> str:
    if node.text in choices:
        return node.text
    raise ValueError(f"must be one of {', '.join(choices)}{suggestion(node.text, choices)}")


def _integer(node: Node, facts: Key) -> int:
    span = facts.span()
    within = f" of {span}" if span else ""
    if not node.plain:
        raise ValueError(f"must be an integer{within}, not a string: remove the quotes")
    if not scalars.is_integer(node.text):
        raise ValueError(f"must be an integer{within}, not {_kind(node)}")
    # int() of thousands of digits is slow and then refused by Python itself.
    value = int(node.text) if len(node.text) <= 20 else int(node.text[:20])
    if (problem := facts.range_problem(value)) is not None:
        raise ValueError(problem)
    return value


def _boolean(node: Node, _: Key) -> bool:
    truth = scalars.boolean(node.text) if node.plain else None
    if truth is None:
        raise ValueError("must be a boolean: true or false, without quotes")
    return truth


def _string(node: Node, facts: Key) -> str:
    if node.plain and (kind := scalars.reads_as(node.text)) != "string":
        raise ValueError(f"must be a string, and YAML reads it as {kind}: put it in quotes")
    if not node.text and not facts.empty:
        raise ValueError("is empty: it must be a string; give it a value or remove the line")
    if facts.check is not None and (problem := facts.check(node.text)) is not None:
        raise ValueError(problem)
    return node.text


def _duration(node: Node, facts: Key) -> timedelta:
    span = units.duration(node.text)
    if (problem := facts.range_problem(span)) is not None:
        raise ValueError(problem)
    return span


def _size(node: Node, facts: Key) -> Size:
    count = units.size(node.text)
    if (problem := facts.range_problem(count, sizes=True)) is not None:
        raise ValueError(problem)
    return count


def _text_problem(node: Node) -> str | None:
    if "${" in node.text:
        name = node.path.rpartition(".")[2]
        if name.endswith("_env"):
            return f"{_INTERPOLATION}; write the variable's name alone: a *_env key looks it up"
        twin = f"for a value from the environment write {name}_env: NAME, where that key exists (a *_env key)"
        return f"{_INTERPOLATION}; {twin}"
    if "\0" in node.text:
        return "must not contain U+0000"
    if any("\ud800" <= character <= "\udfff" for character in node.text):
        return "must not contain half of a surrogate pair"
    return None


def _kind(node: Node) -> str:
    if node.kind != "scalar":
        return f"a {node.kind}"
    kind = scalars.reads_as(node.text) if node.plain else "string"
    return "a string" if kind == "string" else kind


def _colon_hint(node: Node) -> str:
    return "; put a space after the colon" if node.kind == "scalar" and ":" in node.text else ""


def _touches(path: str, failed: str) -> bool:
    shorter, longer = sorted((path, failed), key=len)
    return longer == shorter or (longer.startswith(shorter) and longer[len(shorter)] in ".[")
