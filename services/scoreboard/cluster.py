"""What a cluster consists of, in which order it starts, scales and stops."""

import asyncio
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

from services.scoreboard.home import (
    ORPHANS_POLL_S,
    ORPHANS_SECONDS_MAX,
    REPLICAS_MAX,
    ClusterError,
    Home,
    ProcessState,
    State,
    born,
    last_line,
    still_running,
)
from services.scoreboard.servers import (
    BINARY_VARIABLES,
    Binaries,
    Nginx,
    Postgres,
    http_status,
    valkey,
    valkey_url,
)
from services.scoreboard.supervisor import Identity, Port, Program, Supervised, run_once

SHARDS_DEFAULT = 2
"""The fewest that show what sharding does."""

DRAIN_SECONDS = 2
"""What a gateway takes to send its clients away; there are few on one machine."""

OLD_WORKERS_SECONDS = 4.0
"""After a reload, an old Nginx worker may send requests to a replica it still knows: for the
template's keepalive_min_timeout (3 s) its clients keep their connections. Then it knows none."""

REPLICA_STOP_SECONDS = DRAIN_SECONDS + 10.0
"""SIGTERM to exit, before SIGKILL: the drain and the last requests, each bounded to 2 s."""

FILES_MAX = 65536
"""A WebSocket takes one in its gateway and two in Nginx; many systems give 1024 unless asked."""

SERVICE_VARIABLES = (
    "HOST", "PORT", "OPERATIONS_PORT", "SHARD_URLS", "REDIS_URL", "DRAIN_SECONDS", *BINARY_VARIABLES,
)  # fmt: skip
"""Set for each service here; the user's own, and their ``*_FILE`` twins, are for another cluster."""

TOKEN_VARIABLES = "JWT_"  # noqa: S105 - a prefix
"""Of those too: `scoreboard token` signs with the home's secret and names no audience."""


