"""Lost replies, crashed shards, zombies: every acknowledged increment counts once all the same.

The short forms run by default, the long ones (marker `chaos`) by `make test-chaos`.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from services.api.audit import audit
from services.api.partition import partition_of
from services.api.writes import RETRY_RESERVE, RETRY_SHARE
from tests.cluster import Cluster, Json, eventually, metric
from tests.faults import Heal, MountRefused, fill, freeze, small_disk, stop
from tests.load import Load, miscounted
from tests.proxies import CommitCutter, Fate, cutting, listening, through
from tests.replica import api_replica

CUT_SHARE = 0.2
"""Of the commits; half of these before and half after."""

LONG = (pytest.mark.chaos, pytest.mark.timeout(600))

ENDLESS = 1_000_000

FROZEN_S = 8.0
"""Longer than Nginx waits for a replica."""

BACK_S_MAX = 10.0
"""The supervisor waits up to 2 s between deaths in a row, and the load goes on."""

EDGE_DEADLINE_S = 5.5
"""Within which Nginx answers whatever happens, and half a second for a busy machine."""

PROBED_S = 1.5
"""After which Nginx asks a replica again that has failed, and not with one request first: until then
some would go to the backup entry of another that freezes, and wait for a second one's time."""

API_DEADLINE_S = 3.0
"""Within which the API answers: Nginx takes a replica that needs longer for a frozen one."""

UNTOUCHED_S = 2.0
"""For those whom a fault does not concern, on a machine as busy as this: less than a try that fails."""

NOTICED_S_MAX = 60.0
"""A table needs more room on its disk only once in a hundred increments."""

NO_QUOTA = {"UPDATE_RATE_LIMIT": "1000000/hour"}
"""What is counted here is scores."""


async def assert_counted_once(cluster: Cluster, load: Load) -> None:
    """What was acknowledged is what the scores say, and the audit finds nobody who differs."""
    await load.assert_exact()
    findings = await audit(cluster.shard_urls, lambda: None)
    # Other tests leave behind on purpose what an audit has to find.
    assert [one for one in findings.differences if one.user_id in load.acknowledged] == []


@pytest.mark.parametrize("increments", [60, pytest.param(250, marks=LONG)])
async def test_a_commit_whose_reply_is_lost_counts_once(
    cluster: Cluster, user: str, tmp_path: Path, seed: int, increments: int
) -> None:
    """Of 20 users; a fifth of the commits is cut off, before it or before its reply."""
    async with (
        cutting(cluster.shard_urls, share=CUT_SHARE, seed=seed) as (shard_urls, cutters),
        api_replica(cluster, tmp_path / "cut.log", shard_urls=shard_urls, **NO_QUOTA) as cut,
        api_replica(cluster, tmp_path / "whole.log", **NO_QUOTA) as whole,
    ):
        load = Load(cluster, [cut])
        await load.all_of(user, users=20, increments=increments)
        # Another replica, on the shards themselves, has the same answers for the same keys.
        again = Load(cluster, [whole])
        await again.all_of(user, users=20, increments=10)
        written = await metric(cut, "scoreboard_write_batch_operations_sum")
        failed = await metric(cut, "scoreboard_write_failures_total")
        retries = await metric(cut, "scoreboard_write_retries_total")
        refused = await metric(cut, "scoreboard_write_retry_budget_exhausted_total")
    await assert_counted_once(cluster, load)
    fates = Counter(fate for cutter in cutters for fate in cutter.fates)
    print(f"{fates}; {dict(load.answers)}, slowest {max(load.slowest_s.values()):.2f} s")
    print(f"first tries {written + failed:.0f}, retries {retries:.0f}, {refused:.0f} refused")

    assert load.acknowledged.total() == 20 * increments
    assert fates[Fate.CUT_BEFORE] > increments / 10
    assert fates[Fate.CUT_AFTER] > increments / 10
    # More is cut than may be tried again at once; then it is for the clients to do so.
    assert 0 < retries <= RETRY_SHARE * (written + failed) + RETRY_RESERVE * len(shard_urls)
    assert refused > 0


