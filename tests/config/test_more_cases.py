"""Every case of more_config.json: on the reader alone, and where plugins have a say on `check-config`."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from taskd.config.read import read
from taskd.errors import ConfigError
from tests.cli.conftest import taskd

TABLE = json.loads((Path(__file__).parent.parent / "data" / "cases" / "more_config.json").read_text())
CASES: Mapping[str, dict[str, Any]] = {case["id"]: case for case in TABLE["cases"]}
NEED_A_CHILD = re.compile(
    r"x2-module-(absent|sub|os|this|antigravity|py)|x2-name-absent|x2-option-(key|from|extra|int|list)"
    r"|x2-config-(none|empty)|s2-plugin-env-unset"
)
CANARY = "re_canary0123456789"


def test_every_case_gives_its_errors(tmp_path: Path) -> None:
    wrong: list[str] = []
    for case in CASES.values():
        if not NEED_A_CHILD.fullmatch(case["id"]):
            file = prepare(case, tmp_path / case["id"])
            began = time.monotonic()
            found: list[tuple[int, str]] = []
            try:
                read(file, env=case.get("env", {}))
            except ConfigError as error:
                found = [(one.line, f"{one.path}: {one.message}") for one in error.problems]
            took_s = time.monotonic() - began
            text = "\n".join(message for _, message in found)
            wrong += judge(case, 78 if found else 0, found, text, took_s)

    assert wrong == []


@pytest.mark.parametrize("case_id", [case_id for case_id in CASES if NEED_A_CHILD.fullmatch(case_id)])
def test_a_case_of_plugins_gives_its_errors(case_id: str, tmp_path: Path) -> None:
    case = CASES[case_id]
    file = prepare(case, tmp_path / "case")

    done = taskd("check-config", file, env=case.get("env"))

    lines = re.finditer(rf"^{re.escape(str(file))}:(\d+): (.*)$", done.stderr, re.MULTILINE)
    found = [(int(line[1]), line[2]) for line in lines]
    assert list(judge(case, done.returncode, found, done.stdout + done.stderr, 0.0)) == []


def prepare(case: Mapping[str, Any], folder: Path) -> Path:
    """Write the files of a case into `folder` and return its configuration."""
    folder.mkdir()
    text = _text(case["yaml"])
    credential = folder / "resend"
    _secret(credential, {"text": CANARY, "mode": "0600"})
    text = text.replace(b"/run/credentials/taskd/resend", bytes(credential))
    for given in case.get("files", ()):
        path = folder / "secret"
        text = text.replace(given["path"].encode(), bytes(path))
        if "dir" in given:
            path.mkdir()
        elif "fifo" in given:
            os.mkfifo(path, 0o600)
        elif "socket" in given:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.relpath(path))  # the absolute path may be too long for a socket
        elif "link" in given:
            path.symlink_to(path if given["link"] == given["path"] else given["link"])
        elif "via_link" in given:
            _secret(folder / "target", given)
            path.symlink_to(folder / "target")
        else:
            _secret(path, given)
    file = folder / "taskd.yaml"
    file.write_bytes(text)
    file.chmod(0o600)
    return file


def judge(
    case: Mapping[str, Any], status: int, found: list[tuple[int, str]], text: str, took_s: float
) -> Iterator[str]:
    """Yield what is wrong with what was told: `found` are the lines and what stands behind them."""
    expect = case["expect"]
    if status != expect["exit"]:
        yield f"{case['id']}: exit {status}: {found}"
    for wanted in expect["errors"]:
        path = "" if not wanted["path"] else f"{wanted['path']}: "
        if not any(
            line == wanted["line"]
            and message.startswith(path)
            and wanted["contains"].lower() in message.lower()
            for line, message in found
        ):
            yield f"{case['id']}: no {wanted} in {found[:5]}"
    if len(found) != expect.get("exact_count", len(found)):
        yield f"{case['id']}: {len(found)} lines: {found}"
    if [line for line, _ in found] != sorted(line for line, _ in found):
        yield f"{case['id']}: not in the order of the lines"
    for secret in (*expect.get("must_not_contain", ()), CANARY, "Traceback"):
        if secret in text:
            yield f"{case['id']}: shows {secret}"
    if took_s > expect.get("within_s", 5):
        yield f"{case['id']}: took {took_s:.1f} s"


def _text(yaml: Any) -> bytes:
    if isinstance(yaml, str):
        return yaml.encode("utf-8", "surrogatepass")
    if "b64" in yaml:
        return base64.b64decode(yaml["b64"])
    if "gen" in yaml:
        return "".join(
            part if isinstance(part, str) else part["repeat"] * part["count"] for part in yaml["gen"]
        ).encode()
    lines = TABLE["base"].splitlines(keepends=True)
    for first, count, text in reversed(yaml["base"]):
        lines[first - 1 : first - 1 + count] = [text]
    return "".join(lines).encode()


def _secret(path: Path, given: Mapping[str, Any]) -> None:
    path.write_bytes(base64.b64decode(given["b64"]) if "b64" in given else given["text"].encode())
    path.chmod(int(given["mode"], 8))
