"""The filter before the board: nearly no update passes it, and the board is exact all the same."""

import asyncio
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from shared.leaderboard import Leaderboard
from tests.benchmarks.http_load import ClosedLoop
from tests.cluster import Cluster, Json
from tests.test_faults import true_board

UPDATES = 200_000
USERS = 10_000
SAMPLES = 50
CONNECTIONS = 64

INCREMENT_MAX = 10
"""Small, so that many are equal: that is what is hardest to keep from the board."""

SENT_SHARE_MAX = 0.01


def updates(cluster: Cluster, chance: random.Random) -> Iterator[bytes]:
    """Of random users, for ever."""
    heads = [
        (
            "POST /api/scores/update HTTP/1.1\r\nHost: localhost\r\n"
            f"Authorization: Bearer {cluster.token(f'user-{number}')}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        )
        for number in range(USERS)
    ]
    while True:
        number = chance.randrange(USERS)
        increment = chance.randint(1, INCREMENT_MAX)
        body = f'{{"userId":"user-{number}","scoreIncrement":{increment}}}'
        yield f"{heads[number]}{len(body)}\r\n\r\n{body}".encode()


def send(cluster: Cluster, requests: Iterator[bytes], count: int) -> int:
    """At least so many, and none of them is under way any more; how many it were."""
    loop = ClosedLoop(cluster.port, CONNECTIONS, requests)
    sent = 0
    while sent < count:
        statuses = loop.run(seconds=0.1).statuses
        assert set(statuses) <= {200}, statuses
        sent += statuses.total()
    statuses = loop.drain().statuses
    assert set(statuses) == {200}, statuses
    return sent + statuses.total()


@pytest.mark.chaos
@pytest.mark.timeout(600)
async def test_few_updates_reach_the_script_and_the_board_is_exact(
    tmp_path: Path, seed: int
) -> None:
    """Whenever no update is under way, GET and the message are PostgreSQL's own top 10."""
    cluster = Cluster(tmp_path / "home", {"UPDATE_RATE_LIMIT": "1000000/hour"})
    cluster.up(shards=3, api=2, gateway=1)
    boards: list[list[Json]] = []
    try:
        requests = updates(cluster, random.Random(seed))
        async with Redis.from_url(cluster.secret("redis_url")) as redis, cluster.client() as client:
            sent = 0
            while sent < UPDATES:
                sent += await asyncio.to_thread(send, cluster, requests, UPDATES // SAMPLES)
                board = await Leaderboard(redis).read()
                assert board is not None
                announced = [
                    {"userId": row.user_id, "score": row.score, "rank": rank}
                    for rank, row in enumerate(board.standings, start=1)
                ]
                truth = await true_board(cluster)
                assert (announced, await client.top()) == (truth, truth)
                boards.append(truth)
        reached = await cluster.metric("scoreboard_leaderboard_scores_total", outcome="sent")
        below = await cluster.metric("scoreboard_leaderboard_scores_total", outcome="below_floor")
    finally:
        cluster.down()
    print(f"{reached:.0f} of {sent} updates reached the script, {reached / sent:.2%}")

    assert reached + below == sent
    assert reached / sent < SENT_SHARE_MAX
    assert all(before != after for before, after in itertools.pairwise(boards))
