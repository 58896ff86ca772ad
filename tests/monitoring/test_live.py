"""The real Prometheus over the real cluster: every query has data, alerts fire on faults and end."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
import websockets

from tests.cluster import Cluster, eventually, receive_board
from tests.load import Load
from tests.monitoring.prometheus import Prometheus, replicas, watching
from tests.monitoring.queries import dashboard_queries, rules
from tests.test_chaos import ENDLESS
from tests.test_degraded import frozen

pytestmark = [pytest.mark.deploy, pytest.mark.cluster, pytest.mark.timeout(300)]

RATE_INTERVAL = "10s"
"""What Grafana puts in where it looks once in 2.5 s."""

DATA_S_MAX = 60.0
"""A rate needs two samples, and a wheel of the load a turn."""

FIRES_S_MAX = 100.0
"""The longest `for` of the four is a minute."""

ENDS_S_MAX = 30.0


@asynccontextmanager
async def under_load(cluster: Cluster) -> AsyncIterator[None]:
    """Updates, reads, watchers, and one client after the other that does what it must not."""

    async def read() -> None:
        async with cluster.client() as client:
            while True:
                await client.http.get("/api/scores/top")
                await asyncio.sleep(0.1)

    async def watch(user: str) -> None:
        async with cluster.live(user) as socket:
            while True:
                await receive_board(socket)

    async def send_something() -> None:
        for number in count():
            async with cluster.live(f"noisy-{number}") as socket:
                await socket.send("anything")
                await socket.wait_closed()
            await asyncio.sleep(0.2)

    load = Load(cluster)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(
            load.running("monitored", users=40, pause_s=0.02, increments=ENDLESS)
        )
        jobs = [read(), send_something(), *(watch(f"watcher-{number}") for number in range(10))]
        tasks = [asyncio.create_task(job) for job in jobs]
        try:
            yield
            done = [task for task in tasks if task.done()]
            assert done == [], "a client gave up"
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(
                isinstance(end, (asyncio.CancelledError, websockets.ConnectionClosed))
                for end in ended
            )


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without quotas."""
    unlimited = {"UPDATE_RATE_LIMIT": "1000000/hour", "TOP_RATE_LIMIT": "1000000/hour"}
    cluster = Cluster(tmp_path / "home", unlimited)
    cluster.up()
    yield cluster
    cluster.down()


async def test_every_query_of_a_dashboard_has_data(watched: Cluster, tmp_path: Path) -> None:
    """Under load; those of one replica for an API replica or for a gateway."""
    instances = [address for _, address in replicas(watched)]
    async with watching(watched, tmp_path) as prometheus, under_load(watched):
        expected = {f"{job} {address}" for job, address in replicas(watched)}

        async def all_found() -> bool:
            return expected <= await prometheus.healthy_targets()

        await eventually(all_found, within_s=15, what="every replica is up")

        empty: list[str] = []

        async def every_query_has() -> bool:
            empty.clear()
            for query in dashboard_queries():
                expression = query.expression.replace("$__rate_interval", RATE_INTERVAL)
                own = instances if "$instance" in expression else [""]
                answers = [
                    await prometheus.query(expression.replace("$instance", instance))
                    for instance in own
                ]
                if not any(answers):
                    empty.append(f"{query.place}: {expression}")
            return not empty

        with suppress(AssertionError):
            await eventually(every_query_has, within_s=DATA_S_MAX)
        assert empty == []
        # What records has recorded, but for windows and exporters that are not there.
        for rule in rules():
            if "record" in rule:
                assert await prometheus.query(rule["record"]), rule
        # A busy machine may miss the objective for latency, but nothing is broken.
        assert {name for name in await firing(prometheus) if "Budget" not in name} == set()
        # A shard that was never audited says NaN.
        assert "AuditNeverRan" in await prometheus.alerts("pending")


async def firing(prometheus: Prometheus) -> set[str]:
    """The names of the alerts that fire."""
    return set(await prometheus.alerts("firing"))


async def test_alerts_fire_on_a_fault_and_end_with_it(watched: Cluster, tmp_path: Path) -> None:
    """With the rules as they are: a shard, Redis and a gateway freeze, and come back."""
    faults = {"ShardDown", "RedisDown", "FeedSilent", "ReplicaDown"}
    async with watching(watched, tmp_path) as prometheus:

        async def all_fire() -> bool:
            return faults <= await firing(prometheus)

        async def none_fires() -> bool:
            return not faults & await firing(prometheus)

        await asyncio.sleep(5)
        assert await none_fires()
        with frozen(watched, "postgres-1", "valkey", "gateway-1"):
            fired_s = await eventually(all_fire, within_s=FIRES_S_MAX)
            told = await prometheus.alerts("firing")
        ended_s = await eventually(none_fires, within_s=ENDS_S_MAX)
    print(f"all four fired after {fired_s:.0f} s and had ended {ended_s:.0f} s after the faults")
    assert told["ShardDown"]["summary"] == "Shard 1 does not answer 2 API replica(s)"
    # What Prometheus writes for a template that fails.
    assert not [text for text in told.values() if "<error" in text["summary"]]
