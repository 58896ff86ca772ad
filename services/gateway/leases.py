"""The shares of all gateways in the caps of a user and of an address, in Redis.

Nobody waits for Redis to connect: a newcomer who is one too many elsewhere is sent away as soon as
Redis has said so. Without Redis each gateway goes on with its own share only.
"""

import asyncio
import secrets
from collections import Counter
from contextlib import suppress
from importlib.resources import files
from itertools import islice

import structlog
from redis.asyncio import Redis

from services.gateway import metrics
from services.gateway.caps import Caps, Counted
from shared.leaderboard import REDIS_FAILURES

GATEWAYS_KEY = "{connections}:gateways"
SHARE_KEY = "{connections}:of:"
"""One hash tag, so that the script finds all shares on one node of a Redis Cluster."""

LEASE_S = 10.0
"""How long a share outlives its gateway."""

RENEW_EVERY_S = 3.0
"""Two renewals may fail before the share is given away."""

BATCH_EVERY_S = 0.05
"""The least time between two calls: how long a newcomer too many may stay."""

NAMES_MAX = 500
"""Users and addresses in one call of the script, which Redis runs alone: under a millisecond."""

log = structlog.get_logger()


class Leases:
    """Keeps this gateway's share in Redis as it is here."""

    def __init__(self, redis: Redis, caps: Caps) -> None:
        self._redis = redis
        self._caps = caps
        self._id = secrets.token_hex(8)
        self._keys = [GATEWAYS_KEY, SHARE_KEY + self._id]
        self._script = redis.register_script(
            files("services.gateway").joinpath("connections.lua").read_text(encoding="utf-8")
        )
        self._writes = 0

    async def keep(self) -> None:
        """Say what has changed, and that this gateway lives; for ever, and then give it back."""
        try:
            await self._keep()
        finally:
            with suppress(*REDIS_FAILURES):
                await self._redis.zrem(GATEWAYS_KEY, self._id)
                await self._redis.delete(SHARE_KEY + self._id)

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        renewed = loop.time() - RENEW_EVERY_S
        failing = False
        while True:
            if self._caps.changed or loop.time() - renewed >= RENEW_EVERY_S:
                try:
                    await self._tell()
                    renewed = loop.time()
                    failing = False
                except REDIS_FAILURES as error:
                    # Whether it was written nobody knows.
                    self._writes = 0
                    if not failing:
                        log.warning("connections.counted_here_only", error=str(error))
                    failing = True
                except Exception:  # a defect; but the end of this task would end every connection
                    self._writes = 0
                    log.exception("connections.count_failed")
                metrics.CAPS_SHARED.set(self._writes > 0)
            await asyncio.sleep(RENEW_EVERY_S if failing else BATCH_EVERY_S)

    async def _tell(self) -> None:
        changed, newcomers = self._caps.take_changes()
        if self._writes and not await self._count(changed, limited=True, newcomers=newcomers):
            self._writes = 0
        if not self._writes:
            # Nobody is sent away for what the others counted while this one could not.
            await self._count(list(self._caps.connections), limited=False)

    async def _count(
        self, names: list[str], *, limited: bool, newcomers: list[Counted] | None = None
    ) -> bool:
        """Write the counts of ``names``; False if Redis has lost what was written before."""
        excess: Counter[str] = Counter()
        rest = iter(names)
        while (some := list(islice(rest, NAMES_MAX))) or not names:
            counts = [self._caps.connections[name] for name in some]
            arguments: list[str | int] = [
                self._id, int(LEASE_S * 1000), self._writes, int(limited),
            ]  # fmt: skip
            for name, count in zip(some, counts, strict=True):
                arguments += (name, count, self._caps.limit(name))
            answer = await self._script(keys=self._keys, args=arguments)
            if answer is None:
                return False
            self._writes, *granted = map(int, answer)
            for name, count, most in zip(some, counts, granted, strict=True):
                excess[name] = count - most
            if not names:
                break
        self._caps.withdraw(newcomers or [], excess)
        return True
