"""One process, kept alive: started, asked whether it is ready, restarted when it dies, stopped."""

import asyncio
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from services.scoreboard.home import ClusterError, ProcessState, born, last_line

READY_SECONDS_MAX = 60.0
"""From the first start to ready; crash recovery of a large shard is the slowest of them."""

DEATHS_AT_START_MAX = 3
"""A server that was never ready and died this often will not mend itself: its setup is wrong."""

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.25, 2.0
"""Between deaths in a row, doubling; the first restart is at once."""

STEADY_S = 10.0
"""A process that was ready this long has nothing in a row with its last death."""

PROBE_INTERVAL_S = 0.05
PROBE_SECONDS_MAX = 2.0
"""One question about readiness; a server that hangs is asked again."""

KILL_SECONDS_MAX = 5.0
"""The kernel's time to end a process after SIGKILL."""

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Who a process runs as, where that is not who the supervisor is.

    Attributes:
        uid: To become before the program starts; None stays.
        namespace: Be uid 1000 inside a user namespace of its own: root outside, so it may use
            what only root can reach, but a program that refuses root does not see one.
    """

    uid: int | None = None
    namespace: bool = False

    def arguments(
        self,
        parent_death: signal.Signals | None = None,
        *,
        nice: int = 0,
        sched_batch: bool = False,
    ) -> dict[str, Any]:
        """
        For :mod:`subprocess`: start as this, alone in a new group, and die with the parent.

        In our session: Linux shares a busy CPU among sessions first (autogroup, sched(7)), and would
        give Nginx's two workers together no more of it than a single replica. Then what Nginx
        refuses for want of time waits for the work it is refused in favour of.
        """

        def prepare() -> None:
            if self.namespace:
                if _libc.unshare(_CLONE_NEWUSER) != 0:
                    raise OSError(ctypes.get_errno(), "unshare")
                for name, text in (("setgroups", "deny"), ("uid_map", "1000 0 1"),
                                   ("gid_map", "1000 0 1")):  # fmt: skip
                    with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
                        file.write(text)
            # After the change of identity, which clears it.
            if parent_death is not None and sys.platform == "linux":
                _libc.prctl(_PR_SET_PDEATHSIG, int(parent_death), 0, 0, 0)
            os.nice(nice)
            if sched_batch and sys.platform == "linux":
                with suppress(OSError):  # Not allowed everywhere, and needed nowhere.
                    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

        arguments: dict[str, Any] = {"process_group": 0, "preexec_fn": prepare}
        if self.uid is not None:
            arguments |= {"user": self.uid, "group": self.uid, "extra_groups": []}
        return arguments


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to run, and how to tell and end it.

    Attributes:
        ready: Whether the process of that pid can serve; may raise OSError for no.
        stop: The signals that end it, each with the seconds it gets; SIGKILL follows.
        parent_death: What it gets when the supervisor itself is killed.
        nice: Added to the supervisor's own niceness.
        sched_batch: It waits for its turn on a busy CPU, and does not interrupt whoever runs each
            time something comes for it (SCHED_BATCH, sched(7)): more is done in one go. With it
            two cores did 12 % more updates a second, and refusals at twice the load came sooner.
            PostgreSQL gained nothing: its statements are long already.
        cwd: Where it runs.
    """

    argv: Sequence[str]
    environ: Mapping[str, str]
    ready: Callable[[int], Awaitable[bool]]
    stop: Sequence[tuple[signal.Signals, float]]
    parent_death: signal.Signals
    nice: int = 0
    sched_batch: bool = False
    identity: Identity = field(default_factory=Identity)
    cwd: Path = Path("/")


class Port:
    """A free port of 127.0.0.1 that stays ours, also while the server on it restarts.

    The bound but silent socket keeps the kernel from giving the port to an outgoing connection;
    servers bind with SO_REUSEADDR and so still can. Only Linux works so: elsewhere the socket
    only finds the port.
    """

    def __init__(self, number: int = 0) -> None:
        """
        Reserve that port, or any.

        Raises:
            OSError: If it is taken or not ours to take.
        """
        self._socket = socket.socket()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("127.0.0.1", number))
        except BaseException:
            self._socket.close()
            raise
        self.number: int = self._socket.getsockname()[1]
        if sys.platform != "linux":
            self._socket.close()

    def release(self) -> None:
        """Give it back."""
        self._socket.close()


