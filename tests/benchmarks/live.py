"""From a POST to the last of many WebSocket clients, all of them and the POST through Nginx.

Calm, so that each board is alone; then so fast that boards have to be skipped, for the age of what
clients look at. Starts a cluster of its own. Repeat with `make bench-live`.
"""

import argparse
import asyncio
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from shared.board import BOARD_SIZE, decode_board
from shared.leaderboard import CHANNEL
from tests.benchmarks.http_load import open_loop
from tests.benchmarks.live_load import FIRST_NUMBER, Load, Seen
from tests.cluster import Cluster

CLIENTS = 5000

CALM_PER_S, CALM_SECONDS = 2.0, 60.0
RUSH_PER_S, RUSH_SECONDS = 50.0, 20.0

POSTS_AT_ONCE_MAX = 64

SETTLE_S = 3.0

SETTINGS = {"UPDATE_RATE_LIMIT": "1000000000/hour", "HANDSHAKES_PER_SECOND_MAX": "100000"}

RESULT = Path(".bench/live.json")


@dataclass(frozen=True, slots=True)
class Phase:
    """Updates at one pace, and what the clients saw.

    Attributes:
        posted: When the update that led to this score was due.
        latencies_ms: From then to its answer.
        published: When the board with this score was on the channel, where one is looked at.
    """

    posted: Mapping[int, float]
    latencies_ms: Sequence[float]
    seen: Seen
    published: Mapping[int, float] = field(default_factory=dict)


async def prepare(cluster: Cluster) -> None:
    """A full board, of rows whose length will not change."""
    async with cluster.client() as client:
        await client.post("bench-leader", FIRST_NUMBER)
        for place in range(1, BOARD_SIZE):
            await client.post(f"bench-runner-up-{place}", 900_000_000 + place)


