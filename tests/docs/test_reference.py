"""What the code has is in the manual, and the pages that are made are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from contrib.docs import reference
from taskd import errors
from taskd.api.answers import STATUS
from taskd.api.app import ROUTES
from taskd.config.example import rows
from taskd.model.state import Cause, State
from taskd.model.submit import _MEMBERS
from taskd.plugin import Hooks
from tests.docs import manual

HTTP = manual.text("docs/reference/http.md")
SUBMIT = manual.text("docs/use/submit.md")

SPECIFIED = (
    "invalid_json",
    "unsupported_value",
    "number_out_of_range",
    "duplicate_key",
    "too_deep",
    "too_many_keys",
    "invalid_body",
    "missing_field",
    "invalid_field",
    "unknown_field",
    "exclusive_fields",
    "unknown_type",
    "invalid_payload",
    "blocked_url",
    "bad_request",
    "unauthorized",
    "forbidden",
    "not_found",
    "method_not_allowed",
    "request_timeout",
    "conflict",
    "too_large",
    "unsupported_media_type",
    "rate_limited",
    "backlog_full",
    "internal_error",
    "database_unavailable",
    "shutting_down",
    "not_ready",
    "overloaded",
)
"""The codes of the contract, whether or not this version answers each of them."""


def _shown(path: str) -> str:
    return re.sub(r"<(\w+):\w+>", r"{\1}", path)


@pytest.mark.parametrize("path", sorted(reference.pages()), ids=lambda path: path.name)
def test_a_made_page_is_what_the_code_makes_now(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == reference.pages()[path], "run: make docs-reference"


@pytest.mark.parametrize("path", [row.path for row in rows()])
def test_each_configuration_key_is_in_the_manual(path: str) -> None:
    assert f"| `{path}` |" in manual.text("docs/reference/configuration.md")


@pytest.mark.parametrize("section", sorted({re.split(r"[.\[]", row.path)[0] for row in rows()}))
def test_each_section_is_explained_where_people_configure(section: str) -> None:
    assert f"`{section}`" in manual.text("docs/start/configure.md")


@pytest.mark.parametrize("hook", [name for name in vars(Hooks) if name.startswith("taskd_")])
def test_each_hook_is_in_the_manual(hook: str) -> None:
    assert f"## {hook}(" in manual.text("docs/reference/hooks.md")
    assert f"`{hook}(" in manual.text("docs/plugins/write.md")


@pytest.mark.parametrize("route", [f"{route.method} {_shown(route.path)}" for route in ROUTES])
def test_each_route_is_in_the_manual(route: str) -> None:
    assert f"| `{route}` |" in HTTP
    assert f"\n## {route}\n" in HTTP


def test_the_manual_names_no_route_that_does_not_exist() -> None:
    there = {f"{route.method} {_shown(route.path)}" for route in ROUTES}

    assert set(re.findall(r"^\| `([A-Z]+ /[^`]*)` \|", HTTP, re.MULTILINE)) == there


@pytest.mark.parametrize("command", [path for path, _, _ in reference.commands()])
def test_each_command_is_in_the_manual(command: str) -> None:
    assert f"\n## {command}\n" in manual.text("docs/reference/cli.md")


@pytest.mark.parametrize("code", sorted({*SPECIFIED, *STATUS}))
def test_each_error_code_is_in_the_manual_with_its_status(code: str) -> None:
    assert f"| {STATUS[code]} | `{code}` |" in SUBMIT


@pytest.mark.parametrize(
    "kind",
    [
        errors.StoreUnavailable,
        errors.OutcomeUnknown,
        errors.SchemaMismatch,
        errors.BadRow,
        errors.Refused,
    ],
)
def test_the_code_of_an_error_that_clients_may_see_has_a_status(kind: type[errors.TaskdError]) -> None:
    assert kind.code in STATUS


@pytest.mark.parametrize(
    "status",
    sorted({kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")} | {0, 2, 75}),
)
def test_each_exit_status_is_in_the_manual(status: int) -> None:
    assert f"\n| {status} |" in manual.text("docs/operate/daemon.md")


@pytest.mark.parametrize("state", list(State))
def test_each_state_is_explained(state: State) -> None:
    assert f"| `{state}` |" in SUBMIT


@pytest.mark.parametrize("cause", list(Cause))
def test_each_cause_is_named(cause: Cause) -> None:
    assert f"`{cause}`" in SUBMIT


@pytest.mark.parametrize("member", list(_MEMBERS))
def test_each_member_of_a_job_is_explained(member: str) -> None:
    assert f"`{member}`" in SUBMIT


@pytest.mark.parametrize("target", re.findall(r"^([a-z-]+):.*## ", manual.text("Makefile"), re.MULTILINE))
def test_each_target_of_the_makefile_is_in_the_manual(target: str) -> None:
    assert re.search(rf"`make {target}`|^make {target}\b", manual.whole(), re.MULTILINE)
