"""The top 10 as a value: its order, its position in time, and the three forms it is sent in.

Pure: no I/O, no clock, no framework.
"""

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

BOARD_SIZE = 10
"""Rows on the board; the contract's top 10."""

LIVE_EVENT = "scoresUpdate"


@dataclass(frozen=True, slots=True)
class Standing:
    """One row of the board; its rank is its place in the sequence."""

    user_id: str
    score: int


class Score(NamedTuple):
    """A user's score as PostgreSQL holds it.

    Attributes:
        reached_us: When it was reached, in microseconds since 1970, by the shard's clock.
    """

    user_id: str
    score: int
    reached_us: int


def best(scores: Iterable[Score]) -> list[Score]:
    """The top of ``scores`` in the contract's order, at most ``BOARD_SIZE``.

    Python compares text by code point, which is also the order of its UTF-8 bytes, of Redis and
    of PostgreSQL's collation "C".
    """
    return heapq.nsmallest(
        BOARD_SIZE, scores, key=lambda row: (-row.score, row.reached_us, row.user_id)
    )


@dataclass(frozen=True, slots=True)
class Board:
    """The best users in the contract's order: score, then who reached it first, then user id.

    Attributes:
        epoch: When Redis last had to start afresh, in its own microseconds. Versions of
            different epochs are not comparable, but a later epoch is always newer.
        version: Counts the changes of the board within the epoch, from 1.
        standings: At most ``BOARD_SIZE`` rows, best first.
    """

    epoch: int
    version: int
    standings: tuple[Standing, ...]

    @property
    def position(self) -> tuple[int, int]:
        """What orders boards: a board with a smaller position is older."""
        return self.epoch, self.version


def decode_board(payload: bytes | str) -> Board:
    """
    Read what the leaderboard script stored and published.

    Args:
        payload: ``{"epoch":E,"version":V,"topScores":[{"userId":"…","score":N,"rank":1},…]}``.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        message = json.loads(payload)
        return Board(
            epoch=int(message["epoch"]),
            version=int(message["version"]),
            standings=tuple(
                Standing(user_id=str(row["userId"]), score=int(row["score"]))
                for row in message["topScores"]
            ),
        )
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a board: {error!r}") from error


def live_message(board: Board) -> bytes:
    """What a WebSocket client receives: ``{"event":"scoresUpdate","topScores":[…]}``, UTF-8."""
    return _encode({"event": LIVE_EVENT, "topScores": _rows(board.standings)})


def top_answer(standings: tuple[Standing, ...]) -> bytes:
    """The body of ``GET /api/scores/top``, UTF-8."""
    return _encode({"status": "success", "message": "Top scores", "topScores": _rows(standings)})


def _rows(standings: tuple[Standing, ...]) -> list[dict[str, Any]]:
    return [
        {"userId": row.user_id, "score": row.score, "rank": rank}
        for rank, row in enumerate(standings, start=1)
    ]


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
