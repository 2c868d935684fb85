"""YAML text to nodes that know their line, without any of YAML's surprises.

PyYAML only cuts the text into events; what it would make of them is never asked (it keeps the last of
two equal keys, makes `no` False and `10:30` 630, and builds what an anchor or a tag says). Nodes hold
source text. Everything refused here is refused by its name, and reading goes on as long as the syntax
holds, so that one run shows all that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import yaml

from taskd.config.scalars import is_null, reads_as
from taskd.config.syntax import MarkedLoader, syntax_problems
from taskd.errors import Problem

MAX_DEPTH = 80
"""Levels of nesting: a payload may have 64 of its own (SPEC part 3)."""
MAX_VALUES = 50_000
"""Keys and values of a file; more takes seconds to read and is no configuration."""

# What YAML forbids, and what would be a line break, a hidden mark or half a character to some readers.
_FORBIDDEN = re.compile(
    "[^\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)


@dataclass(slots=True)
class Node:
    """One value of the file: a scalar's source text, or what a mapping or a list holds."""

    kind: Literal["scalar", "mapping", "list"]
    path: str
    line: int
    text: str = ""
    plain: bool = False
    """A scalar without quotes: YAML would guess its type."""
    cut: bool = False
    """A comment follows a scalar without quotes: a part of the value may be meant to be in it."""
    bad: bool = False
    """Already refused: nothing more is said about it."""
    incomplete: bool = False
    """A key or a part of this mapping was refused: what it lacks may stand there."""
    entries: dict[str, Node] = field(default_factory=dict)
    items: list[Node] = field(default_factory=list)

    @property
    def null(self) -> bool:
        """Whether the key stands there without a value."""
        return self.kind == "scalar" and self.plain and is_null(self.text)


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not come yet; `key` waits for its value."""

    node: Node
    key: str | None = None
    key_line: int = 0
    key_ok: bool = False
    is_key: bool = False
    """A mapping or list in the place of a key; refused, read to its end and dropped."""


def compose(text: str) -> tuple[Node | None, list[Problem]]:
    """Return the top node of the one document in `text`, and every problem met on the way.

    The node is None when the text can't be read to its end, or is empty.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    problems = list(_forbidden(text))
    if problems:
        return None, problems
    return _Composer(text).compose()


def join(path: str, key: str) -> str:
    """Return the path of `key` inside `path`, fit for a terminal whatever the key holds.

    >>> join("api", "port")
    'api.port'
    """
    shown = key if key.isprintable() else key.encode("unicode_escape", "backslashreplace").decode()
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return f"{path}.{shown}" if path and shown else path or shown


def _forbidden(text: str) -> Iterator[Problem]:
    for number, line in enumerate(text.split("\n"), start=1):
        match = _FORBIDDEN.search(line)
        if match:
            code = f"U+{ord(match[0]):04X}"
            yield Problem(number, "", f"character {code} is not allowed in the file; remove it")


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 0


