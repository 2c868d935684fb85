"""Where secrets come from, in which order a secret file is refused, and that no value is shown."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from taskd.config.read import read
from taskd.config.secret import Secret, read_secret_file, token_problem
from taskd.errors import ConfigError
from tests.config.samples import ADMIN, TOKEN, only, problems, read_text

OTHER = "b8Xw2nQ7rT4vY1zL6kM3pS9dF5gH0jAc"
DATABASE_URL = "postgresql://u:S3cretPw@db/taskd"


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    return file


def test_a_secret_file_is_read_without_its_line_end(secret_file: Path) -> None:
    assert read_secret_file(secret_file, {}) == TOKEN.encode()


@pytest.mark.parametrize(
    ("path", "contains"),
    [
        pytest.param("/nonexistent/secret", "does not exist", id="missing"),
        pytest.param("/dev/null/secret", "does not exist", id="below what is no folder"),
        pytest.param("/", "directory", id="directory"),
        pytest.param("/dev/zero", "4 KiB", id="endless"),
        pytest.param("/dev/null", "empty", id="empty device"),
    ],
)
def test_a_path_without_a_secret_is_refused_at_once(path: str, contains: str) -> None:
    begun = time.monotonic()

    problem = only(f"admin:\n  token_file: {path}\n")

    assert (problem.line, problem.path) == (2, "admin.token_file")
    assert contains in problem.message
    assert time.monotonic() - begun < 2


def test_a_fifo_does_not_hold_up_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)

    assert "empty" in only(f"admin:\n  token_file: {tmp_path}/fifo\n").message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_a_secret_file_is_its_owners_alone(secret_file: Path, mode: int) -> None:
    secret_file.chmod(mode)

    problem = only(f"admin:\n  token_file: {secret_file}\n")

    assert f"{mode:04o}" in problem.message
    assert "chmod 0600" in problem.message


def test_the_mode_comes_after_the_size_and_before_the_content(secret_file: Path) -> None:
    secret_file.chmod(0o644)
    secret_file.write_bytes(b"x" * 4097)
    too_large = only(f"admin:\n  token_file: {secret_file}\n").message
    secret_file.write_bytes(b"")
    empty = only(f"admin:\n  token_file: {secret_file}\n").message

    assert "4 KiB" in too_large
    assert "mode" in empty


def test_a_systemd_credential_may_have_any_mode(secret_file: Path) -> None:
    secret_file.chmod(0o644)
    env = {"CREDENTIALS_DIRECTORY": str(secret_file.parent)}

    assert problems(f"admin:\n  token_file: {secret_file}\n", env=env) == []


def test_a_way_out_of_the_credentials_directory_is_not_excepted(secret_file: Path) -> None:
    secret_file.chmod(0o644)
    folder = secret_file.parent / "credentials"
    folder.mkdir()
    env = {"CREDENTIALS_DIRECTORY": str(folder)}

    assert "mode" in only(f"admin:\n  token_file: {folder}/../secret\n", env=env).message


def test_a_relative_path_begins_at_the_configuration_file(secret_file: Path) -> None:
    file = secret_file.parent / "taskd.yaml"
    file.write_text("admin:\n  token_file: secret\n")

    assert read(file, env={}).tree.admin.tokens == (Secret(TOKEN),)


@pytest.mark.parametrize(
    ("token", "contains"),
    [
        pytest.param("", "empty", id="empty"),
        pytest.param("b8Xw2nQ7", "32 characters", id="too short"),
        pytest.param(TOKEN[:31], "32 characters", id="one too few"),
        pytest.param("my-super-secret-admin-token", "example", id="of the document"),
        pytest.param("My-Super-Secret-Admin-Token", "example", id="of the document, in other letters"),
        pytest.param("changeme" * 4, "placeholder", id="changeme"),
        pytest.param("change-me-" * 4, "placeholder", id="change-me"),
        pytest.param("CHANGE_ME_PLEASE_CHANGE_ME_PLEASE_12345", "placeholder", id="with digits"),
        pytest.param("your-secret-admin-token-goes-here-please", "placeholder", id="instructions"),
        pytest.param("replace-this-with-some-long-random-string", "placeholder", id="more of them"),
        pytest.param("xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx", "placeholder", id="crosses"),
        pytest.param("a" * 40, "one repeated character", id="one character"),
        pytest.param("x" * 40, "one repeated character", id="x"),
        pytest.param("0123456789abcdef" * 2, "repeats", id="a pattern"),
        pytest.param("é" + TOKEN, "ASCII", id="non-ASCII"),
        pytest.param(TOKEN + " x", "white space", id="space"),
        pytest.param(TOKEN + "\t", "white space", id="tab"),
        pytest.param(TOKEN + "\x07", "control", id="control character"),
    ],
)
def test_a_token_that_protects_nothing_is_refused(token: str, contains: str) -> None:
    problem = token_problem(token)

    assert problem is not None
    assert contains in problem
    assert not token or token not in problem


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(TOKEN, id="random"),
        pytest.param("Zq3vT8mB1xW6nK0#R5sY2uL9dF4hJ7cA", id="with a hash"),
        pytest.param("9f86d081884c7d659a2feaa0c55ad015", id="hexadecimal"),
        pytest.param("q83kPq7J0m8V3xT2y5Zr1w9u4t6e8b0n+/c=", id="base64"),
        pytest.param("correct-horse-battery-staple-secret-token", id="words that are no placeholder"),
    ],
)
def test_a_token_of_32_characters_is_fine(token: str) -> None:
    assert token_problem(token) is None


@pytest.mark.parametrize(
    ("text", "env", "source"),
    [
        pytest.param(f"token: {TOKEN}", {}, "token", id="yaml"),
        pytest.param("token_env: ADMIN_TOKEN", {"ADMIN_TOKEN": TOKEN}, "token_env", id="environment"),
        pytest.param(
            f"token: {TOKEN}\n  token_env: ADMIN_TOKEN", {}, "token", id="an unset variable counts as absent"
        ),
    ],
)
def test_the_token_comes_from_its_one_source(text: str, env: dict[str, str], source: str) -> None:
    admin = read_text(f"admin:\n  {text}\n", env=env).tree.admin

    assert admin.tokens == (Secret(TOKEN),)
    assert admin.source == source


def test_a_token_file_may_hold_two_tokens_while_they_are_rotated(secret_file: Path) -> None:
    secret_file.write_text(f"{TOKEN}\r\n{OTHER}\r\n")

    assert read_text(f"admin:\n  token_file: {secret_file}\n").tree.admin.tokens == (
        Secret(TOKEN),
        Secret(OTHER),
    )


@pytest.mark.parametrize(
    ("content", "contains"),
    [
        pytest.param(f"{TOKEN}\n{OTHER}\n{TOKEN}\n", "two lines", id="three lines"),
        pytest.param(f"{TOKEN}\nshort\n", "32 characters", id="second too short"),
        pytest.param(f"{TOKEN}\n\n{OTHER}\n", "two lines", id="an empty line between"),
        pytest.param("  \n", "empty", id="white space only"),
        pytest.param(f"ADMIN_TOKEN={TOKEN[:20]} x\n", "white space", id="an environment file"),
    ],
)
def test_each_line_of_a_token_file_is_checked(secret_file: Path, content: str, contains: str) -> None:
    secret_file.write_text(content)

    problem = only(f"admin:\n  token_file: {secret_file}\n")

    assert contains in problem.message
    assert TOKEN not in problem.message


@pytest.mark.parametrize(
    ("text", "line", "path"),
    [
        pytest.param("api: {}\n", 0, "admin", id="no section"),
        pytest.param("admin:\n", 1, "admin", id="empty section"),
        pytest.param("admin: {}\n", 1, "admin", id="empty mapping"),
        pytest.param("admin:\n  token_env: ADMIN_TOKEN\n", 2, "admin.token_env", id="variable not set"),
    ],
)
def test_an_api_needs_a_token_and_a_worker_does_not(text: str, line: int, path: str) -> None:
    problem = only(text)

    assert (problem.line, problem.path) == (line, path)
    assert "missing" in problem.message
    assert problems(text, need_admin=False) == []


def test_a_misspelt_token_is_named_beside_the_missing_one() -> None:
    found = problems(f"admin:\n  tokne: {TOKEN}\n")

    assert [(problem.line, problem.path) for problem in found] == [(1, "admin"), (2, "admin.tokne")]
    assert "did you mean token?" in found[1].message


@pytest.mark.parametrize(
    "bad", ["token:", 'token: ""', "token: [a]", "token: short", "token_file: /nonexistent"]
)
def test_a_refused_token_is_not_missing_too(bad: str) -> None:
    assert "missing" not in only(f"admin:\n  {bad}\n").message


def test_a_worker_does_not_read_the_token_file() -> None:
    assert problems("admin:\n  token_file: /nonexistent\n", need_admin=False) == []


@pytest.mark.parametrize(
    ("section", "first", "second"),
    [
        pytest.param("admin", f"token: {TOKEN}", "token_env: VALUE", id="admin"),
        pytest.param("database", "url: postgresql://h/d", "url_env: VALUE", id="database"),
    ],
)
def test_two_sources_in_force_are_refused(section: str, first: str, second: str) -> None:
    text = f"{section}:\n  {first}\n  {second}\n" + ("" if section == "admin" else ADMIN)

    found = problems(text, env={"VALUE": TOKEN})

    assert [problem.line for problem in found] == [1, 3]
    assert "exactly one" in found[0].message


@pytest.mark.parametrize("variable", ["$ADMIN_TOKEN", "ADMIN-TOKEN", "1A", "a b"])
def test_a_variable_has_a_variables_name(variable: str) -> None:
    assert "name of an environment variable" in only(f"admin:\n  token_env: {variable}\n").message


@pytest.mark.parametrize("key", ["token_file", "token_env"])
def test_a_token_pasted_into_the_wrong_key_is_not_shown(key: str) -> None:
    assert TOKEN not in only(f"admin:\n  {key}: {TOKEN}\n").message


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("database:\n  url: mysql://u:S3cretPw@h/d\n", id="scheme"),
        pytest.param("database:\n  url: postgresql://u:S3cretPw@h:99999/d\n", id="port"),
        pytest.param("database:\n  url: postgresql://u:S3cret@Pw@h/d\n", id="at sign"),
        pytest.param("database:\n  url: postgresql://u:S3cret/Pw@h/d\n", id="slash"),
        pytest.param("database:\n  url: postgresql://u:S3cret#Pw@h/d\n", id="hash"),
        pytest.param("database:\n  url: postgresql://u:S3cret?Pw@h/d\n", id="question mark"),
        pytest.param("database:\n  url: postgresql://u:S3cretPw%@h/d\n", id="percent"),
        pytest.param("database:\n  url: 'postgresql://u:S3cretPw @h/d'\n", id="space"),
        pytest.param('database:\n  url: "postgresql://u:S3cretPw@h/d\n', id="unclosed quote"),
        pytest.param('database:\n  url: "postgresql://u:S3cretPw\\q@h/d"\n', id="escape"),
        pytest.param("database: postgresql://u:S3cretPw@h/d\n", id="no mapping"),
        pytest.param("database:\n  url: postgresql://u:S3cretPw@h/d: x\n", id="mapping values"),
        pytest.param("plugins:\n  - module: a\n    config: S3cretPw\n", id="plugin config"),
    ],
)
def test_no_message_repeats_a_secret(text: str) -> None:
    found = problems(ADMIN + text)

    assert found
    assert not any("S3cret" in problem.message for problem in found)


def test_no_secret_is_in_the_repr_of_a_configuration() -> None:
    plugin = "plugins:\n  - module: a\n    config: {api_key: S3cretPw}\n"
    text = f"{ADMIN}database:\n  url: {DATABASE_URL}\n{plugin}"

    shown = repr(read_text(text))

    assert TOKEN not in shown
    assert "S3cret" not in shown


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        pytest.param(ADMIN, "admin.token in line 2", id="token"),
        pytest.param(
            f"database: {{url: '{DATABASE_URL}'}}\nadmin: {{token_env: T}}\n",
            "database.url in line 1",
            id="password in the URL",
        ),
        pytest.param(
            "admin: {token_env: T}\nplugins:\n  - module: a\n    config:\n      api_key: re_123\n",
            "plugins[0].config.api_key in line 5",
            id="key of a plugin",
        ),
        pytest.param(
            "admin: {token_env: T}\njob_types:\n  a:\n    command: [/x]\n    env: {DB_PASSWORD: p}\n",
            "job_types.a.env.DB_PASSWORD in line 5",
            id="password of a command",
        ),
    ],
)
def test_a_file_that_holds_a_secret_is_not_readable_by_the_world(
    tmp_path: Path, text: str, secret: str
) -> None:
    file = tmp_path / "taskd.yaml"
    file.write_text(text)
    file.chmod(0o644)

    with pytest.raises(ConfigError) as caught:
        read(file, env={"T": TOKEN})
    file.chmod(0o640)

    assert len(caught.value.problems) == 1
    assert "file mode is 0644" in caught.value.problems[0].message
    assert secret in caught.value.problems[0].message
    assert read(file, env={"T": TOKEN}).file == str(file)


def test_a_file_without_a_secret_may_be_read_by_the_world(tmp_path: Path) -> None:
    file = tmp_path / "taskd.yaml"
    file.write_text("database: {url: postgresql://u@h/d}\nadmin: {token_env: T}\n")
    file.chmod(0o644)

    assert read(file, env={"T": TOKEN}).tree.admin.tokens == (Secret(TOKEN),)


@pytest.mark.parametrize(
    ("content", "contains"),
    [pytest.param(b"short", "32 bytes", id="short"), pytest.param(b"\n", "empty", id="empty")],
)
def test_a_pepper_has_32_bytes(secret_file: Path, content: bytes, contains: str) -> None:
    secret_file.write_bytes(content)

    problem = only(f"{ADMIN}keys:\n  pepper_file: {secret_file}\n")

    assert problem.path == "keys.pepper_file"
    assert contains in problem.message


def test_a_pepper_may_be_binary_and_its_absence_is_a_warning(secret_file: Path) -> None:
    secret_file.write_bytes(bytes(range(200, 240)))

    with_pepper = read_text(f"{ADMIN}keys:\n  pepper_file: {secret_file}\n")
    without = read_text(ADMIN)

    assert with_pepper.tree.keys.pepper == bytes(range(200, 240))
    assert with_pepper.warnings == ()
    assert [warning for warning in without.warnings if "SHA-256" in warning]
    assert read_text(ADMIN, need_admin=False).warnings == ()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://taskd@127.0.0.1:5432/taskd",
        "postgres://h/d",
        "postgresql:///taskd?host=/run/postgresql",
        "postgresql://u:p@h1:5432,h2:5433/d?target_session_attrs=read-write",
        "postgresql://u:p%40ss@[::1]:5432/d",
        "postgresql://%2Frun%2Fpostgresql/d",
        "postgresql://",
    ],
)
def test_urls_that_libpq_takes_are_taken(url: str) -> None:
    assert read_text(f"{ADMIN}database:\n  url: {url}\n").tree.database.url == Secret(url)


@pytest.mark.parametrize(
    ("url", "contains"),
    [
        pytest.param("mysql://h/d", "postgresql://", id="another database"),
        pytest.param("postgresql+psycopg://h/d", "postgresql://", id="SQLAlchemy's scheme"),
        pytest.param("host=h dbname=d", "postgresql://", id="keywords"),
        pytest.param("POSTGRESQL://h/d", "postgresql://", id="upper case"),
        pytest.param("postgresql://u@h:port/d", "port", id="port no number"),
        pytest.param("postgresql://u@h:0/d", "port", id="port zero"),
        pytest.param("postgresql://u@h:65536/d", "port", id="port too large"),
        pytest.param("postgresql://h1:1,h2:x/d", "port", id="second port"),
        pytest.param("postgresql:///d?port=99999", "port", id="port as parameter"),
        pytest.param("postgresql://u:a@b@h/d", "%40", id="at sign in the password"),
        pytest.param("postgresql://u:a%b@h/d", "%25", id="percent in the password"),
        pytest.param("'postgresql://h/a b'", "white space", id="space"),
        pytest.param("postgresql://[h]/d", "IPv6", id="brackets around a name"),
        pytest.param("${DATABASE_URL}", "url_env", id="interpolation"),
    ],
)
def test_other_urls_are_refused(url: str, contains: str) -> None:
    problem = only(f"{ADMIN}database:\n  url: {url}\n")

    assert (problem.line, problem.path) == (4, "database.url")
    assert contains in problem.message


def test_the_url_comes_from_file_or_environment_and_an_unset_variable_counts_as_absent(
    secret_file: Path,
) -> None:
    secret_file.write_text(DATABASE_URL + "\n")
    env = {"DATABASE_URL": DATABASE_URL}

    from_file = read_text(f"{ADMIN}database:\n  url_file: {secret_file}\n").tree.database
    from_env = read_text(f"{ADMIN}database:\n  url_env: DATABASE_URL\n", env=env).tree.database
    absent = read_text(f"{ADMIN}database:\n  url_env: DATABASE_URL\n").tree.database

    assert (from_file.url, from_file.source) == (Secret(DATABASE_URL), "url_file")
    assert (from_env.url, from_env.source) == (Secret(DATABASE_URL), "url_env")
    assert (absent.url, absent.source) == (None, None)


@pytest.mark.parametrize("value", ["", "mysql://u:S3cretPw@h/d"])
def test_a_url_from_the_environment_is_checked(value: str) -> None:
    problem = only(f"{ADMIN}database:\n  url_env: DATABASE_URL\n", env={"DATABASE_URL": value})

    assert (problem.line, problem.path) == (4, "database.url_env")
    assert "S3cret" not in problem.message
