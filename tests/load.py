"""Users who score as a good client does: one key an increment, tried again until it is answered."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import httpx2 as httpx

from tests.cluster import Client, Cluster

TRY_AGAIN_S = 0.1
"""What a client waits after an error before it sends the same again."""

INCREMENTS_MAX = 60
"""Of one user, so that tries included nobody reaches the quota of 100 an hour."""


class Load:
    """What was acknowledged, and what went wrong on the way."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.acknowledged: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.broken: list[str] = []
        self._stopping = asyncio.Event()

    @asynccontextmanager
    async def running(self, name: str, users: int, pause_s: float) -> AsyncIterator["Load"]:
        """
        Load for as long as the block runs; afterwards every increment begun is acknowledged.

        Args:
            users: Each sends one increment at a time.
            pause_s: Between two increments of a user.
        """
        async with self._cluster.client() as client, asyncio.TaskGroup() as tasks:
            for number in range(users):
                tasks.create_task(self._user(client, f"{name}-{number}", pause_s))
            try:
                yield self
            finally:
                self._stopping.set()

    async def _user(self, client: Client, user: str, pause_s: float) -> None:
        for number in range(INCREMENTS_MAX):
            if self._stopping.is_set():
                return
            await self._increment(client, user, str(number))
            await asyncio.sleep(pause_s)

    async def _increment(self, client: Client, user: str, key: str) -> None:
        while True:
            try:
                answer = await client.post(user, 1, key=key)
            except httpx.TransportError as error:
                self.broken.append(repr(error))
            else:
                self.answers[answer.status] += 1
                if answer.status == 200:
                    self.acknowledged[user] += 1
                    assert answer.json["newScore"] == self.acknowledged[user]
                    return
                assert answer.status in (500, 503), answer
            await asyncio.sleep(TRY_AGAIN_S)

    async def assert_exact(self) -> None:
        """Every acknowledged increment counts once: in the scores and in the operations."""
        stored: dict[str, tuple[int, int]] = {}
        for url in self._cluster.shard_urls:
            connection = await asyncpg.connect(url)
            rows = await connection.fetch(
                """
                SELECT user_id, held.score, sum(delta)::integer AS total
                FROM user_scores AS held LEFT JOIN score_ops USING (user_id)
                WHERE user_id = ANY ($1) GROUP BY user_id, held.score
                """,
                list(self.acknowledged),
            )
            await connection.close()
            stored |= {row["user_id"]: (row["score"], row["total"]) for row in rows}
        assert stored == {user: (count, count) for user, count in self.acknowledged.items()}
