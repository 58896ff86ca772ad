"""The basic approach beside the cluster on the same machine, in turn: updates, clients, memory.

Both run all the time; who is measured changes. Repeat with `make bench-basic`.
"""

import argparse
import asyncio
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx

from services.scoreboard.supervisor import STEADY_S
from tests.benchmarks.live import Phase, percentile, prepare, to_first_ms, to_last_ms, updates
from tests.benchmarks.live_load import FIRST_NUMBER, Load
from tests.benchmarks.processes import proportional_bytes
from tests.benchmarks.write import CONNECTIONS, Cell, Http, figures, requests, trees
from tests.cluster import Basic, Cluster

ROUNDS = 3
SECONDS = 4.0
"""Of each cell and round."""

CLIENTS = 5000

PACES = (("calm", 2.0, 30.0), ("brisk", 20.0, 15.0), ("rush", 50.0, 15.0))
"""Updates a second that each change the board, and for how many seconds."""

KILLS = 3
"""Each of a process that has been steady: after several in a row the supervisor waits."""

SETTINGS = {"UPDATE_RATE_LIMIT": "1000000000/hour", "HANDSHAKES_PER_SECOND_MAX": "100000"}

RESULT = Path(".bench/basic.json")


def memory_mib(cluster: Cluster) -> float:
    """Of all its processes, PostgreSQL's included."""
    roots = [root for kind in trees(cluster).values() for root in kind]
    return proportional_bytes(roots) / 2**20


def write(
    contenders: Mapping[str, Cluster], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Updates in a closed loop, by the number of connections."""
    apis = {
        name: Http(cluster.port, trees(cluster), itertools.cycle(requests(cluster)))
        for name, cluster in contenders.items()
    }
    cells: dict[tuple[str, int], list[Cell]] = {}
    for number in range(rounds):
        for connections in CONNECTIONS:
            for name, api in apis.items():
                cell = api.measure(connections, seconds)
                cells.setdefault((name, connections), []).append(cell)
                print(
                    f"round {number + 1}: {name:8}{connections:4}{cell.per_s:9.0f} req/s"
                    f"{cell.p99_ms:9.1f} ms p99",
                    flush=True,
                )
    return {
        name: {str(number): figures(Cell.median(cells[name, number])) for number in CONNECTIONS}
        for name in contenders
    }


def said(run: Phase, clients: int) -> dict[str, float]:
    """What a pace was like for who scored and for who watched."""
    first_ms, last_ms = to_first_ms(run), to_last_ms(run)
    return {
        "post_p50_ms": percentile(run.latencies_ms, 50),
        "post_p99_ms": percentile(run.latencies_ms, 99),
        "post_to_first_p50_ms": percentile(first_ms, 50),
        "post_to_last_p50_ms": percentile(last_ms, 50),
        "post_to_last_p99_ms": percentile(last_ms, 99),
        "boards_a_client": run.seen.frames / clients,
    }


async def watch(cluster: Cluster, clients: int) -> dict[str, Any]:
    """So many WebSockets, and the leader's updates at each pace."""
    await prepare(cluster)
    alone = memory_mib(cluster)
    report: dict[str, Any] = {"clients": clients, "memory_before_mib": alone}
    async with Load(cluster.secret("jwt_secret"), clients) as load:
        report["join_s"] = await load.join(cluster.port, clients)
        await asyncio.sleep(1)
        report["memory_with_clients_mib"] = memory_mib(cluster)
        number = FIRST_NUMBER + 1
        for pace, per_s, seconds in PACES:
            run = await updates(cluster, load, number, per_s, seconds)
            number += len(run.posted)
            report[pace] = {"per_s": per_s, **said(run, clients)}
    report["memory_after_mib"] = memory_mib(cluster)
    return report


def back_s(basic: Basic) -> list[float]:
    """From SIGKILL of the process to the next answer, some times."""
    took = []
    for _ in range(KILLS):
        time.sleep(STEADY_S + 1)
        basic.kill("basic")
        began = time.monotonic()
        while True:
            try:
                httpx.get(f"{basic.url}/api/scores/top")
                break
            except httpx.TransportError:
                time.sleep(0.01)
        took.append(time.monotonic() - began)
    return took


def ratio(report: Mapping[str, Any], *path: str) -> float:
    """The basic approach's figure to the cluster's."""
    one, other = report["basic"], report["cluster"]
    for name in path:
        one, other = one[name], other[name]
    return float(one / other)


def show(report: Mapping[str, Any]) -> None:
    """Tables, and the ratios."""
    print(f"\n{'':9}{'conns':>6}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'CPU s/1000':>12}")
    for name in ("basic", "cluster"):
        for connections, cell in report[name]["updates"].items():
            print(
                f"{name:9}{connections:>6}{cell['per_s']:9.0f}{cell['p50_ms']:9.2f}"
                f"{cell['p99_ms']:9.2f}{cell['cpu_s_per_1000']:12.3f}"
            )
    for name in ("basic", "cluster"):
        live = report[name]["live"]
        print(f"\n{name}, {live['clients']} clients, who came in {live['join_s']:.1f} s")
        for pace, _, _ in PACES:
            print(
                f"  {pace:6}", ", ".join(f"{key} {value:.1f}" for key, value in live[pace].items())
            )
        print(
            f"  memory {live['memory_before_mib']:.0f} MiB without clients, "
            f"{live['memory_with_clients_mib']:.0f} with, {live['memory_after_mib']:.0f} at the end"
        )
    took = ", ".join(f"{seconds:.2f}" for seconds in report["basic"]["back_s"])
    print(f"\nbasic, from SIGKILL to the next answer: {took} s")
    print("\nbasic to cluster")
    for connections in CONNECTIONS:
        print(
            f"  requests/s at {connections:<4}{ratio(report, 'updates', str(connections), 'per_s'):10.2f}"
        )
    for pace, _, _ in PACES:
        print(f"  to the last, {pace:6}{ratio(report, 'live', pace, 'post_to_last_p50_ms'):9.2f}")
    print(f"  memory with clients{ratio(report, 'live', 'memory_with_clients_mib'):7.2f}")


def main() -> None:
    """Measure, print, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a cell and round")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the medians of these count")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="WebSockets (%(default)s)")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scoreboard-bench-")))
        folder.chmod(0o755)
        basic = Basic(folder / "basic", SETTINGS)
        contenders = {"basic": basic, "cluster": Cluster(folder / "cluster", SETTINGS)}
        report: dict[str, Any] = {}
        for name, cluster in contenders.items():
            print(f"Starting: {name}", flush=True)
            stack.callback(cluster.down)
            cluster.up()
            report[name] = {"memory_idle_mib": memory_mib(cluster)}
        for name, cells in write(contenders, options.rounds, options.seconds).items():
            report[name]["updates"] = cells
        for name, cluster in contenders.items():
            print(f"{options.clients} clients: {name}", flush=True)
            report[name]["live"] = asyncio.run(watch(cluster, options.clients))
        report["basic"]["back_s"] = back_s(basic)
    show(report)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1))
    print(f"\nIn {RESULT}")


if __name__ == "__main__":
    main()
