"""What the endpoints ask of others: each role is played by Redis in a cluster, by memory in one process."""

from typing import Protocol

from services.api.allowance import Allowance
from shared.board import Score, Standing

Standings = tuple[Standing, ...]


class TopUnavailable(Exception):
    """Nothing that could be shown as the top 10."""


class Allowances(Protocol):
    """How much a client may do.

    Attributes:
        name: The quota's, as clients are told.
    """

    name: str

    async def spend(self, client: str, request_id: str) -> Allowance:
        """Count one request of the client, if it is allowed; the same request counts once.

        Raises:
            Overloaded: If too many wait to be counted.
        """


class Announcer(Protocol):
    """Whom committed scores are told."""

    async def announce(self, score: Score) -> None:
        """Rank a committed score; returns when readers can see it, or it is kept for later."""


class TopReader(Protocol):
    """Who knows the board."""

    async def read(self) -> Standings:
        """
        The board.

        Raises:
            TopUnavailable: If there is nothing to show.
            Overloaded: If too many wait.
        """
