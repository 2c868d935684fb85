"""The life of one embedded server: made, started or adopted, stopped."""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

from taskd.embedded.account import account_name, as_account, can_run, choose_account, make_private
from taskd.embedded.errors import EmbeddedError
from taskd.embedded.servers import Server, choose_server, copy_wheel

_PORT = 5432  # nothing listens on it: it only names the socket file
_LONGEST_SOCKET_DIR = 88  # bytes; a socket path holds 107, and "/.s.PGSQL.5432" and its lock file come after
_PAUSE_S = 0.02
_LONGEST_LOG = 10 * 1024 * 1024  # bytes; a longer one is put aside at the next start, over the one before it


def default_home(environ: Mapping[str, str], *, root: bool) -> Path:
    """Return the folder that `taskd up` keeps its server in: the system's for root, else the user's own."""
    if root:
        return Path("/var/lib/taskd/pg")
    state = environ.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):  # the XDG specification: a relative path is to be ignored
        state = f"{environ.get('HOME') or Path.home()}/.local/state"
    return Path(state) / "taskd" / "pg"


class EmbeddedPG:
    """A PostgreSQL server in the folder `home`, started and stopped by this process.

    `with EmbeddedPG(home) as server:` stops it however the block ends, Ctrl-C too. A server that was left
    running by a killed taskd, or that another taskd has just started, is adopted instead: used, but not
    stopped. Owns the server process from `start` to `stop`; nothing here is safe to call from two threads.
    """

    adopted: bool
    """True after a `start` that found the server running already."""

    bindir: Path
    """Where the binaries of the running server are; set by `start`."""

    socket_dir: Path
    """The folder of the socket; `start` may change it."""

    def __init__(
        self,
        home: Path,
        *,
        settings: Sequence[str] = (),
        bindir: Path | None = None,
        user: str | None = None,
        prefer: Literal["system", "wheel"] = "system",
    ) -> None:
        """Describe the server; nothing is read or made before `start`.

        `settings` are lines of postgresql.conf, `fsync=off`, and win over that file. `user` is whom it
        runs as when taskd is root, before those of `ACCOUNTS`; a cluster that exists keeps its owner.
        `bindir` and `prefer` are those of `choose_server`.
        """
        self.home = home.resolve()
        self.data = self.home / "data"
        self.log = self.home / "postgres.log"
        self.socket_dir = self.home / "s"
        self.adopted = False
        # jit: a plan of taskd's that the planner takes for expensive costs 25 ms more with it, and under
        # MemoryDenyWriteExecute= it can't run at all. It may still be switched on by `settings`.
        self._settings = ("jit=off", *settings)
        self._configured = bindir
        self._prefer = prefer
        self._wanted_user = user
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: timedelta = timedelta(seconds=60)) -> Self:
        """Start the server, or adopt the one that runs on this folder; return when it takes connections.

        Several starters at once end up with one server: the first makes it, the others adopt it.

        Raises:
            EmbeddedError: it didn't come up within `timeout`, or the folder or the binaries can't be used.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        if self._process is not None and self._process.poll() is None:
            return self
        self._process, self.adopted = None, False
        try:
            self._make_home()
            while (lock := self._take_lock()) is None:
                if self._adopt():
                    return self
                if time.monotonic() > deadline:
                    raise EmbeddedError(
                        f"the server in {self.home} neither starts nor ends; {self._last_words(0)}"
                    )
                time.sleep(_PAUSE_S)
            try:
                if not self._adopt():  # free lock, running server: someone started it with pg_ctl
                    self._launch(lock, deadline)
            finally:
                os.close(lock)  # the server keeps its own descriptor of it, if there is one
        except OSError as error:
            raise EmbeddedError(f"{error.filename or self.home}: {error.strerror or error}") from error
        return self

    def stop(self, timeout: timedelta = timedelta(seconds=30), *, adopted: bool = False) -> None:
        """Stop the server that `start` started; one that it adopted only with `adopted=True`.

        Open transactions are rolled back. After `timeout` the server is told to drop everything, which
        costs a recovery at the next start, and after that again it is killed. Twice is once.
        """
        limit_s = timeout.total_seconds()
        if self._process is not None:
            for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                if self._process.poll() is None:
                    self._process.send_signal(signum)
                try:
                    self._process.wait(limit_s)
                    break
                except subprocess.TimeoutExpired:
                    continue
        elif self.adopted:
            if not adopted:
                return
            for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                deadline = time.monotonic() + limit_s
                if running := self._running():
                    with suppress(ProcessLookupError):
                        os.kill(running.pid, signum)
                while self._running() and time.monotonic() < deadline:
                    time.sleep(_PAUSE_S)
        self._process, self.adopted = None, False
        if self.socket_dir.parent != self.home and self._running() is None:
            shutil.rmtree(self.socket_dir, ignore_errors=True)
            self.socket_dir = self.home / "s"

    def url(self, database: str = "postgres") -> str:
        """Return the URL of `database` on the running server, with every right and without a password."""
        # with its port, since a PGPORT in the environment would otherwise look for another socket file
        where = f"host={quote(str(self.socket_dir), safe='/')}&port={_PORT}"
        return f"postgresql://taskd@/{quote(database, safe='')}?{where}"

    @property
    def pid(self) -> int | None:
        """The process id of the running server, adopted or not; None when none runs."""
        running = self._running()
        return running.pid if running else None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- who runs already

    def _take_lock(self) -> int | None:
        """Return a descriptor that holds this folder's lock, or None when someone else holds it.

        The starter holds it while it makes the cluster, and every process of the server after that,
        since they inherit it. So it is free exactly when nothing works on the folder: also when a killed
        server leaves a process behind, and across containers that share the folder but no process ids.
        """
        fd = os.open(self.home / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def _running(self) -> _PidFile | None:
        """Return what the pid file says of the running server, or None when none runs."""
        noted = _PidFile.read(self.data)
        return noted if noted and self._works_here(noted.pid) else None

    def _works_here(self, pid: int) -> bool | None:
        """Return whether process `pid` is a PostgreSQL server on this folder; None when that can't be told.

        After a reboot or in a new container the number in a pid file may be anybody's.
        """
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() not in ("postgres", "postmaster"):
                return False
            return os.readlink(f"/proc/{pid}/cwd") == str(self.data)
        except PermissionError:  # root in a container may not look at another account's process that closely
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
            return True if str(self.data) in words else None
        except OSError:
            return False

    def _adopt(self) -> bool:
        """Use the server that takes connections here; return False when there is none."""
        running = self._running()
        if running is None or not running.ready or not running.socket_dir:
            return False
        program = (self.data / "postmaster.opts").read_text().split(' "')[0]
        self.bindir = Path(program).parent
        self.socket_dir = Path(running.socket_dir)
        self.adopted = True
        return True

    # --- making and starting it

    def _make_home(self) -> None:
        """Make the folder and the missing ones above it; as root open to all, since others must pass."""
        mode = 0o755 if os.geteuid() == 0 else 0o700
        missing = [folder for folder in (self.home, *self.home.parents) if not folder.exists()]
        for folder in reversed(missing):
            try:
                folder.mkdir(mode=mode)
                folder.chmod(mode)  # whatever the umask
            except FileExistsError:  # another starter was quicker
                pass
        owner = self.home.stat().st_uid
        if owner != os.geteuid():
            raise EmbeddedError(
                f"{self.home} belongs to {account_name(owner)}: start taskd as that account, "
                "or choose another folder. taskd writes only into a folder of its own."
            )

    def _launch(self, lock: int, deadline: float) -> None:
        account = choose_account(self.data, wanted=self._wanted_user)
        make_private(self.socket_dir, account)
        if not can_run(account, "/bin/sh", "-c", 'cd "$0"', self.socket_dir):
            raise EmbeddedError(
                f"the account {account.pw_name}, which the server runs as, can't enter {self.home}: "
                "some folder above it is closed to others (chmod o+x), or choose another folder."
            )
        if len(os.fsencode(self.socket_dir)) > _LONGEST_SOCKET_DIR or "," in str(self.socket_dir):
            # nor does a comma work: a client takes it for the end of one host in a list of hosts
            self.socket_dir = Path(tempfile.mkdtemp(prefix="taskd-pg-"))
            make_private(self.socket_dir, account)
        server = self._server_for(account)
        self.bindir = server.bindir
        if not self._is_made():
            self._make_cluster(server, account, lock)
        noted = _PidFile.read(self.data)
        if noted and self._works_here(noted.pid) is False:
            # PostgreSQL itself takes the file for good when any process of its account has that number
            (self.data / "postmaster.pid").unlink(missing_ok=True)
        self._write_access(account)

        quoted_dir = '"' + str(self.socket_dir).replace('"', '""') + '"'  # the option takes a list
        where = ["-D", str(self.data), "-k", quoted_dir, "-h", "", "-p", str(_PORT)]
        files = (f"hba_file={self.home / 'pg_hba.conf'}", f"ident_file={self.home / 'pg_ident.conf'}")
        options = [word for setting in (*files, *self._settings) for word in ("-c", setting)]
        with suppress(FileNotFoundError):
            if self.log.stat().st_size > _LONGEST_LOG:
                self.log.replace(self.log.with_suffix(".log.1"))
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        log_start = os.fstat(log).st_size
        try:
            process: subprocess.Popen[bytes] = subprocess.Popen(
                [server.bindir / "postgres", *where, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,  # the terminal's Ctrl-C is for taskd, which then stops the server
                **as_account(account),
            )
            self._process = process
            while not ((running := self._running()) and running.ready and running.pid == process.pid):
                ended = process.poll() is not None
                if ended or time.monotonic() > deadline:
                    what = "did not start" if ended else "starts too slowly"
                    raise EmbeddedError(f"PostgreSQL {server.version} {what}; {self._last_words(log_start)}")
                time.sleep(_PAUSE_S)
        except BaseException:  # Ctrl-C too: nothing may be left running that nobody knows of
            self.stop()
            raise
        finally:
            os.close(log)

    def _is_made(self) -> bool:
        if (self.data / "PG_VERSION").exists():
            return True
        if self.data.exists() and any(self.data.iterdir()):
            raise EmbeddedError(f"{self.data} is not empty and no PostgreSQL data: choose another folder.")
        return False

    def _make_cluster(self, server: Server, account: pwd.struct_passwd, lock: int) -> None:
        """Make the cluster beside its place and move it there, so that `data` is whole or absent."""
        unfinished = self.home / "data.new"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        make_private(unfinished, account)
        kind = ["-U", "taskd", "-A", "peer", "-E", "UTF8", "--locale=C", "--data-checksums"]
        made = subprocess.run(
            [server.bindir / "initdb", "-D", unfinished, *kind, "--no-instructions"],
            capture_output=True,
            text=True,
            pass_fds=(lock,),  # if taskd is killed meanwhile, the next start waits for the end of this
            **as_account(account),
        )
        if made.returncode != 0:
            raise EmbeddedError(
                f"PostgreSQL {server.version} could not make its data folder: {made.stderr.strip()}"
            )
        unfinished.rename(self.data)
        fd = os.open(self.home, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _write_access(self, account: pwd.struct_passwd) -> None:
        """Let in whom the kernel says to be the server's account, this process's, or root; nobody else.

        The files stand in `home`, not in `data`: taskd as root does not write where the server's account
        could put a link in the way.
        """
        names = sorted({account.pw_name, account_name(os.geteuid()), "root"})
        texts = {
            "pg_ident.conf": "".join(f'taskd "{name}" taskd\n' for name in names),
            "pg_hba.conf": "local all all peer map=taskd\nlocal replication all peer map=taskd\n",
        }
        for name, text in texts.items():
            file = self.home / name
            file.unlink(missing_ok=True)
            file.write_text(text)
            file.chmod(0o644)  # the server's account reads them; nothing in them is secret

    def _server_for(self, account: pwd.struct_passwd) -> Server:
        """Return the server to run; copied into `home` when it lies where `account` can't reach it."""
        server = choose_server(self.data, configured=self._configured, prefer=self._prefer)
        if can_run(account, server.bindir / "postgres", "--version"):
            return server
        if not server.from_wheel:
            raise EmbeddedError(
                f"the account {account.pw_name}, which the server runs as, can't run "
                f"{server.bindir / 'postgres'}: some folder above it is closed to others."
            )
        return copy_wheel(server, self.home)

    def _last_words(self, start: int) -> str:
        """Return where the server's log is and the end of what it says from byte `start` on."""
        try:
            with self.log.open("rb") as log:
                log.seek(start)
                said = log.read()[-2000:].decode(errors="replace").strip()
        except OSError:
            said = ""
        return f"its log, {self.log}, says:\n{said}" if said else f"its log, {self.log}, says nothing."


@dataclass(frozen=True, slots=True, kw_only=True)
class _PidFile:
    """What a running server says of itself in postmaster.pid."""

    pid: int
    socket_dir: str
    ready: bool

    @classmethod
    def read(cls, data: Path) -> _PidFile | None:
        """Return what the file in `data` says, whether or not it is still true; None without a file."""
        try:
            lines = (data / "postmaster.pid").read_text().splitlines()
            pid = int(lines[0])
        except (OSError, ValueError, IndexError):
            return None
        lines += [""] * 8  # it is written bit by bit while the server starts
        return cls(pid=pid, socket_dir=lines[4], ready=lines[7].strip() == "ready")
