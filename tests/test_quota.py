"""A quota is exact over replicas, by Redis's clock, and neither opens nor closes without Redis."""

import asyncio
import itertools
import time

from limits import parse
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.api.allowance import Allowance
from services.api.quota import Quota, count_in_memory, count_operations
from services.api.shards import Operation, Shards
from tests.cluster import Cluster, free_port


def nobody() -> Redis:
    """A client of a Redis that is away, and that asks once, as the services do."""
    return Redis(port=free_port(), retry=Retry(NoBackoff(), 0))


CLOCK_S = 0.002
"""Redis counts in whole milliseconds, of another clock."""

_requests = itertools.count()


async def spend(quota: Quota, client: str) -> Allowance:
    """A request of its own."""
    return await quota.spend(client, str(next(_requests)))


async def no_fallback(_client: str) -> Allowance:
    """Redis is there."""
    raise AssertionError("asked without need")


async def test_as_many_as_are_allowed_over_all_replicas(redis: Redis) -> None:
    """However they come together."""
    replicas = [Quota("update", parse("10/hour"), redis, no_fallback) for _ in range(3)]
    spent = await asyncio.gather(*(spend(replicas[n % 3], "ana") for n in range(40)))

    assert sum(allowance.allowed for allowance in spent) == 10
    assert sorted(one.remaining for one in spent if one.allowed) == list(range(10))
    assert (await spend(replicas[0], "ben")).allowed


async def test_no_window_has_more_and_no_refusal_is_needless(redis: Redis) -> None:
    """Wherever the window is laid, by the moments between which Redis must have looked."""
    limit, window_s = 5, 1.0
    quota = Quota("update", parse("5/second"), redis, no_fallback)
    asked = []
    for step in range(60):
        before = time.monotonic()
        allowance = await spend(quota, "ana")
        asked.append((before, time.monotonic(), allowance.allowed))
        await asyncio.sleep(0.03 + 0.05 * (step % 3))
    passed = [(before, after) for before, after, allowed in asked if allowed]

    assert limit < len(passed) < len(asked)
    for first, sixth in zip(passed, passed[limit:], strict=False):
        assert sixth[1] - first[0] >= window_s - CLOCK_S
    for before, _, allowed in asked:
        if not allowed:
            earlier = [after for _, after in passed if after <= before]
            assert before - earlier[-limit] <= window_s + CLOCK_S


async def test_a_request_that_is_sent_again_counts_once(redis: Redis) -> None:
    """Also when the quota is spent by then: what it asked for may be done already."""
    quota = Quota("update", parse("2/hour"), redis, no_fallback)
    spent = [await quota.spend("ana", request) for request in ("one", "one", "two", "three", "two")]

    assert [one.allowed for one in spent] == [True, True, True, False, True]
    assert [one.remaining for one in spent] == [1, 1, 0, 0, 0]


async def test_what_is_said_of_the_rest_is_true(redis: Redis) -> None:
    """When the next is allowed, and when all of it is free again."""
    quota = Quota("update", parse("2/second"), redis, no_fallback)
    await spend(quota, "ana")
    await asyncio.sleep(0.3)
    await spend(quota, "ana")
    refused = await spend(quota, "ana")

    assert not refused.allowed
    assert 0.6 < refused.retry_in_s < 0.75
    assert 0.9 < refused.whole_in_s <= 1.0
    await asyncio.sleep(refused.retry_in_s)
    assert (await spend(quota, "ana")).allowed
    assert not (await spend(quota, "ana")).allowed


async def test_a_restarted_redis_knows_the_script_again(redis: Redis) -> None:
    """It is loaded once more, and nobody is refused."""
    rate = parse("10/hour")
    quota = Quota("update", rate, redis, count_in_memory(rate))
    await spend(quota, "ana")
    await redis.script_flush()

    assert (await spend(quota, "ana")).remaining == 8


async def test_a_redis_that_has_forgotten_is_not_believed_alone(redis: Redis) -> None:
    """For one window, by any replica: what was counted elsewhere counts too."""
    rate = parse("10/minute")
    elsewhere = count_in_memory(rate)
    replicas = [Quota("update", rate, redis, elsewhere) for _ in range(2)]
    for replica in replicas:
        await spend(replica, "ana")
    for _ in range(4):
        await elsewhere("ana")
    await redis.flushall()
    await redis.script_flush()

    assert [(await spend(replica, "ana")).remaining for replica in replicas] == [5, 4]
    assert 59_000 < await redis.pttl("{quota:update}:gap") <= 60_000


async def test_without_redis_updates_are_counted_from_the_operations(
    cluster: Cluster, user: str
) -> None:
    """What Redis had counted as updates is in PostgreSQL too."""
    rate = parse("3/hour")
    async with Shards.connect(cluster.shard_urls) as shards:
        await shards.check()
        away = nobody()
        quota = Quota("update", rate, away, count_operations(rate, shards))
        shard = shards.shard_of(user)
        for number in range(3):
            allowance = await spend(quota, user)
            assert (allowance.allowed, allowance.remaining) == (True, 2 - number)
            await shards.record(shard, [Operation(user, str(number), 1)])
        refused = await spend(quota, user)
        await away.aclose()

    assert (refused.allowed, refused.remaining) == (False, 0)
    assert 3590 < refused.retry_in_s <= refused.whole_in_s <= 3600


async def test_without_redis_reads_are_counted_in_memory() -> None:
    """By each replica."""
    rate = parse("3/hour")
    away = nobody()
    quota = Quota("top", rate, away, count_in_memory(rate))
    spent = [await spend(quota, "address:127.0.0.1") for _ in range(4)]
    await away.aclose()

    assert [one.allowed for one in spent] == [True, True, True, False]
    assert [one.remaining for one in spent] == [2, 1, 0, 0]
    assert b"\r\nretry-after: 3600\r\n" in spent[-1].headers("top")
