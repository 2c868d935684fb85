from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TextIO
from uuid import UUID

import pytest

import taskd
from taskd.errors import StoreUnavailable
from taskd.obs.log import MAX_LINE, Format, LineHandler, setup

ROOT = str(Path(taskd.__file__).parents[1])


class Lines:
    """Logging as a daemon sets it up, on a stream in memory."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.log = logging.getLogger("taskd.test")

    def setup(self, format: Format = "json", stream: TextIO | None = None, **environ: str) -> LineHandler:
        self.handler = setup("info", format, stream or self.stream, environ)
        # Alone: half a character in pytest's own report of the test would end a parallel run.
        logging.getLogger().handlers = [self.handler]
        return self.handler

    def read(self) -> list[str]:
        self.handler.flush()
        text = self.stream.getvalue()
        assert text == "" or text.endswith("\n")
        return text.split("\n")[:-1]

    def one(self) -> dict[str, object]:
        (line,) = self.read()
        fields = json.loads(line)
        assert isinstance(fields, dict)
        return fields


@pytest.fixture
def lines() -> Iterator[Lines]:
    root = logging.getLogger()
    level, hook = root.level, sys.excepthook
    lines = Lines()
    lines.setup()
    yield lines
    root.removeHandler(lines.handler)
    lines.handler.close()
    root.setLevel(level)
    sys.excepthook = hook
    logging.captureWarnings(False)


def test_a_line_is_the_fixed_text_and_the_facts_beside_it(lines: Lines) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)  # the line's time is cut to one

    lines.log.info("job settled", extra={"job_id": UUID(int=1), "state": "completed", "ran_s": 0.5})

    fields = lines.one()
    assert list(fields) == ["time", "level", "event", "logger", "job_id", "state", "ran_s"]
    assert str(fields["time"]).endswith("Z")
    assert before < datetime.fromisoformat(str(fields["time"])) <= datetime.now(UTC)
    assert len(str(fields["time"])) == len("2026-11-24T00:00:00.000Z")
    assert list(fields.values())[1:] == [
        "info",
        "job settled",
        "taskd.test",
        "00000000-0000-0000-0000-000000000001",
        "completed",
        0.5,
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param(timedelta(seconds=90), 90.0, id="spans in seconds"),
        pytest.param(datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00.000Z", id="moments in UTC"),
        pytest.param(float("nan"), "nan", id="what JSON has no word for"),
        pytest.param({1: {2}}, {"1": [2]}, id="containers"),
        pytest.param(b"\xff", "\\xff", id="bytes"),
        pytest.param(Path("/x"), "/x", id="anything else as text"),
    ],
)
def test_facts(lines: Lines, value: object, shown: object) -> None:
    lines.log.info("event", extra={"fact": value})

    assert lines.one()["fact"] == shown


def test_a_fact_can_not_replace_the_head(lines: Lines) -> None:
    lines.log.info("event", extra={"time": "then", "level": "debug", "logger": "other", "event": "forged"})

    fields = lines.one()
    assert (fields["level"], fields["event"], fields["logger"]) == ("info", "event", "taskd.test")
    assert (fields["level_"], fields["event_"]) == ("debug", "forged")


NASTY = {
    "line feed": "\n",
    "carriage return": "\r",
    "nul": "\0",
    "ansi": "\x1b[31m",
    "c1 control sequence": "\x9b31m",
    "next line": "\x85",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "right to left": "\u202e",
    "delete": "\x7f",
    "half a surrogate pair": "\ud800",
}


@pytest.mark.parametrize("nasty", NASTY.values(), ids=NASTY.keys())
@pytest.mark.parametrize("format", ["json", "text"])
def test_nothing_in_a_line_forges_another(lines: Lines, format: Format, nasty: str) -> None:
    forged = f'x{nasty}{{"level":"error","event":"forged"}}'
    lines.setup(format)

    lines.log.warning(forged, extra={"fact": forged, "deep": {forged: [forged]}})
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger(f"other{nasty}").exception("failed", extra={"fact": 1})

    found = lines.read()
    assert len(found) == 2
    assert all(line.isprintable() for line in found)
    if format == "json":
        assert [json.loads(line)["level"] for line in found] == ["warning", "error"]


def test_ordinary_text_of_any_script_stays_readable(lines: Lines) -> None:
    lines.log.info("event", extra={"who": "Zoë 日本語 🙂"})

    assert "Zoë 日本語 🙂" in lines.read()[0]


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"fact": "x" * 5_000_000}, id="one huge text"),
        pytest.param({"fact": "\x1b" * 100_000}, id="escapes that swell"),
        pytest.param({f"fact{n}": "\u2028" * 300 for n in range(500)}, id="many facts"),
        pytest.param({"fact": [["é" * 1000] * 1000] * 1000}, id="nested lists"),
    ],
)
def test_a_line_has_at_most_16_kib(lines: Lines, format: Format, extra: dict[str, object]) -> None:
    lines.setup(format)

    lines.log.info("event" + "e" * 100_000, extra=extra)

    (line,) = lines.read()
    assert len(line.encode()) + 1 <= MAX_LINE
    assert "event" in line
    if format == "json":
        json.loads(line)


def test_an_exception_comes_with_its_traceback_and_without_locals(lines: Lines) -> None:
    def fail() -> None:
        local = "precious" + "-local"
        raise RuntimeError(f"boom {len(local)}")

    try:
        fail()
    except RuntimeError:
        lines.log.exception("job child failed")

    fields = lines.one()
    assert fields["error"] == "RuntimeError: boom 14"
    assert "in fail" in str(fields["traceback"])
    assert "precious-local" not in str(fields)


def test_an_expected_error_comes_with_its_code_and_without_a_traceback(lines: Lines) -> None:
    try:
        raise StoreUnavailable("no route to host")
    except StoreUnavailable:
        lines.log.warning("claim failed", exc_info=True)

    fields = lines.one()
    assert (fields["error"], fields["code"]) == ("StoreUnavailable: no route to host", "database_unavailable")
    assert "traceback" not in fields


def test_text_is_for_people(lines: Lines) -> None:
    lines.setup("text")

    lines.log.info("job settled", extra={"state": "completed", "note": "two words", "n": 3})

    (line,) = lines.read()
    assert line.split(" ", 1)[1] == 'info taskd.test: job settled state=completed note="two words" n=3'


def test_text_for_the_journal_begins_with_its_priority(lines: Lines, tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w") as journal:
        status = os.fstat(journal.fileno())
        handler = lines.setup("text", journal, JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            lines.log.log(level, "event")
        handler.flush()

    assert (tmp_path / "journal").read_text().splitlines() == [
        "<6>info taskd.test: event",
        "<4>warning taskd.test: event",
        "<3>error taskd.test: event",
    ]


def test_a_stream_that_is_not_the_journal_gets_no_priorities(lines: Lines, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        handler = lines.setup("text", file, JOURNAL_STREAM="1:1")
        lines.log.info("event")
        handler.flush()

    assert not (tmp_path / "file").read_text().startswith("<")


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("message", "args", "extra"),
    [
        pytest.param("%d", ("x",), {}, id="arguments that don't fit"),
        pytest.param("event", (), {"fact": Broken()}, id="a fact without a text"),
        pytest.param("event", (), {"fact": 10**5000}, id="a number too long to write"),
    ],
)
def test_handling_a_record_never_raises(
    lines: Lines, message: str, args: tuple[object, ...], extra: dict[str, object]
) -> None:
    fields = {"msg": message, "args": args, "levelname": "INFO", "name": "taskd.test", **extra}

    lines.handler.handle(logging.makeLogRecord(fields))  # pytest's own handlers would raise

    assert lines.one()["event"] == "log line could not be made"


def test_setup_again_replaces_the_first(lines: Lines) -> None:
    lines.setup()
    lines.setup()

    lines.log.info("event")

    assert len(lines.read()) == 1


def test_a_closed_stream_is_borne(lines: Lines) -> None:
    lines.stream.close()

    lines.log.info("event")
    lines.handler.flush()

    assert lines.handler.writer.dropped == 1


DEAF = """
import logging, sys, time
from taskd.obs.log import setup
handler = setup("info", "json", sys.stderr, {})
log = logging.getLogger("taskd")
for n in range(12_000):
    log.info("event", extra={"n": n, "text": "x" * 200})
