"""What a cluster consists of, in which order it starts, scales and stops."""

import asyncio
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from services.scoreboard.home import REPLICAS_MAX, ClusterError, Home, State
from services.scoreboard.installation import Installation, all_of
from services.scoreboard.servers import Binaries, Nginx, Postgres, valkey, valkey_url
from services.scoreboard.supervisor import Supervised

SHARDS_DEFAULT = 2
"""The fewest that show what sharding does."""

API_NICE = 2
"""So that what Nginx refuses need not wait for the work it is refused in favour of: at twice the load the
refusals' p99 was 17 to 31 ms, 37 to 59 without, and as much was done."""

OLD_WORKERS_SECONDS = 4.0
"""After a reload, an old Nginx worker may send requests to a replica it still knows: for the
template's keepalive_min_timeout (3 s) its clients keep their connections. Then it knows none."""


class Cluster(Installation):
    """Shards, Valkey, replicas of both services, and Nginx before them."""

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
        super().__init__(home, port=port, shown=shown)
        self._counts = {"api": api, "gateway": gateway}
        self._shard_count = shards
        self._valkey: list[Supervised] = []
        self._nginx: list[Supervised] = []
        self._replicas: dict[str, list[Supervised]] = {"api": [], "gateway": []}

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

        self._plan_shards(postgres, shard_ports)
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
        await all_of(*(server.start() for server in (*self._shards, *self._valkey)))
        await self._migrate(migration)
        await all_of(
            *(replica.start() for replicas in self._replicas.values() for replica in replicas),
            *(server.start() for server in self._nginx),
        )
        self._phase("ready")

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
            await all_of(*(replica.start() for replica in added))
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
        nice = API_NICE if service == "api" else 0
        return self._service(f"{service}-{index}", service, port, operations_port, nice=nice)

    def _environ(self) -> dict[str, str]:
        return super()._environ() | {"REDIS_URL_FILE": str(self._home.secrets / "redis_url")}


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