async def test_counting_that_is_not_exact_is_noticed(
    cluster: Cluster, user: str, seed: int
) -> None:
    """The control: a plain upsert, tried again when its reply is lost, counts ghosts."""
    shard_url = cluster.shard_urls[0]
    owner = await asyncpg.connect(shard_url)
    await owner.execute("CREATE TABLE naive (user_id text PRIMARY KEY, score integer NOT NULL)")
    cutter = CommitCutter(
        urlsplit(shard_url).port or 0, statement="INSERT INTO naive", share=CUT_SHARE, seed=seed
    )
    acknowledged: Counter[str] = Counter()
    try:
        async with listening(cutter):
            connection = owner
            while acknowledged[user] < 300:
                try:
                    if connection is owner or connection.is_closed():
                        connection = await asyncpg.connect(through(shard_url, cutter.port))
                    await connection.fetch(
                        """
                        INSERT INTO naive AS held VALUES ($1, 1)
                        ON CONFLICT (user_id) DO UPDATE SET score = held.score + 1
                        """,
                        user,
                    )
                except (OSError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError):
                    continue
                acknowledged[user] += 1
        connection.terminate()
        score = await owner.fetchval("SELECT score FROM naive")
    finally:
        await owner.execute("DROP TABLE naive")
        await owner.close()
    ghosts = cutter.fates.count(Fate.CUT_AFTER)
    print(f"300 acknowledged, {score} counted")

    assert ghosts > 0
    assert miscounted(acknowledged, {user: (score, score)}) == {user: (300, (300 + ghosts,) * 2)}


# Whole processes

SHARDS = 3


async def process(cluster: Cluster, name: str) -> Json:
    """One process of the status, asked for beside the load."""
    return await asyncio.to_thread(cluster.process, name)


async def is_back(cluster: Cluster, before: Json) -> bool:
    """Whether another process is ready in the place of the one before."""
    now = await process(cluster, before["name"])
    return bool(now["state"] == "ready" and now["pid"] != before["pid"])


