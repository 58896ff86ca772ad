"""Reading the top 10: from Redis, else from PostgreSQL, else what this replica read last."""

import time
from collections.abc import Sequence

import structlog

from services.api import metrics
from services.api.batch import Batches
from services.api.roles import Standings, TopUnavailable
from services.api.shards import DATABASE_FAILURES, Shards
from shared.board import Standing
from shared.leaderboard import REDIS_FAILURES, Leaderboard

QUEUE_MAX = 10_000
"""Readers waiting for one read; all of them are answered by it."""

PATIENCE_S = 1.0

STALE_MAX_S = 60.0
"""For how long the last board is shown while neither Redis nor all of PostgreSQL answers."""

log = structlog.get_logger()


class Top:
    """The top 10 as readers get it; those of one moment share one read."""

    def __init__(self, shards: Shards, leaderboard: Leaderboard) -> None:
        self._shards = shards
        self._leaderboard = leaderboard
        self._batches = Batches[None, Standings](
            self._read_for, batch_max=QUEUE_MAX, queue_max=QUEUE_MAX, patience_s=PATIENCE_S
        )
        self._last: tuple[float, Standings] | None = None

    async def read(self) -> Standings:
        """
        The board.

        Raises:
            TopUnavailable: If Redis and a shard are away, and nothing recent is remembered.
            Overloaded: If too many wait.
        """
        return await self._batches.submit(None)

    async def _read_for(self, readers: Sequence[None]) -> list[Standings | Exception]:
        return [await self._read()] * len(readers)

    async def _read(self) -> Standings:
        try:
            board = await self._leaderboard.read()
        except REDIS_FAILURES as error:
            log.debug("leaderboard.unavailable", error=repr(error))
            board = None
        if board is not None:
            metrics.TOP_READS.labels("redis").inc()
            return self._remember(board.standings)
        try:
            scores = await self._shards.top()
        except DATABASE_FAILURES as error:
            log.warning("shards.unavailable", error=repr(error))
            return self._remembered()
        metrics.TOP_READS.labels("postgresql").inc()
        return self._remember(tuple(Standing(score.user_id, score.score) for score in scores))

    def _remember(self, standings: Standings) -> Standings:
        self._last = (time.monotonic(), standings)
        return standings

    def _remembered(self) -> Standings:
        if self._last is None or time.monotonic() - self._last[0] > STALE_MAX_S:
            raise TopUnavailable
        metrics.TOP_READS.labels("memory").inc()
        return self._last[1]
