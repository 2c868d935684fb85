"""Writes contrib/requirements.lock: what taskd needs, each in one version with the hashes of its files.

`make lock` runs it. The versions are those of .venv, which the tests ran with; a system is installed from
it with `pip install --require-hashes -r contrib/requirements.lock`. No index is named in it: whoever
installs takes the files from where he trusts, and the hashes tell whether they are the right ones.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "contrib/requirements.lock"
HEAD = "# Made by `make lock`: every package that taskd needs, with the embedded PostgreSQL, by hash.\n"


def main() -> int:
    """Resolve within the versions that are installed, and write the file."""
    frozen = subprocess.run(
        [ROOT / ".venv/bin/python", "-m", "pip", "freeze", "--exclude-editable"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        constraints, out = Path(folder, "installed.txt"), Path(folder, "lock.txt")
        constraints.write_text(frozen)
        words = ["--quiet", "--generate-hashes", "--allow-unsafe", "--strip-extras", "--no-annotate"]
        words += ["--no-header", "--no-emit-index-url", "--no-emit-trusted-host", "--no-emit-find-links"]
        words += ["--extra", "embedded", "--constraint", str(constraints), "--output-file", str(out)]
        subprocess.run(
            [sys.executable, "-m", "piptools", "compile", *words, "setup.cfg"], check=True, cwd=ROOT
        )
        lines = out.read_text().splitlines(keepends=True)
        LOCK.write_text(HEAD + "".join(line for line in lines if line.strip() and not line.startswith("#")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
