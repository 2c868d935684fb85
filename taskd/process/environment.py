"""The environment that job children get: enough to find programs, nothing that is a secret."""

from __future__ import annotations

import os
from collections.abc import Mapping

NODE_VARIABLE = "TASKD_NODE"
"""Names the node in all that runs its jobs, commands too: leftovers are recognised by it."""

_KEPT = frozenset({"PATH", "HOME", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV"})


def child_env(environ: Mapping[str, str], node: str) -> dict[str, str]:
    """Return what a job child of `node` sees of the supervisor's `environ`, and `TASKD_NODE`.

    The list names what is kept, so that a `DATABASE_URL` or a variable nobody thought of stays out.
    Without a PATH the system's default path is given.
    """
    kept = {name: value for name, value in environ.items() if name in _KEPT or name.startswith("LC_")}
    kept.setdefault("PATH", os.defpath)
    kept[NODE_VARIABLE] = node
    return kept
