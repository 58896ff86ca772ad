"""A part that does not answer: what the contract says then, through Nginx."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
from redis.asyncio import Redis

from services.api.partition import partition_of
from shared.leaderboard import BOARD_KEY
from tests.cluster import Client, Cluster, eventually, metric
from tests.faults import freeze
from tests.replica import api_replica
from tests.test_contract_top import leading_score

HEALED_S_MAX = 6.0


@contextmanager
def frozen(cluster: Cluster, *names: str) -> Iterator[None]:
    """Processes that answer nothing while the block runs."""
    heal = freeze(cluster, *names)
    try:
        yield
    finally:
        heal()


def user_of(shard: int, user: str) -> str:
    """A user whom the first layout, remainder modulo shards, puts on that shard."""
    return next(name for n in range(100) if partition_of(name := f"{user}-{n}") % 2 == shard)


async def score_after(client: Client, user: str, increment: int, key: str) -> int:
    """What an increment leads to; a shard that was away is left alone for another moment."""
    answer = await client.post(user, increment, key=key)

    async def is_written() -> bool:
        nonlocal answer
        answer = await client.post(user, increment, key=key)
        return answer.status == 200

    if answer.status != 200:
        await eventually(is_written, within_s=HEALED_S_MAX, what="the shard is asked again")
    score: int = answer.json["newScore"]
    return score


async def test_a_write_that_fails_is_tried_four_times(
    cluster: Cluster, user: str, tmp_path: Path
) -> None:
    """Then the answer is 500, and the client's key settles whether it counted."""
    away, near = user_of(1, user), user_of(0, user)
    async with (
        api_replica(cluster, tmp_path / "api.log") as url,
        cluster.client(url=url) as client,
    ):
        with frozen(cluster, "postgres-1"):
            failing = asyncio.create_task(client.post(away, 5, key="once"))
            for _ in range(5):
                assert (await client.post(near, 1)).status == 200
            answer = await failing
            assert await metric(url, "scoreboard_shard_resting", shard="1") == 1

        assert answer.status == 500
        assert answer.json == {"status": "error", "message": "Internal server error after retries"}
        assert answer.headers["X-RateLimit-Remaining"] == "99"
        # On a busy machine the deadline may come before the third.
        assert await metric(url, "scoreboard_write_retries_total", shard="1") in (2, 3)
        assert await score_after(client, away, 5, key="once") == 5
        assert await metric(url, "scoreboard_shard_resting") == 0
        assert (await client.post(near, 1)).json["newScore"] == 6


async def test_who_would_wait_too_long_is_refused_unstarted(
    cluster: Cluster, user: str, tmp_path: Path
) -> None:
    """503 with Retry-After, after less than a second, and nothing was added."""
    away = [user_of(1, f"{user}-{n}") for n in range(12)]
    async with (
        api_replica(cluster, tmp_path / "api.log") as url,
        cluster.client(url=url) as client,
    ):
        with frozen(cluster, "postgres-1"):
            first = [asyncio.create_task(client.post(one, 1)) for one in away[:4]]
            await asyncio.sleep(0.2)
            answers = await asyncio.gather(*(client.post(one, 1) for one in away[4:]))
            await asyncio.gather(*first)
        refused = [
            one for one, answer in zip(away[4:], answers, strict=True) if answer.status == 503
        ]

        assert {answer.status for answer in answers} <= {500, 503}
        assert refused
        for answer in answers:
            if answer.status == 503:
                assert answer.json == {"status": "error", "message": "Service overloaded"}
                assert answer.headers["Retry-After"] == "1"
        for one in refused:
            assert await score_after(client, one, 7, key="seven") == 7


async def test_a_score_that_redis_missed_is_shown_while_a_shard_is_away(
    cluster: Cluster, client: Client, user: str
) -> None:
    """What the others' users reach must not wait for it."""
    near, score = user_of(0, user), await leading_score(client)
    with frozen(cluster, "postgres-1"):
        with frozen(cluster, "valkey"):
            assert (await client.post(near, score)).status == 200

        async def is_shown() -> bool:
            return near in [row["userId"] for row in await client.top()]

        await eventually(is_shown, within_s=HEALED_S_MAX, what="the score on the board")


async def test_the_last_board_is_shown_while_nothing_answers(
    cluster: Cluster, client: Client
) -> None:
    """By a replica that has read one."""
    boards = [await client.top() for _ in range(8)]
    with frozen(cluster, "postgres-0", "postgres-1", "valkey"):
        assert await client.top() == boards[-1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", "inf"), ("epoch", "-1"), ("version", "1e999"), ("floor", "x"), ("message", "{}")],
)
async def test_a_damaged_board_is_nobodys_error(
    cluster: Cluster, client: Client, user: str, field: str, value: str
) -> None:
    """Updates and reads go on, and it is rebuilt."""
    async with Redis.from_url(cluster.secret("redis_url")) as redis:
        before = [cluster.process(name)["pid"] for name in cluster.names("api-")]
        score = await leading_score(client)
        await redis.hset(BOARD_KEY, field, value)
        assert (await client.post(user, score)).status == 200
        await client.top()

        async def is_rebuilt() -> bool:
            held = await redis.hget(BOARD_KEY, field)
            shown = [row["userId"] for row in await client.top()]
            return held != value.encode() and user in shown

        await eventually(is_rebuilt, within_s=HEALED_S_MAX, what="the board is rebuilt")
        assert [cluster.process(name)["pid"] for name in cluster.names("api-")] == before


async def test_a_replica_that_starts_without_its_shards_is_ready_once_they_are(
    cluster: Cluster,
) -> None:
    """Without a request that would make it look."""
    before = cluster.process("api-0")
    with frozen(cluster, "postgres-0", "postgres-1"):
        os.kill(before["pid"], signal.SIGKILL)
        async with httpx.AsyncClient() as http:

            async def says_why() -> bool:
                try:
                    answer = await http.get(f"http://127.0.0.1:{before['port']}/readyz")
                except httpx.TransportError:
                    return False
                return answer.status_code == 503 and "shard" in answer.json()["reason"]

            await eventually(says_why, within_s=10, what="the replica says why it is not ready")
    await eventually(
        lambda: cluster.process("api-0")["state"] == "ready",
        within_s=HEALED_S_MAX,
        what="the replica is ready",
    )
