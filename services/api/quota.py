"""How much a client may do: a moving window a client, counted in Redis.

`limits` gives the notation of a quota. Where Redis is away updates are counted from the operations
in PostgreSQL, and reads in this replica's memory: a quota never opens and never closes because of
Redis.
"""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.resources import files

import structlog
from limits import RateLimitItem
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from services.api import metrics
from services.api.allowance import Allowance
from services.api.batch import Batches
from services.api.shards import NOTHING_SPENT, Limit, Shards, Spent
from services.api.windows import Windows
from shared.leaderboard import REDIS_FAILURES

BATCH_MAX = 500
"""Checks in one call of the script, during which Redis serves nobody else."""

QUEUE_MAX = 10_000
"""Checks waiting for Redis; the one past that is refused as overload."""

PATIENCE_S = 1.0
"""Redis answers or is given up within a quarter of that. A replica that gets no CPU for as long, as
when six start at once on two cores, needs the rest: who waited there must not be refused for it."""

FALLBACK_PATIENCE_S = 0.5
"""For PostgreSQL's count. It comes after Redis has been waited for, and before the commit."""

ID_DIGITS = 16
"""Of a request's id: 64 bits tell a client's requests of one window apart, in half the memory."""

log = structlog.get_logger()


Fallback = Callable[[str], Awaitable[Allowance]]


class Quota:
    """One named quota, for any number of clients."""

    def __init__(self, name: str, rate: RateLimitItem, redis: Redis, fallback: Fallback) -> None:
        """
        Args:
            fallback: Counts one request of a client while Redis is away.
        """
        self.name = name
        self._rate = rate
        self._redis = redis
        self._fallback = fallback
        # Under a name of its own, so that each quota learns by itself that Redis has forgotten it.
        script = files("services.api").joinpath("quota.lua").read_text(encoding="utf-8")
        self._script = f"-- {name}\n{script}"
        self._sha = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()
        # One hash tag: a batch is one call of the script, on one node of a Redis Cluster.
        self._prefix = f"{{quota:{name}}}:spent:{rate.amount}/{rate.get_expiry()}:"
        # In Redis for one window from such a moment on: what it has counted is not all.
        self._gap_key = _gap_key(name)
        self._window_ms = rate.get_expiry() * 1000
        # Whether requests were counted elsewhere, or Redis has forgotten some, and that key must be set.
        self._gap = False
        self._has_counted = False
        self._batches = Batches[tuple[str, bytes], tuple[Allowance, bool]](
            self._spend, batch_max=BATCH_MAX, queue_max=QUEUE_MAX, patience_s=PATIENCE_S
        )

    async def spend(self, client: str, request_id: str) -> Allowance:
        """
        Count one request of the client, if it is allowed; the same request counts once.

        Args:
            request_id: Hexadecimal digits, at least ``ID_DIGITS``.

        Raises:
            Overloaded: If too many wait to be counted.
        """
        request = bytes.fromhex(request_id[:ID_DIGITS])
        try:
            counted, is_incomplete = await self._batches.submit((client, request))
        except REDIS_FAILURES as error:
            metrics.QUOTA_FALLBACKS.labels(self.name).inc()
            log.debug("quota.unavailable", quota=self.name, error=repr(error))
            return await self._fallback(client)
        if is_incomplete and counted.allowed:
            other = await self._fallback(client)
            return min(counted, other, key=_room)._replace(at_write=other.at_write)
        return counted

    async def _spend(
        self, requests: Sequence[tuple[str, bytes]]
    ) -> list[tuple[Allowance, bool] | Exception]:
        try:
            try:
                answer = await self._run(requests)
            except NoScriptError:  # Redis has restarted: nothing was counted.
                self._gap |= self._has_counted
                await self._redis.script_load(self._script)
                answer = await self._run(requests)
        except REDIS_FAILURES:
            self._gap = True
            raise
        self._gap, self._has_counted = False, True
        is_incomplete = bool(answer[0])
        limit, window_s = self._rate.amount, self._rate.get_expiry()
        return [
            (
                Allowance(
                    bool(allowed), limit, window_s, left, whole_in_ms / 1000, free_in_ms / 1000
                ),
                is_incomplete,
            )
            for allowed, left, whole_in_ms, free_in_ms in zip(*[iter(answer[1:])] * 4, strict=True)
        ]

    async def _run(self, requests: Sequence[tuple[str, bytes]]) -> list[int]:
        keys = [self._gap_key, *(self._prefix + client for client, _ in requests)]
        # Not redis-py's Script: it would ask whether Redis has it by another command.
        answer: list[int] = await self._redis.evalsha(
            self._sha,
            len(keys),
            *keys,
            self._rate.amount,
            self._window_ms,
            int(self._gap),
            *(request_id for _, request_id in requests),
        )
        return answer


def _gap_key(name: str) -> str:
    return f"{{quota:{name}}}:gap"


async def open_gap(redis: Redis, name: str, window_s: int) -> None:
    """Say that what Redis has counted of this quota is not all, for one window from now on."""
    await redis.set(_gap_key(name), 1, px=window_s * 1000)


def _room(one: Allowance) -> tuple[bool, int, float]:
    return one.allowed, one.remaining, -one.whole_in_s


def count_operations(rate: RateLimitItem, shards: Shards) -> Fallback:
    """Count a user's updates from the operations in PostgreSQL; other requests cost nothing then."""
    limit = Limit(rate.amount, rate.get_expiry())

    async def spent(shard: int, user_ids: Sequence[str]) -> list[Spent]:
        found = await shards.spent(shard, user_ids, limit.window_s)
        return [found.get(user_id, NOTHING_SPENT) for user_id in user_ids]

    # One a shard, so that a slow one delays its own users only.
    queues = [
        Batches[str, Spent](
            partial(spent, shard),
            batch_max=BATCH_MAX,
            queue_max=QUEUE_MAX,
            patience_s=FALLBACK_PATIENCE_S,
        )
        for shard in range(shards.count)
    ]

    async def count(user_id: str) -> Allowance:
        used = await queues[shards.shard_of(user_id)].submit(user_id)
        allowed = used.count < limit.count
        return Allowance(
            allowed=allowed,
            limit=limit.count,
            window_s=limit.window_s,
            remaining=max(0, limit.count - used.count - allowed),
            whole_in_s=limit.window_s - (0 if allowed else used.newest_s),
            retry_in_s=0 if allowed else limit.window_s - used.oldest_s,
            at_write=limit,
        )

    return count


def count_in_memory(rate: RateLimitItem) -> Fallback:
    """Count in this replica alone: each replica then allows the whole quota, and no more."""
    windows = Windows(rate)

    async def count(client: str) -> Allowance:
        return windows.spend(client)

    return count
