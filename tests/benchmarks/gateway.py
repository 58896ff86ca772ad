"""What a board costs the gateway: beside a bare loop, a Node.js gateway and nchan, all in one run.

Boards are published at a steady pace to clients with a token each. The clients are in processes of
their own, and CPU is that of the servers' processes only. Repeat with `make bench-gateway`;
`YARDSTICK=FOLDER` says where the Node.js gateway is (`yardstick.py` says what it must be), and
`NCHAN=FOLDER` below which root Debian's nginx and libnginx-mod-nchan are, if not below /.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.scoreboard.progress import Steps
from tests.benchmarks import broadcasters
from tests.benchmarks.broadcasters import CONNECTIONS_MAX, Broadcaster, pace
from tests.benchmarks.live_load import FIRST_NUMBER, Load, Seen
from tests.benchmarks.processes import resident_kib, thread_seconds
from tests.gateway.harness import SECRET

CLIENTS = 3000
BOARDS_PER_S = 10.0
SECONDS = 3.0
ROUNDS = 5
"""Of every contender in turn; one round more comes before them, to warm up."""

FULL_BOARDS = 60
FULL_BOARDS_PER_S = 2.0

SETTLE_S = 0.5
"""After the last board: the slowest has sent it by then."""

IDLE_S = 2.0
"""Before the memory of a process is read."""

CONTENDERS = ("ours", "floor", "node", "nchan")

RESULT = Path(".bench/gateway.json")


@dataclass(frozen=True, slots=True)
class Window:
    """One contender for some seconds.

    Attributes:
        us_per_frame: µs of its CPU for each board that reached a client.
        load_us_per_frame: The same of the load, which is in no other figure.
        missed: Boards that clients were not shown.
    """

    us_per_frame: float
    load_us_per_frame: float
    missed: int


@dataclass(frozen=True, slots=True)
class Spread:
    """From the publication of a board to the first, the median and the last client that has it."""

    first_ms: float
    median_ms: float
    last_ms: float

    @classmethod
    def of(cls, published_at: float, arrivals: Sequence[float]) -> "Spread":
        """Of one board."""
        points = (min(arrivals), statistics.median(arrivals), max(arrivals))
        return cls(*((at - published_at) * 1e3 for at in points))

    @classmethod
    def median(cls, spreads: Sequence["Spread"]) -> "Spread":
        """Of each figure by itself."""
        return cls(
            statistics.median(one.first_ms for one in spreads),
            statistics.median(one.median_ms for one in spreads),
            statistics.median(one.last_ms for one in spreads),
        )


def spreads(published: Mapping[int, float], seen: Seen) -> list[Spread]:
    """Of all boards that reached anybody."""
    return [
        Spread.of(at, seen.arrivals[number])
        for number, at in published.items()
        if number in seen.arrivals
    ]


def require_order(seen: Seen) -> None:
    """
    What holds at any pace.

    Raises:
        RuntimeError: If an older board came after a newer one, or a connection broke.
    """
    if seen.backwards or seen.closed:
        raise RuntimeError(f"{seen.backwards} older boards after newer ones, closed: {seen.closed}")


async def window(broadcaster: Broadcaster, load: Load, numbers: range, per_s: float) -> Window:
    """Publish boards at that pace; what they cost."""
    await load.report()
    before = thread_seconds(broadcaster.pids)
    await pace(broadcaster, numbers, per_s)
    await asyncio.sleep(SETTLE_S)
    spent = thread_seconds(broadcaster.pids) - before
    seen = await load.report()
    require_order(seen)
    return Window(
        us_per_frame=spent / seen.frames * 1e6,
        load_us_per_frame=seen.cpu_s / seen.frames * 1e6,
        missed=seen.missed,
    )


async def fan_out(
    contenders: Mapping[str, Broadcaster],
    *,
    clients: int,
    per_s: float,
    seconds: float,
    rounds: int,
) -> dict[str, list[Window]]:
    """Everyone in turn, round by round, each with so many clients of its own."""
    windows: dict[str, list[Window]] = {name: [] for name in contenders}
    boards = max(1, round(per_s * seconds))
    async with AsyncExitStack() as stack:
        loads = {}
        for place, (name, contender) in enumerate(contenders.items()):
            load = Load(SECRET, clients, first=place * 10_000_000)
            loads[name] = await stack.enter_async_context(load)
            await load.join(contender.port, clients)
        with Steps("fan-out", "windows", (rounds + 1) * len(contenders)) as steps:
            for start in range(FIRST_NUMBER + 1, FIRST_NUMBER + 1 + (rounds + 1) * boards, boards):
                for name, contender in contenders.items():
                    numbers = range(start, start + boards)
                    windows[name].append(await window(contender, loads[name], numbers, per_s))
                    steps.advance()
    return {name: measured[1:] for name, measured in windows.items()}


async def full(folder: Path, clients: int) -> dict[str, float]:
    """One process with as many clients as it takes."""
    async with (
        broadcasters.ours(folder, FIRST_NUMBER) as gateway,
        Load(SECRET, clients, processes=2) as load,
    ):
        empty_kib = resident_kib(gateway.pids)
        seconds = await load.join(gateway.port, clients)
        numbers = range(FIRST_NUMBER + 1, FIRST_NUMBER + 1 + FULL_BOARDS)
        await load.report()
        published = await pace(gateway, numbers, FULL_BOARDS_PER_S)
        await asyncio.sleep(IDLE_S)
        seen = await load.report()
        require_order(seen)
        if seen.holding != {numbers[-1]: clients}:
            raise RuntimeError(f"not everyone has the last board, {numbers[-1]}: {seen.holding}")
        kib = resident_kib(gateway.pids) - empty_kib
    each = spreads(published, seen)
    middle = Spread.median(each)
    return {
        "clients": clients,
        "kib_per_client": kib / clients,
        "handshakes_per_s": clients / seconds,
        "first_ms": middle.first_ms,
        "median_ms": middle.median_ms,
        "last_ms": middle.last_ms,
        "last_max_ms": max(spread.last_ms for spread in each),
        "boards_missed": seen.missed / clients,
    }


def show(windows: Mapping[str, Sequence[Window]]) -> dict[str, float]:
    """Print the table; the medians."""
    print(f"\n{'':8}{'µs a frame':>12}{'lowest':>9}{'highest':>9}{'× floor':>9}{'of the load':>13}")
    middle = {
        name: statistics.median(window.us_per_frame for window in measured)
        for name, measured in windows.items()
    }
    for name, measured in windows.items():
        costs = [window.us_per_frame for window in measured]
        load = statistics.median(window.load_us_per_frame for window in measured)
        missed = sum(window.missed for window in measured)
        print(
            f"{name:8}{middle[name]:12.2f}{min(costs):9.2f}{max(costs):9.2f}"
            f"{middle[name] / middle['floor']:9.2f}{load:13.2f}"
            + (f"  {missed} boards not shown" if missed else "")
        )
    if "node" in middle:
        print(f"ours to node.js {middle['ours'] / middle['node']:.2f}")
    return middle


async def measure(
    options: argparse.Namespace, folder: Path, source: Path | None, root: Path
) -> dict[str, Any]:
    """Everything that was asked for."""
    report: dict[str, Any] = {}
    async with AsyncExitStack() as stack:

        def work(name: str) -> Path:
            (folder / name).mkdir()
            return folder / name

        contenders: dict[str, Broadcaster] = {
            "ours": await stack.enter_async_context(broadcasters.ours(work("ours"), FIRST_NUMBER)),
            "floor": await stack.enter_async_context(broadcasters.bare(FIRST_NUMBER)),
        }
        if source:
            print("Installing the Node.js gateway…", flush=True)
            contenders["node"] = await stack.enter_async_context(
                broadcasters.node(source, work("node"))
            )
        else:
            print("Without the Node.js gateway: YARDSTICK is not set to its folder.")
        if broadcasters.nchan_in(root):
            contenders["nchan"] = await stack.enter_async_context(
                broadcasters.nchan(root, work("nchan"), FIRST_NUMBER)
            )
        else:
            print(f"Without nchan: it is not installed below {root}; see NCHAN.")
        windows = await fan_out(
            contenders,
            clients=options.clients,
            per_s=options.per_second,
            seconds=options.seconds,
            rounds=options.rounds,
        )
    middle = show(windows)
    report["us_per_frame"] = {name: middle.get(name) for name in CONTENDERS}
    if options.full:
        print(f"\nOne process with {options.full} clients…", flush=True)
        figures = await full(work("full"), options.full)
        for figure, value in figures.items():
            print(f"  {figure:18}{value:10.1f}")
        report.update(figures)
    return report


def main() -> None:
    """Measure, print, and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clients", type=int, default=CLIENTS, help="of every contender (%(default)s)"
    )
    parser.add_argument(
        "--per-second", type=float, default=BOARDS_PER_S, help="boards (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="of a contender and round (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="the medians of these count (%(default)s)"
    )
    parser.add_argument(
        "--full",
        type=int,
        default=CONNECTIONS_MAX,
        metavar="CLIENTS",
        help="of one process for memory and latency (%(default)s); 0 leaves it out",
    )
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    source = os.environ.get("YARDSTICK")
    if source and not Path(source, "gateway.js").is_file():
        raise SystemExit(f"YARDSTICK is {source}, where there is no gateway.js.")
    with tempfile.TemporaryDirectory(prefix="scoreboard-bench-") as folder:
        Path(folder).chmod(0o755)
        report = asyncio.run(
            measure(
                options,
                Path(folder),
                Path(source).absolute() if source else None,
                Path(os.environ.get("NCHAN") or "/").absolute(),
            )
        )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1))
    print(f"\nIn {RESULT}")


if __name__ == "__main__":
    main()
