"""The top 10 in Redis: written by the API, read by the API and the gateway.

Everything here can be rebuilt from PostgreSQL. Nothing retries: a lost write is repaired by the
next rebuild, and the caller knows best whether it can wait for that.
"""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisClusterException, RedisError

from shared.board import BOARD_SIZE, Board, Score, decode_board

CHANNEL = "scores_channel"

# One hash tag, so that the script's keys live on one node of a Redis Cluster.
SCORES_KEY = "{scoreboard}:scores"
REACHED_KEY = "{scoreboard}:reached"
BOARD_KEY = "{scoreboard}:board"
REBUILD_KEY = "{scoreboard}:rebuild"

REDIS_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
"""All the ways Redis fails: the cluster's errors are no ``RedisError`` (redis-py 8.1)."""


class DamagedBoard(RedisError):
    """Redis holds something that this module never wrote; discard it and rebuild."""


class Leaderboard:
    """The board as one replica sees it."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._script = redis.register_script(
            files("shared").joinpath("leaderboard.lua").read_text(encoding="utf-8")
        )
        self._seen = (0, 0)
        # The score of the last row, and when it was reached; 0 and 0 while there are fewer rows.
        self._floor, self._floor_reached_us = 0, 0

    def matters(self, score: Score) -> bool:
        """
        Whether the score may change the board; if not, it need not be sent.

        What comes after the last row does not. A stale floor is only too low while scores grow,
        hence safe.
        """
        return score.score > self._floor or (
            score.score == self._floor and score.reached_us <= self._floor_reached_us
        )

    async def read(self) -> Board | None:
        """
        The board as last announced; None when Redis holds none.

        Raises:
            DamagedBoard: If what it holds is no board.
        """
        message = await self._redis.hget(BOARD_KEY, "message")
        try:
            return None if message is None else decode_board(message)
        except ValueError as error:
            raise DamagedBoard(str(error)) from None

    async def remind(self, shown: Board) -> None:
        """Say that this board was shown, where Redis holds an older one or none.

        The next board then begins a later epoch, as if an API replica had seen it. Without this, a
        Redis that came back with less, to replicas that have all been restarted and with its clock
        set back, would count on from boards that gateways must not show.
        """
        epoch, version = shown.position
        shown_at: list[str | int] = ["shown_epoch", epoch, "shown_version", version]
        await self._redis.hset(BOARD_KEY, items=shown_at)

    async def apply(self, scores: Iterable[Score]) -> bool:
        """
        Rank scores that are committed, and announce the board if that changed it.

        Returns:
            False when Redis has no board or an older one than this replica has seen: call
            :meth:`rebuild`.
        """
        return await self._run(scores, retractions={}, whole=False)

    async def rebuild(self, top: Iterable[Score], retractions: Mapping[str, float]) -> None:
        """
        Make Redis agree with PostgreSQL, upward and downward.

        Args:
            top: The best of all shards, read after ``retractions`` were looked up.
            retractions: Entries of :meth:`entries` that PostgreSQL does not confirm.
        """
        await self._run(top, retractions=retractions, whole=True)

    async def _run(
        self, scores: Iterable[Score], *, retractions: Mapping[str, float], whole: bool
    ) -> bool:
        arguments: list[Any] = [CHANNEL, BOARD_SIZE, *self._seen, int(whole), len(retractions)]
        for user_id, score in retractions.items():
            arguments += (user_id.encode(errors="surrogateescape"), score)
        for row in scores:
            arguments += (row.user_id, row.score, row.reached_us)
        answer = await self._script(keys=[SCORES_KEY, REACHED_KEY, BOARD_KEY], args=arguments)
        if answer is None:
            return False
        epoch, version, self._floor, self._floor_reached_us = map(int, answer)
        self._seen = max(self._seen, (epoch, version))
        return True

    async def refresh_floor(self) -> None:
        """Take over the floor that other replicas have raised, or a repair has lowered."""
        held = await self._redis.hmget(BOARD_KEY, "floor", "floor_reached")
        try:
            self._floor, self._floor_reached_us = (int(number or 0) for number in held)
        except ValueError as error:
            raise DamagedBoard(str(error)) from None

    async def entries(self) -> dict[str, float]:
        """What Redis believes: user id → score, unchecked; bytes that are no text as surrogates."""
        rows: Any = await self._redis.zrange(SCORES_KEY, 0, -1, withscores=True)
        return {user_id.decode(errors="surrogateescape"): float(score) for user_id, score in rows}

    async def discard(self) -> None:
        """Drop keys that are not what they should be; the next rebuild starts a new epoch."""
        await self._redis.delete(SCORES_KEY, REACHED_KEY, BOARD_KEY)

    async def claim_rebuild(self, period_ms: int) -> bool:
        """Whether this replica is the one to rebuild in this period."""
        return bool(await self._redis.set(REBUILD_KEY, 1, nx=True, px=period_ms))
