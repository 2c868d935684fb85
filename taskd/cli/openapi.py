"""`taskd openapi`: the description of the HTTP API, made from the code."""

from __future__ import annotations

import click

from taskd.cli.session import Command


@click.command("openapi", cls=Command)
def openapi() -> None:
    """Print the OpenAPI 3.1 document of the HTTP API, as GET /openapi.json answers it.

    It asks no server and reads no configuration.
    """
    from taskd.api.app import ROUTES
    from taskd.api.openapi import document
    from taskd.cli import show

    show.echo_json(document(ROUTES))
