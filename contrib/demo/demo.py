"""`make demo`: taskd from nothing to finished jobs, shown over HTTP; ends by itself and leaves nothing.

Everything lives in a scratch folder: the configuration, the embedded PostgreSQL, the outbox of a local
stand-in for Resend. The exit status is 0 only if every step did what it says.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from tests.plugins.resend_standin import ResendStandIn  # noqa: E402

START_S = 60.0
WAIT_S = 20
"""Seconds that a job is waited for over HTTP."""

CONFIG = """\
# Written by `make demo`.
api:
  port: {port}
admin:
  token: {token}
rate_limit:
  rate: 50
  burst: 100
plugins:
  - name: email
    config:
      api_key: {resend_key}
      base_url: {resend_url}
  - module: demo_jobs
job_types:
  say:
    description: Say something, with a program and no code
    command: [/usr/bin/env, printf, '{{"said": "%s"}}', "{{text}}"]
    params:
      text: "[A-Za-z0-9 ,.!]{{1,200}}"
log:
  format: text
"""


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


class Failed(Exception):
    """A step did not do what it says."""


class Client:
    """Speaks HTTP to taskd and shows each request as the curl line that does the same."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, method: str, path: str, headers: dict[str, str], body: object = None) -> Any:
        """Send one request, show it and its answer, and return the answer's JSON."""
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers = {**headers, "Content-Type": "application/json"}
        shown = " ".join(f"-H '{name}: {value}'" for name, value in headers.items())
        sent = "" if data is None else f" -d '{data.decode()}'"
        say(f"$ curl -X {method} '{self.url}{path}' {shown}{sent}")
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=WAIT_S + 10) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise Failed(f"{error.code}: {error.read().decode()}") from error
        value = json.loads(text)
        say(json.dumps(value, indent=2))
        say()
        return value

    def run(self, key: str, type_: str, payload: dict[str, object]) -> Any:
        """Submit a job and return it once it has finished."""
        headers = {"X-API-Key": key}
        receipt = self.call("POST", "/jobs", headers, {"type": type_, "payload": payload})
        return self.call("GET", f"/jobs/{receipt['job_id']}?wait={WAIT_S}", headers)


def free_port() -> int:
    """Return 8080 if nobody has it, else any free port."""
    for port in (8080, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Failed("no free port")


@contextmanager
def taskd_up(folder: Path, config: Path, url: str) -> Iterator[subprocess.Popen[str]]:
    """Run `taskd up` on a scratch state folder until the block ends, whichever way that is."""
    environ = {
        **os.environ,
        "XDG_RUNTIME_DIR": str(folder),
        "XDG_STATE_HOME": str(folder),
        "STATE_DIRECTORY": str(folder / "state"),
        "PYTHONPATH": str(HERE),
    }
    environ.pop("RUNTIME_DIRECTORY", None)
    log = folder / "taskd.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "taskd", "--config", str(config), "up"],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            start_new_session=True,
        )
        try:
            _await_ready(process, log)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if status != 0:
            raise Failed(f"taskd ended with {status}:\n{log.read_text()[-4000:]}")


def _await_ready(process: subprocess.Popen[str], log: Path) -> None:
    """Wait for the line that `taskd up` prints when it serves; pass on what it prints meanwhile."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None

    def read(stream: Iterator[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=START_S)
        except queue.Empty:
            raise Failed(f"taskd was not ready after {START_S:g} s:\n{log.read_text()[-4000:]}") from None
        if line is None:
            raise Failed(f"taskd did not start:\n{log.read_text()[-4000:]}")
        if "taskd is ready" in line:
            return


def check(holds: bool, what: str) -> None:
    """End the demonstration with an error unless `holds`."""
    if not holds:
        raise Failed(what)


def show(folder: Path, resend: ResendStandIn) -> None:
    """Run the whole demonstration."""
    token = secrets.token_urlsafe(32)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = folder / "taskd.yaml"
    config.touch(mode=0o600)
    config.write_text(CONFIG.format(port=port, token=token, resend_key=resend.api_key, resend_url=resend.url))
    say("== Starting taskd with an embedded PostgreSQL, one command: taskd up")
    with taskd_up(folder, config, url):
        client = Client(url)
        say("\n== 1. An API key, made with the admin token\n")
        made = client.call(
            "POST",
            "/admin/api-keys",
            {"Authorization": f"Bearer {token}"},
            {"name": "demo", "prefix": "demo"},
        )
        key = made["key"]
        steps: list[tuple[str, Callable[[], None]]] = [
            ("2. A mail, delivered to a local stand-in for Resend", lambda: mail(client, key, resend)),
            ("3. A job that fails twice and then succeeds, with its history", lambda: flaky(client, key)),
            ("4. A command defined in YAML, no code", lambda: command(client, key)),
        ]
        for title, step in steps:
            say(f"== {title}\n")
            step()
        say("== To go on: start `taskd up` with a configuration of your own (docs/start/), then")
        say(f"curl {url}/health")
        say(
            f"curl -X POST {url}/admin/api-keys -H 'Authorization: Bearer ADMIN_TOKEN' "
            "-H 'Content-Type: application/json' -d '{\"name\": \"me\"}'"
        )
        say(
            f"curl -X POST {url}/jobs -H 'X-API-Key: KEY' -H 'Content-Type: application/json' "
            '-d \'{"type": "echo", "payload": {"hello": "world"}}\''
        )
        say(f"curl '{url}/jobs/JOB_ID?wait=10' -H 'X-API-Key: KEY'")
        say("\n== Stopping")


def mail(client: Client, key: str, resend: ResendStandIn) -> None:
    """A mail goes out once and is seen as completed."""
    payload: dict[str, object] = {
        "to": "recipient@example.com",
        "from": "sender@example.com",
        "subject": "Hello from taskd",
        "text": "It works.",
    }
    done = client.run(key, "send_email", payload)
    check(done["status"] == "completed", "the mail job did not complete")
    check(len(resend.sent) == 1, f"the stand-in got {len(resend.sent)} mails")
    say(f"The stand-in for Resend got: {resend.sent[0]}\n")


def flaky(client: Client, key: str) -> None:
    """Two failures stand in the history of a job that completed at its third attempt."""
    done = client.run(key, "flaky", {"fails": 2})
    check(
        done["status"] == "completed" and done["attempts"] == 3, "the flaky job did not take three attempts"
    )
    check([run["cause"] for run in done["history"]] == ["error", "error"], "its history is not two errors")


def command(client: Client, key: str) -> None:
    """A program that only YAML knows has run."""
    text = "a job without a line of code"
    done = client.run(key, "say", {"text": text})
    check(done["status"] == "completed", "the command did not complete")
    check(done["result"] == {"said": text}, "what the command printed is not the result")


def main() -> int:
    """Run the demonstration and return the exit status."""
    folder = Path(tempfile.mkdtemp(prefix="taskd-demo-"))
    folder.chmod(0o755)  # the embedded PostgreSQL of root runs as somebody else
    try:
        with ResendStandIn() as resend:
            show(folder, resend)
    except Failed as error:
        say(f"demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; everything is stopped")
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say("done: everything that was started is stopped, nothing is left behind")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
