"""YAML's traps, each refused by its name at its line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.config.read import MAX_FILE
from taskd.errors import Problem
from tests.config.samples import ADMIN, TOKEN, only, problems, read_text

LINES = (
    "api:\n  host: 127.0.0.1\n  port: 8080\n  trusted_proxies: []\n"
    f"admin:\n  token: {TOKEN}\nlog:\n  level: info\nkeys: {{}}\n"
    'pools:\n  "reports": {processes: 1}\n'
)


@pytest.mark.parametrize(
    ("old", "new", "line", "contains"),
    [
        pytest.param("127.0.0.1", '"127.0.0.1', 2, "quote", id="a later quote closes it"),
        pytest.param("127.0.0.1", "'127.0.0.1", 2, "quote", id="nothing closes it"),
        pytest.param("level: info", 'level: "info', 8, "quote", id="closed by the opening of another"),
        pytest.param("[]", "[", 4, "never closed", id="bracket"),
        pytest.param("[]", "{", 4, "never closed", id="brace"),
        pytest.param("  port: 8080", "  port:8080", 3, "space after the colon", id="no space"),
        pytest.param("  port: 8080", "  port 8080", 3, "expected ':'", id="no colon"),
        pytest.param("  port: 8080", "\tport: 8080", 3, "tab", id="tab"),
        pytest.param("  port: 8080", "   port: 8080", 3, "mapping values", id="indented too far"),
        pytest.param("  port: 8080", " port: 8080", 3, "indentation", id="indented too little"),
        pytest.param("8080", "@8080", 3, "quotes", id="a reserved sign"),
        pytest.param("8080", "* 80", 3, "alias", id="a star"),
        pytest.param("8080", "& 80", 3, "anchor", id="an ampersand"),
        pytest.param("8080", '"\\q"', 3, "escape", id="an unknown escape"),
        pytest.param("8080", '"\\UFFFFFFFF"', 3, "escape", id="an escape beyond Unicode"),
        pytest.param("8080", "!e!x 80", 3, "tag", id="a tag without its handle"),
        pytest.param("8080", "!!int 8080", 3, "tag", id="a tag of YAML itself"),
        pytest.param("8080", "&a 8080", 3, "anchor", id="an anchor"),
        pytest.param("8080", "*a", 3, "alias", id="an alias"),
        pytest.param("port: 8080", "<<: {port: 8080}", 3, "merge", id="a merge key"),
    ],
)
def test_syntax_is_refused_at_the_line_to_change(old: str, new: str, line: int, contains: str) -> None:
    problem = only(LINES.replace(old, new, 1))

    assert (problem.line, problem.path) == (line, "")
    assert contains in problem.message


def test_a_line_without_a_space_after_the_colon_is_named_beside_the_line_where_reading_stops() -> None:
    found = problems("api:\n  port:8080\n  workers: 2\n" + ADMIN)

    assert [problem.line for problem in found] == [2, 3]
    assert "no space after the colon of 'port'" in found[0].message


@pytest.mark.parametrize(
    ("value", "contains"),
    [
        pytest.param("10:30", "sexagesimal", id="base 60"),
        pytest.param("8_080", "underscore", id="underscore"),
        pytest.param("0600", "octal", id="leading zero"),
        pytest.param("0o600", "octal", id="YAML 1.2's octal"),
        pytest.param("0x1F90", "hexadecimal", id="hexadecimal"),
        pytest.param("yes", "boolean", id="yes"),
        pytest.param("off", "boolean", id="off"),
        pytest.param("8080.0", "integer", id="float"),
        pytest.param("1e3", "integer", id="exponent"),
        pytest.param(".inf", "integer", id="infinity"),
        pytest.param("true", "integer", id="true"),
        pytest.param('"8080"', "quotes", id="quoted"),
        pytest.param("", "empty", id="no value"),
        pytest.param("~", "empty", id="null"),
        pytest.param("[8080]", "integer", id="list"),
        pytest.param("{a: 1}", "integer", id="mapping"),
        pytest.param("9" * 5000, "1 to 65535", id="more digits than Python converts"),
        pytest.param("0", "1 to 65535", id="zero"),
        pytest.param("-1", "1 to 65535", id="negative"),
    ],
)
def test_an_integer_is_a_plain_decimal_number(value: str, contains: str) -> None:
    problem = only(f"{ADMIN}api:\n  port: {value}\n")

    assert (problem.line, problem.path) == (4, "api.port")
    assert contains in problem.message
    assert "integer" in problem.message or "1 to 65535" in problem.message


@pytest.mark.parametrize("value", ["no", "On", "123", "1.5", "true", "0600", "10:30", "1_0"])
def test_a_string_that_yaml_would_read_otherwise_must_be_quoted(value: str) -> None:
    problem = only(f"{ADMIN}workers:\n  node: {value}\n")

    assert (problem.line, problem.path) == (4, "workers.node")
    assert "string" in problem.message
    assert "quotes" in problem.message


@pytest.mark.parametrize(
    ("key", "path"),
    [
        pytest.param("yes", "api.yes", id="boolean of YAML 1.1"),
        pytest.param("true", "api.true", id="boolean"),
        pytest.param("8080", "api.8080", id="integer"),
        pytest.param("1.5", "api.1.5", id="float"),
        pytest.param("? ", "api", id="nothing"),
        pytest.param("~", "api", id="null"),
        pytest.param("{a: 1}", "api", id="mapping"),
        pytest.param("[a]", "api", id="list"),
    ],
)
def test_a_key_is_a_string(key: str, path: str) -> None:
    colon = "\n  " if key == "? " else ""
    problem = only(f"{ADMIN}api:\n  {key}{colon}: 1\n")

    assert (problem.line, problem.path) == (4, path)
    assert "key must be a string" in problem.message


@pytest.mark.parametrize(
    ("text", "line", "path"),
    [
        pytest.param(f"{ADMIN}api:\n  port: 1\n  port: 2\n", 5, "api.port", id="block"),
        pytest.param(f"{ADMIN}api: {{port: 1, port: 2}}\n", 3, "api.port", id="flow"),
        pytest.param(f'{ADMIN}api:\n  port: 1\n  "port": 2\n', 5, "api.port", id="quoted"),
        pytest.param(f"{ADMIN}{ADMIN}", 3, "admin", id="section"),
        pytest.param(
            f"{ADMIN}plugins:\n  - module: a\n    config:\n      x: 1\n      x: 2\n",
            7,
            "plugins[0].config.x",
            id="plugin option",
        ),
        pytest.param(f"{ADMIN}job_types:\n  echo: {{}}\n  echo: {{}}\n", 5, "job_types.echo", id="job type"),
    ],
)
def test_a_key_stands_once(text: str, line: int, path: str) -> None:
    problem = only(text)

    assert (problem.line, problem.path) == (line, path)
    assert "duplicate" in problem.message


@pytest.mark.parametrize(
    ("text", "contains"),
    [
        pytest.param("", "empty", id="nothing"),
        pytest.param("# only\n\n# comments\n", "empty", id="comments"),
        pytest.param("---\n", "empty", id="a document without content"),
        pytest.param("~\n", "empty", id="null"),
        pytest.param("\n\n- a\n", "mapping", id="a list further down"),
        pytest.param("text\n", "mapping", id="text"),
        pytest.param("5\n", "mapping", id="number"),
    ],
)
def test_a_file_without_a_mapping_is_refused_in_line_1(text: str, contains: str) -> None:
    problem = only(text)

    assert (problem.line, problem.path) == (1, "")
    assert contains in problem.message


@pytest.mark.parametrize("separator", ["---\n", "--- # more\n", "...\n---\n"])
def test_a_file_holds_one_document(separator: str) -> None:
    problem = only(f"{ADMIN}{separator}api: {{}}\n")

    assert problem.line == (4 if separator.startswith("...") else 3)
    assert "one document" in problem.message


def test_document_marks_around_the_one_document_are_fine() -> None:
    assert problems(f"%YAML 1.1\n---\n{ADMIN}...\n") == []


@pytest.mark.parametrize(
    ("character", "code"),
    [
        pytest.param("\0", "U+0000", id="NUL"),
        pytest.param("\x1b", "U+001B", id="escape sequences would reach a terminal"),
        pytest.param("\u2028", "U+2028", id="a line break to YAML alone"),
        pytest.param("\x85", "U+0085", id="another one"),
        pytest.param("\ufeff", "U+FEFF", id="a byte order mark inside"),
    ],
)
def test_hidden_characters_are_named(character: str, code: str) -> None:
    problem = only(f"api:\r\n  host: a\r\n  x: a{character}b\r\n")

    assert (problem.line, problem.path) == (3, "")
    assert code in problem.message


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_counted_as_an_editor_does(end: str) -> None:
    problem = only(f"{ADMIN}log:\n  level: loud\n".replace("\n", end))

    assert problem.line == 4


def test_a_byte_order_mark_in_front_is_fine() -> None:
    assert problems(b"\xef\xbb\xbf" + ADMIN.encode()) == []


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        pytest.param(ADMIN.encode("utf-16"), 1, id="UTF-16"),
        pytest.param(b"# a\r\n# b\r\n# \xe9\r\n", 3, id="Latin-1, at its line"),
    ],
)
def test_other_encodings_are_refused(raw: bytes, line: int) -> None:
    problem = only(raw)

    assert problem.line == line
    assert "UTF-8" in problem.message


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        pytest.param("api: " + "[" * 3000 + "]" * 3000, "api", 1, id="flow lists"),
        pytest.param("api: " + "{a: " * 3000 + "}" * 3000, "api", 1, id="flow mappings"),
        pytest.param("".join(" " * n + "a:\n" for n in range(200)), "a", 81, id="block mappings"),
        pytest.param("- " * 3000 + "a", "", 1, id="block lists"),
        pytest.param("[" * 500_000, "", 1, id="half a megabyte of brackets"),
    ],
)
def test_deep_nesting_is_an_error_and_no_recursion(text: str, path: str, line: int) -> None:
    problem = only(text)

    assert (problem.line, problem.path) == (line, path)
    assert "deep" in problem.message


def test_a_huge_file_is_refused_unread() -> None:
    problem = only("#" * (MAX_FILE + 1))

    assert (problem.line, problem.path) == (0, "")
    assert "too large" in problem.message


def test_a_flood_of_values_is_refused_before_its_end() -> None:
    problem = only("a: [" + "1," * 60_000 + "]")

    assert problem.line == 0
    assert "too large" in problem.message


def test_a_reference_bomb_is_never_expanded() -> None:
    text = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" + ADMIN

    words = {word for problem in problems(text) for word in ("anchor", "alias") if word in problem.message}

    assert words == {"anchor", "alias"}


def test_one_run_shows_every_trap_and_every_wrong_value() -> None:
    text = f"{ADMIN}api:\n  port: 0\n  host: &a localhost\n  yes: 1\n  prot: 1\nlog:\n  level: !x info\n"

    assert [problem.line for problem in problems(text)] == [4, 5, 6, 7, 9]


def test_a_refused_part_gives_no_follow_up() -> None:
    assert only("x: 1\n".replace("x: 1", "<<: {admin: {}}")).message.startswith("a merge key")
    assert [problem.line for problem in problems("base: &b {}\nadmin: *b\n") if problem.line == 0] == []


def test_escapes_in_a_key_do_not_reach_the_terminal() -> None:
    problem = only(f'{ADMIN}"a\\e[31m\\nb": 1\n')

    assert problem.path == "a\\x1b[31m\\nb"
    assert problem.show("f").isprintable()


@pytest.mark.parametrize("escape", ["\\0", "\\ud800"])
def test_what_no_text_column_takes_is_refused(escape: str) -> None:
    problem = only(f'{ADMIN}plugins:\n  - module: a\n    config: {{x: "a{escape}b"}}\n')

    assert problem.path == "plugins[0].config.x"


def test_a_comment_that_cuts_a_token_off_is_pointed_out() -> None:
    problem = only("admin:\n  token: Zq3vT8mB1xW6nK0p #R5sY2uL9dF4hJ7cA\n")

    assert "comment" in problem.message


@given(
    st.lists(
        st.tuples(st.integers(0, len(LINES)), st.sampled_from("\t :-[]{}\"'#&*!|>%@`,?\n\\~<é\0")), max_size=4
    )
)
def test_a_damaged_file_gives_problems_and_never_a_traceback(damage: list[tuple[int, str]]) -> None:
    text = LINES
    for place, character in damage:
        text = text[:place] + character + text[place + 1 :]

    found = problems(text)

    assert all(problem.line <= text.count("\n") + 1 for problem in found)
    assert all(problem.show("f").isprintable() for problem in found)
    if damage == []:
        assert found == []


def test_the_error_shows_file_line_path_and_message() -> None:
    assert Problem(8, "api.port", "is wrong").show("f.yaml") == "f.yaml:8: api.port: is wrong"
    assert Problem(8, "", "is wrong").show("f.yaml") == "f.yaml:8: is wrong"


def test_the_digest_tells_two_files_apart() -> None:
    assert read_text(ADMIN).digest != read_text(ADMIN + "\n").digest
