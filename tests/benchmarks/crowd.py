"""A hundred thousand clients on one machine, while some of them leave and others come.

As many gateway processes as that takes, a token for every client, and boards at a steady pace. It
ends with an error if any client missed a board, saw an older one after a newer one or was cut off.
Boards are 2 s apart: who is still waiting for the one before when the next comes has missed it.
Repeat with `make bench-crowd`; it takes 8 minutes, 5 GB of memory and 20,000 open files a process.
"""

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from services.scoreboard.progress import Steps
from tests.benchmarks import broadcasters
from tests.benchmarks.broadcasters import CONNECTIONS_MAX, Ours, pace
from tests.benchmarks.gateway import Spread, spreads
from tests.benchmarks.live_load import FIRST_NUMBER, Load, Seen
from tests.benchmarks.processes import resident_kib, thread_seconds
from tests.gateway.harness import SECRET

CLIENTS = 100_000
SECONDS = 300.0
BOARDS_PER_S = 0.5
EXCHANGED_PER_MINUTE = 0.05

WARM_BOARDS = 5
"""Before memory is compared."""

STEP_BOARDS = 10
"""Between two looks at how it goes."""

SETTLE_S = 3.0

RESULT = Path(".bench/crowd.json")


@dataclass(frozen=True, slots=True)
class Step:
    """Some boards long.

    Attributes:
        problems: How often something was not as it should be, by what it was.
        spread: Medians of the boards.
        last_max_ms: The slowest board's.
        gateways_kib: Resident memory of all gateways.
        kernel_kib: What sockets hold in the kernel.
        gateways_cpu: Of one core.
        load_cpu: The same.
    """

    # No Counter: `asdict` would count its pairs.
    problems: dict[str, int]
    spread: Spread
    last_max_ms: float
    frames: int
    joined: int
    gateways_kib: int
    kernel_kib: int
    gateways_cpu: float
    load_cpu: float


def socket_kib() -> int:
    """What TCP holds in buffers, by the kernel's account."""
    lines = Path("/proc/net/sockstat").read_text().splitlines()
    words = next(line.split() for line in lines if line.startswith("TCP:"))
    return int(words[words.index("mem") + 1]) * resource.getpagesize() // 1024


def problems(seen: Seen, clients: int, boards: int) -> dict[str, int]:
    """What was not as it should be: everyone has every board while connected, and stays."""
    counts = {
        "boards missed": seen.missed,
        "older boards after newer ones": seen.backwards,
        "left without a board that others had had for a second": seen.left_behind,
        "connections cut": sum(seen.closed.values()),
        "clients not there": clients - sum(seen.holding.values()) - seen.opening,
        # Who comes while a board is on its way has it from the start, who leaves has it not.
        "frames too few": clients * boards - seen.frames - seen.missed - 2 * seen.joined,
    }
    return {name: count for name, count in counts.items() if count > 0}


async def step(gateways: Ours, load: Load, first: int, boards: int, clients: int) -> Step:
    """Publish some boards and hold what was seen against what should be."""
    before, began = thread_seconds(gateways.pids), time.monotonic()
    published = await pace(gateways, range(first, first + boards), BOARDS_PER_S)
    await asyncio.sleep(1 / BOARDS_PER_S)
    seen = await load.report()
    elapsed = time.monotonic() - began
    each = spreads(published, seen)
    return Step(
        problems=problems(seen, clients, boards),
        spread=Spread.median(each),
        last_max_ms=max(spread.last_ms for spread in each),
        frames=seen.frames,
        joined=seen.joined,
        gateways_kib=resident_kib(gateways.pids),
        kernel_kib=socket_kib(),
        gateways_cpu=(thread_seconds(gateways.pids) - before) / elapsed,
        load_cpu=seen.cpu_s / elapsed,
    )


async def measure(folder: Path, clients: int, seconds: float) -> dict[str, object]:
    """Connect everyone, let boards come, and see whether it stays so."""
    processes = -(-clients // CONNECTIONS_MAX)
    async with (
        broadcasters.ours(folder, FIRST_NUMBER, processes) as gateways,
        Load(SECRET, clients) as load,
    ):
        empty_kib = resident_kib(gateways.pids)
        began = time.monotonic()
        with Steps("connecting", "gateways", processes) as progress:
            for place, gateway in enumerate(gateways.gateways):
                share = clients // processes + (place < clients % processes)
                await load.join(gateway.port, share)
                progress.advance()
        connecting_s = time.monotonic() - began
        number = FIRST_NUMBER + 1
        await pace(gateways, range(number, number + WARM_BOARDS), BOARDS_PER_S)
        number += WARM_BOARDS
        await asyncio.sleep(SETTLE_S)
        await load.report()
        load.leave(clients * EXCHANGED_PER_MINUTE / 60)
        count = max(1, round(seconds * BOARDS_PER_S / STEP_BOARDS))
        steps = []
        print(
            f"\n{'boards':>6}{'first ms':>10}{'median':>8}{'last':>8}{'slowest':>9}{'joined':>8}"
            f"{'gateways MiB':>14}{'sockets MiB':>13}{'CPU':>7}{'of the load':>13}  problems"
        )
        for _ in range(count):
            done = await step(gateways, load, number, STEP_BOARDS, clients)
            number += STEP_BOARDS
            steps.append(done)
            print(
                f"{number - FIRST_NUMBER - 1:6}{done.spread.first_ms:10.1f}"
                f"{done.spread.median_ms:8.0f}{done.spread.last_ms:8.0f}{done.last_max_ms:9.0f}"
                f"{done.joined:8}{done.gateways_kib / 1024:14.0f}{done.kernel_kib / 1024:13.0f}"
                f"{done.gateways_cpu:7.2f}{done.load_cpu:13.2f}  {done.problems or ''}",
                flush=True,
            )
    return {
        "clients": clients,
        "processes": processes,
        "handshakes_per_s": clients / connecting_s,
        "frames": sum(done.frames for done in steps),
        "exchanged": sum(done.joined for done in steps),
        "last_ms": statistics.median(done.spread.last_ms for done in steps),
        "last_max_ms": max(done.last_max_ms for done in steps),
        "kib_per_client": (steps[-1].gateways_kib - empty_kib) / clients,
        "growth": steps[-1].gateways_kib / steps[0].gateways_kib - 1,
        "problems": sum((Counter(done.problems) for done in steps), Counter[str]()),
        "steps": [asdict(done) for done in steps],
    }


def main() -> None:
    """Measure, print, and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=CLIENTS, help="(%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="after all are there (%(default)s)"
    )
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="scoreboard-bench-") as folder:
        report = asyncio.run(measure(Path(folder), options.clients, options.seconds))
    print()
    for figure, value in report.items():
        if isinstance(value, int | float):
            print(f"  {figure:18}{value:12.2f}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1))
    print(f"\nIn {RESULT}")
    if report["problems"]:
        raise SystemExit(f"Not as it should be: {report['problems']}")


if __name__ == "__main__":
    main()
