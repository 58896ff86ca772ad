"""Caps over two gateways: they hold together, and neither fails nor opens without Redis."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from services.gateway.leases import BATCH_EVERY_S, GATEWAYS_KEY, LEASE_S, RENEW_EVERY_S
from tests.cluster import eventually
from tests.gateway.harness import Gateway, Scores, closed, next_score, running_gateway, token
from tests.valkey import Valkey

LIMITS = {
    "DRAIN_SECONDS": "0.5",
    "CONNECTIONS_PER_USER_MAX": "3",
    "CONNECTIONS_PER_ADDRESS_MAX": "5",
}


class Pair:
    """Two gateways on one Valkey, and the connections that a test has opened on them."""

    def __init__(self, valkey: Valkey, redis: Redis, gateways: list[Gateway]) -> None:
        self.valkey = valkey
        self.redis = redis
        self.one, self.two = gateways
        self.stack = AsyncExitStack()

    async def is_let_in(self, gateway: Gateway, user: str, address: str = "") -> bool:
        """Whether a connection more stays; it does until the test ends."""
        headers = {"X-Real-IP": address or f"user-{user}"}
        stream = await self.stack.enter_async_context(gateway.stream(token(user), headers))
        if stream.answer.status == 429:
            return False
        await stream.event()
        return not await stream.ends_within(0.3)

    async def shared(self) -> None:
        """Wait until both count with each other."""
        for gateway in (self.one, self.two):
            await gateway.counts_with_others()


@pytest_asyncio.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """With a board, a Valkey of their own, and limits that a test can reach."""
    async with AsyncExitStack() as stack:
        valkey = Valkey(tmp_path)
        stack.push_async_callback(valkey.kill)
        await valkey.start()
        redis = await stack.enter_async_context(Redis.from_url(valkey.url))
        await Scores(redis).announce(1)
        gateways = [
            await stack.enter_async_context(
                running_gateway(valkey.url, tmp_path / f"log-{number}", **LIMITS)
            )
            for number in range(2)
        ]
        pair = Pair(valkey, redis, gateways)
        await pair.one.ready()
        await pair.two.ready()
        await pair.shared()
        async with pair.stack:
            yield pair


async def test_a_user_has_one_limit_over_all_gateways(pair: Pair) -> None:
    """Whoever is one too many is sent away with 4429; whoever leaves makes room elsewhere."""
    async with pair.one.connect(token("ana")) as first, pair.one.connect(token("ana")) as second:
        async with pair.two.connect(token("ana")):
            await asyncio.sleep(3 * BATCH_EVERY_S)  # Of two at once either may be the one too many.
            for gateway in (pair.one, pair.two):
                async with gateway.connect(token("ana")) as fourth:
                    assert await closed(fourth) == (4429, "too many connections")
                assert not await pair.is_let_in(gateway, "ana")
        await first.close()

        assert await pair.is_let_in(pair.two, "ana")
        assert await pair.is_let_in(pair.two, "ana")
        assert not await pair.is_let_in(pair.one, "ana")
        assert await next_score(second) == 1


async def test_an_address_has_one_limit_over_all_gateways(pair: Pair) -> None:
    """The address is the one that the trusted proxy names."""
    for number in range(5):
        gateway = (pair.one, pair.two)[number % 2]
        assert await pair.is_let_in(gateway, f"user-{number}", "192.0.2.1")

    assert not await pair.is_let_in(pair.one, "another", "192.0.2.1")
    assert not await pair.is_let_in(pair.two, "another", "192.0.2.1")
    assert await pair.is_let_in(pair.two, "another", "192.0.2.2")


async def test_a_gateway_that_ends_gives_its_share_back_at_once(pair: Pair) -> None:
    """Nobody has to wait for the end of its lease."""
    for gateway in (pair.one, pair.two, pair.one):
        assert await pair.is_let_in(gateway, "ana")
    pair.one.signal()
    await pair.one.exit_status()
    assert await pair.is_let_in(pair.two, "ana")
    assert await pair.is_let_in(pair.two, "ana")
    assert not await pair.is_let_in(pair.two, "ana")

    pair.two.signal()
    await pair.two.exit_status()
    assert await pair.redis.keys("{connections}:of:*") == []
    assert await pair.redis.zcard(GATEWAYS_KEY) == 0


@pytest.mark.chaos
async def test_a_killed_gateway_gives_its_share_back(pair: Pair) -> None:
    """At the end of its lease, not before."""
    for _ in range(3):
        assert await pair.is_let_in(pair.one, "ana")
    assert not await pair.is_let_in(pair.two, "ana")

    pair.one.signal(signal.SIGKILL)
    killed_at = time.monotonic()

    async def is_let_in() -> bool:
        return await pair.is_let_in(pair.two, "ana")

    await eventually(is_let_in, within_s=LEASE_S + 2)
    assert time.monotonic() - killed_at > LEASE_S - RENEW_EVERY_S - 1


async def test_without_redis_each_gateway_has_its_own_caps(pair: Pair) -> None:
    """Neither open nor closed; and when Redis is back, empty, nobody is sent away for it."""
    for gateway in (pair.one, pair.two):
        assert await pair.is_let_in(gateway, "ana")
    await pair.valkey.kill()
    for gateway in (pair.one, pair.two):
        for _ in range(2):
            assert await pair.is_let_in(gateway, "ana")
        assert not await pair.is_let_in(gateway, "ana")

    await pair.valkey.start()
    await pair.shared()
    assert not await pair.is_let_in(pair.two, "ana")
    for gateway in (pair.one, pair.two):
        assert await gateway.metric("transport_connections", transport="sse") == 3
