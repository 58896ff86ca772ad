"""Old operations are removed and their sum is kept; the audit finds whatever does not add up."""

import asyncio
import os
import pty
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator

import asyncpg
import httpx2 as httpx
import pytest

from services.api import schema
from services.api.audit import audit
from services.api.shards import Operation, Shards
from services.api.upkeep import EXPORT_PERIOD_S, Retention
from tests.cluster import COMMAND, Cluster, eventually
from tests.load import Load

DAY_S = 86_400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of this module's own: what is edited here no other test shall see."""
    cluster = Cluster(tmp_path_factory.mktemp("upkeep") / "home")
    cluster.up()
    yield cluster
    cluster.down()


@pytest.fixture
async def shards(cluster: Cluster) -> AsyncIterator[Shards]:
    """The shards of the cluster, as an API replica has them."""
    async with Shards.connect(cluster.shard_urls) as shards:
        await shards.check()
        yield shards


@pytest.fixture
async def shard(cluster: Cluster, shards: Shards, user: str) -> AsyncIterator[asyncpg.Connection]:
    """A session on the shard of the test's user."""
    connection = await asyncpg.connect(cluster.shard_urls[shards.shard_of(user)])
    yield connection
    await connection.close()


async def record(shards: Shards, user: str, *deltas: int) -> None:
    """Operations 0, 1, 2, … of a user."""
    operations = [Operation(user, str(number), delta) for number, delta in enumerate(deltas)]
    await shards.record(shards.shard_of(user), operations)


async def age(shard: asyncpg.Connection, user: str, seconds: float) -> None:
    """Make the user's operations that much older."""
    await shard.execute(
        "UPDATE score_ops SET created_at = created_at - make_interval(secs => $2)"
        " WHERE user_id = $1",
        user,
        seconds,
    )


async def differences(cluster: Cluster) -> list[tuple[str, int, int | None, int]]:
    """What an audit finds."""
    findings = await audit(cluster.shard_urls, lambda: None)
    return [(one.user_id, one.shard, one.score, one.total) for one in findings.differences]


async def pruned(shard: asyncpg.Connection, user: str) -> tuple[int, int] | None:
    """Sum and number of the user's removed operations."""
    row = await shard.fetchrow(
        "SELECT delta, operations FROM score_ops_pruned WHERE user_id = $1", user
    )
    return None if row is None else (row["delta"], row["operations"])


async def test_old_operations_are_removed_and_their_sum_is_kept(
    cluster: Cluster, shards: Shards, shard: asyncpg.Connection, user: str
) -> None:
    """Twice: the second pass adds to what the first has left. Newer ones stay."""
    number = shards.shard_of(user)
    retention = Retention(cluster.shard_urls, DAY_S)
    await record(shards, user, *range(1, 1201))
    assert await retention.prune(number) == 0
    await age(shard, user, DAY_S + 1)
    await shards.record(number, [Operation(user, "new", 7)])
    assert await retention.prune(number) == 1200
    assert await pruned(shard, user) == (sum(range(1201)), 1200)
    await age(shard, user, DAY_S + 1)
    assert await retention.prune(number) == 1
    assert await pruned(shard, user) == (sum(range(1201)) + 7, 1201)

    assert (await shards.scores_of([user]))[user].score == sum(range(1201)) + 7
    assert await differences(cluster) == []


async def test_a_key_is_good_until_its_operation_is_removed(
    cluster: Cluster, shards: Shards, shard: asyncpg.Connection, user: str
) -> None:
    """Within the retention a repeat answers what the first one answered; after it, it counts anew."""
    retention = Retention(cluster.shard_urls, DAY_S)
    async with cluster.client() as client:
        assert (await client.post(user, 5, key="once")).json["newScore"] == 5
        await age(shard, user, DAY_S - 60)
        await retention.prune(shards.shard_of(user))
        assert (await client.post(user, 5, key="once")).json["newScore"] == 5
        await age(shard, user, 61)
        await retention.prune(shards.shard_of(user))
        assert (await client.post(user, 5, key="once")).json["newScore"] == 10

    assert await differences(cluster) == []


async def test_pruning_under_load_keeps_every_snapshot_exact(
    cluster: Cluster, shards: Shards, user: str
) -> None:
    """Operations go as fast as they come, and each audit meanwhile is clean."""
    retention = Retention(cluster.shard_urls, 0.3)
    stop = asyncio.Event()

    async def prune(number: int) -> int:
        removed = 0
        while not stop.is_set():
            removed += await retention.prune(number) or 0
        return removed

    async with Load(cluster).running(user, users=20, pause_s=0.05) as load:
        pruning = [asyncio.create_task(prune(number)) for number in range(shards.count)]
        for _ in range(10):
            assert await differences(cluster) == []
        stop.set()
        removed = sum(await asyncio.gather(*pruning))
    scores = await shards.scores_of(load.acknowledged)
    print(f"{sum(load.acknowledged.values())} updates, {removed} of them removed")

    assert {one: score.score for one, score in scores.items()} == load.acknowledged
    assert (set(load.answers), load.broken) == ({200}, [])
    assert removed > 100
    assert await differences(cluster) == []


