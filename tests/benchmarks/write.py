"""What a score costs: the cluster, a Node.js API and pgbench in turn, on the same PostgreSQL servers.

Everyone adds to the scores of the same 10,000 users, one row a request. Repeat with
`make bench-write`; `YARDSTICK=FOLDER` says where the Node.js API is (`yardstick.py` says what it
must be).
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import asyncpg

from services.scoreboard.servers import Binaries
from tests.benchmarks import yardstick
from tests.benchmarks.http_load import Arrival, ClosedLoop, Sample, open_loop
from tests.benchmarks.processes import cpu_seconds, cpu_spent, titles
from tests.cluster import Cluster

USERS = 10_000
USER_IDS = tuple(f"bench-{number}" for number in range(USERS))
REQUESTS_PER_USER = 2
INCREMENT_MAX = 1000
CONNECTIONS = (1, 64, 256)
"""Those of the last are the capacity, and what the profile and the ratios are about."""

ROUNDS = 3
SECONDS = 4.0
"""Of each cell and round: 3 minutes in all."""

WARM_S = 1.0
"""Before each cell is measured."""

QUOTA = "1000/minute"
"""Everyone counts every request; nobody reaches this, at two updates a second and user."""

OVERLOAD = 2.0
OVERLOAD_SECONDS = 10.0
CALM = 0.2
CALM_SECONDS = 5.0
"""Open loop: shares of the capacity, the calm before and after."""

OPEN_CONNECTIONS_MAX = 6000
"""Of the open loop: with Nginx's two ends of each, half of what its workers have."""

NORMAL_WINDOW_S = 0.5
"""A hiccup of the machine shorter than half of that, as there are in the calm before as well (59 ms in
a tenth of a second there, in one run of nine), does not make a window's median."""

NORMAL_FACTOR = 2.0
"""Normal again: from then on no window's median is beyond twice that of the calm before."""

RESULT = Path(".bench/write.json")

SEED = 4

TABLE = """
    CREATE TABLE user_scores (
        user_id VARCHAR(255) PRIMARY KEY,
        score INTEGER NOT NULL DEFAULT 0,
        last_updated TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
    );
    CREATE INDEX idx_user_scores_score ON user_scores (score DESC);
"""

PGBENCH = """
\\set user random(0, :users - 1)
\\set increment random(1, :increment_max)
INSERT INTO user_scores (user_id, score) VALUES ('bench-' || :user::text, :increment)
    ON CONFLICT (user_id) DO UPDATE SET score = user_scores.score + EXCLUDED.score,
    last_updated = CURRENT_TIMESTAMP RETURNING score;
"""

PGBENCH_SECONDS_MAX = 600
"""It is told to end much earlier; this is for one that was left behind."""

DATABASES = ("yardstick", "pgbench")
"""Of the Node.js API and of pgbench, each on every shard's server, beside the cluster's."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One contender at one number of connections.

    Attributes:
        cpu_s: CPU seconds of its servers per request, by what they are.
        load_cpu_s: The same of the load.
    """

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s: Mapping[str, float]
    load_cpu_s: float

    @property
    def cpu_s_per_1000(self) -> float:
        """Of all servers."""
        return sum(self.cpu_s.values()) * 1000

    @classmethod
    def of(
        cls, seconds: float, latencies_s: Sequence[float], cpu: Mapping[str, float], load: float
    ) -> "Cell":
        """From what was measured in one window."""
        count = len(latencies_s)
        return cls(
            per_s=count / seconds,
            p50_ms=statistics.median(latencies_s) * 1e3,
            p99_ms=statistics.quantiles(latencies_s, n=100)[98] * 1e3,
            cpu_s={name: spent / count for name, spent in cpu.items()},
            load_cpu_s=load / count,
        )

    @classmethod
    def median(cls, cells: Sequence["Cell"]) -> "Cell":
        """Of each figure by itself."""

        def middle(figure: Callable[[Cell], float]) -> float:
            return statistics.median(map(figure, cells))

        return cls(
            per_s=middle(lambda cell: cell.per_s),
            p50_ms=middle(lambda cell: cell.p50_ms),
            p99_ms=middle(lambda cell: cell.p99_ms),
            cpu_s={
                name: statistics.median(cell.cpu_s[name] for cell in cells)
                for name in cells[0].cpu_s
            },
            load_cpu_s=middle(lambda cell: cell.load_cpu_s),
        )


class Contender(Protocol):
    """Who is measured."""

    def measure(self, connections: int, seconds: float) -> Cell:
        """One cell, once."""


