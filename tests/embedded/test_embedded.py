from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from textwrap import dedent

import psycopg
import pytest

from taskd.embedded import (
    EmbeddedError,
    EmbeddedPG,
    choose_server,
    default_home,
    system_servers,
    wheel_servers,
)
from tests.postgres import FAST, crash, scratch_folder

AS_ROOT = os.geteuid() == 0
only_as_root = pytest.mark.skipif(not AS_ROOT, reason="only root can drop to another account")


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder for one server; whatever still runs there is stopped after the test."""
    with scratch_folder() as folder:
        yield folder / "pg"
        if (folder / "pg" / "data").exists():
            left = EmbeddedPG(folder / "pg", prefer="wheel")
            if left.pid:
                left.start().stop(adopted=True)


def wheel_server(home: Path, *settings: str) -> EmbeddedPG:
    return EmbeddedPG(home, settings=(*FAST, *settings), prefer="wheel")


def ask(server: EmbeddedPG, query: str) -> str:
    with psycopg.connect(server.url()) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return str(row[0])


def processes_of(home: Path) -> list[int]:
    """Return the processes that work in the folder below `home`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink().is_relative_to(home):
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return found


STARTER = """
    import sys
    from pathlib import Path
    from taskd.embedded import EmbeddedPG

    with EmbeddedPG(Path(sys.argv[1]), settings=["fsync=off"], prefer="wheel") as server:
        print(server.adopted, server.pid, flush=True)
        sys.stdin.read()
"""


