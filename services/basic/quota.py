"""Quotas in the memory of the one process; updates as exact after a restart as before it."""

from collections.abc import Sequence

from limits import RateLimitItem

from services.api.allowance import Allowance
from services.api.batch import Batches
from services.api.shards import Limit, Shards
from services.api.windows import Windows

BATCH_MAX = 500
"""Users looked up by one statement."""

QUEUE_MAX = 4096
"""Users waiting for it; the next one is refused as overload."""

PATIENCE_S = 0.5


class LocalQuota:
    """One named quota, for any number of clients."""

    def __init__(self, name: str, rate: RateLimitItem) -> None:
        self.name = name
        self._windows = Windows(rate)

    async def spend(self, client: str, request_id: str) -> Allowance:
        """Count one request of the client, if it is allowed; nobody sends one again under its id."""
        return self._windows.spend(client)


class UpdateQuota(LocalQuota):
    """
    The quota of updates, which begins with what PostgreSQL knows of a user.

    That is, of whoever comes for the first time since the start, or was forgotten: until the window
    of what may be missing is over.
    """

    def __init__(self, rate: RateLimitItem, shards: Shards) -> None:
        super().__init__("update", rate)
        self._limit = Limit(rate.amount, rate.get_expiry())
        self._shards = shards
        self._unknown_until = self._windows.now() + self._windows.window_s
        self._batches = Batches[str, None](
            self._remember, batch_max=BATCH_MAX, queue_max=QUEUE_MAX, patience_s=PATIENCE_S
        )

    async def spend(self, client: str, request_id: str) -> Allowance:
        """Count one update of the user, if it is allowed."""
        windows = self._windows
        if client not in windows and windows.now() < max(
            self._unknown_until, windows.forgotten_until
        ):
            await self._batches.submit(client)
        return await super().spend(client, request_id)

    async def _remember(self, users: Sequence[str]) -> list[None]:
        shard = self._shards.shard_of(users[0])
        ages = await self._shards.ages(shard, list(set(users)), self._limit)
        for user in users:
            self._windows.restore(user, ages.get(user, ()))
        return [None] * len(users)
