"""`scoreboard scale` and `down`, `up` under load and with data."""

import asyncio

from tests.cluster import Cluster, metric, receive_board, receive_until
from tests.load import Load

SCALE_SECONDS_MAX = 90


async def requests_of(cluster: Cluster, name: str) -> float:
    """How many updates a replica has answered, by its own metrics."""
    url = f"http://127.0.0.1:{cluster.process(name)['port']}"
    return await metric(url, "scoreboard_http_requests_total", route="/api/scores/update")


async def test_scaling_under_load_fails_no_request(cluster: Cluster, user: str) -> None:
    """Up and down again; new replicas take their part, and who watches watches on."""
    async with cluster.live() as early:
        await scale_under_load(cluster, user)
        async with cluster.client() as client:
            top = await client.top(user)
        await receive_until(early, lambda board: board == top)


async def scale_under_load(cluster: Cluster, user: str) -> None:
    """Up and down again while many update."""
    async with Load(cluster).running(user, users=20, pause_s=0.4) as load:
        done = await asyncio.to_thread(
            cluster.command, "scale", "api=4", "gateway=3", timeout=SCALE_SECONDS_MAX
        )
        assert done.returncode == 0, done.stderr
        assert cluster.names("api-") == ["api-0", "api-1", "api-2", "api-3"]
        assert cluster.names("gateway-") == ["gateway-0", "gateway-1", "gateway-2"]
        await asyncio.sleep(2)
        shares = [await requests_of(cluster, name) for name in cluster.names("api-")]
        async with cluster.live(port=cluster.process("gateway-2")["port"]) as socket:
            await receive_board(socket)
        done = await asyncio.to_thread(
            cluster.command, "scale", "api=2", "gateway=2", timeout=SCALE_SECONDS_MAX
        )
        assert done.returncode == 0, done.stderr
        assert cluster.names("api-") == ["api-0", "api-1"]
    await load.assert_exact()
    print(f"{sum(load.answers.values())} updates; shares of the four replicas: {shares}")

    assert (set(load.answers), load.broken) == ({200}, [])
    assert min(shares) > 0


async def test_down_and_up_keep_scores_board_and_quota(fresh: Cluster) -> None:
    """As if nothing had been."""
    fresh.up(api=1, gateway=1, shards=2)
    async with fresh.client() as client:
        for number in range(12):
            await client.post(f"user-{number}", number + 1, key="first")
        before = await client.top()
    fresh.down()
    fresh.up(api=1, gateway=1)
    async with fresh.client() as client:
        assert await client.top() == before
        async with fresh.live() as socket:
            assert await receive_board(socket) == before
        assert (await client.post("user-3", 4, key="first")).json["newScore"] == 4
        answer = await client.post("user-3", 1)

    assert answer.json["newScore"] == 5
    assert answer.headers["X-RateLimit-Remaining"] == "97"
