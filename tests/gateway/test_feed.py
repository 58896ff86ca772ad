"""The newest board reaches clients whatever happens to Redis."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from services.gateway.leases import BATCH_EVERY_S, GATEWAYS_KEY
from shared.board import Score
from shared.leaderboard import BOARD_KEY, Leaderboard
from shared.redis import open_redis
from tests.cluster import eventually
from tests.gateway.harness import Gateway, Scores, closed, next_score, running_gateway
from tests.openapi import check_refusal
from tests.proxies import Proxy, UnreliableChannel, listening, proxy_to
from tests.valkey import Valkey, ValkeyCluster

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


async def test_a_redis_that_nobody_remembers_is_believed_again(chain: Chain) -> None:
    """Its clock went back, and all API replicas are new: the gateway says what it has shown."""
    async with chain.gateway.connect() as client:
        await next_score(client)
        await chain.scores.publish(chain.scores.board(2, epoch=int((time.time() + 3600) * 1e6)))
        assert await next_score(client) == 2
        leaderboard = Leaderboard(chain.scores.redis)
        await chain.scores.redis.delete(BOARD_KEY)
        await asyncio.sleep(HEALED_WITHIN_S / 2 + 0.2)

        assert not await leaderboard.apply([Score("ana", 3, 1)])
        await leaderboard.rebuild([Score("ana", 3, 1)], {})

        assert await next_score(client, HEALED_WITHIN_S) == 3
        assert await leaderboard.apply([Score("ana", 4, 2)])
        assert await next_score(client, HEALED_WITHIN_S) == 4
        await chain.gateway.ready()


async def test_an_older_redis_is_not_believed(chain: Chain) -> None:
    """As long as nobody has rebuilt it, the newer board stays."""
    async with chain.gateway.connect() as client:
        await next_score(client)
        older = chain.scores.board(2)
        await chain.scores.announce(3)
        assert await next_score(client) == 3
        await chain.scores.keep(older)
        with pytest.raises(TimeoutError):
            await next_score(client, 2.5)


async def test_half_of_the_messages_lost_doubled_or_late(tmp_path: Path) -> None:
    """No client sees an older board after a newer one, and all hold the true one when it heals."""
    async with AsyncExitStack() as stack:
        valkey = Valkey(tmp_path)
        stack.push_async_callback(valkey.kill)
        await valkey.start()
        unreliable = UnreliableChannel(valkey.port, seed=5)
        channel = await stack.enter_async_context(listening(unreliable))
        scores = Scores(await stack.enter_async_context(Redis.from_url(valkey.url)))
        await scores.announce(1)
        url = f"redis://127.0.0.1:{channel.port}/0"
        async with running_gateway(url, tmp_path / "log") as gateway:
            await gateway.ready()
            await subscribed(gateway)
            async with gateway.connect() as socket, gateway.stream() as stream:
                for score in range(2, 202):
                    await scores.announce(score)
                    await asyncio.sleep(0.01)
                channel.at_work = False
                shown_by_socket = await scores_until(partial(next_score, socket), 201)
                shown_by_stream = await scores_until(stream.score, 201)
            assert min(channel.lost, channel.doubled, channel.late) > 10
            for shown in (shown_by_socket, shown_by_stream):
                assert shown == sorted(set(shown))
            missed = await gateway.metric("versions_missed_total")
            assert channel.lost <= missed <= channel.lost + channel.late


async def scores_until(next_one: Callable[[float], Awaitable[int]], last: int) -> list[int]:
    """What a client is shown until the last score, which must come soon."""
    shown: list[int] = []
    async with asyncio.timeout(HEALED_WITHIN_S):
        while not shown or shown[-1] != last:
            shown.append(await next_one(HEALED_WITHIN_S))
    return shown


async def test_a_redis_cluster(tmp_path: Path) -> None:
    """Boards, caps and channel on three nodes; a node that dies takes only its own with it."""
    limit = {"CONNECTIONS_PER_USER_MAX": "1"}
    async with AsyncExitStack() as stack:
        cluster = ValkeyCluster(tmp_path)
        stack.push_async_callback(cluster.kill)
        await cluster.start()
        redis = open_redis(cluster.url, timeout_s=1)
        stack.push_async_callback(redis.aclose)
        leaderboard = Leaderboard(redis)
        assert not await leaderboard.apply([Score("ana", 1, 1)])
        await leaderboard.rebuild([Score("ana", 1, 1)], {})
        gateway, other = [
            await stack.enter_async_context(
                running_gateway(cluster.url, tmp_path / f"log-{n}", **limit)
            )
            for n in range(2)
        ]
        for one in (gateway, other):
            await one.ready()
            await subscribed(one)
            await one.counts_with_others()
        async with gateway.connect() as client:
            assert await next_score(client) == 1
            assert await leaderboard.apply([Score("ana", 2, 2)])
            assert await next_score(client) == 2
            assert await gateway.metric("boards_received_total", source="channel") == 1
            await asyncio.sleep(3 * BATCH_EVERY_S)  # Of two at once either may be the one too many.
            async with other.connect() as too_many:
                assert (await closed(too_many))[0] == 4429

            needed = {cluster.owner(key) for key in (BOARD_KEY, GATEWAYS_KEY)}
            await next(node for node in cluster.nodes if node not in needed).kill()
            for score in range(3, 6):
                assert await leaderboard.apply([Score("ana", score, score)])
                assert await next_score(client, HEALED_WITHIN_S) == score
            await subscribed(gateway)
            assert (await gateway.operations("/readyz")).status == 200
            assert await gateway.metric("caps_shared") == 1


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
