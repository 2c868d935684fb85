"""Secrets to their places: which source is in force, what it holds, and whether that can be used.

A `*_env` key whose variable is not set counts as absent. Sources of one secret: YAML, a file, a variable;
two in force are refused, because nobody could say which one an outage at night is about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from taskd.config import checks
from taskd.config.convert import Converter
from taskd.config.nodes import Node, join
from taskd.config.secret import (
    MIN_PEPPER,
    Secret,
    is_secret_option,
    read_secret_file,
    show_variable,
    text_of,
    token_problem,
    variable_problem,
)
from taskd.config.tree import Admin, Database, Keys, PluginEntry, Tree


class Resolver:
    """Fills in what several keys of the file come to; used once for one file."""

    def __init__(
        self, converter: Converter, *, root: Node, env: Mapping[str, str], need_admin: bool, need_pepper: bool
    ) -> None:
        self.warnings: list[str] = []
        self._to = converter
        self._root = root
        self._env = env
        self._need_admin = need_admin
        self._need_pepper = need_pepper

    def resolve(self, tree: Tree) -> Tree:
        """Return `tree` with its secrets in place."""
        plugins = tuple(self._plugin(index, entry) for index, entry in enumerate(tree.plugins))
        return dataclasses.replace(
            tree,
            database=self._database(tree.database),
            admin=self._admin(tree.admin),
            keys=self._keys(tree.keys),
            plugins=plugins,
        )

    def literal_secrets(self, tree: Tree) -> list[tuple[int, str]]:
        """Return line and path of each secret that the file holds itself."""
        found = [self._node("admin", "token")]
        for name in ("url", "listen_url"):
            node = self._node("database", name)
            found.append(node if node is not None and _holds_password(node.text) else None)
        for index, _ in enumerate(tree.plugins):
            config = self._node("plugins", index, "config")
            members = config.entries.items() if config is not None else ()
            found += [node for name, node in members if is_secret_option(name, node.text)]
        for job_type in self._members("job_types"):
            for part in ("env", "options"):
                inside = job_type.entries.get(part)
                members = inside.entries.items() if inside is not None else ()
                found += [node for name, node in members if is_secret_option(name, node.text)]
        return sorted(
            (node.line, node.path) for node in found if node is not None and node.text and not node.null
        )

    def _database(self, database: Database) -> Database:
        given = {"url": database.url, "url_file": database.url_file, "url_env": database.url_env}
        source = self._one_source("database", given)
        if source is None or source == "url":
            if database.url is not None and self._to.fine("database.url"):
                self._warn_plain(database.url.value)
            return dataclasses.replace(database, source=source)
        url = self._fetch("database", source, given[source], _line_of_text)
        if url is None:
            return database
        problem = "is empty" if not url else checks.database_url(url)
        if problem is not None:
            self._refuse("database", source, f"names a URL that {problem}")
            return database
        self._warn_plain(url)
        return dataclasses.replace(database, url=Secret(url), source=source)

    def _warn_plain(self, url: str) -> None:
        if checks.travels_plain(url):
            self.warnings.append(
                "the database URL leads over a network without TLS: add sslmode=verify-full to it"
            )

    def _admin(self, admin: Admin) -> Admin:
        if admin.token is not None and (problem := token_problem(admin.token.value)) is not None:
            self._refuse("admin", "token", problem)
        given = {"token": admin.token, "token_file": admin.token_file, "token_env": admin.token_env}
        source = self._one_source("admin", given)
        if not self._need_admin:
            tokens = (admin.token,) if admin.token is not None else ()
            return dataclasses.replace(admin, tokens=tokens)
        if source is None:
            self._say_missing_token(admin)
            return admin
        if source == "token" and admin.token is not None:
            return dataclasses.replace(admin, tokens=(admin.token,), source=source)
        text = self._fetch("admin", source, given[source], _decoded)
        if text is None:
            return admin
        lines = text.splitlines() if source == "token_file" else [text]
        problem = "must hold one token, or two lines while it is rotated" if len(lines) > 2 else None
        problem = problem or next(filter(None, map(token_problem, lines or [""])), None)
        if problem is not None:
            what = "names a file whose token" if source == "token_file" else "names a variable whose token"
            self._refuse("admin", source, f"{what} {problem}")
            return admin
        return dataclasses.replace(admin, tokens=tuple(map(Secret, lines)), source=source)

    def _say_missing_token(self, admin: Admin) -> None:
        fix = "set exactly one of token_file, token_env and token"
        written = self._root.entries.get("admin")
        if self._root.incomplete or (written is not None and (written.bad or written.incomplete)):
            return
        if not all(self._to.fine(f"admin.{name}") for name in ("token", "token_file", "token_env")):
            return
        if admin.token_env is not None:
            variable = show_variable(admin.token_env)
            self._refuse(
                "admin", "token_env", f"the admin token is missing: {variable} is not set; set it, or {fix}"
            )
        elif written is not None:
            self._to.add(written.line, "admin", f"token is missing: {fix}")
        else:
            self._to.add(0, "admin", f"the admin section with its token is missing and required: {fix}")

    def _keys(self, keys: Keys) -> Keys:
        if not self._need_pepper:
            return keys
        if keys.pepper_file is None:
            if self._to.fine("keys"):
                self.warnings.append("keys.pepper_file is not set: API keys are stored as plain SHA-256")
            return keys
        pepper = self._fetch("keys", "pepper_file", keys.pepper_file, lambda content: content)
        if pepper is not None and len(pepper) < MIN_PEPPER:
            fix = "openssl rand -hex 32"
            self._refuse(
                "keys", "pepper_file", f"names a pepper of less than {MIN_PEPPER} bytes; make one: {fix}"
            )
            return keys
        return dataclasses.replace(keys, pepper=pepper)

    def _plugin(self, index: int, entry: PluginEntry) -> PluginEntry:
        """Resolve `X_file` and `X_env` of a plugin's options to `X`, and remember how each was written."""
        if not entry.enabled:
            return entry
        options: dict[str, Any] = {}
        written: dict[str, str] = {}
        node = self._node("plugins", index, "config")
        for name, value in entry.config.items():
            base, form = _split(name)
            if form and isinstance(value, str):
                value = self._option(node.entries[name] if node is not None else None, form, value)
                if value is None:
                    continue
            elif form and node is not None:
                kind = "the path of a file" if form == "_file" else "the name of an environment variable"
                self._to.refuse(node.entries[name], f"must be a string: {kind} that holds the option {base}")
                continue
            if base in options and node is not None:
                message = f"sets the option {base} beside {written[base]}: exactly one may be in force"
                self._to.refuse(node.entries[name], message)
                continue
            options[base], written[base] = value, name
        return dataclasses.replace(entry, config=MappingProxyType(options), written=MappingProxyType(written))

    def _option(self, node: Node | None, form: str, value: str) -> str | None:
        if node is None:
            return None
        try:
            if form == "_env":
                if (problem := variable_problem(value)) is not None:
                    raise ValueError(problem)
                return self._env.get(value)
            if not value:
                raise ValueError("is empty: it must be the path of a file")
            return text_of(read_secret_file(self._to.folder / value, self._env))
        except ValueError as error:
            self._to.refuse(node, str(error))
            return None

    def _one_source(self, section: str, given: Mapping[str, Any]) -> Any:
        """Return the one key of `given` that is in force; None for none, or when they can't be used."""
        in_force = [name for name, value in given.items() if value is not None]
        for name in [name for name in in_force if name.endswith("_env")]:
            if (problem := variable_problem(given[name])) is not None:
                self._refuse(section, name, problem)
            if given[name] not in self._env:
                in_force.remove(name)
        if len(in_force) > 1:
            in_force.sort(key=lambda name: self._line(section, name))
            which = ", ".join(f"{name} (line {self._line(section, name)})" for name in in_force)
            message = f"exactly one of {', '.join(given)} may be in force, not {which}: keep only one"
            self._to.add(self._line(section), section, message)
            for name in in_force[1:]:
                self._refuse(
                    section,
                    name,
                    f"is a second source beside {in_force[0]}: exactly one may be in force, keep only one",
                )
            return None
        return in_force[0] if in_force and self._to.fine(f"{section}.{in_force[0]}") else None

    def _fetch(self, section: str, name: str, value: Any, convert: Callable[[bytes], Any]) -> Any:
        """Return what the file or variable that a key names holds; None after writing down why not."""
        if name.endswith("_env"):
            return self._env[value].strip("\r\n")
        try:
            return convert(read_secret_file(value, self._env))
        except ValueError as error:
            self._refuse(section, name, str(error))
            return None

    def _refuse(self, section: str, name: str, message: str) -> None:
        node = self._node(section, name)
        if node is not None:
            self._to.refuse(node, message, text=True)
        else:
            self._to.add(0, join(section, name), message)

    def _node(self, *way: str | int) -> Node | None:
        node: Node | None = self._root
        for step in way:
            if node is None:
                return None
            if isinstance(step, int):
                node = node.items[step] if step < len(node.items) else None
            else:
                node = node.entries.get(step)
        return node

    def _line(self, *way: str) -> int:
        node = self._node(*way)
        return node.line if node is not None else 0

    def _members(self, section: str) -> list[Node]:
        node = self._node(section)
        return list(node.entries.values()) if node is not None else []


def _split(name: str) -> tuple[str, str]:
    for form in ("_file", "_env"):
        if name.endswith(form) and len(name) > len(form):
            return name.removesuffix(form), form
    return name, ""


def _line_of_text(content: bytes) -> str:
    return text_of(content).strip(" \t")


def _decoded(content: bytes) -> str:
    # What is not UTF-8 stays visible as non-ASCII, and the token's own check refuses it.
    return content.decode("utf-8", "replace").removeprefix("\ufeff")


def _holds_password(url: str) -> bool:
    try:
        return checks.has_password(url)
    except ValueError:
        return True
