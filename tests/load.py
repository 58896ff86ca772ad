"""Users who score as a good client does: one key an increment, tried again until it is answered."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
import httpx2 as httpx

from tests.cluster import Client, Scoreboard

TRY_AGAIN_S = 0.1
"""What a client waits after an error before it sends the same again."""

INCREMENTS_MAX = 60
"""Of one user, so that tries included nobody reaches the quota of 100 an hour."""

NOT_WRITTEN = b'{"status":"error","message":"Internal server error after retries"}'
"""The contract's body of every 500."""


class Load:
    """What was acknowledged, and what went wrong on the way.

    Attributes:
        acknowledged: Increments answered 200, by user.
        answers: Answers by status.
        failures: Answers other than 200 and broken connections, by user.
        broken: Connections that ended without an answer.
        slowest_s: The longest that an answer took, by user.
    """

    def __init__(self, cluster: Scoreboard, urls: Sequence[str] = ()) -> None:
        """
        Args:
            urls: Replicas to send to, each user to the next one with every try; else Nginx.
        """
        self._cluster = cluster
        self._urls = urls or [cluster.url]
        self.acknowledged: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.failures: Counter[str] = Counter()
        self.broken: list[str] = []
        self.slowest_s: dict[str, float] = {}
        self._stopping = asyncio.Event()

    @asynccontextmanager
    async def running(
        self, name: str, users: int, pause_s: float, increments: int = INCREMENTS_MAX
    ) -> AsyncIterator["Load"]:
        """
        Load for as long as the block runs; afterwards every increment begun is acknowledged.

        Args:
            users: Each sends one increment at a time.
            pause_s: Between two increments of a user.
            increments: The most that a user sends.
        """
        async with self._clients() as clients, asyncio.TaskGroup() as tasks:
            for number in range(users):
                turns = _turns(clients, number)
                tasks.create_task(self._user(turns, f"{name}-{number}", pause_s, increments))
            try:
                yield self
            finally:
                self._stopping.set()

    async def all_of(self, name: str, users: int, increments: int) -> None:
        """Send all increments of all users, each as fast as it is answered."""
        async with self._clients() as clients, asyncio.TaskGroup() as tasks:
            for number in range(users):
                turns = _turns(clients, number)
                tasks.create_task(self._user(turns, f"{name}-{number}", 0, increments))

    @asynccontextmanager
    async def _clients(self) -> AsyncIterator[list[Client]]:
        async with AsyncExitStack() as stack:
            yield [
                await stack.enter_async_context(self._cluster.client(url=url)) for url in self._urls
            ]

    async def _user(
        self, clients: Iterator[Client], user: str, pause_s: float, increments: int
    ) -> None:
        for number in range(increments):
            if self._stopping.is_set():
                return
            await self._increment(clients, user, str(number))
            await asyncio.sleep(pause_s)

    async def _increment(self, clients: Iterator[Client], user: str, key: str) -> None:
        for client in clients:
            asked_at = time.monotonic()
            try:
                answer = await client.post(user, 1, key=key)
            except httpx.TransportError as error:
                self.broken.append(repr(error))
            else:
                took_s = time.monotonic() - asked_at
                self.slowest_s[user] = max(took_s, self.slowest_s.get(user, 0))
                self.answers[answer.status] += 1
                if answer.status == 200:
                    self.acknowledged[user] += 1
                    assert answer.json["newScore"] == self.acknowledged[user]
                    return
                assert answer.status in (500, 503), answer
                assert answer.status != 500 or answer.body == NOT_WRITTEN
            self.failures[user] += 1
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
        assert miscounted(self.acknowledged, stored) == {}


def _turns(clients: Sequence[Client], first: int) -> Iterator[Client]:
    """Whom a user asks, try by try."""
    return itertools.islice(itertools.cycle(clients), first % len(clients), None)


def miscounted(
    acknowledged: Mapping[str, int], stored: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, tuple[int, int]]]:
    """
    The users whose increments were lost or doubled.

    Args:
        stored: Of each user the score, and the sum of the operations.

    Returns:
        What was acknowledged and what is stored; empty when all of it is exact.
    """
    users = acknowledged.keys() | stored.keys()
    pairs = {user: (acknowledged.get(user, 0), stored.get(user, (0, 0))) for user in users}
    return {user: (seen, held) for user, (seen, held) in pairs.items() if held != (seen, seen)}
