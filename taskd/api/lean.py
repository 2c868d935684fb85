"""What of the web framework is never used here, and so not loaded: the pages that it shows to people.

Sanic imports the renderers of its debug pages and folder listings with itself, and with them some three
megabytes in each process. Every answer of taskd is JSON of its own making, the framework's refusals too.
"""

from __future__ import annotations

import sys
from types import ModuleType

PAGES = ("sanic.pages.error", "sanic.pages.directory_page")


class _LeftOut(ModuleType):
    """Stands for a module of which classes are imported and never made."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def leave_out_pages() -> None:
    """Put empty modules in the place of those pages; called before Sanic is imported."""
    for name in PAGES:
        sys.modules.setdefault(name, _LeftOut(name))
