"""The processes of one home, until somebody asks them to stop, and what others are told of them."""

import asyncio
import os
import resource
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

from services.scoreboard.home import (
    ORPHANS_POLL_S,
    ORPHANS_SECONDS_MAX,
    ClusterError,
    Home,
    ProcessState,
    State,
    born,
    last_line,
    still_running,
)
from services.scoreboard.servers import BINARY_VARIABLES, Postgres, http_status
from services.scoreboard.supervisor import Identity, Port, Program, Supervised, run_once

DRAIN_SECONDS = 2
"""What a gateway takes to send its clients away; there are few on one machine."""

REPLICA_STOP_SECONDS = DRAIN_SECONDS + 10.0
"""SIGTERM to exit, before SIGKILL: the drain and the last requests, each bounded to 2 s."""

FILES_MAX = 65536
"""A WebSocket takes one in its gateway and two in Nginx; many systems give 1024 unless asked."""

SERVICE_VARIABLES = (
    "HOST", "PORT", "OPERATIONS_PORT", "SHARD_URLS", "DATABASE_URL", "REDIS_URL", "DRAIN_SECONDS",
    *BINARY_VARIABLES,
)  # fmt: skip
"""Set for each service here; the user's own, and their ``*_FILE`` twins, are for another cluster."""

TOKEN_VARIABLES = "JWT_"  # noqa: S105 - a prefix
"""Of those too: `scoreboard token` signs with the home's secret and names no audience."""


