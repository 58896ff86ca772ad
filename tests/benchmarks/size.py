"""What users, updates and clients take: on a shard's disk and in its log, in Redis, at the edge.

Starts a cluster of its own, with one shard, in a temporary home. Repeat with `make bench-size`.
"""

import asyncio
import re
import secrets
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import httpx2 as httpx
from limits import parse
from redis.asyncio import Redis

from services.api.engine import open_engine
from services.api.quota import Quota, count_in_memory
from services.api.shards import Operation, Shards
from tests.benchmarks.processes import cpu_seconds, cpu_spent
from tests.cluster import Cluster

USERS = 100_000
OPERATIONS_PER_USER = 5
BATCH = 100
"""Operations in a commit: what a few hundred connections lead to."""

QUOTA_USERS = 2_000
QUOTA_REQUESTS = (1, 10, 100)
"""Of each of them, within the window: so far, and in the end all that a quota allows."""

CLIENTS = 1000
BOARDS = 100

IDLE_S = 3.0

PATIENCE_S = 60.0
"""Nobody waits for an answer here, and the disk may be anybody's."""

SIZES = """
    SELECT inhparent::regclass::text, sum(pg_total_relation_size(inhrelid))::bigint
    FROM pg_inherits WHERE inhparent = ANY($1::regclass[]) GROUP BY 1
"""


def user(number: int) -> str:
    """As long as a name or a short id."""
    return f"player-{number:08}"


async def disk(cluster: Cluster, shard: asyncpg.Connection) -> None:
    """Operations written as the API writes them, each user in turn."""
    empty = dict(await shard.fetch(SIZES, ["user_scores", "score_ops"]))
    log_start = await shard.fetchval("SELECT pg_current_wal_lsn()")
    engine = open_engine(cluster.shard_urls[0], statement_timeout_s=PATIENCE_S)
    shards = Shards([engine])
    await shards.refresh_owners()
    for _ in range(OPERATIONS_PER_USER):
        for first in range(0, USERS, BATCH):
            operations = [
                Operation(user(number), f"r:{secrets.token_hex(16)}", 1)
                for number in range(first, first + BATCH)
            ]
            await shards.record(0, operations)
    await engine.dispose()
    full = dict(await shard.fetch(SIZES, ["user_scores", "score_ops"]))
    written = await shard.fetchval("SELECT pg_current_wal_lsn() - $1::pg_lsn", log_start)
    count = USERS * OPERATIONS_PER_USER
    print(f"a user            {(full['user_scores'] - empty['user_scores']) / USERS:.0f} bytes")
    print(f"an operation      {(full['score_ops'] - empty['score_ops']) / count:.0f} bytes")
    print(f"an update's log   {int(written) / count:.0f} bytes (WAL)")


async def memory(cluster: Cluster) -> None:
    """A user's quota in Redis, by how much of it is used."""
    async with Redis.from_url(cluster.secret("redis_url")) as redis:
        rate = parse("100/hour")
        quota = Quota("size", rate, redis, count_in_memory(rate))
        before = (await redis.info("memory"))["used_memory"]
        spent = 0
        for requests in QUOTA_REQUESTS:
            for _ in range(requests - spent):
                for first in range(0, QUOTA_USERS, BATCH):
                    await asyncio.gather(
                        *(
                            quota.spend(user(number), secrets.token_hex(16))
                            for number in range(first, first + BATCH)
                        )
                    )
            spent = requests
            used = (await redis.info("memory"))["used_memory"] - before
            print(f"a quota, {requests:3} used  {used / QUOTA_USERS:.0f} bytes")


async def idle(cluster: Cluster) -> None:
    """What a replica takes before anybody comes."""
    await asyncio.sleep(IDLE_S)
    async with httpx.AsyncClient() as http:
        for name in ("api-0", "gateway-0"):
            port = cluster.process(name)["operations_port"]
            text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
            found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
            assert found is not None
            print(f"{name:17} {float(found[1]) / 2**20:.0f} MiB resident")


def resident_kib(pid: int) -> int:
    """Of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) + sum(resident_kib(int(child)) for child in children)


async def edge(cluster: Cluster) -> None:
    """Clients that watch through Nginx: each takes memory there and in the gateway, and CPU a board."""
    pids = {name: cluster.process(name)["pid"] for name in ("nginx", "gateway-0")}
    empty = {name: resident_kib(pid) for name, pid in pids.items()}
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(cluster.client())
        sockets = [
            await stack.enter_async_context(cluster.live(f"watcher-{number // 10}"))
            for number in range(CLIENTS)
        ]
        for socket in sockets:
            await socket.recv()
        await asyncio.sleep(IDLE_S)
        for name, pid in pids.items():
            kib = (resident_kib(pid) - empty[name]) / CLIENTS
            print(f"a client          {kib:.1f} KiB in {name}")
        began = {name: cpu_seconds([pid]) for name, pid in pids.items()}
        for number in range(BOARDS):
            await client.post(user(number), USERS + number)
            await asyncio.gather(*(socket.recv() for socket in sockets))
        for name, pid in pids.items():
            spent_us = cpu_spent(began[name], cpu_seconds([pid])) / (CLIENTS * BOARDS) * 1e6
            print(f"a board to it     {spent_us:.1f} µs in {name}")


async def main(folder: str) -> None:
    """All of it, on one cluster."""
    cluster = Cluster(Path(folder, "home"), {"UPDATE_RATE_LIMIT": "1000000/hour"})
    print("Starting a cluster…", flush=True)
    cluster.up(shards=1, api=1, gateway=1)
    try:
        await idle(cluster)
        shard = await asyncpg.connect(cluster.shard_urls[0])
        await disk(cluster, shard)
        await shard.close()
        await memory(cluster)
        await edge(cluster)
    finally:
        cluster.down()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="scoreboard-bench-") as folder:
        asyncio.run(main(folder))
