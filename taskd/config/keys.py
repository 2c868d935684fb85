"""How a section declares its keys: one field is the whole truth of a key.

The reader, `conf/taskd.yaml` and the manual are all made from the fields; the docstring under a field is
its one comment line. Ranges are written as in YAML (`min="5s"`) and become values of the field's type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final

from taskd.config.units import Size, duration, show_duration, show_size, size

KEY: Final = "taskd.key"
"""Where a field's metadata holds its `Key`; a field without one is made by the reader, not read."""

REQUIRED: Final = object()
"""A default that does not exist: the file must give the key."""

Check = Callable[[Any], str | None]
"""Returns why a value can't be used, without repeating it, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is known of a key beside its type, default and docstring."""

    min: int | timedelta | None = None
    max: int | timedelta | None = None
    check: Check | None = None
    """Of the value, or of each member of a list or mapping."""
    name_check: Check | None = None
    """Of each name in a mapping."""
    secret: bool = False
    restart: bool = False
    """A reload can't change it."""
    empty: bool = False
    """An empty string or list is a value."""
    required: bool = False
    example: str = ""
    """YAML that the example file shows where there is no default."""

    def range_problem(self, value: int | timedelta, *, sizes: bool = False) -> str | None:
        """Return why `value` is out of range, in the words of the file, or None."""
        low, high = self.min, self.max
        if (low is not None and value < low) or (high is not None and value > high):  # type: ignore[operator]
            return f"must be {self.span(sizes=sizes)}{self._zero(value)}"
        return None

    def span(self, *, sizes: bool = False) -> str:
        """Return the range as people read it: `1 to 65535`, `5s to 1h`; empty when there is none."""
        if self.min is None or self.max is None:
            return ""
        return f"{_show(self.min, sizes)} to {_show(self.max, sizes)}"

    def _zero(self, value: int | timedelta) -> str:
        nothing = timedelta(0) if isinstance(value, timedelta) else 0
        low = self.min
        return " (greater than 0)" if value <= nothing and low is not None and low > nothing else ""  # type: ignore[operator]


def key(
    default: Any,
    *,
    min: int | str | None = None,
    max: int | str | None = None,
    check: Check | None = None,
    name_check: Check | None = None,
    secret: bool = False,
    restart: bool = False,
    empty: bool = False,
    example: str = "",
) -> Any:
    """Declare a key of a section; `default` is None for a key that may be absent, `{}` for an empty mapping.

    `min` and `max` are both inside the range. `default=REQUIRED` makes the key required.
    """
    facts = Key(
        min=_limit(min),
        max=_limit(max),
        check=check,
        name_check=name_check,
        secret=secret,
        restart=restart,
        empty=empty,
        required=default is REQUIRED,
        example=example,
    )
    metadata = {KEY: facts}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=_nothing, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def made(default: Any) -> Any:
    """Declare a field that the reader fills in: no key of the file has its name."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=_nothing)
    return dataclasses.field(default=default)


def keys_of(section: type[Any]) -> dict[str, tuple[dataclasses.Field[Any], Key]]:
    """Return the keys of a section in the order of the file."""
    fields = dataclasses.fields(section)
    return {field.name: (field, field.metadata[KEY]) for field in fields if KEY in field.metadata}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default, or `REQUIRED`."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING else field.default


def _nothing() -> MappingProxyType[str, Any]:
    return MappingProxyType({})


def _limit(text: int | str | None) -> int | timedelta | None:
    if not isinstance(text, str):
        return text
    return size(text) if text.endswith("B") else duration(text)


def _show(value: int | timedelta, sizes: bool) -> str:
    if isinstance(value, timedelta):
        return show_duration(value)
    return show_size(Size(value)) if sizes else str(value)
