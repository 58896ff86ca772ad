"""What an API replica's memory grows to in a million updates, and what its caches hold at most.

Starts a cluster of its own in a temporary home. Repeat with `make bench-memory`.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from services.api import partition
from shared import token
from shared.token import TokenSettings, TokenVerifier, mint
from tests.benchmarks.http_load import ClosedLoop
from tests.benchmarks.processes import resident_bytes
from tests.benchmarks.write import QUOTA, requests
from tests.cluster import Cluster

REQUESTS = 1_000_000
CONNECTIONS = 128
SAMPLE_EVERY = 100_000
SECONDS_MAX = 600.0
"""A slow machine does fewer requests."""

LIMIT_MB = 150

ID_LENGTHS = (10, 36, 255)
"""Of user ids: a name, a UUID, the longest there is."""

SECRET = "a-secret-of-at-least-thirty-two-bytes"

RESULT = Path(".bench/memory.json")

MB = 1e6


Sample = tuple[int, dict[str, float]]
"""Requests answered until then, and MB of each replica."""


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """The resident memory of each replica, by requests answered by all of them together."""
    with tempfile.TemporaryDirectory(prefix="scoreboard-bench-") as folder:
        cluster = Cluster(Path(folder, "home"), {"UPDATE_RATE_LIMIT": QUOTA})
        print("Starting a cluster…", flush=True)
        cluster.up()
        try:
            pids = {name: cluster.process(name)["pid"] for name in cluster.names("api-")}
            loop = ClosedLoop(cluster.port, options.connections, itertools.cycle(requests(cluster)))
            samples: list[Sample] = []
            statuses: Counter[int] = Counter()
            done, began = 0, time.monotonic()
            while True:
                resident = {name: resident_bytes(pid) / MB for name, pid in pids.items()}
                samples.append((done, resident))
                said = ", ".join(f"{name} {mb:.1f} MB" for name, mb in resident.items())
                print(f"{done:>9} requests  {said}", flush=True)
                seconds = time.monotonic() - began
                if done >= options.requests or seconds > SECONDS_MAX:
                    break
                until = min(done + SAMPLE_EVERY, options.requests)
                while done < until:
                    statuses += loop.run(seconds=0.5).statuses
                    done = statuses.total()
            loop.drain()
        finally:
            cluster.down()
    largest = max(mb for _, resident in samples for mb in resident.values())
    print(
        f"{dict(statuses)}, {done / seconds:.0f} req/s; the largest replica {largest:.1f} MB of {LIMIT_MB}"
    )
    return {
        "statuses": dict(statuses),
        "seconds": seconds,
        "largest_mb": largest,
        "samples": samples,
    }


def tokens_believed(length: int) -> TokenVerifier:
    """As many as are believed at a time, each of another user."""
    verifier = TokenVerifier(TokenSettings.from_environ({"JWT_SECRET": SECRET}))
    for number in range(token.BELIEVED_MAX):
        verifier.verify(mint(SECRET, f"{number:0{length}}", ttl_s=3600))
    return verifier


def partitions_cached(length: int) -> None:
    """As many as are remembered."""
    partition.partition_of.cache_clear()
    for number in range(partition.partition_of.cache_parameters()["maxsize"]):
        partition.partition_of(f"{number:0{length}}")


def grown_by_mb(fill: Callable[[int], object], length: int) -> float:
    """By what this process grows when something is filled, and kept."""
    before = resident_bytes(os.getpid())
    kept = fill(length)
    after = resident_bytes(os.getpid())
    del kept
    return (after - before) / MB


def bounds() -> dict[str, float]:
    """The caches that grow with the number of users, full: each in a process of its own."""
    sizes = {}
    for name, fill in (("tokens", tokens_believed), ("partitions", partitions_cached)):
        for length in ID_LENGTHS:
            with get_context("spawn").Pool(1) as pool:
                size = pool.apply(grown_by_mb, (fill, length))
            sizes[f"{name}, ids of {length}"] = size
            print(f"{name:10} full, ids of {length:3} characters {size:8.1f} MB", flush=True)
    return sizes


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    options = parser.parse_args()
    report = growth(options) | {"bounds_mb": bounds()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1))
    print(f"\nIn {RESULT}")


if __name__ == "__main__":
    main()
