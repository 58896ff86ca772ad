"""The folder of a cluster: data, secrets, logs, and what the running supervisor says of itself.

postgres-0, postgres-1, …   one data directory a shard
valkey                      the append-only file
secrets                     0700; every file 0600
log                         NAME.log of this run, NAME.log.1 of the one before; one that fails
                            before it starts anything is no run
run                         lock, state.json, wish.json, the rendered Nginx configuration
"""

import fcntl
import json
import os
import pwd
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

REPLICAS_MAX = 16
"""Of one service: PostgreSQL has connections for as many, one machine hardly the cores."""

SHARDS_MAX = 16
"""A machine that needs more has long needed a second machine."""

SECRET_BYTES = 32
"""Of randomness in each secret: what HS256 asks for, and more than a password needs."""

LOCK_WAIT_S, LOCK_POLL_S = 0.5, 0.02
"""`status` holds the lock shared for an instant; a supervisor that meets it tries again."""

ORPHANS_SECONDS_MAX, ORPHANS_POLL_S = 30.0, 0.1
"""For the servers of a killed supervisor; a shard's last checkpoint is the slowest end of one."""

FIRST_STATE_SECONDS_MAX = 2.0
"""From a supervisor's lock to the first it says of itself."""

LAST_LINE_BYTES = 4096
"""Of a log, read to quote its last line."""


class ClusterError(Exception):
    """Why the command cannot do what was asked: one sentence for the person who asked."""


@dataclass(kw_only=True)
class ProcessState:
    """One process as ``scoreboard status`` shows it.

    Attributes:
        operations_port: Where a gateway answers /readyz and /metrics.
        born: What :func:`born` says of the pid.
        started_at: Unix time in seconds; None before the first start.
    """

    name: str
    log: str
    port: int | None = None
    operations_port: int | None = None
    pid: int | None = None
    born: str = ""
    state: Literal["waiting", "creating", "starting", "ready", "stopping", "stopped", "done"] = (
        "waiting"
    )
    restarts: int = 0
    started_at: float | None = None

    def alive(self) -> bool:
        """Whether that very process still runs; on other systems than Linux it never does."""
        return bool(self.pid and self.born) and born(self.pid or 0) == self.born


