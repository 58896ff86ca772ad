"""Who shows boards to many clients: our gateway, a bare loop, and peers where they are installed.

Each is a server on a port of its own, and has its own way to be given a board.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from redis.asyncio import Redis

from services.gateway.audience import SEND_BUFFER_BYTES
from shared.board import BOARD_SIZE, Board, Score, Standing, live_message
from shared.leaderboard import CHANNEL, Leaderboard
from tests.benchmarks.yardstick import install
from tests.cluster import eventually, free_port
from tests.gateway.harness import SECRET, Gateway, running_gateway
from tests.valkey import Valkey

START_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 10.0

ANY = "1000000"
"""A second: what a gateway can is what is measured."""

CONNECTIONS_MAX = 19_000
"""Of one process: what our gateway takes by default."""

NCHAN = """
load_module {root}/usr/lib/nginx/modules/ngx_nchan_module.so;
worker_processes 1;
worker_rlimit_nofile 20000;
daemon off;
pid nchan.pid;
error_log stderr;
events {{ worker_connections 19900; }}
http {{
    access_log off;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp;
    uwsgi_temp_path temp; scgi_temp_path temp;
    server {{
        listen 127.0.0.1:{port} backlog=2048 sndbuf={send_buffer};
        location = /scores/live {{ nchan_subscriber websocket; nchan_channel_id board; }}
        location = /publish {{
            nchan_publisher; nchan_channel_id board; nchan_message_buffer_length 1;
        }}
    }}
}}
"""


def scores(number: int) -> list[Score]:
    """A board whose first score is ``number``; boards of ten digits are of one length."""
    others = (
        Score(f"bench-runner-up-{place}", 900_000_000 + place, reached_us=1)
        for place in range(1, BOARD_SIZE)
    )
    return [Score("bench-leader-0000", number, reached_us=number), *others]


def message(number: int) -> bytes:
    """The same as clients get it."""
    rows = sorted(scores(number), key=lambda row: -row.score)
    standings = tuple(Standing(row.user_id, row.score) for row in rows)
    return live_message(Board(epoch=0, version=0, standings=standings))


class Broadcaster(Protocol):
    """A server."""

    @property
    def port(self) -> int:
        """Where its clients connect."""

    @property
    def pids(self) -> Sequence[int]:
        """Its processes."""

    async def publish(self, number: int) -> None:
        """Give it the next board; numbers rise by one."""


class Ours:
    """Gateways, and a Valkey to which boards are published by the leaderboard script."""

    def __init__(self, gateways: Sequence[Gateway], leaderboard: Leaderboard) -> None:
        self.gateways = gateways
        self.port = gateways[0].port
        self.pids = [gateway.process.pid for gateway in gateways]
        self._leaderboard = leaderboard

    async def publish(self, number: int) -> None:
        """As the API does after a commit."""
        if not await self._leaderboard.apply(scores(number)[:1]):
            raise RuntimeError("Redis has lost the board")


@asynccontextmanager
async def ours(folder: Path, first: int, processes: int = 1) -> AsyncIterator[Ours]:
    """So many gateway processes with a first board."""
    valkey = Valkey(folder)
    await valkey.start()
    gateways: list[Gateway] = []
    try:
        async with Redis.from_url(valkey.url) as redis:
            leaderboard = Leaderboard(redis)
            await leaderboard.rebuild(scores(first), {})
            async with _gateways(valkey.url, folder, processes) as gateways:
                for gateway in gateways:
                    await gateway.ready()
                yield Ours(gateways, leaderboard)
    finally:
        await valkey.kill()


@asynccontextmanager
async def _gateways(redis_url: str, folder: Path, count: int) -> AsyncIterator[list[Gateway]]:
    """As they are in production, but for the log's level."""
    if not count:
        yield []
        return
    log = folder / f"gateway-{count}.log"
    async with (
        running_gateway(redis_url, log, LOG_LEVEL="info", HANDSHAKES_PER_SECOND_MAX=ANY) as gateway,
        _gateways(redis_url, folder, count - 1) as others,
    ):
        yield [gateway, *others]


