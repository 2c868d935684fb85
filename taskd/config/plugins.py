"""Problems that a plugin finds in its own options, put at the lines of the file.

Plugins are loaded in child processes only; the child names a place inside the plugin's entry, and here
it becomes a place of the file.
"""

from __future__ import annotations

from collections.abc import Iterable

from taskd.config.read import Config
from taskd.errors import Problem


def plugin_problems(config: Config, found: Iterable[tuple[int, str, str]]) -> list[Problem]:
    """Return what plugins said, as problems of the file.

    Each of `found` is (number of the entry in `config.tree.plugins`, path inside it, message), the path
    as `module`, `config`, `config.api_key`, or empty. An option that the file gives as `api_key_file` or
    `api_key_env` is named so.
    """
    return [Problem(*_place(config, index, path), message) for index, path, message in found]


def _place(config: Config, index: int, path: str) -> tuple[int, str]:
    if not 0 <= index < len(config.tree.plugins):
        return 0, "plugins"
    entry = f"plugins[{index}]"
    if path in {"module", "name"} and f"{entry}.{path}" not in config.lines:
        path = "name" if path == "module" else "module"  # the entry says the other one of the two
    section, _, inside = path.partition(".")
    if section == "config" and inside:
        option, rest = _cut(inside)
        path = f"config.{config.tree.plugins[index].written.get(option, option)}{rest}"
    full = f"{entry}.{path}" if path else entry
    return config.where(full), full


def _cut(inside: str) -> tuple[str, str]:
    """Split `to[0].name` into the option and the rest."""
    ends = [place for place in (inside.find("."), inside.find("[")) if place >= 0]
    end = min(ends, default=len(inside))
    return inside[:end], inside[end:]
