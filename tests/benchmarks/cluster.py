"""What one update costs beside the bare upsert, and how soon the last client sees it.

Starts a cluster of its own in a temporary home. Repeat with `make bench`.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import websockets

from services.api.shards import Operation, Shards
from tests.cluster import Client, Cluster

ROUNDS = 300
"""Of one POST and one upsert in turn."""

COMMITS_S = 2.0
CLIENTS = 200
BOARDS = 50

UPSERT = """
    INSERT INTO user_scores AS held (user_id, score) VALUES ($1, 1)
    ON CONFLICT (user_id) DO UPDATE SET score = held.score + 1, last_updated = clock_timestamp()
    RETURNING score
"""


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and 99th percentile."""
    p99 = statistics.quantiles(seconds, n=100)[98]
    return f"p50 {statistics.median(seconds) * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms"


class Poster:
    """Updates without the checks that the tests make of each answer: they cost more than a POST."""

    def __init__(self, cluster: Cluster, client: Client) -> None:
        self._cluster = cluster
        self._http = client.http
        self._tokens: dict[str, str] = {}

    async def post(self, user: str, increment: int = 1) -> None:
        """One update."""
        token = self._tokens.setdefault(user, self._cluster.token(user))
        answer = await self._http.post(
            "/api/scores/update",
            headers={"Authorization": f"Bearer {token}"},
            json={"userId": user, "scoreIncrement": increment},
        )
        assert answer.status_code == 200, answer.text


async def updates(cluster: Cluster) -> None:
    """POST and upsert, in turn."""
    posts, upserts = [], []
    async with cluster.client() as client, Shards.connect(cluster.shard_urls) as shards:
        await shards.refresh_owners()
        poster = Poster(cluster, client)
        connections = [await asyncpg.connect(url) for url in cluster.shard_urls]
        for number in range(ROUNDS):
            user = f"bench-{number % 20}"
            began = time.perf_counter()
            await poster.post(user)
            posts.append(time.perf_counter() - began)
            connection = connections[shards.shard_of(user)]
            began = time.perf_counter()
            await connection.fetchval(UPSERT, user)
            upserts.append(time.perf_counter() - began)
        for connection in connections:
            await connection.close()
    ratio = statistics.median(posts) / statistics.median(upserts)
    print(f"POST through Nginx    {milliseconds(posts)}")
    print(f"bare upsert (floor)   {milliseconds(upserts)}")
    print(f"ratio                 {ratio:.2f}")


async def commits(cluster: Cluster) -> None:
    """What a commit costs by how many increments are in it, on one connection."""
    async with Shards.connect(cluster.shard_urls) as shards:
        await shards.refresh_owners()
        names = (f"commit-{number}" for number in range(10_000))
        users = [user for user in names if shards.shard_of(user) == 0][:2000]
        for size in (1, 10, 100, 500):
            began, rounds = time.perf_counter(), 0
            while (spent := time.perf_counter() - began) < COMMITS_S:
                rounds += 1
                batch = random.sample(users, size)
                await shards.record(0, [Operation(user, f"{size}-{rounds}", 1) for user in batch])
            print(
                f"{size:>3} in a commit       {rounds * size / spent:7.0f} increments/s,"
                f" {spent / rounds * 1e3:.2f} ms each"
            )


async def boards(cluster: Cluster) -> None:
    """From the 200 to the first and the last client."""
    first, last = [], []
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(cluster.client())
        sockets = [
            await stack.enter_async_context(cluster.live(f"watcher-{number % 50}"))
            for number in range(CLIENTS)
        ]
        for socket in sockets:
            await socket.recv()
        poster = Poster(cluster, client)
        score = (await client.top())[0]["score"]
        for _ in range(BOARDS):
            score += 10
            watching = [asyncio.create_task(arrival(socket, score)) for socket in sockets]
            await poster.post(f"leader-{score}", score)
            answered = time.perf_counter()
            seen = await asyncio.gather(*watching)
            first.append(max(0.0, min(seen) - answered))
            last.append(max(0.0, max(seen) - answered))
    print(f"200 to first of {CLIENTS:<5} {milliseconds(first)}")
    print(f"200 to last of {CLIENTS:<6} {milliseconds(last)}")


async def arrival(socket: websockets.ClientConnection, score: int) -> float:
    """When the board with that score came."""
    wanted = f'"score":{score},'
    while wanted not in str(await socket.recv()):
        pass
    return time.perf_counter()


async def main(folder: str) -> None:
    """Both, on one cluster."""
    cluster = Cluster(Path(folder, "home"))
    print("Starting a cluster…", flush=True)
    cluster.up()
    try:
        await updates(cluster)
        await commits(cluster)
        await boards(cluster)
    finally:
        cluster.down()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="scoreboard-bench-") as folder:
        asyncio.run(main(folder))
