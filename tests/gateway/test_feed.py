"""The newest board reaches clients whatever happens to Redis."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest_asyncio
from redis.asyncio import Redis

from tests.cluster import eventually
from tests.gateway.harness import Gateway, Scores, next_score, running_gateway
from tests.openapi import check_refusal
from tests.proxies import Proxy, proxy_to
from tests.valkey import Valkey

HEALED_WITHIN_S = 2.0


@dataclass
class Chain:
    """A Valkey that may break, a proxy that may break, and a gateway behind both."""

    valkey: Valkey
    proxy: Proxy
    scores: Scores
    gateway: Gateway

    async def restart_valkey(self) -> None:
        """Start it again after :meth:`Valkey.kill`."""
        await self.valkey.start()
        await self.scores.redis.connection_pool.disconnect()


@pytest_asyncio.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Chain]:
    """All of it, with a first board of score 1."""
    valkey = Valkey(tmp_path)
    await valkey.start()
    async with proxy_to(valkey.port) as proxy, Redis.from_url(valkey.url) as redis:
        scores = Scores(redis)
        await scores.announce(1)
        through = f"redis://127.0.0.1:{proxy.port}/0"
        async with running_gateway(through, tmp_path / "log") as gateway:
            await gateway.ready()
            await subscribed(gateway)
            yield Chain(valkey, proxy, scores, gateway)
    await valkey.kill()


async def subscribed(gateway: Gateway) -> None:
    """Wait until the subscription is up."""

    async def is_subscribed() -> bool:
        return await gateway.metric("feed_connected") == 1

    await eventually(is_subscribed, within_s=HEALED_WITHIN_S)


async def test_a_board_lost_on_the_channel_is_shown_within_two_seconds(chain: Chain) -> None:
    """Publications may vanish; the comparison finds what they would have said."""
    async with chain.gateway.connect() as client:
        await next_score(client)
        await chain.scores.keep(chain.scores.board(2))

        assert await next_score(client, HEALED_WITHIN_S) == 2


async def test_a_half_open_subscription_is_replaced_within_two_seconds(chain: Chain) -> None:
    """Silence is no proof of life: the subscription must answer pings."""
    async with chain.gateway.connect() as client:
        await next_score(client)
        chain.proxy.freeze()
        await chain.scores.announce(2)
        assert await next_score(client, HEALED_WITHIN_S + 1) == 2

        async def is_lost() -> bool:
            return "feed.subscription_lost" in chain.gateway.log

        await eventually(is_lost, within_s=HEALED_WITHIN_S)
        await subscribed(chain.gateway)
        before = await chain.gateway.metric("boards_received_total", source="channel")
        await chain.scores.announce(3)
        assert await next_score(client, HEALED_WITHIN_S) == 3
        assert await chain.gateway.metric("boards_received_total", source="channel") == before + 1


async def test_a_cut_subscription_loses_nothing(chain: Chain) -> None:
    """What was announced in the gap is read once the subscription is back."""
    async with chain.gateway.connect() as client:
        await next_score(client)
        for score in (2, 3, 4):
            chain.proxy.cut()
            await chain.scores.announce(score)
            assert await next_score(client, HEALED_WITHIN_S) == score


async def test_clients_outlive_redis_and_see_what_it_says_when_it_is_back(chain: Chain) -> None:
    """The last board stays on show; readiness says that nobody vouches for it."""
    gateway = chain.gateway
    async with gateway.connect() as client:
        await next_score(client)
        await chain.scores.redis.save()
        await chain.valkey.kill()

        async def is_unready() -> bool:
            return (await gateway.operations("/readyz")).status == 503

        await eventually(is_unready, within_s=7)
        assert (await gateway.operations("/livez")).status == 200
        async with gateway.connect() as newcomer:
            assert await next_score(newcomer) == 1

        await chain.restart_valkey()
        await chain.scores.announce(2)
        assert await next_score(client, HEALED_WITHIN_S) == 2
        await gateway.ready()


async def test_a_redis_that_comes_back_empty_takes_nothing_away(chain: Chain) -> None:
    """Its emptiness is not shown; the board it is given next is."""
    async with chain.gateway.connect() as client:
        await next_score(client)
        await chain.valkey.kill()
        chain.valkey.forget()
        await chain.restart_valkey()
        await subscribed(chain.gateway)
        async with chain.gateway.connect() as newcomer:
            assert await next_score(newcomer) == 1

        chain.scores.later()
        await chain.scores.announce(2)
        assert await next_score(client, HEALED_WITHIN_S) == 2


async def test_without_a_board_nobody_is_let_in(tmp_path: Path) -> None:
    """A gateway that has never reached Redis has nothing to show."""
    async with running_gateway("redis://127.0.0.1:1/0", tmp_path / "log") as gateway:
        answer = await gateway.get("/scores/live")

        assert answer.status == 503
        check_refusal(answer.status, answer.headers, answer.body)
        readiness = await gateway.operations("/readyz")
        assert readiness.status == 503
        assert b"no board" in readiness.body


async def test_before_the_first_score_the_board_is_empty(tmp_path: Path) -> None:
    """A new system shows an empty board, not an error."""
    valkey = Valkey(tmp_path)
    await valkey.start()
    async with running_gateway(valkey.url, tmp_path / "log") as gateway:
        await gateway.ready()
        async with gateway.connect() as client:
            assert await client.recv() == '{"event":"scoresUpdate","topScores":[]}'
    await valkey.kill()