@dataclass(kw_only=True)
class State:
    """The cluster as its supervisor last wrote it down.

    Attributes:
        born: What :func:`born` says of the pid.
        error: Why it ended, where it did not end because it was asked to.
        wish: The id of the last `scale` that was carried out or refused.
        wish_error: Why that one was refused.
    """

    pid: int
    born: str = ""
    port: int
    url: str
    secrets_dir: str
    phase: Literal["starting", "ready", "stopping", "stopped"] = "starting"
    error: str | None = None
    wish: str | None = None
    wish_error: str | None = None
    processes: list[ProcessState] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read back what :meth:`Home.write_state` wrote."""
        fields = json.loads(text)
        fields["processes"] = [ProcessState(**process) for process in fields["processes"]]
        return cls(**fields)


class Home:
    """One ``--home``. Nothing outside of it is written, and no permission outside of it changed."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.log = self.path / "log"
        self.first_words = self.log / "supervisor.new"
        self.run = self.path / "run"
        self.secrets = self.path / "secrets"

    def create(self) -> None:
        """
        Make the folders.

        Raises:
            ClusterError: If the place cannot be written to, or is somebody else's.
        """
        self.check_owner()
        try:
            for folder in (self.path, self.log, self.run, self.secrets):
                folder.mkdir(parents=True, exist_ok=True)
            self.secrets.chmod(0o700)
            # Below a checkout nobody commits data and secrets by accident.
            (self.path / ".gitignore").write_text("*\n")
            (self.run / "lock").touch()
        except OSError as error:
            raise ClusterError(
                f"--home {self.path} cannot be used: {error.strerror or error} ({error.filename})."
            ) from None

    def check_owner(self) -> None:
        """
        Root could write here, and its owner could then read nothing of it.

        Raises:
            ClusterError: If the home belongs to another user.
        """
        owner = self.path.stat().st_uid if self.path.is_dir() else os.geteuid()
        if owner != os.geteuid():
            try:
                name = pwd.getpwuid(owner).pw_name
            except KeyError:
                name = f"uid {owner}"
            raise ClusterError(
                f"--home {self.path} belongs to {name}: run this as that user, or choose another."
            )

    def postgres(self, shard: int) -> Path:
        """The data directory of that shard."""
        return self.path / f"postgres-{shard}"

    def shards(self) -> int:
        """How many shards have data here; 0 in a new home."""
        count = 0
        while self.postgres(count).is_dir():
            count += 1
        return count

    def secret(self, name: str) -> str:
        """The secret of that name, made on first use; letters, digits, ``-`` and ``_`` only."""
        path = self.secrets / name
        if not path.exists():
            self.write_secret(name, secrets.token_urlsafe(SECRET_BYTES))
        return path.read_text(encoding="utf-8")

    def write_secret(self, name: str, text: str) -> Path:
        """Keep ``text`` readable to the owner only; the path is what a ``*_FILE`` variable takes."""
        path = self.secrets / name
        replace_file(path, text)
        return path

    def lock(self) -> None:
        """
        Be the only supervisor of this home, until the process ends: then nothing of it is left.

        Raises:
            ClusterError: If there is one already.
        """
        self._lock = (self.run / "lock").open("r+")
        give_up_at = time.monotonic() + LOCK_WAIT_S
        while not _locked(self._lock.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > give_up_at:
                raise ClusterError(self.already())
            time.sleep(LOCK_POLL_S)

    def running(self) -> State | None:
        """
        What the supervisor says, or None where none runs: a dead one's state is not believed.

        Raises:
            ClusterError: If one runs that has said nothing yet.
        """
        give_up_at = time.monotonic() + FIRST_STATE_SECONDS_MAX
        while time.monotonic() < give_up_at:
            try:
                with (self.run / "lock").open() as file:
                    if _locked(file.fileno(), fcntl.LOCK_SH):
                        return None
            except FileNotFoundError:
                return None
            except OSError as error:
                raise ClusterError(
                    f"--home {self.path} cannot be read: {error.strerror}."
                ) from None
            state = self.state()
            if state is not None and state.born in ("", born(state.pid)):
                return state
            time.sleep(LOCK_POLL_S)
        raise ClusterError(f"A cluster is about to start or stop in {self.path}; try again.")

    def already(self) -> str:
        """The sentence for whoever starts a second one."""
        state = self.state()
        where = f" at {state.url} (pid {state.pid})" if state else ""
        return f"A cluster already runs in {self.path}{where}. Stop it with: {command('down')}"

    def state(self) -> State | None:
        """The last state written, by a supervisor that may be gone."""
        try:
            return State.from_json((self.run / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except PermissionError:
            raise ClusterError(f"The cluster in {self.path} belongs to another user.") from None

    def orphans(self) -> list[ProcessState]:
        """Servers of a supervisor that was killed, which are about to end; Linux only."""
        state = self.state()
        return [process for process in (state.processes if state else ()) if process.alive()]

    def write_state(self, state: State) -> None:
        """Replace the state in one step: a reader sees the old or the new one."""
        replace_file(self.run / "state.json", json.dumps(asdict(state)))

    def write_wish(self, wish: dict[str, str | int]) -> None:
        """Say what `scale` is to bring about."""
        replace_file(self.run / "wish.json", json.dumps(wish))

    def wish(self) -> dict[str, str | int]:
        """The last wish; empty where there has been none that can be read."""
        with suppress(OSError):
            wish: dict[str, str | int] = json.loads((self.run / "wish.json").read_text())
            return wish
        return {}

    def rotate_logs(self) -> None:
        """Put the last run's logs aside; what a detached supervisor has said so far begins anew."""
        for old in self.log.glob("*.log.1"):
            old.unlink()
        for path in self.log.glob("*.log"):
            path.replace(path.with_suffix(".log.1"))
        if self.first_words.exists():
            self.first_words.rename(self.log / "supervisor.log")


def command(name: str) -> str:
    """A subcommand, to be typed as this one was: it is seldom on PATH."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" or shutil.which(called.name) == str(called):
        return f"scoreboard {name}"
    if called.is_absolute() and called.is_relative_to(Path.cwd()):
        called = called.relative_to(Path.cwd())
    return f"{shlex.quote(str(called))} {name}"


def born(pid: int) -> str:
    """
    What tells the process from a later one of the same pid: when it began, in the kernel's ticks.

    Empty if none runs, and on systems that do not say, all but Linux.
    """
    fields = _stat(pid)
    return "" if not fields or fields[0] in "ZX" else fields[19]


def children(pid: int | None) -> set[int]:
    """The processes that one has started."""
    if Path("/proc/self/stat").exists():
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return {child for child in pids if _stat(child)[1:2] == [str(pid)]}
    listing = subprocess.run(
        ["/bin/ps", "-A", "-o", "pid=,ppid="], check=True, capture_output=True, text=True
    )
    pairs = [line.split() for line in listing.stdout.splitlines()]
    return {int(child) for child, parent in pairs if parent == str(pid)}


def _stat(pid: int) -> list[str]:
    """What Linux says of a process: state, parent, and so on; empty if nothing does."""
    try:
        # The name before, in parentheses, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def command_line(pid: int) -> str:
    """What runs as that pid; empty if nothing does, or the system does not say."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def still_running(orphans: Iterable[ProcessState]) -> ClusterError:
    """What to say when they do not end by themselves."""
    left = ", ".join(f"{one.name} (pid {one.pid})" for one in orphans if one.alive())
    return ClusterError(
        f"Still running after {ORPHANS_SECONDS_MAX:.0f} s, though the supervisor was killed: {left}. "
        "End them with kill."
    )


def last_line(log: Path) -> str:
    """What a server said at the end: its last line that names an error, else its last line."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_LINE_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        errors = [
            line
            for line in lines
            # Valkey's is only a heading.
            if any(word in line for word in ("FATAL", "[emerg]")) and not line.startswith("***")
        ]
        return next((line for line in reversed(errors or lines) if line), "it wrote nothing")
    return "it wrote nothing"


def _locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def replace_file(path: Path, text: str) -> None:
    """Write a file of mode 0600 in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)