class _Composer:
    """Builds the nodes of one text; used once."""

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._loader = MarkedLoader(text)
        self._problems: list[Problem] = []
        self._open: list[_Open] = []
        self._root: Node | None = None
        self._values = 0

    def compose(self) -> tuple[Node | None, list[Problem]]:
        try:
            complete = self._read()
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            self._problems += syntax_problems(error, self._loader, self._lines)
            complete = False
        if not complete:
            return None, self._problems
        if self._root is None or self._root.null:
            self._problems.append(Problem(1, "", "the file is empty: it needs at least the admin section"))
            return None, self._problems
        return self._root, self._problems

    def _read(self) -> bool:
        documents = 0
        while self._loader.check_event():
            event = self._loader.get_event()  # type: ignore[no-untyped-call]
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    line = _line(event)
                    self._refuse(line, "", "a second document begins here: the file must hold one document")
                    if self._root is not None:
                        self._root.incomplete = True
                    return True
            elif isinstance(event, yaml.NodeEvent):
                if not self._take(event):
                    return False
            elif isinstance(event, yaml.CollectionEndEvent):
                self._close()
        return True

    def _take(self, event: yaml.NodeEvent) -> bool:
        """Add one event to the open nodes; False when the rest of the file is not worth reading."""
        line = _line(event)
        self._values += 1
        if self._values > MAX_VALUES:
            self._refuse(0, "", f"the file is too large: it has more than {MAX_VALUES} keys and values")
            return False
        if len(self._open) >= MAX_DEPTH and isinstance(event, yaml.CollectionStartEvent):
            outermost = self._open[0].key or ""
            self._refuse(line, outermost, f"is nested too deep: more than {MAX_DEPTH} levels")
            return False
        if self._expects_key():
            self._take_key(event, line)
            return True
        node = self._node(event, line, self._next_path())
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append(_Open(node))
        else:
            self._attach(node)
        return True

    def _expects_key(self) -> bool:
        return bool(self._open) and self._open[-1].node.kind == "mapping" and self._open[-1].key is None

    def _next_path(self) -> str:
        if not self._open:
            return ""
        top = self._open[-1]
        if top.node.kind == "list":
            return f"{top.node.path}[{len(top.node.items)}]"
        return join(top.node.path, top.key or "")

    def _take_key(self, event: yaml.NodeEvent, line: int) -> None:
        top = self._open[-1]
        top.key_line, top.key_ok = line, False
        node = self._node(event, line, top.node.path)
        if isinstance(event, yaml.CollectionStartEvent):
            self._refuse(line, top.node.path, "a key must be a string, not a mapping or a list (complex key)")
            node.bad = True
            self._open.append(_Open(node, is_key=True))
            top.node.incomplete = True
            return
        top.key = node.text
        if node.bad:
            top.node.incomplete = True
        elif node.plain and node.text == "<<":
            self._refuse(line, "", "a merge key (<<) is not supported: write the keys out")
        elif node.null:
            self._refuse(line, top.node.path, "a key must be a string, and this one is empty (null)")
        elif node.plain and (kind := reads_as(node.text)) != "string":
            message = f"a key must be a string, and YAML reads this one as {kind}: put it in quotes"
            self._refuse(line, join(top.node.path, node.text), message)
        elif node.text in top.node.entries:
            first = top.node.entries[node.text].line
            message = f"duplicate key: it is already set in line {first}; remove one of the two"
            self._refuse(line, join(top.node.path, node.text), message)
        else:
            top.key_ok = True
        top.node.incomplete |= not (top.key_ok or node.text in top.node.entries)

    def _node(self, event: yaml.NodeEvent, line: int, path: str) -> Node:
        node = Node(kind="scalar", path=path, line=line)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(line, "", "an alias (*name) is not supported: write the value out, or quote it")
            node.bad = True
            return node
        if event.anchor is not None:
            self._refuse(line, "", "an anchor (&name) is not supported: remove it, or quote the value")
        if isinstance(event, yaml.ScalarEvent):
            node.text, node.plain = event.value, event.style is None
            node.cut = node.plain and self._comment_follows(event)
        elif isinstance(event, yaml.MappingStartEvent):
            node.kind = "mapping"
        else:
            node.kind = "list"
        if getattr(event, "tag", None) is not None:
            self._refuse(line, "", "a tag (!name, !!name) is not supported: remove it, or quote the value")
            node.bad = True
        return node

    def _comment_follows(self, event: yaml.ScalarEvent) -> bool:
        mark = event.end_mark
        if mark is None:
            return False
        line = self._lines[mark.line] if mark.line < len(self._lines) else ""
        return line[mark.column :].lstrip().startswith("#")

    def _close(self) -> None:
        closed = self._open.pop()
        if closed.is_key:
            self._open[-1].key = ""  # a complex key: its value comes next and is dropped
            return
        self._attach(closed.node)

    def _attach(self, node: Node) -> None:
        if not self._open:
            self._root = node
            return
        top = self._open[-1]
        if top.node.kind == "list":
            top.node.items.append(node)
            return
        if top.key_ok and top.key is not None:
            node.line = top.key_line
            top.node.entries[top.key] = node
        top.key = None

    def _refuse(self, line: int, path: str, message: str) -> None:
        self._problems.append(Problem(line, path, message))
