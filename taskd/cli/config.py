"""`taskd check-config` and `taskd config`: the configuration file, judged and shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from taskd.cli.session import Command, Group, Session, json_option

if TYPE_CHECKING:
    from taskd.config.read import Config


@click.command("check-config", cls=Command)
@click.argument("file", metavar="[FILE]", required=False, type=click.Path())
@json_option
@click.pass_obj
def check_config(session: Session, /, file: str | None) -> None:
    """Check a configuration and its plugins.

    Nothing is connected to. Each problem is a line FILE:LINE: PATH: MESSAGE on stderr. Exits with 0 or 78.
    """
    from taskd.cli import plugins, show

    if file is not None:
        session.file = file
    config = session.config(need_admin=True)
    registry, warnings = plugins.load(config, session.environ)
    if session.json:
        show.echo_json(
            {
                "file": config.file,
                "types": sorted(registry.infos),
                "warnings": [*config.warnings, *warnings],
                "digest": config.digest,
            }
        )
        return
    for warning in (*config.warnings, *warnings):
        click.echo(f"{config.file}: warning: {warning}", err=True)
    click.echo(f"{config.file}: fine; {len(registry.infos)} job types: {', '.join(sorted(registry.infos))}")


@click.group("config", cls=Group)
def config() -> None:
    """Show the configuration."""


@config.command("example")
def example() -> None:
    """Print a configuration with every key, its default and what it does."""
    from taskd.config.example import example

    click.echo(example(), nl=False)


@config.command("show")
@click.option("--sources", is_flag=True, help="Also say where each value comes from.")
@json_option
@click.pass_obj
def show_(session: Session, /, sources: bool) -> None:
    """Print every key of the configuration in force; secrets are masked."""
    from taskd.cli import show

    config = session.config()
    found = list(_members(config))
    if session.json:
        show.echo_json([{"path": path, "value": value, "source": source} for path, value, source in found])
    elif sources:
        show.echo_table(["key", "value", "source"], found)
    else:
        show.echo_table(["key", "value"], [row[:2] for row in found])


def _members(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield path, value as YAML, and `FILE:LINE` or `default` of each key."""
    for path, value, hint in _walk("", config.tree):
        source = f"{config.file}:{config.lines[path]}" if path in config.lines else "default"
        if path == "database.url" and config.tree.database.source not in (None, "url"):
            source = f"database.{config.tree.database.source}"
        yield path, _shown(path, value, hint), source


def _walk(path: str, section: Any) -> Iterator[tuple[str, Any, Any]]:
    import typing

    from taskd.config.keys import KEY

    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        if KEY not in field.metadata:
            continue
        value = getattr(section, field.name)
        here = f"{path}.{field.name}" if path else field.name
        if _is_section(value):
            yield from _walk(here, value)
        elif isinstance(value, tuple) and any(map(_is_section, value)):
            for index, member in enumerate(value):
                yield from _walk(f"{here}[{index}]", member)
        elif isinstance(value, Mapping) and any(map(_is_section, value.values())):
            for name, member in value.items():
                yield from _walk(f"{here}.{name}", member)
        elif isinstance(value, Mapping) and here.endswith((".config", ".options", ".env")):
            for name, member in value.items():
                yield f"{here}.{name}", member, None
        elif value is not None:
            yield here, value, hints[field.name]


def _shown(path: str, value: Any, hint: Any) -> str:
    from taskd.config.example import show
    from taskd.config.secret import Secret, is_secret_option
    from taskd.obs.redact import MASK

    if isinstance(value, Secret) or is_secret_option(path.rpartition(".")[2], value):
        return MASK
    if isinstance(value, list):
        value = tuple(value)
    return show(value, hint)


def _is_section(value: Any) -> bool:
    from taskd.config.secret import Secret
    from taskd.config.units import Rate

    return dataclasses.is_dataclass(value) and not isinstance(value, Secret | Rate)
