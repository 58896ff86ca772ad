"""How late the event loop is: what everything that waits in a replica waits at least."""

import asyncio

from prometheus_client import Histogram

PERIOD_S = 0.25
"""Between two looks: a thousandth of a percent of the CPU, and sixty looks in a scrape of 15 s."""

DELAY = Histogram(
    "scoreboard_loop_delay_seconds",
    "How much later than asked for a timer of the event loop fired",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)


async def measure_loop() -> None:
    """Look regularly, for as long as the replica lives."""
    now = asyncio.get_running_loop().time
    while True:
        asked_for = now() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        DELAY.observe(max(0.0, now() - asked_for))
