"""The lock: all that taskd needs, by version and hash, within the bounds of setup.cfg, from nowhere named."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "contrib/requirements.lock").read_text()
PINNED = dict(re.findall(r"^([a-z0-9.-]+)==(\S+) \\$", LOCK, re.MULTILINE))


def test_every_dependency_is_locked_within_its_bounds() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["embedded"]

    for line in filter(None, wanted.splitlines()):
        needed = Requirement(line)
        assert needed.specifier.contains(PINNED[canonicalize_name(needed.name)]), line


def test_every_locked_package_has_hashes() -> None:
    for block in re.split(r"\n(?=[a-z0-9])", LOCK.split("\n", 1)[1]):
        lines = block.rstrip("\n").split("\n")
        assert lines[0].removesuffix(" \\").split("==")[0] in PINNED
        assert len(lines) > 1
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines[1:])


def test_the_lock_names_no_place_to_get_things_from() -> None:
    assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host|@", LOCK)
