from __future__ import annotations

import os

from taskd.process.environment import child_env


def test_a_child_sees_what_it_needs_and_no_secret() -> None:
    environ = {
        "PATH": "/bin",
        "HOME": "/h",
        "LANG": "C",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "TMPDIR": "/t",
        "PYTHONPATH": "/p",
        "VIRTUAL_ENV": "/v",
    }
    secrets = {
        "DATABASE_URL": "x",
        "ADMIN_TOKEN": "x",
        "RESEND_API_KEY": "x",
        "NOTIFY_SOCKET": "x",
        "LD_PRELOAD": "x",
    }

    assert child_env({**environ, **secrets}, "web-1") == {**environ, "TASKD_NODE": "web-1"}


def test_programs_are_found_without_a_path() -> None:
    assert child_env({}, "n") == {"PATH": os.defpath, "TASKD_NODE": "n"}