def increment(cluster: Cluster) -> bytes:
    """The leader's next point, as HTTP."""
    body = '{"userId":"bench-leader","scoreIncrement":1}'
    return (
        "POST /api/scores/update HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {cluster.token('bench-leader')}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


async def follow(redis: Redis, published: dict[int, float]) -> None:
    """Note when each board was on the channel, for ever."""
    async with redis.pubsub() as channel:
        await channel.subscribe(CHANNEL)
        async for message in channel.listen():
            if message["type"] == "message":
                at = time.monotonic()
                published[decode_board(message["data"]).standings[0].score] = at


async def phase(cluster: Cluster, load: Load, first: int, per_s: float, seconds: float) -> Phase:
    """Updates of the leader, and the channel meanwhile."""
    published: dict[int, float] = {}
    async with Redis.from_url(cluster.secret("redis_url")) as redis:
        following = asyncio.create_task(follow(redis, published))
        run = await updates(cluster, load, first, per_s, seconds)
        following.cancel()
    return replace(run, published=published)


async def updates(cluster: Cluster, load: Load, first: int, per_s: float, seconds: float) -> Phase:
    """Updates of the leader, the first of which makes the score ``first``."""
    await load.report()
    began = time.monotonic()
    arrivals = await asyncio.to_thread(
        open_loop,
        cluster.port,
        itertools.repeat(increment(cluster)),
        [(per_s, seconds)],
        POSTS_AT_ONCE_MAX,
    )
    await asyncio.sleep(SETTLE_S)
    if any(arrival.status != 200 for arrival in arrivals):
        raise RuntimeError(f"not every update was written: {arrivals}")
    seen = await load.report()
    if seen.backwards or seen.closed:
        raise RuntimeError(f"{seen.backwards} older boards after newer ones, closed: {seen.closed}")
    last = first + len(arrivals) - 1
    if seen.holding != {last: sum(seen.holding.values())}:
        raise RuntimeError(f"not everyone has the last board, {last}: {seen.holding}")
    due = sorted(began + arrival.due_s for arrival in arrivals)
    latencies_ms = [arrival.latency_s * 1e3 for arrival in arrivals]
    return Phase(dict(enumerate(due, first)), latencies_ms, seen)


def to_last_ms(run: Phase) -> list[float]:
    """From each POST to the last client that has its board."""
    return [
        (max(run.seen.arrivals[number]) - at) * 1e3
        for number, at in run.posted.items()
        if number in run.seen.arrivals
    ]


def to_first_ms(run: Phase) -> list[float]:
    """The same to the first client."""
    return [
        (min(run.seen.arrivals[number]) - at) * 1e3
        for number, at in run.posted.items()
        if number in run.seen.arrivals
    ]


def age_ms(run: Phase) -> list[float]:
    """For each board: since when it was on the channel when the last client was shown it."""
    return [
        (max(run.seen.arrivals[number]) - at) * 1e3
        for number, at in run.published.items()
        if number in run.seen.arrivals
    ]


def outdated_ms(run: Phase) -> list[float]:
    """For each board: how long there had been a newer one when the last client was shown one."""
    numbers = sorted(run.published)
    return [
        (run.seen.replaced[number] - run.published[newer]) * 1e3
        for number, newer in itertools.pairwise(numbers)
        if number in run.seen.replaced
    ]


def interval_ms(run: Phase, clients: int) -> float:
    """Between two boards at a client, of the time in which boards were published."""
    times = run.published.values()
    return (max(times) - min(times)) * clients / run.seen.frames * 1e3


def percentile(values: Sequence[float], percent: int) -> float:
    """Of at least two values."""
    return statistics.quantiles(values, n=100)[percent - 1]


async def measure(cluster: Cluster, clients: int, calm_s: float, rush_s: float) -> dict[str, Any]:
    """Both phases."""
    await prepare(cluster)
    async with Load(cluster.secret("jwt_secret"), clients) as load:
        await load.join(cluster.port, clients)
        await asyncio.sleep(1)
        print(f"{CALM_PER_S:g} updates/s for {calm_s:g} s…", flush=True)
        calm = await phase(cluster, load, FIRST_NUMBER + 1, CALM_PER_S, calm_s)
        print(f"{RUSH_PER_S:g} updates/s for {rush_s:g} s…", flush=True)
        first = FIRST_NUMBER + 1 + len(calm.posted)
        rush = await phase(cluster, load, first, RUSH_PER_S, rush_s)
    first_ms, last_ms = to_first_ms(calm), to_last_ms(calm)
    age, outdated = age_ms(rush), outdated_ms(rush)
    pass_ms = statistics.median(last - first for first, last in zip(first_ms, last_ms, strict=True))
    return {
        "clients": clients,
        "calm": {
            "updates": len(last_ms),
            "post_to_first_p50_ms": percentile(first_ms, 50),
            "post_to_last_p50_ms": percentile(last_ms, 50),
            "post_to_last_p99_ms": percentile(last_ms, 99),
            "pass_ms": pass_ms,
            "missed": calm.seen.missed,
        },
        "rush": {
            "updates": len(rush.posted),
            "boards": len(rush.published),
            "boards_a_client": rush.seen.frames / clients,
            "interval_ms": interval_ms(rush, clients),
            "age_p50_ms": percentile(age, 50),
            "age_p99_ms": percentile(age, 99),
            "age_p99_passes": percentile(age, 99) / pass_ms,
            "outdated_p50_ms": percentile(outdated, 50),
            "outdated_p99_ms": percentile(outdated, 99),
        },
    }


def main() -> None:
    """Measure, print, and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=CLIENTS, help="(%(default)s)")
    parser.add_argument(
        "--calm",
        type=float,
        default=CALM_SECONDS,
        help=f"seconds at {CALM_PER_S:g}/s (%(default)s)",
    )
    parser.add_argument(
        "--rush",
        type=float,
        default=RUSH_SECONDS,
        help=f"seconds at {RUSH_PER_S:g}/s (%(default)s)",
    )
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="scoreboard-bench-") as folder:
        Path(folder).chmod(0o755)
        cluster = Cluster(Path(folder, "home"), SETTINGS)
        print("Starting a cluster…", flush=True)
        cluster.up()
        try:
            report = asyncio.run(measure(cluster, options.clients, options.calm, options.rush))
        finally:
            cluster.down()
    for name, figures in report.items():
        if isinstance(figures, dict):
            print(f"\n{name}")
            for figure, value in figures.items():
                print(f"  {figure:22}{value:10.1f}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1))
    print(f"\nIn {RESULT}")


if __name__ == "__main__":
    main()
