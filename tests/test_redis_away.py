"""Without Redis: no error, no quota opened or closed, and the true board once it is back."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import Client, Cluster, eventually, free_port
from tests.load import Load
from tests.proxies import Fate, cutting
from tests.replica import api_replica
from tests.test_faults import true_board
from tests.valkey import Valkey

QUOTA = 100
"""Updates an hour: the default."""

BOARD_S_MAX = 2.0
"""From Redis's return to the true board."""


@dataclass(frozen=True)
class Replicas:
    """Two replicas on the cluster's shards, and a Redis of their own."""

    urls: list[str]
    clients: list[Client]
    valkey: Valkey


@pytest.fixture
async def replicas(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Replicas]:
    """Both ready, Redis empty."""
    valkey = Valkey(tmp_path)
    await valkey.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(valkey.kill)
        urls = [
            await stack.enter_async_context(
                api_replica(
                    cluster,
                    tmp_path / f"api-{number}.log",
                    redis_url=valkey.url,
                    TOP_RATE_LIMIT="1000000/hour",
                )
            )
            for number in range(2)
        ]
        clients = [await stack.enter_async_context(cluster.client(url=url)) for url in urls]
        yield Replicas(urls, clients, valkey)


async def spend(replicas: Replicas, user: str, count: int) -> Counter[int]:
    """Updates at once over both replicas; their statuses."""
    answers = await asyncio.gather(
        *(replicas.clients[number % 2].post(user) for number in range(count))
    )
    return Counter(answer.status for answer in answers)


@pytest.mark.parametrize(
    "away_s",
    [8, pytest.param(60, marks=(pytest.mark.chaos, pytest.mark.timeout(300)))],
)
async def test_an_outage_of_redis_is_no_error(
    cluster: Cluster, replicas: Replicas, user: str, away_s: float
) -> None:
    """For reads and writes under load; the board is true within two seconds of its return.

    And nobody gets past a quota meanwhile, or is kept from it.
    """
    load = Load(cluster, replicas.urls)
    reads: Counter[int] = Counter()

    async def read_on() -> None:
        while True:
            for client in replicas.clients:
                reads[(await client.request("GET", "/api/scores/top")).status] += 1
            await asyncio.sleep(0.05)

    async def is_true() -> bool:
        truth = await true_board(cluster)
        return all([await client.top() == truth for client in replicas.clients])

    async with load.running(user, users=30, pause_s=away_s / 40):
        reading = asyncio.create_task(read_on())
        await eventually(lambda: reads.total() > 4)
        assert await spend(replicas, f"{user}-all", 40) == {200: 40}
        await replicas.valkey.kill()
        rest = QUOTA - 40 - 1
        for number in range(rest):
            answer = await replicas.clients[number % 2].post(f"{user}-all")
            assert answer.status == 200
            await asyncio.sleep(away_s / rest)
        hundredth = await replicas.clients[0].post(f"{user}-all")
        refused = await replicas.clients[1].post(f"{user}-all")
        await replicas.valkey.start()
        healed_s = await eventually(is_true, within_s=BOARD_S_MAX, what="the true board")
        still_refused = await replicas.clients[0].post(f"{user}-all")
        reading.cancel()
    await load.assert_exact()
    slowest_s = max(load.slowest_s.values())
    print(f"{dict(load.answers)}, slowest {slowest_s:.2f} s; {dict(reads)}; {healed_s:.2f} s")

    assert (set(load.answers), set(reads), load.broken) == ({200}, {200}, [])
    assert [one.status for one in (hundredth, refused, still_refused)] == [200, 429, 429]


async def test_without_redis_the_quota_is_exact(replicas: Replicas, user: str) -> None:
    """Over both replicas and at once: the 100th passes, and the 101st does not."""
    await replicas.valkey.kill()
    first = await spend(replicas, user, QUOTA - 5)
    rest = await spend(replicas, user, 20)
    refused = await replicas.clients[0].post(user)

    assert first == {200: QUOTA - 5}
    assert rest == {200: 5, 429: 15}
    assert (refused.status, refused.headers["X-RateLimit-Remaining"]) == (429, "0")


async def test_what_was_spent_without_redis_or_before_is_not_forgotten(
    replicas: Replicas, user: str
) -> None:
    """Redis comes back empty, and the quota is no other than it was."""
    assert await spend(replicas, user, 40) == {200: 40}
    await replicas.valkey.kill()
    assert await spend(replicas, user, 30) == {200: 30}
    await replicas.valkey.start()
    answer = await replicas.clients[1].post(user)

    assert (answer.status, answer.headers["X-RateLimit-Remaining"]) == (200, "29")
    assert await spend(replicas, user, 40) == {200: 29, 429: 11}


async def test_without_redis_a_commit_whose_reply_is_lost_spends_once(
    cluster: Cluster, user: str, tmp_path: Path, seed: int
) -> None:
    """Counting, writing and trying again go together."""
    async with (
        cutting(cluster.shard_urls, share=0.2, seed=seed) as (shard_urls, cutters),
        api_replica(
            cluster,
            tmp_path / "api.log",
            shard_urls=shard_urls,
            redis_url=f"redis://127.0.0.1:{free_port()}/0",
            UPDATE_RATE_LIMIT="40/hour",
        ) as url,
        cluster.client(url=url) as client,
    ):
        load = Load(cluster, [url])
        await load.all_of(user, users=4, increments=30)
        fates = Counter(fate for cutter in cutters for fate in cutter.fates)
        # Nothing is cut any more.
        for cutter in cutters:
            cutter.share = 0
        answers = await asyncio.gather(*(client.post(f"{user}-0") for _ in range(15)))
    load.acknowledged[f"{user}-0"] += sum(answer.status == 200 for answer in answers)
    await load.assert_exact()
    print(f"{fates}; {dict(load.answers)}")

    assert min(fates[Fate.CUT_BEFORE], fates[Fate.CUT_AFTER]) > 0
    assert Counter(answer.status for answer in answers) == {200: 10, 429: 5}