class Meter:
    """CPU seconds of the servers from its making on."""

    def __init__(self, trees: Mapping[str, Sequence[int]]) -> None:
        self._trees = trees
        self._before = self._read()

    def _read(self) -> dict[str, dict[int, float]]:
        return {name: cpu_seconds(roots) for name, roots in self._trees.items()}

    def spent(self) -> dict[str, float]:
        """By what they are."""
        return {name: cpu_spent(self._before[name], now) for name, now in self._read().items()}


class Http:
    """An API behind its Nginx."""

    def __init__(
        self, port: int, trees: Mapping[str, Sequence[int]], requests: Iterator[bytes]
    ) -> None:
        self.port = port
        self._trees = trees
        self._requests = requests

    def measure(self, connections: int, seconds: float) -> Cell:
        """Closed loop, at so many connections."""
        loop = ClosedLoop(self.port, connections, self._requests)
        loop.run(WARM_S)
        meter = Meter(self._trees)
        sample = loop.run(seconds)
        spent = meter.spent()
        loop.drain()
        _check(sample)
        return Cell.of(sample.seconds, sample.latencies_s, spent, sample.cpu_s)


def _check(sample: Sample) -> None:
    wrong = {status: count for status, count in sample.statuses.items() if status != 200}
    if wrong:
        raise SystemExit(f"Not every answer was 200: {wrong}")


