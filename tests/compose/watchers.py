"""Many who watch the board as `live.js` does: whoever is sent away comes back after a while."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import websockets

from tests.cluster import ANSWER_SECONDS_MAX, Scoreboard

JITTER_S = 1.0
"""At most, before a client comes back."""

AT_ONCE = 50
"""Handshakes under way, so that a thousand clients are no flood."""

USERS = 100
"""Who they are: each user watches in several tabs."""


class Watchers:
    """
    Clients that watch until the block ends.

    Attributes:
        closed: Connections that ended, by close code: 1006 is none at all, 1000 left by itself.
        refused: Handshakes that failed, by why.
        messages: Boards received, by all of them.
    """

    def __init__(self, scoreboard: Scoreboard) -> None:
        self._scoreboard = scoreboard
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._sockets: set[websockets.ClientConnection] = set()
        self.closed: Counter[int] = Counter()
        self.refused: Counter[str] = Counter()
        self.messages = 0

    @asynccontextmanager
    async def watching(self, count: int) -> AsyncIterator[Self]:
        """Have so many, all of whom have seen a board when the block begins."""
        tokens = [self._scoreboard.token(f"watcher-{number}") for number in range(USERS)]
        async with asyncio.TaskGroup() as tasks:
            clients = [
                tasks.create_task(self._client(tokens[number % USERS])) for number in range(count)
            ]
            async with asyncio.timeout(ANSWER_SECONDS_MAX * 3):
                while self.connected < count:  # noqa: ASYNC110 - of a thousand tasks
                    await asyncio.sleep(0.1)
            try:
                yield self
            finally:
                for client in clients:
                    client.cancel()

    @property
    def connected(self) -> int:
        """How many watch now."""
        return len(self._sockets)

    async def leave(self, count: int) -> None:
        """Have so many leave; they come back like those who were sent away."""
        leaving = list(self._sockets)[:count]
        await asyncio.gather(*(socket.close() for socket in leaving))

    async def _client(self, token: str) -> None:
        url = f"ws://127.0.0.1:{self._scoreboard.port}/scores/live?token={token}"
        while True:
            try:
                async with self._turn:
                    socket = await websockets.connect(
                        url, proxy=None, compression=None, ping_interval=None, max_queue=None
                    )
                    await socket.recv()
            except (OSError, TimeoutError, websockets.WebSocketException) as error:
                self.refused[str(error)] += 1
                await asyncio.sleep(random.uniform(0, JITTER_S))
                continue
            self._sockets.add(socket)
            try:
                async for _ in socket:
                    self.messages += 1
            except websockets.ConnectionClosed:
                pass
            finally:
                self._sockets.discard(socket)
                socket.transport.abort()
            self.closed[socket.close_code or 1006] += 1
            await asyncio.sleep(random.uniform(0, JITTER_S))
