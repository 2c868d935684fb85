"""`job_types:`: overrides, commands, and what may not stand together."""

from __future__ import annotations

from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import pytest

from taskd.config.jobtypes import JobTypeOverride, RetryOverride
from taskd.config.units import Rate
from tests.config.samples import ADMIN, only, problems, read_text


def test_what_the_file_does_not_say_is_none() -> None:
    assert read_text(f"{ADMIN}job_types:\n  echo:\n").tree.job_types == {"echo": JobTypeOverride()}


def test_every_key_is_read() -> None:
    text = f"""{ADMIN}
pools: {{mail: {{}}}}
job_types:
  send_email.bulk:
    handler: send_email
    enabled: false
    pool: mail
    concurrency: 4
    max_running: 10
    rate: "100/m"
    rate_burst: 5
    timeout: 20s
    grace: 0s
    priority: -5
    retry:
      {{max_attempts: 5, backoff: fixed, backoff_base: 1s, backoff_cap: 2s, jitter: none, delays: [0s, 1m]}}
    restartable: false
    max_backlog: 100
    retention: 1d
    isolation: process
    max_memory: 64MiB
    options: {{from: a@b.example, n: 1}}
  resize:
    description: Makes a picture smaller
    command: [/usr/bin/convert, "{{file}}", -resize, "--to={{size}}", "{{{{size}}}}", "{{}}"]
    params: {{file: "[a-z]+", size: {{type: integer}}}}
    success_codes: [0, 1]
    no_retry_codes: [64]
    env: {{TZ: UTC}}
    cwd: /var/lib
"""

    types = read_text(text).tree.job_types

    assert types["send_email.bulk"] == JobTypeOverride(
        handler="send_email",
        enabled=False,
        pool="mail",
        concurrency=4,
        max_running=10,
        rate=Rate(Fraction(5, 3), "100/m"),
        rate_burst=5,
        timeout=timedelta(seconds=20),
        grace=timedelta(0),
        priority=-5,
        retry=RetryOverride(
            max_attempts=5,
            backoff="fixed",
            backoff_base=timedelta(seconds=1),
            backoff_cap=timedelta(seconds=2),
            jitter="none",
            delays=(timedelta(0), timedelta(minutes=1)),
        ),
        restartable=False,
        max_backlog=100,
        retention=timedelta(days=1),
        isolation="process",
        max_memory=types["send_email.bulk"].max_memory,
        options={"from": "a@b.example", "n": 1},
    )
    assert types["send_email.bulk"].max_memory == 64 << 20
    resize = types["resize"]
    assert resize.command == ("/usr/bin/convert", "{file}", "-resize", "--to={size}", "{{size}}", "{}")
    assert resize.params == {"file": "[a-z]+", "size": {"type": "integer"}}
    assert (resize.success_codes, resize.no_retry_codes) == ((0, 1), (64,))
    assert (resize.env, resize.cwd) == ({"TZ": "UTC"}, Path("/var/lib"))


