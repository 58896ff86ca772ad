"""The board in Redis: exact whatever the order and repetition of what is written."""

import random

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.board import Score, Standing, best
from shared.leaderboard import BOARD_KEY, CHANNEL, REACHED_KEY, SCORES_KEY, Leaderboard


@pytest.fixture
async def leaderboard(redis: Redis) -> Leaderboard:
    """A leaderboard that has started."""
    leaderboard = Leaderboard(redis)
    await leaderboard.rebuild([], {})
    return leaderboard


async def standings(leaderboard: Leaderboard) -> list[tuple[str, int]]:
    """What readers see."""
    board = await leaderboard.read()
    assert board is not None
    return [(row.user_id, row.score) for row in board.standings]


@pytest.mark.parametrize("seed", range(30))
async def test_order_and_repetition_do_not_matter(
    redis: Redis, leaderboard: Leaderboard, seed: int
) -> None:
    """Shuffled, doubled and filtered by an old floor, the top is the oracle's; ties by time."""
    chance = random.Random(seed)
    truth: dict[str, Score] = {}
    written: list[Score] = []
    for moment in range(150):
        user = f"user-{chance.randrange(30)}"
        before = truth[user].score if user in truth else 0
        truth[user] = Score(user, before + chance.randrange(1, 4), moment // 5)
        written.append(truth[user])
    written += chance.sample(written, 40)
    chance.shuffle(written)
    while written:
        size = chance.randrange(1, 20)
        batch, written = written[:size], written[size:]
        await leaderboard.apply(filter(leaderboard.matters, batch))

    expected = best(truth.values())
    assert await standings(leaderboard) == [(row.user_id, row.score) for row in expected]
    last = expected[-1]
    for replica in (leaderboard, Leaderboard(redis)):
        await replica.refresh_floor()
        assert replica.matters(last)
        assert not replica.matters(last._replace(reached_us=last.reached_us + 1))
        assert not replica.matters(last._replace(score=last.score - 1, reached_us=0))


async def test_a_board_that_is_not_full_takes_every_score(leaderboard: Leaderboard) -> None:
    """However low and late."""
    await leaderboard.apply([Score(f"user-{number}", 5, 1) for number in range(9)])

    assert leaderboard.matters(Score("ana", 1, 2**52))


async def test_who_reached_the_last_row_when_is_not_known(
    redis: Redis, leaderboard: Leaderboard
) -> None:
    """Whoever has as much may come before it."""
    await leaderboard.apply([Score(f"user-{number}", 5, 1) for number in range(10)])
    await redis.delete(REACHED_KEY)
    await leaderboard.apply([])
    assert leaderboard.matters(Score("ana", 5, 2))
    await leaderboard.apply([Score("ana", 5, 2)])

    assert ("ana", 5) in await standings(leaderboard)


async def test_only_a_change_is_announced(redis: Redis, leaderboard: Leaderboard) -> None:
    """With the next version; a replay is silent."""
    async with redis.pubsub() as channel:
        await channel.subscribe(CHANNEL)
        await channel.get_message(timeout=1)
        for score in (5, 5, 6):
            await leaderboard.apply([Score("ana", score, 1)])
        messages = [await channel.get_message(timeout=0.2) for _ in range(3)]

    first, second, third = messages
    assert (
        first is not None and b'"version":2,"topScores":[{"userId":"ana","score":5' in first["data"]
    )
    assert (
        second is not None
        and b'"version":3,"topScores":[{"userId":"ana","score":6' in second["data"]
    )
    assert third is None


async def test_names_survive_the_script(leaderboard: Leaderboard) -> None:
    """Lua's JSON, ours and the client's mean the same text."""
    names = ["a/b", '"', "\\", "\u0001\t", "é", "\U0001f600", "\u2028", "{x}", "\x7f"]
    await leaderboard.apply([Score(name, 1, place) for place, name in enumerate(names)])

    assert await standings(leaderboard) == [(name, 1) for name in names]


async def test_equal_in_score_and_time_is_ordered_by_code_point(leaderboard: Leaderboard) -> None:
    """Not by the locale of the server."""
    names = ["B", "a", "Z", "ä", "\uffff", "\U0001f600", "_"]
    await leaderboard.apply([Score(name, 1, 1) for name in names])

    assert await standings(leaderboard) == [(name, 1) for name in sorted(names)]


async def test_a_lost_board_waits_for_its_rebuild(redis: Redis, leaderboard: Leaderboard) -> None:
    """A single score must not be announced as the top 10; the new epoch is newer than the old."""
    await leaderboard.apply([Score("ana", 5, 1)])
    before = await leaderboard.read()
    await redis.flushdb()

    assert await leaderboard.apply([Score("ben", 1, 2)]) is False
    assert await leaderboard.read() is None
    await leaderboard.rebuild([Score("ana", 5, 1), Score("ben", 1, 2)], {})
    after = await leaderboard.read()
    assert before is not None and after is not None
    assert after.standings == (Standing("ana", 5), Standing("ben", 1))
    assert after.position > before.position


async def test_a_redis_that_went_back_in_time_is_noticed(
    redis: Redis, leaderboard: Leaderboard
) -> None:
    """After a failover that lost writes, versions must not be used a second time."""
    await leaderboard.apply([Score("ana", 1, 1)])
    lost = await redis.dump(BOARD_KEY) or b""
    await leaderboard.apply([Score("ana", 2, 2)])
    before = await leaderboard.read()
    await redis.restore(BOARD_KEY, 0, lost, replace=True)

    assert await leaderboard.apply([Score("ana", 3, 3)]) is False
    await leaderboard.rebuild([Score("ana", 3, 3)], {})
    after = await leaderboard.read()
    assert before is not None and after is not None
    assert after.position > before.position


async def test_what_postgresql_does_not_confirm_is_retracted(
    redis: Redis, leaderboard: Leaderboard
) -> None:
    """Unless it has changed since it was looked up."""
    await leaderboard.apply([Score("ana", 5, 1)])
    await redis.zadd(SCORES_KEY, {b"forged": 999, b"nul\0": 998, b"\xff": 997, b"ana": 7})
    entries = await leaderboard.entries()
    assert entries == {"ana": 7.0, "forged": 999.0, "nul\0": 998.0, "\udcff": 997.0}
    await leaderboard.apply([Score("ana", 8, 2)])
    await leaderboard.rebuild([Score("ana", 5, 1)], entries)

    assert await standings(leaderboard) == [("ana", 8)]


async def test_a_tampered_message_is_replaced(redis: Redis, leaderboard: Leaderboard) -> None:
    """The next write or rebuild announces what is true."""
    await leaderboard.apply([Score("ana", 5, 1)])
    await redis.hset(BOARD_KEY, "message", "nonsense")
    await leaderboard.rebuild([Score("ana", 5, 1)], {})

    assert await standings(leaderboard) == [("ana", 5)]


async def test_keys_of_another_type_can_be_discarded(
    redis: Redis, leaderboard: Leaderboard
) -> None:
    """The script says so, and starts anew after."""
    await redis.set(SCORES_KEY, "text")
    with pytest.raises(ResponseError):
        await leaderboard.apply([Score("ana", 5, 1)])
    await leaderboard.discard()
    await leaderboard.rebuild([Score("ana", 5, 1)], {})

    assert await standings(leaderboard) == [("ana", 5)]


async def test_one_replica_rebuilds_for_all(redis: Redis) -> None:
    """Once in a period."""
    replicas = [Leaderboard(redis) for _ in range(5)]

    assert sum([await replica.claim_rebuild(60_000) for replica in replicas]) == 1
