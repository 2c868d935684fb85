"""The pages of the manual as the tests read them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def text(name: str) -> str:
    """Return the page `name`, by its path in the checkout."""
    return (ROOT / name).read_text(encoding="utf-8")


def whole() -> str:
    """Return all pages, one after the other."""
    return "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


def blocks(name: str, language: str) -> list[str]:
    """Return the code blocks of a page that are marked as `language`."""
    return [body for kind, body in _FENCE.findall(text(name)) if kind == language]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as people's viewers make them."""
    plain = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {_slug(heading) for heading in _HEADING.findall(plain)}


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def _slug(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return kept.strip().replace(" ", "-")