async def test_one_replica_at_a_time(
    cluster: Cluster, shards: Shards, shard: asyncpg.Connection, user: str
) -> None:
    """Whoever has the lock, to prune or to move a partition, is not waited for; nor is it repeated."""
    number = shards.shard_of(user)
    retention = Retention(cluster.shard_urls, DAY_S)
    await shard.execute("SELECT pg_advisory_lock($1)", schema.PRUNE_LOCK)
    assert await retention.prune(number) is None
    await shard.execute("SELECT pg_advisory_unlock($1)", schema.PRUNE_LOCK)
    assert await retention.prune(number) == 0
    assert await retention.prune(number, not_within_s=60) is None
    assert await retention.prune(number, not_within_s=0) == 0


async def test_the_audit_names_every_difference(
    cluster: Cluster, shards: Shards, shard: asyncpg.Connection, user: str
) -> None:
    """An edited score, a deleted operation, a doubled one, and one without a score."""
    number = shards.shard_of(user)
    names = (f"{user}-{number}" for number in range(1000))
    users = [one for one in names if shards.shard_of(one) == number][:5]
    edited, deleted, doubled, lost, _fine = users
    for one in users:
        await record(shards, one, 10, 20)
    before = cluster.command("audit")
    assert (before.returncode, before.stderr.count("partitions")) == (0, 8)
    await shard.execute("UPDATE user_scores SET score = 31 WHERE user_id = $1", edited)
    await shard.execute("DELETE FROM score_ops WHERE user_id = $1 AND op_id = '0'", deleted)
    await shard.execute(
        "INSERT INTO score_ops SELECT user_id, 'again', delta, score, created_at FROM score_ops"
        " WHERE user_id = $1 AND op_id = '0'",
        doubled,
    )
    await shard.execute("DELETE FROM user_scores WHERE user_id = $1", lost)
    after = cluster.command("audit")
    exported = await eventually(
        lambda: shows(cluster, number, 4), within_s=2 * EXPORT_PERIOD_S, what="the gauges"
    )
    for one in users:
        await shard.execute("DELETE FROM user_scores WHERE user_id = $1", one)
        await shard.execute("DELETE FROM score_ops WHERE user_id = $1", one)
    print(f"gauges after {exported:.1f} s")

    assert after.returncode == 1
    assert sorted(after.stdout.splitlines()) == sorted(
        [
            f"'{edited}' on shard {number}: score 31, operations 30",
            f"'{deleted}' on shard {number}: score 30, operations 20",
            f"'{doubled}' on shard {number}: score 30, operations 40",
            f"'{lost}' on shard {number}: no score, operations 30",
        ]
    )
    assert re.search(r"^Error: 4 of \d+ users differ from the sum", after.stderr, re.MULTILINE)
    assert cluster.command("audit").returncode == 0


async def shows(cluster: Cluster, shard: int, differences: int) -> bool:
    """Whether every API replica's gauges have the audit that has just ended."""
    async with httpx.AsyncClient() as http:
        for name in cluster.names("api-"):
            port = cluster.process(name)["port"]
            text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
            gauge = rf'^scoreboard_audit_{{}}{{{{shard="{shard}"}}}} (\S+)$'
            found = re.search(gauge.format("differences"), text, re.MULTILINE)
            ended = re.search(gauge.format("finished_timestamp_seconds"), text, re.MULTILINE)
            if found is None or ended is None or float(found[1]) != differences:
                return False
            assert 0 <= time.time() - float(ended[1]) < 60
    return True


async def test_an_audit_under_load_is_clean(cluster: Cluster, user: str) -> None:
    """Its sentence says so; where there is no terminal a few lines tell how far it is."""
    async with Load(cluster).running(user, users=20, pause_s=0.02):
        await asyncio.sleep(0.3)
        done = await asyncio.to_thread(cluster.command, "audit")

    assert done.returncode == 0, done.stdout
    assert re.fullmatch(
        r"Clean: every score of \d+ users is the sum of its operations \(\d+\.\d s\)\.\n",
        done.stdout,
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 8
    assert re.fullmatch(r" +\d+\.\d s  audit +256 of 256 partitions", lines[-1])


def test_on_a_terminal_the_audit_shows_a_bar(cluster: Cluster) -> None:
    """And wipes it at the end."""
    ours, theirs = pty.openpty()
    audit = subprocess.Popen(
        [COMMAND, "audit", "--home", str(cluster.home)],
        env={**cluster.environ, "TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # The other end is closed.
        os.close(ours)

    assert audit.wait(60) == 0
    assert b"/256" in shown
    assert "━".encode() in shown


async def test_a_shard_that_is_missing_is_no_clean_audit(cluster: Cluster) -> None:
    """Half of the users is not all of them."""
    with pytest.raises(
        schema.SchemaError, match="128 of 256 partitions are attached on none of the 1 shards"
    ):
        await audit(cluster.shard_urls[:1], lambda: None)
