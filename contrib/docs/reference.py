"""Makes the pages of docs/reference/ that the code itself knows, and the state diagram of the manual.

`make docs-reference` writes them; a test compares them with what the code says now.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
HOW_IT_WORKS = ROOT / "docs" / "how-it-works.md"

_MADE = "<!-- Made by `make docs-reference`; change the code and make it again. -->\n\n"
_BEGIN, _END = "<!-- moves: made by `make docs-reference` -->\n", "<!-- end of moves -->"


def configuration() -> str:
    """Return the page of all keys of the configuration."""
    from taskd.config.example import rows

    parts = [
        "# Configuration keys\n\n",
        _MADE,
        "How to write the file: [Configure](../start/configure.md).\n",
        "A change takes effect at the next start.\n",
    ]
    sections: dict[str, list[Any]] = defaultdict(list)
    for row in rows():
        sections[re.split(r"[.\[]", row.path)[0]].append(row)
    for name, members in sections.items():
        parts.append(f"\n## {name}\n\n{_section_text(name)}\n\n")
        parts.append("| Key | Default | Range | Meaning |\n|---|---|---|---|\n")
        for row in members:
            default = "required" if row.default == "required" else f"`{row.default}`" if row.default else "–"
            text = row.text.replace("|", "\\|")
            parts.append(f"| `{row.path}` | {default} | {row.range or '–'} | {text} |\n")
    return "".join(parts)


def _section_text(name: str) -> str:
    import typing

    from taskd.config.tree import Tree

    hint: Any = typing.get_type_hints(Tree)[name]
    while not inspect.isclass(hint) or typing.get_origin(hint):
        inner = [one for one in typing.get_args(hint) if one is not type(None) and one is not Ellipsis]
        hint = inner[-1]
    text = (hint.__doc__ or "").splitlines()[0].partition(" - ")[2]
    return text[:1].upper() + text[1:]


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """Yield every command and group as people type it, parents first."""
    from taskd.cli import main

    settings = {**main.context_settings, "terminal_width": 100, "max_content_width": 100}
    root = click.Context(main, info_name="taskd", **settings)
    yield from _walk("taskd", main, root)


def _walk(
    path: str, command: click.Command, context: click.Context
) -> Iterator[tuple[str, click.Command, click.Context]]:
    yield path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                inside = click.Context(
                    inner, parent=context, info_name=name, max_content_width=100, terminal_width=100
                )
                yield from _walk(f"{path} {name}", inner, inside)


def command_line() -> str:
    """Return the page of all commands."""
    parts = ["# Commands\n\n", _MADE, "What `--help` says, for every command.\n"]
    for path, command, context in commands():
        parts.append(f"\n## {path}\n\n```text\n{command.get_help(context)}\n```\n")
    return "".join(parts)


def hooks() -> str:
    """Return the page of all hooks, from their docstrings."""
    from taskd.plugin import API_VERSION, Hooks

    parts = [
        "# Hooks\n\n",
        _MADE,
        f"Plugin API version {API_VERSION}. How to write a plugin: [Plugins](../plugins/write.md).\n\n",
        _text(Hooks),
    ]
    for name, function in vars(Hooks).items():
        if name.startswith("taskd_"):
            signature = inspect.signature(function)
            shown = ", ".join(one for one in signature.parameters if one != "self")
            parts.append(f"\n\n## {name}({shown})\n\n{_text(function)}")
    return "".join(parts) + "\n"


def _text(documented: object) -> str:
    return inspect.getdoc(documented) or ""


def diagram() -> str:
    """Return the moves of a job as a mermaid diagram."""
    from taskd.model.state import MOVES, State

    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.SCHEDULED}: submit, due later"]
    lines.append(f"    [*] --> {State.PENDING}: submit, due now")
    for (state, event), targets in MOVES.items():
        for target in sorted(targets):
            lines.append(f"    {state} --> {target}: {event}")
    lines += [f"    {state} --> [*]" for state in State if state.final]
    return "\n".join([*lines, "```"]) + "\n"


def with_diagram(page: str) -> str:
    """Return the page with the diagram of now between its two marks."""
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}{diagram()}{_END}{after}"


def pages() -> dict[Path, str]:
    """Return what each made page must be."""
    return {
        REFERENCE / "configuration.md": configuration(),
        REFERENCE / "cli.md": command_line(),
        REFERENCE / "hooks.md": hooks(),
        HOW_IT_WORKS: with_diagram(HOW_IT_WORKS.read_text(encoding="utf-8")),
    }


def main() -> int:
    """Write the pages that changed and name them."""
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
