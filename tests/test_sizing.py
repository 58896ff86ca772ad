"""The page on sizing: its costs are those of the benchmarks, and its arithmetic adds up."""

import re
from math import ceil
from pathlib import Path

import pytest

from services.api.engine import POOL_CONNECTIONS
from services.gateway.settings import GatewaySettings
from shared.board import BOARD_SIZE, Board, Standing, live_message

ROOT = Path(__file__).parent.parent
SIZING = (ROOT / "deploy/sizing.md").read_text()
BENCHMARKS = (ROOT / "tests/benchmarks/README.md").read_text()

NUMBER = r"\d[\d,]*(?:\.\d+)?"
COSTS = {
    name: (cost, anchor)
    for name, cost, anchor in re.findall(
        r"^\| (\w+) \| ([^|]+) \| [^|]+ \| \[[^]]+\]\([^#)]+#([^)]+)\) \|$", SIZING, re.MULTILINE
    )
}

CLIENTS = 1_000_000
BOARDS_PER_S = 2
BUSY = 0.6
UPDATES_PER_S = CLIENTS / 60
TARGET = 12_500
NGINX_WEBSOCKETS = 16_384


def section(anchor: str) -> str:
    """What stands under the heading that this link leads to."""
    for text in re.split(r"^## ", BENCHMARKS, flags=re.MULTILINE):
        heading = text.partition("\n")[0]
        if re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") == anchor:
            return text
    raise AssertionError(f"there is no heading #{anchor}")


@pytest.mark.parametrize("name", COSTS)
def test_a_cost_is_what_a_benchmark_gave(name: str) -> None:
    """Each of its figures stands in the section that the page names."""
    cost, anchor = COSTS[name]
    figures = re.findall(NUMBER, cost)
    there = re.findall(NUMBER, section(anchor))
    assert figures
    assert [figure for figure in figures if figure not in there] == []


def cost(name: str, place: int = 0) -> float:
    """In the unit of the page."""
    return float(re.findall(NUMBER, COSTS[name][0])[place].replace(",", ""))


def test_the_arithmetic_adds_up() -> None:
    """For a million clients and two million users, row by row."""
    replicas = ceil(UPDATES_PER_S * cost("A") / 1e6 / BUSY)
    gateways = CLIENTS // TARGET
    pods = ceil(CLIENTS / NGINX_WEBSOCKETS / 0.75)
    nginx = (UPDATES_PER_S * cost("N") + CLIENTS * BOARDS_PER_S * cost("G3")) / 1e6 / BUSY
    gateway = TARGET * BOARDS_PER_S * cost("G1") / 1e6
    handshakes = GatewaySettings.model_fields["handshakes_per_second_max"].default
    board = Board(1, 1, tuple(Standing("x" * 15, 12345) for _ in range(BOARD_SIZE)))
    network = CLIENTS * BOARDS_PER_S * len(live_message(board)) * 8 / 1e9
    requested = replicas + gateways + pods / 2
    nodes = ceil(requested / 8)
    rows = {
        "API": f"{replicas} replicas of a core",
        "their connections": f"{replicas * (POOL_CONNECTIONS + 1)}",
        "PostgreSQL, cores": f"{ceil(UPDATES_PER_S * cost('P') / 1e6 / BUSY)} cores",
        "PostgreSQL, disk": f"{(480e6 * cost('D2') + 2e6 * cost('D1')) / 1e9:.0f} GB",
        "PostgreSQL, log": f"{UPDATES_PER_S * cost('D3') / 1e6:.1f} MB/s",
        "Redis, core": f"{UPDATES_PER_S * cost('V') / 1e6:.2f} of its one core",
        "Redis, memory": f"less than {ceil(CLIENTS * cost('Q', 2) / 1e9)} GB",
        "gateways, connections": f"{gateways}",
        "gateways, cores": f"{gateway:.2f} of a core each, {gateways * gateway:.0f} in all",
        "gateways, memory": f"{cost('M', 1) + TARGET * cost('G2') / 1024:.0f} MiB each",
        "Nginx, connections": f"{pods} pods",
        "Nginx, cores": f"{nginx:.0f} cores, {nginx / pods:.2f} a pod",
        "Nginx, memory": f"{NGINX_WEBSOCKETS * cost('G4') / 1024:.0f} MiB a pod",
        "network": f"{network:.1f} Gbit/s out",
        "all clients come back": f"{ceil(CLIENTS / gateways / handshakes)} s",
    }
    said = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", SIZING, re.MULTILINE))
    assert {
        row: said[row] for row, result in rows.items() if not said[row].startswith(result)
    } == {}
    assert gateway + handshakes / cost("G5") < 1
    for sentence in (
        f"0.6 / {cost('V'):.0f} µs = {BUSY / cost('V') * 1e6:,.0f} updates/s",
        f"1 / {cost('A'):.0f} µs = {1e6 / cost('A'):,.0f} updates/s",
        f"which is {handshakes / cost('G5'):.2f} of a core",
        f"= {requested:.0f} cores, so {nodes} nodes",
        f"{ceil(nodes * 1.5)} nodes",
    ):
        assert sentence in SIZING
