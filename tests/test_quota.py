"""A quota is exact over replicas, by Redis's clock, and neither opens nor closes without Redis."""

import asyncio
import bisect
import itertools
import time

import pytest
from limits import parse
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.api.allowance import Allowance
from services.api.quota import Quota, count_in_memory, count_operations
from services.api.shards import Operation, Shards
from tests.cluster import Cluster, eventually, free_port


def nobody() -> Redis:
    """A client of a Redis that is away, and that asks once, as the services do."""
    return Redis(port=free_port(), retry=Retry(NoBackoff(), 0))


LOG_MAX = 1000
"""Of `quota.lua`: the largest limit that is kept as a log."""

CLOCK_S = 0.002
"""Redis counts in whole milliseconds, of another clock."""

_requests = itertools.count()


def request_id(number: int) -> str:
    """As the edge makes them; only the first digits tell them apart."""
    return f"{number:016x}{0:016x}"


async def spend(quota: Quota, client: str) -> Allowance:
    """A request of its own."""
    return await quota.spend(client, request_id(next(_requests)))


def spent_key(of: str) -> str:
    """The key of what a client has spent of the quota for updates."""
    return f"{{quota:update}}:spent:{of}"


async def no_fallback(_client: str) -> Allowance:
    """Redis is there."""
    raise AssertionError("asked without need")


@pytest.mark.parametrize("limit", [10, LOG_MAX, LOG_MAX + 1])
async def test_as_many_as_are_allowed_over_all_replicas(redis: Redis, limit: int) -> None:
    """However they come together; what is spent of a large quota is kept otherwise."""
    replicas = [Quota("update", parse(f"{limit}/hour"), redis, no_fallback) for _ in range(3)]
    spent = await asyncio.gather(*(spend(replicas[n % 3], "ana") for n in range(limit + 30)))

    assert sum(allowance.allowed for allowance in spent) == limit
    assert sorted(one.remaining for one in spent if one.allowed) == list(range(limit))
    assert (await spend(replicas[0], "ben")).allowed
    assert await redis.type(spent_key(f"{limit}/3600:ana")) == (
        b"zset" if limit > LOG_MAX else b"string"
    )


@pytest.mark.parametrize(
    ("limit", "window_s", "steps", "rest_s"),
    [(5, 1, 60, (0.03, 0.08, 0.13)), (LOG_MAX + 1, 2, 4000, (0.001,))],
)
async def test_no_window_has_more_and_no_refusal_is_needless(
    redis: Redis, limit: int, window_s: int, steps: int, rest_s: tuple[float, ...]
) -> None:
    """Wherever the window is laid, by the moments between which Redis must have looked."""
    quota = Quota("update", parse(f"{limit}/{window_s} second"), redis, no_fallback)
    asked = []
    for step in range(steps):
        before = time.monotonic()
        allowance = await spend(quota, "ana")
        asked.append((before, time.monotonic(), allowance.allowed))
        await asyncio.sleep(rest_s[step % len(rest_s)])
    passed = [(before, after) for before, after, allowed in asked if allowed]

    assert limit < len(passed) < len(asked)
    for first, next_window in zip(passed, passed[limit:], strict=False):
        assert next_window[1] - first[0] >= window_s - CLOCK_S
    ends = [after for _, after in passed]
    for before, _, allowed in asked:
        if not allowed:
            earlier = bisect.bisect_right(ends, before)
            assert before - ends[earlier - limit] <= window_s + CLOCK_S


@pytest.mark.parametrize("limit", [2, LOG_MAX + 1])
async def test_a_request_that_is_sent_again_counts_once(redis: Redis, limit: int) -> None:
    """Also when the quota is spent by then: what it asked for may be done already."""
    quota = Quota("update", parse(f"{limit}/hour"), redis, no_fallback)
    await asyncio.gather(*(spend(quota, "ana") for _ in range(limit - 2)))
    one, two, three = (request_id(2**40 + number) for number in range(3))
    spent = [await quota.spend("ana", request) for request in (one, one, two, three, two)]

    assert [one.allowed for one in spent] == [True, True, True, False, True]
    assert [one.remaining for one in spent] == [1, 1, 0, 0, 0]


async def test_no_request_is_taken_for_a_piece_of_others(redis: Redis) -> None:
    """What is spent stands in one text: an id that is found in the middle of it is another one."""
    quota = Quota("update", parse("100/hour"), redis, no_fallback)
    for _ in range(3):
        await spend(quota, "ana")
    log = await redis.get(spent_key("100/3600:ana"))
    assert isinstance(log, bytes)
    pieces = {log[start : start + 8].hex() for start in range(len(log) - 8) if start % 14}
    for number, piece in enumerate(pieces, 4):
        assert (await quota.spend("ana", piece)).remaining == 100 - number


async def test_what_nobody_spends_any_more_goes_away(redis: Redis) -> None:
    """After two windows at most, also where windows follow each other, and not before one."""
    quota = Quota("update", parse("50/second"), redis, no_fallback)
    for _ in range(8):
        for _ in range(5):
            await spend(quota, "ana")
            assert 1000 <= await redis.pttl(spent_key("50/1:ana")) <= 2000
        await asyncio.sleep(0.3)

    async def is_gone() -> bool:
        return not await redis.exists(spent_key("50/1:ana"))

    await eventually(is_gone, within_s=2, what="two windows are over")


@pytest.mark.parametrize("spent", [1, 3])
async def test_a_clock_that_was_set_back_keeps_nobody_out(redis: Redis, spent: int) -> None:
    """What had counted by the later time ends a window from now, and what comes after it as well."""
    quota = Quota("update", parse("3/second"), redis, no_fallback)
    tomorrow = (int((time.time() + 86_400) * 1000)).to_bytes(6, "big")
    log = b"".join(bytes([number] * 8) + tomorrow for number in range(spent))
    await redis.set(spent_key("3/1:ana"), log, px=90_000_000)
    said = await spend(quota, "ana")
    assert (said.allowed, said.remaining) == (spent < 3, max(0, 2 - spent))
    assert 0.9 < said.whole_in_s <= 1
    await asyncio.sleep(said.whole_in_s + CLOCK_S)

    assert (await spend(quota, "ana")).remaining == 2


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