class Pgbench:
    """The bare upsert, without any API: PostgreSQL's own benchmark, half of it on each shard."""

    def __init__(self, folder: Path, urls: Sequence[str], servers: Sequence[int]) -> None:
        self._folder = folder
        self._program = Binaries.find(os.environ).postgres / "pgbench"
        self._urls = urls
        self._servers = servers
        self._script = folder / "upsert.sql"
        self._script.write_text(PGBENCH)

    def measure(self, connections: int, seconds: float) -> Cell:
        """Prepared statements; a single connection has one shard to itself."""
        logs = Path(tempfile.mkdtemp(dir=self._folder))
        shares = [connections // 2, connections // 2] if connections > 1 else [1]
        runs = [
            subprocess.Popen(
                [
                    self._program, "--no-vacuum", "--protocol=prepared", f"--file={self._script}",
                    f"--define=users={USERS}", f"--define=increment_max={INCREMENT_MAX}",
                    f"--client={share}", "--jobs=1", f"--time={PGBENCH_SECONDS_MAX}",
                    "--log", f"--log-prefix={logs}/{number}", self._urls[number],
                ],
                stdout=subprocess.DEVNULL,
            )
            for number, share in enumerate(shares)
        ]  # fmt: skip
        while self._connected() < connections:
            if any(run.poll() is not None for run in runs):
                raise SystemExit("pgbench ended before it had its connections.")
            time.sleep(0.05)
        time.sleep(WARM_S)
        meter = Meter({"postgres": self._servers})
        load_before = cpu_seconds(run.pid for run in runs)
        began = time.time()
        time.sleep(seconds)
        spent = meter.spent()
        load = cpu_spent(load_before, cpu_seconds(run.pid for run in runs))
        ended = time.time()
        for run in runs:
            run.send_signal(signal.SIGALRM)  # Its own timer's.
        for run in runs:
            if run.wait() != 0:
                raise SystemExit(f"pgbench failed: {run.returncode}")
        latencies = []
        for log in logs.iterdir():
            for line in log.read_text().splitlines():
                # client, transaction, µs it took, script, seconds and µs of its end
                _, _, took, _, second, microsecond = line.split()
                if began <= int(second) + int(microsecond) / 1e6 < ended:
                    latencies.append(int(took) / 1e6)
        return Cell.of(ended - began, latencies, spent, load)

    def _connected(self) -> int:
        waiting = ("authentication", "startup")
        return sum(
            f" {DATABASES[1]} " in title and not title.rstrip("\0 ").endswith(waiting)
            for server in self._servers
            for title in titles(server)
        )


def requests(cluster: Cluster, users: Sequence[str] = USER_IDS) -> list[bytes]:
    """Prebuilt updates of these users, in a shuffled order."""
    rng = random.Random(SEED)
    built = []
    for user in users:
        token = cluster.token(user)
        for _ in range(REQUESTS_PER_USER):
            body = f'{{"userId":"{user}","scoreIncrement":{rng.randint(1, INCREMENT_MAX)}}}'
            built.append(
                (
                    "POST /api/scores/update HTTP/1.1\r\nHost: localhost\r\n"
                    f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n{body}"
                ).encode()
            )
    rng.shuffle(built)
    return built


async def create_databases(cluster: Cluster) -> list[list[str]]:
    """The databases with the plain table on the cluster's servers: for each, a URL a server."""
    urls: list[list[str]] = [[] for _ in DATABASES]
    for url in cluster.shard_urls:
        server = await asyncpg.connect(url)
        for name, there in zip(DATABASES, urls, strict=True):
            await server.execute(f"CREATE DATABASE {name}")
            there.append(f"{url.rpartition('/')[0]}/{name}")
            database = await asyncpg.connect(there[-1])
            await database.execute(TABLE)
            await database.close()
        await server.close()
    return urls


def trees(cluster: Cluster) -> dict[str, list[int]]:
    """The cluster's processes that have a part in an update, by what they are."""
    kinds: dict[str, list[int]] = {}
    for process in cluster.status()["processes"]:
        kind = process["name"].partition("-")[0]
        if process["pid"] is not None:
            kinds.setdefault(kind, []).append(process["pid"])
    return kinds


def overload(api: Http, requests: Iterator[bytes], capacity: float) -> dict[str, Any]:
    """Twice the capacity for a while, whatever becomes of it, between two calms."""
    calm = (CALM * capacity, CALM_SECONDS)
    rush = (OVERLOAD * capacity, OVERLOAD_SECONDS)
    arrivals = open_loop(api.port, requests, [calm, rush, calm], OPEN_CONNECTIONS_MAX)
    begin, end = CALM_SECONDS, CALM_SECONDS + OVERLOAD_SECONDS
    offered = [arrival for arrival in arrivals if begin <= arrival.due_s < end]
    done = [
        arrival
        for arrival in arrivals
        if arrival.status == 200 and begin <= arrival.due_s + arrival.latency_s < end
    ]
    before = [arrival for arrival in arrivals if 1 <= arrival.due_s < begin]
    refused = [arrival.latency_s for arrival in offered if arrival.status == 503]
    accepted = [arrival.latency_s for arrival in offered if arrival.status == 200]
    after = [arrival for arrival in arrivals if arrival.due_s >= end]
    return {
        "offered_per_s": len(offered) / OVERLOAD_SECONDS,
        "goodput_per_s": len(done) / OVERLOAD_SECONDS,
        "goodput_to_peak": len(done) / OVERLOAD_SECONDS / capacity,
        # 0 stands for what was not sent, or never answered.
        "statuses": dict(Counter(str(arrival.status) for arrival in offered)),
        "accepted_p50_ms": percentile(accepted, 50) * 1e3,
        "accepted_p99_ms": percentile(accepted, 99) * 1e3,
        "refused_p99_ms": percentile(refused, 99) * 1e3,
        "calm_p50_ms": percentile([arrival.latency_s for arrival in before], 50) * 1e3,
        "normal_after_s": normal_after(before, after, end),
    }


def percentile(seconds: Sequence[float], percent: int) -> float:
    """0 where there is nothing to take it of."""
    return statistics.quantiles(seconds, n=100)[percent - 1] if len(seconds) > 1 else 0.0


def normal_after(calm: Sequence[Arrival], after: Sequence[Arrival], end: float) -> float:
    """Seconds from ``end`` until the latency stays as in the calm; all there are if it does not."""
    bound_s = NORMAL_FACTOR * statistics.median(medians(calm).values())
    slow = [window for window, median_s in medians(after).items() if median_s > bound_s]
    return (max(slow) + 1) * NORMAL_WINDOW_S - end if slow else 0.0


def medians(arrivals: Sequence[Arrival]) -> dict[int, float]:
    """The median latency of each window; what was refused took for ever."""
    windows: dict[int, list[float]] = {}
    for arrival in arrivals:
        windows.setdefault(int(arrival.due_s / NORMAL_WINDOW_S), []).append(
            arrival.latency_s if arrival.status == 200 else float("inf")
        )
    return {window: statistics.median(latencies) for window, latencies in windows.items()}


def show(results: Mapping[str, Mapping[int, Cell]]) -> None:
    """The table, the ratios, and where the CPU went at the capacity."""
    print(f"\n{'':9}{'conns':>6}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}", end="")
    print(f"{'CPU s/1000':>12}{'of the load':>13}")
    for name, cells in results.items():
        for connections, cell in cells.items():
            print(
                f"{name:9}{connections:6}{cell.per_s:9.0f}{cell.p50_ms:9.2f}{cell.p99_ms:9.2f}"
                f"{cell.cpu_s_per_1000:12.3f}{cell.load_cpu_s * 1000:13.3f}"
            )
    for peer in ("node", "pgbench"):
        if peer in results:
            ratios = (
                f"{results['ours'][connections].per_s / results[peer][connections].per_s:.2f} ×"
                f" at {connections}"
                for connections in CONNECTIONS
            )
            print(f"requests/s, ours to {peer:8} {', '.join(ratios)}")
    ours, bare = results["ours"][CONNECTIONS[0]], results["pgbench"][CONNECTIONS[0]]
    print(
        f"p50 at one connection       {ours.p50_ms:.2f} ms; "
        f"2 × pgbench's + 2 ms is {2 * bare.p50_ms + 2:.2f}"
    )
    print(f"\nµs of CPU a request at {CONNECTIONS[-1]} connections")
    for name, cells in results.items():
        parts = cells[CONNECTIONS[-1]].cpu_s
        said = ", ".join(f"{part} {spent * 1e6:.0f}" for part, spent in sorted(parts.items()))
        print(f"{name:9}{sum(parts.values()) * 1e6:5.0f}: {said}")


def figures(cell: Cell) -> dict[str, Any]:
    """A cell as JSON."""
    return {
        "per_s": cell.per_s,
        "p50_ms": cell.p50_ms,
        "p99_ms": cell.p99_ms,
        "cpu_s_per_1000": cell.cpu_s_per_1000,
        "cpu_us": {name: spent * 1e6 for name, spent in cell.cpu_s.items()},
        "load_cpu_s_per_1000": cell.load_cpu_s * 1000,
    }


def main() -> None:
    """Measure everyone in turn, then the overload, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a cell and round")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the medians of these count")
    parser.add_argument("--no-overload", action="store_true", help="leave the open loop out")
    options = parser.parse_args()
    source = os.environ.get("YARDSTICK")
    if source and not Path(source, "api.js").is_file():
        raise SystemExit(f"YARDSTICK is {source}, where there is no api.js.")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scoreboard-bench-")))
        folder.chmod(0o755)
        cluster = Cluster(folder / "home", {"UPDATE_RATE_LIMIT": QUOTA})
        print("Starting a cluster…", flush=True)
        stack.callback(cluster.down)
        cluster.up()
        if sys.platform == "linux":
            # From here on, and what is started from here: a load on another machine would not
            # interrupt servers, and everyone's are scheduled as ours. PostgreSQL runs already.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        ours = trees(cluster)
        node_urls, pgbench_urls = asyncio.run(create_databases(cluster))
        updates = itertools.cycle(requests(cluster))
        api = Http(cluster.port, ours, updates)
        contenders: dict[str, Contender] = {"ours": api}
        if source:
            print("Installing the Node.js API…", flush=True)
            work = folder / "yardstick"
            work.mkdir()
            node = stack.enter_context(
                yardstick.running(Path(source).absolute(), work, cluster, node_urls)
            )
            contenders["node"] = Http(
                node.port, {**node.trees, "postgres": ours["postgres"]}, updates
            )
        else:
            print("Without the Node.js API: YARDSTICK is not set to its folder.")
        contenders["pgbench"] = Pgbench(folder, pgbench_urls, ours["postgres"])

        cells: dict[tuple[str, int], list[Cell]] = {}
        for number in range(options.rounds):
            for connections in CONNECTIONS:
                for name, contender in contenders.items():
                    cell = contender.measure(connections, options.seconds)
                    cells.setdefault((name, connections), []).append(cell)
                    print(
                        f"round {number + 1}: {name:8}{connections:4}{cell.per_s:9.0f} req/s",
                        flush=True,
                    )
        results = {
            name: {
                connections: Cell.median(cells[name, connections]) for connections in CONNECTIONS
            }
            for name in contenders
        }
        show(results)
        report: dict[str, Any] = {"node": None} | {
            name: {str(connections): figures(cell) for connections, cell in row.items()}
            for name, row in results.items()
        }
        if not options.no_overload:
            capacity = results["ours"][CONNECTIONS[-1]].per_s
            report["overload"] = overload(api, updates, capacity)
            print(f"\nOpen loop, {OVERLOAD:g} × {capacity:.0f} req/s for {OVERLOAD_SECONDS:g} s")
            for figure, value in report["overload"].items():
                said = f"{value:10.2f}" if isinstance(value, float) else f"  {value}"
                print(f"  {figure:16}{said}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1))
    print(f"\nIn {RESULT}")


if __name__ == "__main__":
    main()
