"""What the contract promises while a container is frozen, cut off or dead, and that all is back."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from services.api.partition import partition_of
from tests.cluster import Json, eventually
from tests.compose.build import ROOT
from tests.compose.stack import Stack
from tests.load import Load
from tests.test_faults import shows_the_truth

pytestmark = [pytest.mark.compose, pytest.mark.chaos]

AWAY_S = 5.0
"""Longer than any deadline of a request."""

BACK_SECONDS_MAX = 15.0
"""From the loss, or its end, to healthy; a shard's recovery is the slowest."""

BOARD_SECONDS_MAX = 6.0


@asynccontextmanager
async def loaded(stack: Stack, name: str) -> AsyncIterator[Load]:
    """Users who score; afterwards every score is exact and everyone shows the true board."""
    load = Load(stack)
    async with load.running(name, users=20, pause_s=0.2):
        await asyncio.sleep(1)
        yield load
    await load.assert_exact()
    healed = await eventually(
        lambda: shows_the_truth(stack), within_s=BOARD_SECONDS_MAX, what="the true board"
    )
    print(f"{name}: {dict(load.answers)}, {len(load.broken)} broken; "
          f"board true {healed:.1f} s after; slowest {max(load.slowest_s.values()):.1f} s")  # fmt: skip
    if load.failures:
        print(*stack.failures(), sep="\n")


def is_well(stack: Stack, before: Json) -> bool:
    """Whether the container has been started anew and is healthy."""
    (now,) = [one for one in stack.containers() if one["Id"] == before["Id"]]
    state = now["State"]
    return bool(
        state["StartedAt"] != before["State"]["StartedAt"]
        and state["Health"]["Status"] == "healthy"
    )


async def test_a_frozen_shard_fails_only_its_own_users(stack: Stack, user: str) -> None:
    """Theirs get the contract's 500 or 503 in time; the others notice nothing."""
    shard = stack.container("shard-1")["Id"]
    async with loaded(stack, user) as load:
        stack.docker("pause", shard)
        try:
            await asyncio.sleep(AWAY_S)
        finally:
            stack.docker("unpause", shard)
        await asyncio.sleep(1)
    assert load.failures and all(partition_of(one) % 2 == 1 for one in load.failures)
    assert set(load.answers) <= {200, 500, 503} and not load.broken


async def test_without_redis_updates_are_written(stack: Stack, user: str) -> None:
    """Neither the answer nor the score changes; the board comes back with it."""
    valkey = stack.container("valkey")["Id"]
    network = f"{stack.project}_data"
    async with loaded(stack, user) as load:
        stack.docker("network", "disconnect", network, valkey)
        try:
            await asyncio.sleep(AWAY_S)
        finally:
            stack.docker("network", "connect", "--alias", "valkey", network, valkey)
        await asyncio.sleep(2)
    assert set(load.answers) == {200} and not load.broken


SERVICES = ("nginx", "api", "gateway", "shard-0", "shard-1", "valkey", "prometheus")


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's process can only be killed by root")
@pytest.mark.parametrize("service", SERVICES)
async def test_a_crashed_container_is_back_by_itself(stack: Stack, user: str, service: str) -> None:
    """SIGKILL of its process, as when it runs out of memory: the engine starts it again."""
    before = stack.containers(service)[0]
    async with loaded(stack, user) as load:
        os.kill(before["State"]["Pid"], signal.SIGKILL)
        took = await eventually(
            lambda: is_well(stack, before), within_s=BACK_SECONDS_MAX, what=f"{service} is back"
        )
        print(f"{service}: back in {took:.1f} s")
    check_promise(service, load)


@pytest.fixture
def keeper(stack: Stack) -> Iterator["subprocess.Popen[str]"]:
    """`deploy/keep` beside the containers."""
    with subprocess.Popen(
        [ROOT / "deploy" / "keep"], env=stack.environ, stdout=subprocess.PIPE, text=True
    ) as keeping:
        assert keeping.stdout is not None
        assert f"{stack.project} is kept." in keeping.stdout.readline()
        yield keeping
        keeping.terminate()


@pytest.mark.usefixtures("keeper")
@pytest.mark.parametrize("service", SERVICES)
async def test_a_killed_container_is_back_by_itself(stack: Stack, user: str, service: str) -> None:
    """`docker kill` is an order to the engine; `deploy/keep` countermands it."""
    before = stack.containers(service)[0]
    async with loaded(stack, user) as load:
        stack.docker("kill", before["Id"])
        took = await eventually(
            lambda: is_well(stack, before), within_s=BACK_SECONDS_MAX, what=f"{service} is back"
        )
        print(f"{service}: back in {took:.1f} s")
    check_promise(service, load)


def listeners(stack: Stack) -> list[bytes]:
    """The command lines of those who listen to what the engine says of these containers."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(path.read_bytes())
    return [line for line in lines if b"events" in line and stack.project.encode() in line]


async def test_what_is_stopped_stays_so(stack: Stack, keeper: "subprocess.Popen[str]") -> None:
    """Also what has to be killed in the end; and a second keeper ends at once."""
    container = stack.container("prometheus")["Id"]
    stack.docker("stop", "--time", "0", container)
    other = await asyncio.to_thread(
        subprocess.run,
        [ROOT / "deploy" / "keep"],
        env=stack.environ,
        capture_output=True,
        text=True,
    )
    assert other.stderr == f"{stack.project} is kept already.\n"
    await asyncio.sleep(AWAY_S)
    assert stack.container("prometheus")["State"]["Status"] == "exited"
    # Any signal that ends it but a gentle one is a kill.
    stack.docker("start", container)
    stack.docker("kill", "--signal", "ABRT", container)
    assert keeper.stdout is not None
    said = await asyncio.to_thread(keeper.stdout.readline)
    assert said.endswith("prometheus-1 was killed: started.\n")
    keeper.terminate()
    assert await asyncio.to_thread(keeper.wait, AWAY_S) == 0
    assert listeners(stack) == []


def check_promise(service: str, load: Load) -> None:
    """What the contract says of users while such a container was away."""
    if service == "nginx":
        return  # Nobody is left who could answer; that all is exact, `loaded` has seen.
    assert not load.broken
    if service.startswith("shard-"):
        shard = int(service[-1])
        assert all(partition_of(one) % 2 == shard for one in load.failures)
        assert set(load.answers) <= {200, 500, 503}
    else:
        assert set(load.answers) == {200}