@pytest.mark.parametrize(
    ("entry", "path", "contains"),
    [
        pytest.param("{command: [/x], handler: echo}", ".command", "only one of", id="command and handler"),
        pytest.param("{params: {a: b}}", ".params", "beside command", id="params without command"),
        pytest.param("{cwd: /x}", ".cwd", "beside command", id="cwd without command"),
        pytest.param("{http: {url: https://x.example}}", ".http", "later version", id="HTTP call"),
        pytest.param("{command: /x}", ".command", "list", id="a shell line"),
        pytest.param("{command: []}", ".command", "empty", id="no program"),
        pytest.param("{command: [x]}", ".command[0]", "absolute", id="a program from the path"),
        pytest.param('{command: ["/{a}"], params: {a: b}}', ".command[0]", "program", id="a chosen program"),
        pytest.param('{command: [/x, "{a}"]}', ".command[1]", "params", id="an undeclared parameter"),
        pytest.param('{command: [/x, "-{a}"], params: {a: b}}', ".command[1]", "option", id="option"),
        pytest.param("{command: [/x, yes]}", ".command[1]", "quotes", id="an argument that YAML reads"),
        pytest.param('{command: [/x], params: {a: "["}}', ".params.a", "regular expression", id="pattern"),
        pytest.param("{command: [/x], params: {a: 5}}", ".params.a", "pattern", id="neither"),
        pytest.param("{command: [/x], params: {a: {type: array}}}", ".params.a", "one of string", id="type"),
        pytest.param(
            '{command: [/x], params: {a: {type: string, $ref: "http://127.0.0.1:1/"}}}',
            ".params.a",
            "outside",
            id="$ref",
        ),
        pytest.param(
            "{command: [/x], params: {a: {type: string, minLength: x}}}",
            ".params.a",
            "JSON Schema",
            id="schema",
        ),
        pytest.param("{command: [/x], params: {a-b: x}}", ".params.a-b", "parameter's name", id="parameter"),
        pytest.param("{command: [/x], success_codes: [256]}", ".success_codes[0]", "0 to 255", id="code"),
        pytest.param("{command: [/x], no_retry_codes: [75]}", ".no_retry_codes", "retry", id="EX_TEMPFAIL"),
        pytest.param("{command: [/x], no_retry_codes: [0]}", ".no_retry_codes[0]", "1 to 255", id="zero"),
        pytest.param(
            "{command: [/x], success_codes: [3], no_retry_codes: [3]}",
            ".no_retry_codes",
            "success",
            id="both",
        ),
        pytest.param("{command: [/x], env: {A: 1}}", ".env.A", "quotes", id="a number in the environment"),
        pytest.param("{command: [/x], env: {A-B: x}}", ".env.A-B", "variable", id="a variable's name"),
        pytest.param("{handler: Echo}", ".handler", "job type", id="handler's name"),
        pytest.param("{pool: mial}", ".pool", "did you mean mail?", id="pool"),
        pytest.param("{rate: 0}", ".rate", "greater than 0", id="rate of zero"),
        pytest.param("{rate: 10/d}", ".rate", "rate", id="rate a day"),
        pytest.param("{rate: [1]}", ".rate", "list", id="list for a rate"),
        pytest.param("{rate_burst: 0}", ".rate_burst", "1 to 1000000", id="burst"),
        pytest.param("{timeout: 0s}", ".timeout", "greater than", id="timeout"),
        pytest.param("{timeout: 20}", ".timeout", "unit", id="timeout without unit"),
        pytest.param("{priority: 101}", ".priority", "-100 to 100", id="priority"),
        pytest.param("{concurrency: 0}", ".concurrency", "1 to", id="concurrency"),
        pytest.param("{max_running: 0}", ".max_running", "1 to", id="max_running"),
        pytest.param("{isolation: thread}", ".isolation", "async, process", id="isolation"),
        pytest.param("{max_memory: 1GB}", ".max_memory", "size", id="memory"),
        pytest.param("{options: []}", ".options", "mapping", id="options"),
        pytest.param("{retry: {jitter: half}}", ".retry.jitter", "full, none", id="jitter"),
        pytest.param("{retry: {delays: [5]}}", ".retry.delays[0]", "unit", id="delay without unit"),
        pytest.param("{retry: {delays: []}}", ".retry.delays", "empty", id="no delay"),
        pytest.param(
            "{retry: {backoff_base: 2s, backoff_cap: 1s}}",
            ".retry.backoff_cap",
            "backoff_base",
            id="cap",
        ),
    ],
)
def test_a_job_type_that_can_not_be_is_refused(entry: str, path: str, contains: str) -> None:
    problem = only(f"{ADMIN}pools: {{mail: {{}}}}\njob_types:\n  a: {entry}\n")

    assert (problem.line, problem.path) == (5, f"job_types.a{path}")
    assert contains in problem.message


@pytest.mark.parametrize(
    ("name", "contains"),
    [
        pytest.param("Echo", "job type", id="capital"),
        pytest.param("a b", "job type", id="space"),
        pytest.param("a" * 65, "job type", id="too long"),
        pytest.param("taskd.notify", "reserved", id="taskd's own"),
    ],
)
def test_a_job_type_has_a_job_types_name(name: str, contains: str) -> None:
    assert contains in only(f"{ADMIN}job_types:\n  {name}: {{}}\n").message


def test_one_wrong_type_does_not_hide_another() -> None:
    found = problems(f"{ADMIN}job_types:\n  a: {{rate: 0}}\n  b: {{pool: nowhere}}\n")

    assert [problem.path for problem in found] == ["job_types.a.rate", "job_types.b.pool"]
