"""Loads the statements of `sql/queries/` by their names.

A file holds statements, each under a header `-- name: NAME`. Comments are cut off here: psycopg looks
for placeholders in comments too. The files write the schema as `taskd.`; a process tree serves one
schema, so another name is put in once, at start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files

_NAME = re.compile(r"^-- name: ([a-z_]+)$", re.MULTILINE)
_COMMENT = re.compile(r"--[^\n]*")
_SCHEMA = re.compile(r"\btaskd\.")

DEFAULT_SCHEMA = "taskd"


def for_schema(sql: str, schema: str) -> str:
    """Return `sql` with the schema `taskd` replaced by `schema`, which is a plain lower-case name."""
    return sql if schema == DEFAULT_SCHEMA else _SCHEMA.sub(f"{schema}.", sql)


class Statements(Mapping[str, str]):
    """Statements by name, read at their first use. `use_schema` is called at most once, before that."""

    def __init__(self) -> None:
        self._schema = DEFAULT_SCHEMA
        self._texts: dict[str, str] = {}

    @property
    def schema(self) -> str:
        """The schema that this process works in."""
        return self._schema

    def use_schema(self, schema: str) -> None:
        """Work in `schema` from now on."""
        if schema != self._schema:
            self._schema = schema
            self._texts = {}

    def _load(self) -> dict[str, str]:
        if not self._texts:
            for file in files("taskd.sql.queries").iterdir():
                if file.name.endswith(".sql"):
                    parts = _NAME.split(file.read_text(encoding="utf-8"))
                    for name, text in zip(parts[1::2], parts[2::2], strict=True):
                        statement = for_schema(_COMMENT.sub("", text).strip().rstrip(";"), self._schema)
                        self._texts[name] = statement
        return self._texts

    def __getitem__(self, name: str) -> str:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


SQL = Statements()
