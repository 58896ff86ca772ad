"""What users notice of a fault of somebody else's shard: their p99 during it, beside just before.

One of three shards is stopped, frozen or has a full disk. Starts clusters of its own in a temporary
home. Repeat with `make bench-shards`.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from services.api.partition import partition_of
from tests.benchmarks.http_load import Arrival, open_loop
from tests.benchmarks.write import QUOTA, SEED, USER_IDS, percentile, requests
from tests.cluster import Cluster, eventually
from tests.faults import Heal, MountRefused, fill, freeze, small_disk, stop

SHARDS = 3
FAULTY = 1

RATE = 300.0
"""Requests/s of all users: far from busy, so that the fault decides and not the load."""

WARM_S = 3.0
"""Also to recover from the round before."""

BEFORE_S = 8.0
DURING_S = 8.0
NOTICED_S = 3.0
"""What is sent after the fault is asked for, until it is there; of neither."""

ROUNDS = 3
"""Of each fault; the medians count."""

CONNECTIONS_MAX = 2000

HEALED_S_MAX = 30.0

MEMORY = Path("/dev/shm")  # noqa: S108 - for the data of one run, in a folder of its own
"""Here three shards share a disk, and whoever else uses it: that is no part of what is measured."""

RESULT = Path(".bench/shards.json")

Fault = Callable[[], Heal]


def shard_of(user: str) -> int:
    """Where a new cluster places the user."""
    return partition_of(user) % SHARDS


def one_round(
    port: int, updates: Iterator[bytes], theirs: Collection[bytes], fault: Fault
) -> tuple[dict[str, Any], Heal]:
    """An open loop, and in its middle the fault; what the others saw, and how to heal it."""
    healed_by: list[Heal] = []
    there_at_s = 0.0
    began = time.perf_counter()

    def break_it() -> None:
        nonlocal there_at_s
        time.sleep(WARM_S + BEFORE_S)
        healed_by.append(fault())
        there_at_s = time.perf_counter() - began

    breaking = threading.Thread(target=break_it)
    breaking.start()
    seconds = WARM_S + BEFORE_S + NOTICED_S + DURING_S
    arrivals = open_loop(port, updates, [(RATE, seconds)], CONNECTIONS_MAX)
    breaking.join()

    def sent(begin: float, seconds: float, *, by_others: bool) -> list[Arrival]:
        return [
            arrival
            for arrival in arrivals
            if begin <= arrival.due_s < begin + seconds
            and (arrival.request not in theirs) is by_others
        ]

    def p99_ms(them: Sequence[Arrival]) -> float:
        return percentile([one.latency_s for one in them], 99) * 1e3

    before = sent(WARM_S, BEFORE_S, by_others=True)
    during = sent(there_at_s, DURING_S, by_others=True)
    affected = sent(there_at_s, DURING_S, by_others=False)
    return {
        "before_p99_ms": p99_ms(before),
        "during_p99_ms": p99_ms(during),
        "ratio": p99_ms(during) / p99_ms(before),
        "errors": sum(one.status != 200 for one in during),
        "before": dict(Counter(str(one.status) for one in before)),
        "during": dict(Counter(str(one.status) for one in during)),
        "theirs": dict(Counter(str(one.status) for one in affected)),
        "theirs_p99_ms": p99_ms(affected),
    }, healed_by[0]


async def heal_shard(cluster: Cluster, heal: Heal) -> None:
    """Until its users are served again."""
    heal()
    user = next(user for user in USER_IDS if shard_of(user) == FAULTY)
    async with cluster.client() as client:

        async def is_served() -> bool:
            return (await client.post(user)).status == 200

        # Of each replica twice: it may be another one that answers.
        for _ in range(4):
            await eventually(is_served, within_s=HEALED_S_MAX, what="the shard serves again")


def measure(cluster: Cluster, name: str, fault: Fault, rounds: int) -> dict[str, Any]:
    """All rounds of one fault, and their medians."""
    theirs = requests(cluster, [user for user in USER_IDS if shard_of(user) == FAULTY])
    others = requests(cluster, [user for user in USER_IDS if shard_of(user) != FAULTY])
    mixed = [*theirs, *others]
    random.Random(SEED).shuffle(mixed)
    updates = itertools.cycle(mixed)
    results = []
    for number in range(rounds):
        result, heal = one_round(cluster.port, updates, frozenset(theirs), fault)
        asyncio.run(heal_shard(cluster, heal))
        results.append(result)
        print(
            f"{name:8} round {number + 1}: others' p99 {result['before_p99_ms']:.1f} ms before,"
            f" {result['during_p99_ms']:.1f} during, {result['ratio']:.2f} ×,"
            f" {result['before']} {result['during']}; its own users {result['theirs']},"
            f" p99 {result['theirs_p99_ms']:.0f} ms",
            flush=True,
        )
    figures = ("before_p99_ms", "during_p99_ms", "ratio", "theirs_p99_ms")
    return {
        **{figure: statistics.median(one[figure] for one in results) for figure in figures},
        "errors": sum(one["errors"] for one in results),
        "rounds": results,
    }


def main() -> None:
    """Every fault, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the medians of these count")
    parser.add_argument("--dir", type=Path, default=MEMORY, help="where the data is meanwhile")
    options = parser.parse_args()
    shard = f"postgres-{FAULTY}"
    counts = {"shards": SHARDS, "api": 2, "gateway": 1}
    report: dict[str, Any] = {}
    with ExitStack() as stack:
        place = tempfile.TemporaryDirectory(prefix="scoreboard-bench-", dir=options.dir)
        folder = Path(stack.enter_context(place))
        folder.chmod(0o755)
        cluster = Cluster(folder / "home", {"UPDATE_RATE_LIMIT": QUOTA})
        stack.callback(cluster.command, "down")
        print("Starting a cluster…", flush=True)
        cluster.up(**counts)
        for name, fault in (("stopped", stop), ("frozen", freeze)):
            report[name] = measure(cluster, name, partial(fault, cluster, shard), options.rounds)
        cluster.down()
        data = cluster.home / shard
        try:
            stack.enter_context(small_disk(data))
        except MountRefused as error:
            print(f"No full disk: none can be mounted here ({error}).")
            report["full"] = None
        else:
            stack.callback(cluster.command, "down")  # Before its disk goes.
            cluster.up(**counts)
            report["full"] = measure(cluster, "full", partial(fill, data), options.rounds)
    print(
        f"\n{'its shard':10}{'before':>10}{'during':>10}{'ratio':>8}{'errors':>8}   others' p99, ms"
    )
    for name, result in report.items():
        if result is not None:
            print(
                f"{name:10}{result['before_p99_ms']:10.1f}{result['during_p99_ms']:10.1f}"
                f"{result['ratio']:8.2f}{result['errors']:8}"
            )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1))
    print(f"\nIn {RESULT}")


if __name__ == "__main__":
    main()
