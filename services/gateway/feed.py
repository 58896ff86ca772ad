"""The newest board, from Redis.

The channel is fast but loses silently: whatever is published while a subscription is down, and
everything on one that is half open. So a board is also read once a second, which bounds how long
any loss can last, and both go through one gate that lets only newer boards pass. Subscribing comes
before reading: in the other order a board published in between would reach nobody.
"""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import structlog
from redis.asyncio import Redis

from services.gateway import metrics
from shared.board import Board, decode_board
from shared.leaderboard import CHANNEL, REDIS_FAILURES, DamagedBoard, Leaderboard
from shared.redis import open_subscription

COMPARE_EVERY_S = 1.0
"""Between reads: how long a board lost on the channel stays unseen."""

HEARTBEAT_S = 0.5
"""Between pings on the subscription."""

SILENCE_MAX_S = 1.5
"""A subscription that answers no ping for this long is dead, whatever TCP believes."""

RESUBSCRIBE_AFTER_S = (0.05, 0.5)
"""Waited before another attempt, at random, so that gateways do not come back in step."""

NO_SCORES = Board(epoch=0, version=0, standings=())
"""What there is to show while nobody has scored; every real board is newer."""

log = structlog.get_logger()


class Feed:
    """Follows the board and passes each newer one on.

    Attributes:
        board: The newest seen; None before the first answer of Redis.
        subscribed: Whether the subscription is up.
    """

    def __init__(self, redis: Redis, publish: Callable[[Board], None]) -> None:
        self._redis = redis
        self._leaderboard = Leaderboard(redis)
        self._publish = publish
        self._now = asyncio.get_running_loop().time
        self._confirmed_at = self._now()
        self._in_doubt = asyncio.Event()
        self.board: Board | None = None
        self.subscribed = False

    @property
    def age_s(self) -> float:
        """Seconds since Redis last confirmed that the board held is the newest."""
        return self._now() - self._confirmed_at

    async def follow(self) -> None:
        """Keep a subscription, for ever."""
        while True:
            try:
                await self._listen()
            except REDIS_FAILURES as error:
                if self.subscribed:
                    log.warning("feed.subscription_lost", error=str(error))
            except Exception:  # a defect; but the end of this task would end every connection
                log.exception("feed.subscription_failed")
            self.subscribed = False
            await asyncio.sleep(random.uniform(*RESUBSCRIBE_AFTER_S))  # noqa: S311

    async def _listen(self) -> None:
        async with await open_subscription(self._redis) as channel:
            await channel.subscribe(CHANNEL)
            heard = pinged = self._now()
            while self._now() - heard < SILENCE_MAX_S:
                message = await channel.get_message(timeout=HEARTBEAT_S)
                if message is not None:
                    heard = self._now()
                    self._receive(message)
                if self._now() - pinged >= HEARTBEAT_S:
                    # redis-py's own health check sends the ping and never misses the answer.
                    await channel.ping()
                    pinged = self._now()
        raise TimeoutError("the subscription went silent")

    def _receive(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            self.subscribed = True
            metrics.SUBSCRIPTIONS.inc()
            self._in_doubt.set()
            log.info("feed.subscribed")
        elif message["type"] == "message":
            try:
                board = decode_board(message["data"])
            except ValueError:
                metrics.BOARDS_UNREADABLE.inc()
                return
            if not self._take(board, source="channel"):
                metrics.BOARDS_DROPPED.inc()

    async def compare(self) -> None:
        """Read the board regularly, and at once after each subscription; for ever."""
        failing = False
        while True:
            self._in_doubt.clear()
            try:
                await self._read()
                failing = False
            except REDIS_FAILURES as error:
                if not failing:
                    log.warning("feed.redis_unavailable", error=str(error))
                failing = True
            except Exception:  # as above
                log.exception("feed.comparison_failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(COMPARE_EVERY_S):
                    await self._in_doubt.wait()

    async def _read(self) -> None:
        try:
            board = await self._leaderboard.read() or NO_SCORES
        except DamagedBoard:
            metrics.BOARDS_UNREADABLE.inc()
            return
        self._take(board, source="poll")
        # A Redis that came back empty or behind confirms nothing: it waits for its rebuild.
        if self.board is None or board.position >= self.board.position:
            self._confirmed_at = self._now()
        else:
            await self._leaderboard.remind(self.board)

    def _take(self, board: Board, *, source: str) -> bool:
        """Pass the board on if it is newer than the one held."""
        if self.board is not None and board.position <= self.board.position:
            return False
        metrics.BOARDS_RECEIVED.labels(source).inc()
        if self.board is not None and board.epoch == self.board.epoch:
            metrics.VERSIONS_MISSED.inc(board.version - self.board.version - 1)
        metrics.BOARD_VERSION.set(board.version)
        self.board = board
        self._publish(board)
        return True