class Supervised:
    """A program kept running from :meth:`start` to :meth:`stop`."""

    def __init__(self, program: Program, state: ProcessState, changed: Callable[[], None]) -> None:
        self.state = state
        self._program = program
        self._changed = changed
        self._process: asyncio.subprocess.Process | None = None
        self._was_ready = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """
        Start it and wait until it is ready; from then on it is restarted whenever it dies.

        Raises:
            ClusterError: If it keeps dying before that, or takes too long.
        """
        self._keeping = asyncio.create_task(self._keep(), name=self.state.name)
        ready = asyncio.create_task(self._was_ready.wait())
        try:
            await asyncio.wait(
                (self._keeping, ready),
                timeout=READY_SECONDS_MAX,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            ready.cancel()
        if self._keeping.done():
            self._keeping.result()
        if not self._was_ready.is_set():
            raise ClusterError(
                f"{self.state.name} was not ready after {READY_SECONDS_MAX:.0f} s: "
                f"{last_line(Path(self.state.log))} (log: {self.state.log})"
            )

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self) -> None:
        """End it, gently first. Safe to call at any time, also twice."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait((self._keeping,))
        process = self._process
        if process is not None:
            self._show("stopping")
            for number, seconds in self._program.stop:
                if process.returncode is not None:
                    break
                self.signal(number)
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), seconds)
            await self._kill(process)
            self._process = self.state.pid = None
        self._show("stopped")

    async def _keep(self) -> None:
        deaths = 0
        while True:
            try:
                ready_at = await self._live_once()
            except Exception:
                # It ends this life, not the watch: without one a later death would go unseen.
                logger.exception("%s is started anew, because of a defect here", self.state.name)
                ready_at = None
                if self._process is not None:
                    await self._kill(self._process)
                    self._process = self.state.pid = None
            if ready_at is not None and time.monotonic() - ready_at > STEADY_S:
                deaths = 0
            deaths += 1
            if not self._was_ready.is_set() and deaths == DEATHS_AT_START_MAX:
                raise ClusterError(
                    f"{self.state.name} died {deaths} times at start: "
                    f"{last_line(Path(self.state.log))} (log: {self.state.log})"
                )
            if deaths > 1:
                await asyncio.sleep(min(BACKOFF_FIRST_S * 2 ** (deaths - 2), BACKOFF_MAX_S))
            self.state.restarts += 1

    async def _live_once(self) -> float | None:
        """One life, from start to death; the monotonic time at which it became ready."""
        self._show("starting")
        log_path = Path(self.state.log)
        try:
            with _append(log_path) as log:
                process = await asyncio.create_subprocess_exec(
                    *self._program.argv,
                    env=self._program.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._program.cwd,
                    **self._program.identity.arguments(
                        self._program.parent_death,
                        nice=self._program.nice,
                        sched_batch=self._program.sched_batch,
                    ),
                )
        except (OSError, subprocess.SubprocessError) as error:
            with suppress(OSError), _append(log_path) as log:
                log.write(f"{self._program.argv[0]} cannot be started: {error}\n".encode())
            return None
        self._process = process
        self.state.pid, self.state.born = process.pid, born(process.pid)
        self.state.started_at = time.time()
        self._changed()
        ready_at: float | None = None
        death = asyncio.create_task(process.wait())
        try:
            while not death.done() and ready_at is None:
                if await self._ready(process.pid):
                    ready_at = time.monotonic()
                    self._show("ready")
                    self._was_ready.set()
                else:
                    await asyncio.wait((death,), timeout=PROBE_INTERVAL_S)
            await asyncio.shield(death)
        finally:
            death.cancel()
        # What is left of it, such as the workers of a killed Nginx, still holds its port.
        await self._kill(process)
        self._process = self.state.pid = None
        return ready_at

    async def _ready(self, pid: int) -> bool:
        try:
            async with asyncio.timeout(PROBE_SECONDS_MAX):
                return await self._program.ready(pid)
        except (OSError, EOFError, ValueError):
            return False

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), KILL_SECONDS_MAX)

    def _show(self, state: str) -> None:
        self.state.state = state  # type: ignore[assignment]
        self._changed()


async def run_once(
    argv: Sequence[str], environ: Mapping[str, str], log_path: Path, identity: Identity
) -> int:
    """Run a program to its end and return its exit code; it ends with this task or process."""
    with _append(log_path) as log:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            **identity.arguments(signal.SIGKILL),
        )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def _append(log: Path) -> IO[bytes]:
    return log.open("ab")