class Installation(ABC):
    """What every installation has, whichever processes it consists of."""

    def __init__(self, home: Home, *, port: int, shown: Callable[[State], None]) -> None:
        self._home = home
        self._shown = shown
        self._state = State(
            pid=os.getpid(),
            born=born(os.getpid()),
            port=port,
            url=f"http://127.0.0.1:{port}/",
            secrets_dir=str(home.secrets),
        )
        self._ports: dict[int, Port] = {}
        self._shards: list[Supervised] = []
        self._asked_to_stop = asyncio.Event()
        self._wished = asyncio.Event()

    async def run(self) -> None:
        """
        Bring everything up and keep it up until SIGINT, SIGTERM or SIGHUP; SIGUSR1 reads the wish.

        Raises:
            ClusterError: If it does not come up. Nothing is left running then.
        """
        _raise_file_limit()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup ignores SIGHUP for us.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._asked_to_stop.set)
        loop.add_signal_handler(signal.SIGUSR1, self._wished.set)
        orphans = self._home.orphans()
        self._changed()
        try:
            await self._unless_stopped(_wait_for(orphans))
            await self._unless_stopped(self._start())
            while not self._asked_to_stop.is_set():
                await self._unless_stopped(self._wished.wait())
                if self._wished.is_set():
                    self._wished.clear()
                    await self._unless_stopped(self._grant())
        except (ClusterError, OSError) as error:
            self._state.error = str(error)
            raise
        finally:
            try:
                self._phase("stopping")
            finally:
                await self._stop()
            for reserved in self._ports.values():
                reserved.release()
            self._phase("stopped")

    async def _unless_stopped(self, work: Coroutine[Any, Any, object]) -> None:
        """Do it, or leave off as soon as it is asked to stop."""
        working = asyncio.create_task(work)
        stop = asyncio.create_task(self._asked_to_stop.wait())
        try:
            await asyncio.wait((working, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not working.done():
                working.cancel()
                await asyncio.wait((working,))
        if not working.cancelled():
            working.result()

    @abstractmethod
    async def _start(self) -> None:
        """Start everything, and return when it is ready."""

    @abstractmethod
    async def _stop(self) -> None:
        """Stop everything that was started."""

    @abstractmethod
    async def _scale(self, counts: Mapping[str, int]) -> None:
        """
        Run that many replicas of each service.

        Raises:
            ClusterError: If that is not possible; nothing has changed then.
        """

    def _plan_shards(self, postgres: Postgres, ports: Sequence[int]) -> None:
        for shard, port in enumerate(ports):
            self._shards.append(
                self._supervised(f"postgres-{shard}", postgres.program(shard, port), port)
            )

    async def _create_shards(self, postgres: Postgres) -> None:
        for server in self._shards[self._home.shards() :]:
            server.state.state = "creating"
        self._changed()
        await all_of(*(postgres.create(shard) for shard in range(len(self._shards))))
        # All or none: how many there are says later on how many shards the data lives on.
        for shard in range(len(self._shards)):
            postgres.adopt(shard)

    async def _migrate(self, state: ProcessState) -> None:
        state.state = "starting"
        self._changed()
        log = self._home.log / "migrate.log"
        argv = [sys.executable, "-P", "-m", "services.scoreboard", "migrate"]
        if await run_once(argv, self._environ(), log, Identity()) != 0:
            raise ClusterError(f"The migration failed: {last_line(log)} (log: {log})")
        state.state = "done"
        self._changed()

    async def _grant(self) -> None:
        wish = self._home.wish()
        if not wish:
            return
        try:
            await self._scale({name: int(count) for name, count in wish.items() if name != "id"})
        except (ClusterError, OSError) as error:
            self._state.wish_error = str(error)
        else:
            self._state.wish_error = None
        self._state.wish = str(wish["id"])
        self._changed()

    def _environ(self) -> dict[str, str]:
        """The user's settings for the services, with addresses and secrets of ours."""
        ours = {name for base in SERVICE_VARIABLES for name in (base, f"{base}_FILE")}
        users = {
            name: value
            for name, value in os.environ.items()
            if name not in ours and not name.startswith(TOKEN_VARIABLES)
        }
        return users | {
            "HOST": "127.0.0.1",
            "SHARD_URLS_FILE": str(self._home.secrets / "shard_urls"),
            "JWT_SECRET_FILE": str(self._home.secrets / "jwt_secret"),
            "DRAIN_SECONDS": str(DRAIN_SECONDS),
            "PYTHONUNBUFFERED": "1",
        }

    def _service(
        self, name: str, package: str, port: int, operations_port: int, *, nice: int = 0
    ) -> Supervised:
        """A process of one of our packages, not started yet."""

        async def ready(_pid: int) -> bool:
            return await http_status(operations_port, "/readyz") == 200

        ports = {"PORT": str(port), "OPERATIONS_PORT": str(operations_port)}
        program = Program(
            argv=[sys.executable, "-P", "-m", f"services.{package}"],
            environ=self._environ() | ports,
            ready=ready,
            stop=((signal.SIGTERM, REPLICA_STOP_SECONDS),),
            parent_death=signal.SIGTERM,
            nice=nice,
            sched_batch=True,
        )
        service = self._supervised(name, program, port)
        service.state.operations_port = operations_port
        return service

    def _supervised(self, name: str, program: Program, port: int) -> Supervised:
        return Supervised(program, self._process_state(name, port), self._changed)

    def _process_state(self, name: str, port: int | None = None) -> ProcessState:
        state = ProcessState(name=name, log=str(self._home.log / f"{name}.log"), port=port)
        self._state.processes.append(state)
        return state

    def _port(self) -> int:
        port = Port()
        self._ports[port.number] = port
        return port.number

    def _edge_port(self) -> int:
        wanted = self._state.port
        try:
            port = Port(wanted)
        except OSError as error:
            reason = "needs root" if isinstance(error, PermissionError) else "is taken"
            raise ClusterError(
                f"Port {wanted} of 127.0.0.1 {reason}: choose another with --port."
            ) from None
        self._ports[port.number] = port
        return port.number

    def _phase(self, phase: str) -> None:
        self._state.phase = phase  # type: ignore[assignment]
        self._changed()

    def _changed(self) -> None:
        # On a full disk, or where nobody reads, the servers matter more than what is said of them.
        with suppress(OSError):
            self._home.write_state(self._state)
        with suppress(OSError):
            self._shown(self._state)


def _raise_file_limit() -> None:
    """Let the servers, which inherit it, open as many files as the system allows, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def _wait_for(orphans: Sequence[ProcessState]) -> None:
    """Let the servers of a killed supervisor give back their port and data directories."""
    give_up_at = time.monotonic() + ORPHANS_SECONDS_MAX
    while any(orphan.alive() for orphan in orphans):
        if time.monotonic() > give_up_at:
            raise still_running(orphans)
        await asyncio.sleep(ORPHANS_POLL_S)


async def all_of(*work: Coroutine[Any, Any, None]) -> None:
    """Do it all at once; the first failure ends the rest and is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        for done in asyncio.as_completed(tasks):
            await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
