"""Where the CPU of an update goes: by server, and within the API by layer.

Repeat with `make bench-layers`. The samples cost a few percent themselves.
"""

import argparse
import itertools
import json
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.benchmarks.http_load import ClosedLoop
from tests.benchmarks.write import CONNECTIONS, QUOTA, WARM_S, Meter, requests, trees
from tests.cluster import Cluster

SECONDS = 20.0

WRITTEN_SECONDS_MAX = 10


def main() -> None:
    """One closed loop at the capacity, sampled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=CONNECTIONS[-1])
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scoreboard-bench-") as folder:
        samples = Path(folder, "samples")
        samples.mkdir()
        cluster = Cluster(
            Path(folder, "home"),
            {
                "UPDATE_RATE_LIMIT": QUOTA,
                "PYTHONPATH": str(Path(__file__).parent / "sampled"),
                "SAMPLES": str(samples),
            },
        )
        print("Starting a cluster…", flush=True)
        cluster.up()
        try:
            servers = trees(cluster)
            loop = ClosedLoop(cluster.port, options.connections, itertools.cycle(requests(cluster)))
            loop.run(WARM_S)
            for pid in servers["api"]:
                os.kill(pid, signal.SIGUSR1)
            meter = Meter(servers)
            sample = loop.run(options.seconds)
            spent = meter.spent()
            for pid in servers["api"]:
                os.kill(pid, signal.SIGUSR1)
            loop.drain()
            give_up_at = time.monotonic() + WRITTEN_SECONDS_MAX
            while len(written := list(samples.glob("*.json"))) < len(servers["api"]):
                if time.monotonic() > give_up_at:
                    raise SystemExit("The replicas did not write their samples.")
                time.sleep(0.05)
            layers: Counter[str] = sum(
                (Counter(json.loads(p.read_text())) for p in written), Counter()
            )
        finally:
            cluster.down()
    count = len(sample.latencies_s)
    print(
        f"{count / sample.seconds:.0f} req/s at {options.connections} connections; µs of CPU each"
    )
    for name, seconds in sorted(spent.items(), key=lambda entry: -entry[1]):
        print(f"{name:22}{seconds / count * 1e6:6.0f}")
    print(f"{'load':22}{sample.cpu_s / count * 1e6:6.0f}")
    print(f"Within the API, of {layers.total()} samples")
    for name, taken in layers.most_common():
        print(f"  {name:20}{spent['api'] / count * taken / layers.total() * 1e6:6.0f}")


if __name__ == "__main__":
    main()