def said(load: Load) -> str:
    """What the users were answered."""
    broken = f"{len(load.broken)} broken, slowest {max(load.slowest_s.values()):.2f} s"
    return f"{load.acknowledged.total()} acknowledged; {dict(load.answers)}, {broken}"


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three shards and two API replicas, without a quota in the way."""
    cluster = Cluster(tmp_path_factory.mktemp("chaos") / "home", NO_QUOTA)
    cluster.up(shards=SHARDS, api=2, gateway=1)
    yield cluster
    cluster.down()


def shard_of(user: str) -> int:
    """Where a new cluster places the user."""
    return partition_of(user) % SHARDS


@pytest.mark.parametrize("stops", [pytest.param(20, marks=LONG)])
async def test_a_shard_that_crashes_again_and_again_loses_nothing(
    chaos: Cluster, user: str, seed: int, stops: int
) -> None:
    """An immediate stop each time, under load; users of the other shards notice nothing."""
    chance = random.Random(seed)
    load = Load(chaos)
    async with load.running(user, users=30, pause_s=0.02, increments=ENDLESS):
        for _ in range(stops):
            before = await process(chaos, "postgres-0")
            os.kill(before["pid"], signal.SIGQUIT)
            await eventually(partial(is_back, chaos, before), within_s=BACK_S_MAX, what="the shard")
            await asyncio.sleep(chance.uniform(0.2, 0.8))
    await assert_counted_once(chaos, load)
    print(said(load))

    assert load.answers[500] > 0, "no stop was noticed by anyone"
    assert {shard_of(one) for one in load.failures} == {0}


@pytest.mark.parametrize("rounds", [pytest.param(5, marks=LONG)])
async def test_a_replica_that_wakes_with_an_old_commit_counts_nothing_twice(
    chaos: Cluster, user: str, seed: int, rounds: int
) -> None:
    """Frozen for 8 s, in which another replica has done its work; then killed."""
    chance = random.Random(seed)
    load = Load(chaos)
    async with load.running(user, users=30, pause_s=0.02, increments=ENDLESS):
        for _ in range(rounds):
            name = f"api-{chance.randrange(2)}"
            before = await process(chaos, name)
            os.kill(before["pid"], signal.SIGSTOP)
            await asyncio.sleep(FROZEN_S)
            os.kill(before["pid"], signal.SIGCONT)
            await asyncio.sleep(chance.uniform(0, 1))
            os.kill(before["pid"], signal.SIGKILL)
            await eventually(partial(is_back, chaos, before), within_s=BACK_S_MAX, what=name)
            await asyncio.sleep(PROBED_S)
    await assert_counted_once(chaos, load)
    print(said(load))

    assert max(load.slowest_s.values()) < EDGE_DEADLINE_S
    assert (set(load.answers), load.broken) == ({200}, [])


async def assert_only_its_users_suffer(
    cluster: Cluster, user: str, shard: int, fault: Callable[[], Heal], lasts_s: float
) -> None:
    """They get 500 in time, or 503 where nothing was started; afterwards all is as before."""
    load = Load(cluster)
    async with load.running(user, users=30, pause_s=0.05, increments=ENDLESS):
        await eventually(lambda: len(load.acknowledged) == 30)
        heal = await asyncio.to_thread(fault)
        try:
            await eventually(
                lambda: load.answers[500] > 0, within_s=NOTICED_S_MAX, what="anyone notices"
            )
            await asyncio.sleep(lasts_s)
        finally:
            heal()
        before = load.acknowledged.copy()
        healed_s = await eventually(
            lambda: all(load.acknowledged[one] > count for one, count in before.items()),
            within_s=BACK_S_MAX,
            what="everyone is served again",
        )
    await assert_counted_once(cluster, load)
    theirs = {one: slowest for one, slowest in load.slowest_s.items() if shard_of(one) == shard}
    others = {one: load.slowest_s[one] for one in load.slowest_s.keys() - theirs.keys()}
    print(
        f"{said(load)}; theirs {max(theirs.values()):.2f} s, others {max(others.values()):.2f} s,"
        f" healed {healed_s:.2f} s after"
    )

    assert load.broken == []
    assert {200, 500} <= set(load.answers) <= {200, 500, 503}
    assert load.answers[500] > load.answers[503]
    assert {shard_of(one) for one in load.failures} == {shard}
    assert max(theirs.values()) < API_DEADLINE_S
    assert max(others.values()) < UNTOUCHED_S


@pytest.mark.parametrize("fault", [stop, freeze])
@pytest.mark.parametrize("lasts_s", [pytest.param(30, marks=LONG)])
async def test_a_shard_that_is_away_takes_only_its_own_users_with_it(
    chaos: Cluster, user: str, fault: Callable[[Cluster, str], Heal], lasts_s: float
) -> None:
    """Stopped or frozen."""
    await assert_only_its_users_suffer(chaos, user, 1, partial(fault, chaos, "postgres-1"), lasts_s)


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_a_shard_with_a_full_disk_takes_only_its_own_users_with_it(
    tmp_path: Path, user: str
) -> None:
    """And serves them again as soon as there is room."""
    cluster = Cluster(tmp_path / "home", NO_QUOTA)
    counts = {"shards": SHARDS, "api": 2, "gateway": 1}
    cluster.up(**counts)
    cluster.down()
    data = cluster.home / "postgres-1"
    with ExitStack() as stack:
        try:
            stack.enter_context(small_disk(data))
        except MountRefused as error:
            pytest.skip(str(error))
        stack.callback(cluster.command, "down")
        cluster.up(**counts)
        await assert_only_its_users_suffer(cluster, user, 1, partial(fill, data), 5)


@pytest.mark.chaos
async def test_reloads_of_nginx_fail_no_request(fresh: Cluster) -> None:
    """Twenty of them, under load; WebSockets stay with the old workers."""
    fresh.environ |= NO_QUOTA
    fresh.up()
    load = Load(fresh)
    nginx = fresh.process("nginx")["pid"]
    async with fresh.live() as socket, load.running("reloaded", 16, 0.01, ENDLESS):
        for _ in range(20):
            await asyncio.sleep(0.5)
            os.kill(nginx, signal.SIGHUP)
        await asyncio.sleep(4)
        assert socket.close_code is None
    assert set(load.answers) == {200}
    assert load.broken == []
    await load.assert_exact()
    print(f"answers: {dict(load.answers)}")
