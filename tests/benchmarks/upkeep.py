"""What writers notice of 200,000 operations being removed, and how long an audit takes.

Starts a cluster of its own, with one shard, in a temporary home. Repeat with `make bench-upkeep`.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

import asyncpg

from services.api.audit import audit
from services.api.shards import Operation, Shards
from services.api.upkeep import Retention
from services.api.writes import Writes
from tests.benchmarks.cluster import milliseconds
from tests.cluster import Cluster

ROUNDS = 10
"""Of writing while operations are removed and of writing undisturbed, in turn first."""

OLD_OPERATIONS = 20_000
"""Removed in each round."""

ALONE_S = 10.0
"""About what a removal takes."""

WRITERS = 8
PAUSE_S = 0.005
"""Between two increments of a writer, at random up to twice that: about 1,000 increments/s."""

USERS = 100_000
OPERATIONS_PER_USER = 10
"""In the audit."""

DAY_S = 86_400

OLD = """
    WITH written AS (
        INSERT INTO score_ops (user_id, op_id, delta, score, created_at)
        SELECT 'old-' || n % 10000, gen_random_uuid(), 3, 3, LOCALTIMESTAMP - interval '25 hours'
        FROM generate_series(1, $1::integer) AS n
        RETURNING user_id, delta
    )
    INSERT INTO user_scores AS held (user_id, score)
    SELECT user_id, sum(delta) FROM written GROUP BY user_id
    ON CONFLICT (user_id) DO UPDATE SET score = held.score + excluded.score
"""

RECENT = (
    """
    INSERT INTO score_ops (user_id, op_id, delta, score)
    SELECT 'recent-' || n % $1::integer, n::varchar, 1, 1
    FROM generate_series(1, $1::integer * $2::integer) AS n
    """,
    """
    INSERT INTO user_scores (user_id, score)
    SELECT 'recent-' || n, $2::integer FROM generate_series(0, $1::integer - 1) AS n
    """,
)

_numbers = count()


async def write(writes: Writes, seconds: list[float]) -> None:
    """One writer, until it is cancelled."""
    while True:
        number = next(_numbers)
        began = time.perf_counter()
        await writes.submit(Operation(f"writer-{number % 1000}", str(number), 1))
        seconds.append(time.perf_counter() - began)
        await asyncio.sleep(random.uniform(0, 2 * PAUSE_S))


async def writing_during(
    writes: Writes, seconds: list[float], retention: Retention | None
) -> float:
    """Write while operations are removed, or undisturbed for about as long; how long it took."""
    writers = [asyncio.create_task(write(writes, seconds)) for _ in range(WRITERS)]
    began = time.perf_counter()
    if retention is None:
        await asyncio.sleep(ALONE_S)
    else:
        assert await retention.prune(0) == OLD_OPERATIONS
    took = time.perf_counter() - began
    for writer in writers:
        writer.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*writers)
    await writes.drain()
    return took


async def removal(cluster: Cluster, shard: asyncpg.Connection) -> None:
    """Writers beside the job, and alone."""
    disturbed: list[list[float]] = [[] for _ in range(ROUNDS)]
    alone: list[list[float]] = [[] for _ in range(ROUNDS)]
    pruning_s = 0.0
    retention = Retention(cluster.shard_urls, DAY_S)
    async with Shards.connect(cluster.shard_urls) as shards:
        await shards.refresh_owners()
        writes = Writes(shards)
        for number in range(ROUNDS):
            await shard.execute(OLD, OLD_OPERATIONS)
            for pruning in (True, False) if number % 2 else (False, True):
                if pruning:
                    pruning_s += await writing_during(writes, disturbed[number], retention)
                else:
                    await writing_during(writes, alone[number], None)
    removed = ROUNDS * OLD_OPERATIONS
    ratios = [p99(one) / p99(other) for one, other in zip(disturbed, alone, strict=True)]
    print(f"{removed} removed       {removed / pruning_s:.0f}/s")
    print(f"writing meanwhile    {milliseconds([*chain(*disturbed)])}")
    print(f"writing undisturbed  {milliseconds([*chain(*alone)])}")
    print(
        f"ratio of the p99     {statistics.median(ratios):.2f} (median of {ROUNDS} rounds,"
        f" {min(ratios):.2f} to {max(ratios):.2f})"
    )


def p99(seconds: Sequence[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(seconds, n=100)[98]


async def audits(cluster: Cluster, shard: asyncpg.Connection) -> None:
    """An audit of all that is there now."""
    for statement in RECENT:
        await shard.execute(statement, USERS, OPERATIONS_PER_USER)
    for _ in range(3):
        began = time.perf_counter()
        findings = await audit(cluster.shard_urls, lambda: None)
        took = time.perf_counter() - began
        assert findings.differences == []
        print(f"audit                {findings.users} users in {took:.2f} s")


async def main(folder: str) -> None:
    """Both, on one cluster."""
    cluster = Cluster(Path(folder, "home"))
    print("Starting a cluster…", flush=True)
    cluster.up(shards=1, api=1, gateway=1)
    try:
        shard = await asyncpg.connect(cluster.shard_urls[0])
        await removal(cluster, shard)
        await audits(cluster, shard)
        await shard.close()
    finally:
        cluster.down()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="scoreboard-bench-") as folder:
        asyncio.run(main(folder))