def start_taskd(home: Path, *, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Run a process that holds a server in `home` until its input ends; first it prints `adopted pid`."""
    return subprocess.Popen(
        [sys.executable, "-c", dedent(STARTER), str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=env,
    )


def test_it_answers_on_its_socket_and_on_no_port(home: Path) -> None:
    with wheel_server(home) as server:
        assert ask(server, "show listen_addresses") == ""
        assert ask(server, "select current_user") == "taskd"
        assert ask(server, "show jit") == "off"


def test_settings_win_over_the_defaults(home: Path) -> None:
    with wheel_server(home, "work_mem=3MB", "jit=on") as server:
        assert ask(server, "show work_mem") == "3MB"
        assert ask(server, "show jit") == "on"


def test_a_name_of_the_environment_does_not_lead_clients_astray(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "6543")

    with wheel_server(home) as server:
        assert ask(server, "select 1") == "1"


def test_stop_leaves_nothing_behind(home: Path) -> None:
    server = wheel_server(home).start()

    server.stop()
    server.stop()

    assert server.pid is None
    assert processes_of(home) == []
    assert not (home / "data" / "postmaster.pid").exists()
    assert list(server.socket_dir.iterdir()) == []


def test_stop_of_a_runner_that_started_nothing_stops_nothing(home: Path) -> None:
    with wheel_server(home) as server:
        wheel_server(home).stop(adopted=True)

        assert ask(server, "select 1") == "1"


def test_data_is_there_after_a_stop(home: Path) -> None:
    with wheel_server(home) as server, psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("create table kept as select 7 as n")

    with wheel_server(home) as server:
        assert ask(server, "select n from kept") == "7"


def test_data_is_there_after_the_server_was_killed(home: Path) -> None:
    with EmbeddedPG(home, prefer="wheel") as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("create table kept as select 7 as n")
        killed = server.pid

        crash(server)
        server.start()

        assert server.pid != killed
        assert not server.adopted
        assert ask(server, "select n from kept") == "7"


def test_the_server_of_a_killed_taskd_is_adopted_and_left_running(home: Path) -> None:
    with start_taskd(home) as taskd:
        assert taskd.stdout is not None
        first = taskd.stdout.readline().split()
        taskd.kill()

    with wheel_server(home) as server:
        assert server.adopted
        assert [str(server.adopted), str(server.pid)] == ["True", first[1]]
        assert server.bindir == wheel_servers()[0].bindir or server.bindir.is_relative_to(home)
        assert ask(server, "select 1") == "1"

    assert str(server.pid) == first[1]


def test_an_adopted_server_is_stopped_on_wish(home: Path) -> None:
    with wheel_server(home):
        adopter = wheel_server(home).start()

        adopter.stop(adopted=True)

        assert adopter.pid is None


def test_ctrl_c_stops_the_server(home: Path) -> None:
    with start_taskd(home) as taskd:
        assert taskd.stdout is not None
        taskd.stdout.readline()

        taskd.send_signal(signal.SIGINT)

        taskd.wait()
    assert processes_of(home) == []


def test_the_terminals_ctrl_c_does_not_reach_the_server(home: Path) -> None:
    with wheel_server(home) as server:
        assert server.pid is not None
        assert os.getsid(server.pid) == server.pid


def test_several_starters_at_once_end_up_with_one_server(home: Path) -> None:
    starters = [start_taskd(home) for _ in range(4)]
    said = [starter.stdout.readline().split() for starter in starters if starter.stdout]

    for starter in starters:
        starter.communicate("")

    assert sorted(adopted for adopted, _ in said) == ["False", "True", "True", "True"]
    assert len({pid for _, pid in said}) == 1
    assert processes_of(home) == []


def test_a_cluster_that_was_half_made_is_made_again(home: Path) -> None:
    (home / "data.new").mkdir(parents=True)
    (home / "data.new" / "PG_VERSION").write_text("18\n")

    with wheel_server(home) as server:
        assert ask(server, "select 1") == "1"

    assert not (home / "data.new").exists()


@pytest.mark.parametrize(
    "process",
    [
        pytest.param(1, id="another account's"),
        pytest.param(os.getpid(), id="our own, as after a restart of a container"),
        pytest.param(2**22 + 1, id="nobody's"),
    ],
)
def test_a_pid_file_that_speaks_of_a_foreign_process_is_ignored(home: Path, process: int) -> None:
    wheel_server(home).start().stop()
    data = home / "data"
    lines = [process, data, 1, 5432, home / "s", "", 1, "ready   "]
    (data / "postmaster.pid").write_text("".join(f"{line}\n" for line in lines))

    with wheel_server(home) as server:
        assert not server.adopted
        assert ask(server, "select 1") == "1"


def test_a_pid_file_that_speaks_of_another_postgres_is_ignored(home: Path) -> None:
    wheel_server(home).start().stop()
    with wheel_server(home.with_name("other")) as other:
        stale = (other.data / "postmaster.pid").read_text()
        (home / "data" / "postmaster.pid").write_text(stale)

        with wheel_server(home) as server:
            assert not server.adopted
            assert server.pid != other.pid


def test_a_folder_with_other_things_in_it_is_not_touched(home: Path) -> None:
    (home / "data").mkdir(parents=True)
    precious = home / "data" / "thesis.txt"
    precious.write_text("years of work")
    if AS_ROOT:
        os.chown(home / "data", pwd.getpwnam("nobody").pw_uid, -1)

    with pytest.raises(EmbeddedError, match="is not empty"):
        wheel_server(home).start()

    assert precious.read_text() == "years of work"


def test_data_of_another_major_version_is_refused_with_the_way_out(home: Path) -> None:
    (home / "data").mkdir(parents=True)
    (home / "data" / "PG_VERSION").write_text("9\n")

    with pytest.raises(EmbeddedError, match=r"was made by PostgreSQL 9; found here: .*pg_dumpall"):
        choose_server(home / "data")


def test_a_server_that_does_not_start_says_why(home: Path) -> None:
    server = wheel_server(home, "max_connections=none")

    with pytest.raises(EmbeddedError, match=r"(?s)did not start; its log, .*max_connections"):
        server.start()

    assert processes_of(home) == []


def test_a_server_that_is_too_slow_is_not_left_running(home: Path) -> None:
    with pytest.raises(EmbeddedError, match="starts too slowly"):
        wheel_server(home).start(timeout=timedelta(0))

    assert processes_of(home) == []


def test_a_long_path_gets_a_short_socket_folder_which_is_removed(home: Path) -> None:
    deep = home / ("d" * 100)

    with wheel_server(deep) as server:
        short = server.socket_dir
        with wheel_server(deep) as adopter:
            assert adopter.socket_dir == short
        assert ask(server, "select 1") == "1"

    assert not short.exists()


@pytest.mark.parametrize("name", ["with space", "a,b", 'quo"te', "per%cent"])
def test_odd_folder_names_work(home: Path, name: str) -> None:
    with wheel_server(home / name) as server:
        assert ask(server, "select 1") == "1"


def test_a_very_long_log_is_put_aside(home: Path) -> None:
    home.mkdir()
    with (home / "postgres.log").open("wb") as log:
        log.truncate(11 * 1024 * 1024)

    with wheel_server(home) as server:
        assert server.log.stat().st_size < 1024 * 1024

    assert (home / "postgres.log.1").exists()


@only_as_root
def test_root_drops_to_an_account_and_changes_no_folder_that_was_there(home: Path) -> None:
    passwords = Path("/etc/passwd").read_bytes()
    before = {folder: folder.stat() for folder in home.parents}

    with wheel_server(home) as server:
        owner = Path(f"/proc/{server.pid}").stat().st_uid
        data = server.data.stat()

    assert owner != 0
    assert (data.st_uid, data.st_mode & 0o777) == (owner, 0o700)
    after = {folder: folder.stat() for folder in home.parents}
    assert {f: (s.st_mode, s.st_uid) for f, s in after.items()} == {
        f: (s.st_mode, s.st_uid) for f, s in before.items()
    }
    assert Path("/etc/passwd").read_bytes() == passwords


@only_as_root
def test_a_cluster_keeps_its_owner(home: Path) -> None:
    EmbeddedPG(home, settings=FAST, prefer="wheel", user="nobody").start().stop()

    with wheel_server(home) as server:
        assert Path(f"/proc/{server.pid}").stat().st_uid == pwd.getpwnam("nobody").pw_uid


@only_as_root
def test_a_closed_folder_above_is_an_error_and_stays_closed(home: Path) -> None:
    home.parent.chmod(0o700)

    with pytest.raises(EmbeddedError, match=r"can't enter .*closed to others"):
        wheel_server(home).start()

    assert home.parent.stat().st_mode & 0o777 == 0o700


@only_as_root
def test_binaries_in_a_closed_folder_are_copied(home: Path) -> None:
    with scratch_folder() as closed:
        original = wheel_servers()[0].bindir
        package = original.parents[1]
        (closed / package.name).symlink_to(package)
        (closed / f"{package.name}.libs").symlink_to(package.with_name(f"{package.name}.libs"))
        closed.chmod(0o700)
        search_path = os.pathsep.join([str(closed), *filter(None, sys.path)])

        with start_taskd(home, env=os.environ | {"PYTHONPATH": search_path}) as taskd:
            assert taskd.stdout is not None
            adopted = taskd.stdout.readline().split()[0]
            with wheel_server(home) as server:
                assert adopted == "False"
                assert server.bindir.is_relative_to(home)
                assert ask(server, "select 1") == "1"
            taskd.communicate("")


@only_as_root
def test_root_does_not_write_into_someone_elses_folder(home: Path) -> None:
    home.mkdir()
    os.chown(home, pwd.getpwnam("nobody").pw_uid, -1)

    with pytest.raises(EmbeddedError, match="belongs to nobody"):
        wheel_server(home).start()

    assert list(home.iterdir()) == []


@only_as_root
def test_another_account_is_not_let_in(home: Path) -> None:
    with wheel_server(home) as server:
        server.socket_dir.chmod(0o755)  # the folder keeps others out as well: this asks the server

        refused = as_account("nobody", lambda: not _connects(server))

        assert refused
        assert "Peer authentication failed" in server.log.read_text()


@only_as_root
def test_an_ordinary_user_runs_a_server_as_itself(home: Path) -> None:
    with wheel_server(home) as server:  # its binaries are where everybody can reach them
        bindir = server.bindir
    mine = home.with_name("mine")
    mine.mkdir()
    account = pwd.getpwnam("nobody")
    os.chown(mine, account.pw_uid, account.pw_gid)

    def run() -> bool:
        with EmbeddedPG(mine / "state" / "pg", settings=FAST, bindir=bindir) as own:
            owner = Path(f"/proc/{own.pid}").stat().st_uid
            private = own.home.stat().st_mode & 0o077 == 0
            return ask(own, "select 1") == "1" and owner == account.pw_uid and private

    assert as_account("nobody", run)
    assert processes_of(mine) == []


def _connects(server: EmbeddedPG) -> bool:
    try:
        psycopg.connect(server.url()).close()
    except psycopg.OperationalError:
        return False
    return True


def as_account(name: str, work: Callable[[], bool]) -> bool:
    """Do `work` in a forked process that has become `name`: that account may not reach our interpreter."""
    account = pwd.getpwnam(name)
    child = os.fork()
    if child == 0:
        good = False
        try:
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
            good = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0 if good else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("environ", "root", "expected"),
    [
        pytest.param({"HOME": "/h"}, True, "/var/lib/taskd/pg", id="root has the system's"),
        pytest.param({"HOME": "/h"}, False, "/h/.local/state/taskd/pg", id="a user has their own"),
        pytest.param({"HOME": "/h", "XDG_STATE_HOME": "/x"}, False, "/x/taskd/pg", id="XDG is followed"),
        pytest.param(
            {"HOME": "/h", "XDG_STATE_HOME": "x"},
            False,
            "/h/.local/state/taskd/pg",
            id="a relative one is not",
        ),
    ],
)
def test_default_home(environ: Mapping[str, str], root: bool, expected: str) -> None:
    assert default_home(environ, root=root) == Path(expected)


def fake_bindir(folder: Path, version: str) -> Path:
    """Make a folder that looks like the binaries of PostgreSQL `version`."""
    folder.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        (folder / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
        (folder / name).chmod(0o755)
    return folder


def test_the_configured_binaries_are_the_only_ones(tmp_path: Path) -> None:
    configured = fake_bindir(tmp_path / "bin", "16.3 (Debian 16.3-1)")

    server = choose_server(tmp_path / "data", configured=configured)

    assert (server.bindir, server.version, server.major) == (configured, "16.3", 16)


def test_configured_binaries_that_are_too_old_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="no PostgreSQL server of version 14 or later"):
        choose_server(tmp_path / "data", configured=fake_bindir(tmp_path / "bin", "13.9"))


def test_a_configured_folder_without_binaries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"database\.bindir: .* holds no PostgreSQL server"):
        choose_server(tmp_path / "data", configured=tmp_path)


def test_a_cluster_gets_the_version_that_made_it(tmp_path: Path) -> None:
    wheel = wheel_servers()[0]
    (tmp_path / "PG_VERSION").write_text(f"{wheel.major}\n")

    assert choose_server(tmp_path).major == wheel.major


def test_new_data_prefers_what_was_asked_for(tmp_path: Path) -> None:
    assert choose_server(tmp_path, prefer="wheel") == wheel_servers()[0]
    assert choose_server(tmp_path) == (system_servers() + wheel_servers())[0]
