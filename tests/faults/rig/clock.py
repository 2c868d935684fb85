"""A wall clock of its own for a unit under test, that jumps and drifts: libfaketime, if it is installed.

Only the wall clock is false; the monotonic clocks stay true, as on a host whose clock somebody sets.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.faults.rig.keeper import ROOT

CACHE_S = 1
"""A process notices a change of its clock within this, in seconds."""

# It takes part in the start of every Python process below the unit: the environment of job children is a
# short list that LD_PRELOAD is not on, so each process puts itself under the false clock.
_START = """\
import os
import select
import sys
import time

WANTED = {wanted!r}

if os.environ.get("LD_PRELOAD") != WANTED["LD_PRELOAD"]:
    os.execve(sys.executable, sys.orig_argv, {{**os.environ, **WANTED}})
# libfaketime 0.9.10 makes clock_nanosleep with an absolute time fail, and that is what time.sleep calls.
def sleep(seconds):
    select.select([], [], [], seconds)


time.sleep = sleep
"""


def library() -> Path | None:
    """Return libfaketime's file for programs with threads; None where it is not installed."""
    for folder in ("/usr/lib", "/usr/local/lib", "/usr/lib64"):
        for found in sorted(Path(folder).glob("**/faketime/libfaketimeMT.so.1")):
            return found
    return None


class Clock:
    """The clock of one unit; `env` is what the unit is started with. Owned by the case."""

    def __init__(self, folder: Path, name: str, library: Path) -> None:
        """Make a clock that is right; `folder` is that of the case."""
        self._folder = folder / f"clock-{name}"
        self._folder.mkdir()
        self._file = self._folder / "offset"
        self.set("+0")
        wanted = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": str(CACHE_S),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        (self._folder / "sitecustomize.py").write_text(_START.format(wanted=wanted))
        self.env = {"PYTHONPATH": os.pathsep.join((str(self._folder), str(ROOT)))}

    def set(self, offset: str) -> None:
        """Have the clock go wrong by `offset`, as libfaketime reads it: `+3600s`, `+0 x1.02`."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset}\n")
        new.replace(self._file)