print(handler.writer.dropped)
"""


def test_a_reader_that_hangs_stops_nobody() -> None:
    environ = {"PYTHONPATH": ROOT, "PATH": os.environ.get("PATH", os.defpath)}
    with subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ
    ) as process:
        code = process.wait(timeout=30)  # nobody reads its stderr, which holds 64 KiB
        assert process.stdout is not None
        dropped = int(process.stdout.read())

    assert code == 0
    assert dropped > 0


def test_a_reader_that_is_gone_stops_nobody() -> None:
    environ = {"PYTHONPATH": ROOT, "PATH": os.environ.get("PATH", os.defpath)}
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=writer, env=environ, timeout=30
    )
    os.close(writer)

    assert ended.returncode == 0


def test_dropped_lines_are_told_once_there_is_a_reader_again(lines: Lines) -> None:
    lines.handler.writer.dropped = 7

    lines.log.info("event")

    last = json.loads(lines.read()[-1])
    assert (last["event"], last["lines"]) == ("log lines were dropped", 7)


def test_uncaught_exceptions_and_warnings_are_log_lines() -> None:
    script = """
import sys, warnings
from taskd.obs.log import setup
setup("info", "json", sys.stderr, {})
warnings.warn("careful")
raise SystemError("boom")
"""
    environ = {"PYTHONPATH": ROOT, "PATH": os.environ.get("PATH", os.defpath)}

    ended = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, env=environ, text=True)

    found = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [line["level"] for line in found] == ["warning", "error"]
    assert found[1]["error"] == "SystemError: boom"