class Bare:
    """The floor; see ``bare_sends.py``."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.port = port
        self.pids = [process.pid]
        self._process = process

    async def publish(self, number: int) -> None:
        """By its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(message(number) + b"\n")
        await self._process.stdin.drain()


@asynccontextmanager
async def bare(first: int) -> AsyncIterator[Bare]:
    """The loop, with a first board."""
    port = free_port()
    async with _process(
        [sys.executable, "-m", "tests.benchmarks.bare_sends", str(port)], port, stdin=True
    ) as process:
        loop = Bare(process, port)
        await loop.publish(first)
        yield loop


class Node:
    """A Node.js gateway: the same message on the channel of a Valkey of its own."""

    def __init__(self, pid: int, port: int, redis: Redis) -> None:
        self.port = port
        self.pids = [pid]
        self._redis = redis

    async def publish(self, number: int) -> None:
        """Straight on the channel."""
        await self._redis.publish(CHANNEL, message(number))


@asynccontextmanager
async def node(source: Path, folder: Path) -> AsyncIterator[Node]:
    """``gateway.js`` of the folder ``source``; see ``yardstick.py``."""
    modules = await asyncio.to_thread(install, source, folder / "modules")
    valkey = Valkey(folder)
    await valkey.start()
    port = free_port()
    environ = {
        "NODE_ENV": "production",
        "NODE_PATH": modules,
        "JWT_SECRET": SECRET,
        "REDIS_URL": valkey.url,
        "PORT": str(port),
    }
    try:
        async with (
            _process(["node", source / "gateway.js"], port, environ) as process,
            Redis.from_url(valkey.url) as redis,
        ):
            yield Node(process.pid, port, redis)
    finally:
        await valkey.kill()


class Nchan:
    """Nginx with nchan, without tokens."""

    def __init__(self, pid: int, port: int) -> None:
        self.port = port
        self._pid = pid

    @property
    def pids(self) -> Sequence[int]:
        """The master's and the worker's."""
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        return [self._pid, *map(int, children)]

    async def publish(self, number: int) -> None:
        """By a POST."""
        body = message(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /publish HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        if b" 201 " not in answer[:20] and b" 202 " not in answer[:20]:
            raise RuntimeError(f"nchan took no board: {answer!r}")


def nchan_in(folder: Path) -> bool:
    """Whether Debian's Nginx with nchan is installed in this root."""
    return (folder / "usr/lib/nginx/modules/ngx_nchan_module.so").is_file()


@asynccontextmanager
async def nchan(root: Path, folder: Path, first: int) -> AsyncIterator[Nchan]:
    """Debian's, from below ``root``, with a first board."""
    port = free_port()
    text = NCHAN.format(root=root, port=port, send_buffer=SEND_BUFFER_BYTES)
    (folder / "nchan.conf").write_text(text)
    argv: list[str | Path] = [
        root / "usr/sbin/nginx",
        "-p",
        folder,
        "-c",
        folder / "nchan.conf",
        "-e",
        "stderr",
    ]
    async with _process(argv, port) as process:
        broadcaster = Nchan(process.pid, port)
        await broadcaster.publish(first)
        yield broadcaster


@asynccontextmanager
async def _process(
    argv: Sequence[str | Path],
    port: int,
    environ: Mapping[str, str] | None = None,
    *,
    stdin: bool = False,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that listens on the port."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        env={**os.environ, **(environ or {})},
        stdin=asyncio.subprocess.PIPE if stdin else subprocess.DEVNULL,
    )

    async def listens() -> bool:
        if process.returncode is not None:
            raise RuntimeError(f"{argv[0]} ended with status {process.returncode}")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await eventually(listens, within_s=START_SECONDS_MAX, what=f"{argv[0]} listens")
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(STOP_SECONDS_MAX):
            await process.wait()


async def pace(broadcaster: Broadcaster, numbers: range, per_s: float) -> dict[int, float]:
    """
    Publish these boards, so many a second.

    Returns:
        When each was published, on the machine's monotonic clock, before it was handed over.
    """
    published = {}
    began = time.monotonic()
    for place, number in enumerate(numbers):
        await asyncio.sleep(max(0.0, began + place / per_s - time.monotonic()))
        published[number] = time.monotonic()
        await broadcaster.publish(number)
    return published
