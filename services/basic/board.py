"""The board in the process: every committed score is merged into it, and PostgreSQL has the last word.

Scores only grow, so a top 10 trimmed after each merge is exact, whatever the order of the commits.
"""

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog

from services.api.roles import Standings, TopUnavailable
from services.api.shards import DATABASE_FAILURES, Shards
from shared.board import BOARD_SIZE, Board, Score, Standing, best

COMPARE_EVERY_S = 1.0
"""Between two looks at PostgreSQL's own top: how long what somebody else wrote there stays unseen."""

log = structlog.get_logger()


class LocalBoard:
    """
    Ranks committed scores, and publishes the board when it changes.

    Attributes:
        board: The newest; None before PostgreSQL has answered.
    """

    def __init__(self, shards: Shards, publish: Callable[[Board], None]) -> None:
        self._shards = shards
        self._publish = publish
        self._now = asyncio.get_running_loop().time
        self._epoch = time.time_ns() // 1000
        self._top: list[Score] = []
        # Of what was committed since the last look at PostgreSQL began.
        self._fresh: list[Score] = []
        self._changed = False
        self._confirmed_at = self._now()
        self.board: Board | None = None

    @property
    def age_s(self) -> float:
        """Seconds since PostgreSQL last confirmed the board."""
        return self._now() - self._confirmed_at

    async def announce(self, score: Score) -> None:
        """Rank a committed score."""
        self._fresh = _merged(self._fresh, [score])
        self._rank(_merged(self._top, [score]))

    async def read(self) -> Standings:
        """
        The board.

        Raises:
            TopUnavailable: If PostgreSQL has not answered yet.
        """
        if self.board is None:
            raise TopUnavailable
        return _standings(self._top)

    async def compare(self) -> None:
        """
        Make the board what PostgreSQL says.

        A row that PostgreSQL does not have in its top was passed by others, or never true; a score
        committed since it was asked may be missing there.

        Raises:
            Exception: If it does not answer.
        """
        self._fresh = []
        top = await self._shards.top()
        if len(top) < len(self._top):
            # Scores do not vanish; but `scoreboard move` takes their tables away.
            await self._shards.refresh_owners()
            if not self._shards.is_complete:
                return
        self._confirmed_at = self._now()
        self._rank(_merged(top, self._fresh))
        if self.board is None:
            self._show()

    async def keep_true(self) -> None:
        """Compare regularly, for as long as the process lives."""
        while True:
            try:
                await self.compare()
            except DATABASE_FAILURES as error:
                log.warning("board.unconfirmed", error=repr(error))
            await asyncio.sleep(COMPARE_EVERY_S)

    def _rank(self, top: list[Score]) -> None:
        if top == self._top:
            return
        self._top = top
        # Those of one commit are published together.
        if self.board is not None and not self._changed:
            self._changed = True
            asyncio.get_running_loop().call_soon(self._show)

    def _show(self) -> None:
        self._changed = False
        standings = _standings(self._top)
        if self.board is None or standings != self.board.standings:
            version = 1 if self.board is None else self.board.version + 1
            self.board = Board(self._epoch, version, standings)
            self._publish(self.board)


def _merged(top: list[Score], scores: Iterable[Score]) -> list[Score]:
    """The top with these scores; of two scores of a user the higher one is the later one."""
    for score in scores:
        if len(top) == BOARD_SIZE and score.score < top[-1].score:
            continue
        held = next((row for row in top if row.user_id == score.user_id), None)
        if held is None or held.score < score.score:
            top = best([*(row for row in top if row is not held), score])
    return top


def _standings(top: list[Score]) -> Standings:
    return tuple(Standing(score.user_id, score.score) for score in top)
