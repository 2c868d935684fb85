"""Looks for known weaknesses: bandit over the code, pip-audit over what is locked.

`make audit` runs it. Exit status 1 when something was found. Where the list of known vulnerabilities
can't be reached, that is said in so many words and is no failure: it is no result either.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 120


def code() -> bool:
    """Run bandit; say what it finds from medium severity on, and whether that was nothing."""
    words = ["--quiet", "--recursive", "--configfile", "pyproject.toml", "--severity-level", "medium"]
    done = subprocess.run(
        [sys.executable, "-m", "bandit", *words, "taskd", "plugins/taskd_email"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    sys.stdout.write(done.stdout)
    print("bandit: " + ("nothing of medium or high severity" if done.returncode == 0 else "see above"))
    return done.returncode == 0


def packages() -> bool:
    """Run pip-audit; say what is vulnerable and what could not be looked up, and whether all is well."""
    words = ["--format", "json", "--disable-pip", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *words, "--requirement", "contrib/requirements.lock"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        print("pip-audit: NOT CHECKED. It got no answer from its list of vulnerabilities.")
        return True
    weak = [(one, each) for one in found for each in one.get("vulns", ())]
    for one, each in weak:
        print(f"pip-audit: {one['name']} {one['version']}: {each['id']}, mended in {each['fix_versions']}")
    unknown = [one["name"] for one in found if "skip_reason" in one]
    if len(unknown) == len(found):
        print(f"pip-audit: NOT CHECKED. None of the {len(found)} packages could be looked up from here.")
    elif unknown:
        print(f"pip-audit: not checked: {', '.join(unknown)}")
    if len(unknown) < len(found) and not weak:
        print(f"pip-audit: no known vulnerability in {len(found) - len(unknown)} packages")
    return not weak


if __name__ == "__main__":
    sys.exit(0 if all([code(), packages()]) else 1)
