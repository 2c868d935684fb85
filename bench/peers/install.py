"""Puts the packages of a peer into a cache folder with the ordinary clients, npm and pip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NODE = "24.21.0"
"""Of Node.js, from the registry's package `node`: current graphile-worker and pg-boss want 22.18 or later,
and the system's own may be older."""

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0

# few retries: without a network the peers are soon told to be unavailable
_NPM = ("--save-exact", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=30000")
_PIP = ("--no-input", "--disable-pip-version-check", "--retries=1", "--timeout=30")


class Unavailable(Exception):
    """A peer can't be measured here; its message says why."""


def default_cache() -> Path:
    """Return the folder of the packages: `$XDG_CACHE_HOME/taskd-bench`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taskd-bench"


def command(
    cache: Path, folder: str, packages: Sequence[str], program: str
) -> tuple[list[str], dict[str, str]]:
    """Return how to run `program` with `packages` (command, environment), installed first if need be.

    `program` is a file of bench/peers/js, which Node.js runs, or else a module of bench/programs.

    Raises:
        Unavailable: something could not be installed; the message says what.
    """
    if program.endswith(".cjs"):
        modules = node_packages(cache, folder, packages)
        script = ROOT / "bench" / "peers" / "js" / program
        return [str(node_runtime(cache)), str(script)], {"NODE_PATH": str(modules), "NODE_ENV": "production"}
    python = python_packages(cache, folder, packages)
    return [str(python), "-m", f"bench.programs.{program}"], {"PYTHONPATH": str(ROOT)}


def node_runtime(cache: Path) -> Path:
    """Return the executable of Node.js, installed first if need be.

    Raises:
        Unavailable: it could not be installed.
    """
    executable = node_packages(cache, f"node-{NODE}", [f"node@{NODE}"]) / "node" / "bin" / "node"
    if not executable.exists():
        raise Unavailable("the package `node` did not bring its executable")
    return executable


def node_packages(cache: Path, folder: str, packages: Sequence[str]) -> Path:
    """Return the `node_modules` with `packages` (each `name@version`), installed first if need be.

    Raises:
        Unavailable: npm is missing or failed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed")
    home = cache / folder
    if not _complete(home, packages):
        home.mkdir(parents=True)
        _run(f"npm install {' '.join(packages)}", [npm, "install", "--prefix", str(home), *_NPM, *packages])
        _note(home, packages)
    return home / "node_modules"


def python_packages(cache: Path, folder: str, packages: Sequence[str]) -> Path:
    """Return the interpreter of a virtual environment with `packages`, made first if need be.

    Raises:
        Unavailable: it could not be made or pip failed.
    """
    home = cache / folder
    python = home / "bin" / "python"
    if not _complete(home, packages):
        _run("python -m venv", [sys.executable, "-m", "venv", str(home)])
        _run(f"pip install {' '.join(packages)}", [str(python), "-m", "pip", "install", *_PIP, *packages])
        _note(home, packages)
    return python


def _complete(home: Path, packages: Sequence[str]) -> bool:
    """Whether `home` holds exactly these packages; what is there of others or half installed is removed."""
    note = home / ".complete"
    if note.is_file() and note.read_text() == "\n".join(packages):
        return True
    shutil.rmtree(home, ignore_errors=True)
    return False


def _note(home: Path, packages: Sequence[str]) -> None:
    (home / ".complete").write_text("\n".join(packages))


def _run(what: str, command: Sequence[str]) -> None:
    """Run an installer to its end. Neither its own words nor folders are told: reports are published."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise Unavailable(f"{what}: {type(problem).__name__}") from problem
    if done.returncode:
        raise Unavailable(f"{what} failed with exit status {done.returncode}")