class Cluster:
    """The processes of one home, and the state that tells others of them."""

    def __init__(
        self,
        home: Home,
        *,
        port: int,
        api: int,
        gateway: int,
        shards: int,
        shown: Callable[[State], None],
    ) -> None:
        self._home = home
        self._counts = {"api": api, "gateway": gateway}
        self._shard_count = shards
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
        self._valkey: list[Supervised] = []
        self._nginx: list[Supervised] = []
        self._replicas: dict[str, list[Supervised]] = {"api": [], "gateway": []}
        self._asked_to_stop = asyncio.Event()
        self._wished = asyncio.Event()

    async def run(self) -> None:
        """
        Bring the cluster up and keep it up until SIGINT, SIGTERM or SIGHUP; SIGUSR1 reads the wish.

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
        """Do it, or leave off as soon as the cluster is asked to stop."""
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

    async def _start(self) -> None:
        # All that can be found wrong beforehand is, with nothing started.
        binaries = Binaries.find(os.environ)
        edge = self._edge_port()
        postgres = Postgres(binaries.postgres, self._home)
        shard_ports = [self._port() for _ in range(self._shard_count)]
        valkey_port = self._port()
        self._home.write_secret("shard_urls", ",".join(map(postgres.url, shard_ports)))
        self._home.write_secret("redis_url", valkey_url(self._home, valkey_port))
        self._home.secret("jwt_secret")
        check_settings(self._environ())
        self._home.rotate_logs()

        for shard, port in enumerate(shard_ports):
            self._shards.append(
                self._supervised(f"postgres-{shard}", postgres.program(shard, port), port)
            )
        self._valkey.append(
            self._supervised(
                "valkey", valkey(binaries.valkey, self._home, valkey_port), valkey_port
            )
        )
        migration = self._process_state("migrate")
        for service, count in self._counts.items():
            self._replicas[service] = [self._replica(service, index) for index in range(count)]
        nginx_log = self._home.log / "nginx.log"
        self._edge = Nginx(binaries.nginx, self._home, edge, nginx_log)
        self._edge.render(_ports(self._replicas["api"]), _ports(self._replicas["gateway"]))
        self._nginx.append(self._supervised("nginx", self._edge.program(), edge))

        await self._create_shards(postgres)
        await _all(*(server.start() for server in (*self._shards, *self._valkey)))
        await self._migrate(migration)
        await _all(
            *(replica.start() for replicas in self._replicas.values() for replica in replicas),
            *(server.start() for server in self._nginx),
        )
        self._phase("ready")

    async def _create_shards(self, postgres: Postgres) -> None:
        for server in self._shards[self._home.shards() :]:
            server.state.state = "creating"
        self._changed()
        await _all(*(postgres.create(shard) for shard in range(self._shard_count)))
        # All or none: how many there are says later on how many shards the data lives on.
        for shard in range(self._shard_count):
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
            await self._scale({name: int(wish[name]) for name in self._replicas if name in wish})
        except (ClusterError, OSError) as error:
            self._state.wish_error = str(error)
        else:
            self._state.wish_error = None
        self._state.wish = str(wish["id"])
        self._changed()

    async def _scale(self, counts: Mapping[str, int]) -> None:
        """
        Run that many replicas of each service, failing no request on the way.

        New ones are ready before Nginx hears of them; old ones end only after no worker of Nginx
        knows them any more. All of it, or nothing changes.
        """
        before = self._replicas
        added, removed, after = [], [], before.copy()
        for service, count in counts.items():
            kept = before[service][:count]
            removed += before[service][count:]
            new = [self._replica(service, index) for index in range(len(kept), count)]
            added += new
            after[service] = kept + new
        if not added and not removed:
            return
        try:
            await _all(*(replica.start() for replica in added))
        except BaseException:
            await self._end(added)
            raise
        try:
            await self._route(after)
        except BaseException:
            # Nginx may yet have heard of the new ones.
            with suppress(OSError):
                self._edge.render(_ports(before["api"]), _ports(before["gateway"]))
                self._nginx[0].signal(signal.SIGHUP)
            await self._end(added)
            raise
        self._replicas = after
        try:
            if removed:
                await asyncio.sleep(OLD_WORKERS_SECONDS)
        finally:
            await self._end(removed)

    async def _route(self, replicas: Mapping[str, list[Supervised]]) -> None:
        """Make Nginx send requests to these and no others."""
        self._edge.render(_ports(replicas["api"]), _ports(replicas["gateway"]))
        await self._edge.reload(self._nginx[0])

    async def _end(self, replicas: list[Supervised]) -> None:
        """Stop them and forget them."""
        await asyncio.gather(*(replica.stop() for replica in replicas))
        for state in (replica.state for replica in replicas):
            self._state.processes.remove(state)
            for number in {state.port, state.operations_port}:
                self._ports.pop(number or 0).release()
        self._changed()

    async def _stop(self) -> None:
        """From the edge inwards, so that whoever is being answered still is."""
        await asyncio.gather(
            *(server.stop() for server in (*self._nginx, *self._replicas["gateway"]))
        )
        await asyncio.gather(*(server.stop() for server in self._replicas["api"]))
        await asyncio.gather(*(server.stop() for server in (*self._shards, *self._valkey)))

    def _replica(self, service: str, index: int) -> Supervised:
        port = self._port()
        operations_port = self._port() if service == "gateway" else port
        environ = self._environ() | {"PORT": str(port)}
        if service == "gateway":
            environ["OPERATIONS_PORT"] = str(operations_port)

        async def ready(_pid: int) -> bool:
            return await http_status(operations_port, "/readyz") == 200

        program = Program(
            argv=[sys.executable, "-P", "-m", f"services.{service}"],
            environ=environ,
            ready=ready,
            stop=((signal.SIGTERM, REPLICA_STOP_SECONDS),),
            parent_death=signal.SIGTERM,
        )
        replica = self._supervised(f"{service}-{index}", program, port)
        replica.state.operations_port = operations_port
        return replica

    def _environ(self) -> dict[str, str]:
        """The user's settings for the services, with this cluster's addresses and secrets."""
        ours = {name for base in SERVICE_VARIABLES for name in (base, f"{base}_FILE")}
        users = {
            name: value
            for name, value in os.environ.items()
            if name not in ours and not name.startswith(TOKEN_VARIABLES)
        }
        return users | {
            "HOST": "127.0.0.1",
            "SHARD_URLS_FILE": str(self._home.secrets / "shard_urls"),
            "REDIS_URL_FILE": str(self._home.secrets / "redis_url"),
            "JWT_SECRET_FILE": str(self._home.secrets / "jwt_secret"),
            "DRAIN_SECONDS": str(DRAIN_SECONDS),
            "PYTHONUNBUFFERED": "1",
        }

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


def check_settings(environ: Mapping[str, str]) -> None:
    """
    See whether API and gateway would start with this environment.

    Raises:
        ClusterError: With the sentence they would end with.
    """
    # Here, because nothing else of the command needs them: they take a while.
    from services.api.settings import ApiSettings
    from services.gateway.settings import GatewaySettings
    from shared.settings import SettingsError

    try:
        for settings in (ApiSettings, GatewaySettings):
            settings.from_environ(environ)
    except SettingsError as error:
        raise ClusterError(str(error)) from None


def _ports(replicas: Sequence[Supervised]) -> list[int]:
    return [replica.state.port for replica in replicas if replica.state.port]


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


async def _all(*work: Coroutine[Any, Any, None]) -> None:
    """Do it all at once; the first failure ends the rest and is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        for done in asyncio.as_completed(tasks):
            await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def shard_count(home: Home, wanted: int | None) -> int:
    """
    How many shards to start: those wanted, else those the home has, else two.

    Raises:
        ClusterError: If the home's data lives on another number.
    """
    there = home.shards()
    if there and wanted not in (None, there):
        raise ClusterError(
            f"The data in {home.path} lives on {there} shards, so it cannot be served by "
            f"{wanted}: leave --shards out, or choose another --home."
        )
    return wanted or there or SHARDS_DEFAULT


def parse_counts(words: tuple[str, ...]) -> dict[str, int]:
    """
    Read ``api=3 gateway=1``.

    Raises:
        ClusterError: If that is not what it says.
    """
    counts: dict[str, int] = {}
    for word in words:
        match = re.fullmatch(r"(api|gateway)=(\d{1,4})", word)
        if match is None or not 1 <= int(match[2]) <= REPLICAS_MAX:
            raise ClusterError(f"{word} is not api=N or gateway=N with N from 1 to {REPLICAS_MAX}.")
        counts[match[1]] = int(match[2])
    return counts
