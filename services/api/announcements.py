"""Committed scores on their way to the board in Redis, and the repair of what got lost on it.

A failure here is nobody's error: the score is safe in PostgreSQL, the answer is 200, and the
next rebuild shows it.
"""

import asyncio
from collections.abc import Sequence

import structlog
from redis.exceptions import RedisError, ResponseError

from services.api import metrics
from services.api.batch import Batches, Overloaded
from services.api.shards import DATABASE_FAILURES, Shards
from shared.board import Score
from shared.leaderboard import REDIS_FAILURES, DamagedBoard, Leaderboard
from shared.user_id import is_user_id

BATCH_MAX = 500
"""Scores in one call of the script: it sorts that many rows in well under a millisecond."""

QUEUE_MAX = 10_000
"""Scores waiting for Redis; the ones past that are kept for later."""

PATIENCE_S = 0.25
"""A score that waited longer is kept for later too, and its client is answered."""

MISSED_MAX = 10_000
"""Scores kept until Redis is back; the ones past that are left to the rebuild."""

REPAIR_PAUSE_S = 0.1
"""Between two tries while Redis is away, however many scores are missed meanwhile."""

REBUILD_PERIOD_S = 1.0
"""How long the board may differ from PostgreSQL while all of it is there; one replica compares for
all."""

CLAIM_MS = 900
"""How long one replica's turn to compare keeps the others from it: a little less than the period."""

# Looking a child up by its label costs more than counting.
_SENT, _BELOW_FLOOR, _FAILED = map(metrics.ANNOUNCED.labels, ("sent", "below_floor", "failed"))

log = structlog.get_logger()


class Announcements:
    """Ranks committed scores, together with whatever else was committed meanwhile."""

    def __init__(self, shards: Shards, leaderboard: Leaderboard) -> None:
        self._shards = shards
        self._leaderboard = leaderboard
        self._batches = Batches[Score, bool](
            self._apply, batch_max=BATCH_MAX, queue_max=QUEUE_MAX, patience_s=PATIENCE_S
        )
        self._missed: dict[str, Score] = {}
        self._repair_now = asyncio.Event()

    async def announce(self, score: Score) -> None:
        """Rank a committed score; returns when readers can see it, or it is kept for later."""
        if not self._leaderboard.matters(score):
            _BELOW_FLOOR.inc()
            return
        try:
            was_sent = await self._batches.submit(score)
        except (Overloaded, *REDIS_FAILURES, *DATABASE_FAILURES) as error:
            _FAILED.inc()
            log.debug("leaderboard.not_announced", error=repr(error))
            self._keep(score)
            self._repair_now.set()
        else:
            (_SENT if was_sent else _BELOW_FLOOR).inc()

    def _keep(self, score: Score) -> None:
        kept = self._missed.get(score.user_id)
        if kept is None and len(self._missed) >= MISSED_MAX:
            return
        if kept is None or kept.score < score.score:
            self._missed[score.user_id] = score

    async def _apply(self, scores: Sequence[Score]) -> list[bool | Exception]:
        """Whether each was sent: while it waited, the board may have left it behind."""
        sent = {score for score in scores if self._leaderboard.matters(score)}
        if sent and not await self._leaderboard.apply(sent):
            await self._rebuild()
        return [score in sent for score in scores]

    async def keep_true(self) -> None:
        """Send what was missed, and compare Redis with PostgreSQL, while the replica lives."""
        while True:
            try:
                await self._send_missed()
                is_mine = await self._leaderboard.claim_rebuild(CLAIM_MS)
                metrics.REDIS_UP.set(1)
                if is_mine:
                    await self._rebuild()
                else:
                    await self._leaderboard.refresh_floor()
            except (ResponseError, DamagedBoard) as error:
                # A key is of another type, or holds what is not ours.
                log.error("leaderboard.damaged", error=repr(error))
                metrics.REBUILDS.labels("damaged").inc()
                await self._discard()
            except (*REDIS_FAILURES, *DATABASE_FAILURES) as error:
                log.warning("leaderboard.rebuild_failed", error=repr(error))
                metrics.REBUILDS.labels("failed").inc()
                if isinstance(error, RedisError):  # What PostgreSQL raises never is one.
                    metrics.REDIS_UP.set(0)
            self._repair_now.clear()
            await asyncio.sleep(REPAIR_PAUSE_S)
            try:
                async with asyncio.timeout(REBUILD_PERIOD_S):
                    await self._repair_now.wait()
            except TimeoutError:
                continue

    async def _send_missed(self) -> None:
        """Needs no shard: one that is away must not hide what the others' users have reached."""
        missed, self._missed = self._missed, {}
        try:
            if missed and not await self._leaderboard.apply(missed.values()):
                await self._rebuild()
        except (*REDIS_FAILURES, *DATABASE_FAILURES):
            for score in missed.values():
                self._keep(score)
            raise

    async def _rebuild(self) -> None:
        """
        Make the board in Redis what PostgreSQL says.

        Redis is read first: scores only grow, and enter Redis after their commit, so an entry
        that PostgreSQL does not confirm afterwards was never true.
        """
        entries = await self._leaderboard.entries()
        confirmed = await self._shards.scores_of(filter(is_user_id, entries))
        wrong = {
            user_id: score
            for user_id, score in entries.items()
            if user_id not in confirmed or confirmed[user_id].score < score
        }
        await self._leaderboard.rebuild(await self._shards.top(), wrong)
        metrics.REBUILDS.labels("repaired" if wrong else "done").inc()

    async def _discard(self) -> None:
        try:
            await self._leaderboard.discard()
        except REDIS_FAILURES as error:
            log.warning("leaderboard.unavailable", error=repr(error))

    async def drain(self) -> None:
        """Wait until every score that was submitted is ranked or left to the rebuild."""
        await self._batches.drain()
