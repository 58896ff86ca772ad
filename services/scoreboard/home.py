"""The folder of a cluster: data, secrets, logs, and what the running supervisor says of itself.

postgres-0, postgres-1, …   one data directory a shard
valkey                      the append-only file
secrets                     0700; every file 0600
log                         NAME.log of this run, NAME.log.1 of the one before
run                         lock, state.json, wish.json, the rendered Nginx configuration
"""

import fcntl
import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

SECRET_BYTES = 32
"""Of randomness in each secret: what HS256 asks for, and more than a password needs."""

LOCK_WAIT_S, LOCK_POLL_S = 0.5, 0.02
"""`status` holds the lock shared for an instant; a supervisor that meets it tries again."""

LAST_LINE_BYTES = 4096
"""Of a log, read to quote its last line."""


class ClusterError(Exception):
    """Why the command cannot do what was asked: one sentence for the person who asked."""


@dataclass(kw_only=True)
class ProcessState:
    """One process as ``scoreboard status`` shows it.

    Attributes:
        operations_port: Where a gateway answers /readyz and /metrics.
        started_at: Unix time in seconds; None before the first start.
    """

    name: str
    log: str
    port: int | None = None
    operations_port: int | None = None
    pid: int | None = None
    state: Literal["waiting", "creating", "starting", "ready", "stopping", "stopped", "done"] = (
        "waiting"
    )
    restarts: int = 0
    started_at: float | None = None


@dataclass(kw_only=True)
class State:
    """The cluster as its supervisor last wrote it down.

    Attributes:
        error: Why it ended, where it did not end because it was asked to.
        wish: The id of the last `scale` that was carried out or refused.
        wish_error: Why that one was refused.
    """

    pid: int
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
        self.run = self.path / "run"
        self.secrets = self.path / "secrets"

    def create(self) -> None:
        """
        Make the folders.

        Raises:
            ClusterError: If the place cannot be written to.
        """
        try:
            for folder in (self.path, self.log, self.run, self.secrets):
                folder.mkdir(parents=True, exist_ok=True)
            self.secrets.chmod(0o700)
            (self.run / "lock").touch()
        except OSError as error:
            raise ClusterError(
                f"--home {self.path} cannot be used: {error.strerror or error} ({error.filename})."
            ) from None

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
        _replace(path, text)
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
        """What the supervisor says, or None where none runs: a dead one's state is not believed."""
        try:
            with (self.run / "lock").open() as file:
                if _locked(file.fileno(), fcntl.LOCK_SH):
                    return None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ClusterError(f"--home {self.path} cannot be read: {error.strerror}.") from None
        return self.state()

    def already(self) -> str:
        """The sentence for whoever starts a second one."""
        state = self.state()
        where = f" at {state.url} (pid {state.pid})" if state else ""
        return f"A cluster already runs in {self.path}{where}. Stop it with: scoreboard down"

    def state(self) -> State | None:
        """The last state written, by a supervisor that may be gone."""
        with suppress(FileNotFoundError):
            return State.from_json((self.run / "state.json").read_text(encoding="utf-8"))
        return None

    def write_state(self, state: State) -> None:
        """Replace the state in one step: a reader sees the old or the new one."""
        _replace(self.run / "state.json", json.dumps(asdict(state)))

    def write_wish(self, wish: dict[str, str | int]) -> None:
        """Say what `scale` is to bring about."""
        _replace(self.run / "wish.json", json.dumps(wish))

    def wish(self) -> dict[str, str | int]:
        """The last wish; empty where there has been none."""
        with suppress(FileNotFoundError):
            wish: dict[str, str | int] = json.loads((self.run / "wish.json").read_text())
            return wish
        return {}

    def rotate_logs(self, *, keep: str) -> None:
        """Put the last run's logs aside, all but that of ``keep``, which is this run's already."""
        for old in self.log.glob("*.log.1"):
            if old.name != f"{keep}.log.1":
                old.unlink()
        for path in self.log.glob("*.log"):
            if path.stem != keep:
                path.replace(path.with_suffix(".log.1"))


def last_line(log: Path) -> str:
    """What a server said at the end: its last line that names an error, else its last line."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_LINE_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        errors = [line for line in lines if any(word in line for word in ("FATAL", "[emerg]"))]
        return next((line for line in reversed(errors or lines) if line), "it wrote nothing")
    return "it wrote nothing"


def _locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _replace(path: Path, text: str) -> None:
    """Write a file of mode 0600 in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)
