"""Scaling, rolling out and losing replicas while 500 updates a second and a thousand watchers go on."""

import asyncio
import itertools
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, suppress
from multiprocessing import get_context
from pathlib import Path

import asyncpg
import httpx2 as httpx
import pytest
import websockets

from tests.benchmarks.http_load import open_loop
from tests.cluster import Json, eventually, receive_board
from tests.compose.build import ROOT
from tests.compose.stack import OPERATIONS_PORTS, PORTS, Stack
from tests.compose.watchers import Watchers

pytestmark = [pytest.mark.compose, pytest.mark.chaos, pytest.mark.timeout(600)]

UPDATES_PER_S = 500
USERS = 2000
"""Each sends at most 90 of the 100 an hour that are allowed."""

WATCHERS = 1000
CONNECTIONS_MAX = 1500

LEADER_SCORE = 1_000_000
"""Of the board's ten: what the load's users reach is far below, so only leaders change the board."""

BOARD_EVERY_S = 0.5
"""As often as `deploy/sizing.md` assumes. Ten leaders' quotas last for 500 s."""

BOARDS_PER_S_MIN = 1.0
"""That a watcher is shown, of those two: a busy machine skips some, and who reconnects misses some."""

LEAVING = 400
"""Watchers who go and come once there are new gateways, as some always do."""

SERVES_SECONDS_MAX = 5.0
"""From a new replica's start to its first update or board."""

COMMON_DRIVERS = ("overlay2", "overlayfs")
"""With another (fuse-overlayfs) each module is read through a process of its own: six who start at once
then take two seconds more on two cores, and have to serve as soon as `up` calls them healthy."""

LOOK_EVERY_S = 0.2
"""At a replica that starts."""


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Stack]:
    """A stack of its own, with one replica of each, whose gateways drain quickly."""
    stack = Stack(tmp_path / "home")
    stack.settings.write_text("DRAIN_SECONDS=3\n")
    try:
        stack.up(api=1, gateway=1)
        yield stack
    finally:
        stack.down()


def updates(tokens: list[str], prefix: str) -> Iterator[bytes]:
    """One unit each, for one user after the other, without a key."""
    requests = [
        (
            "POST /api/scores/update HTTP/1.1\r\nHost: board\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {token}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
        for number, token in enumerate(tokens)
        for body in [json.dumps({"userId": f"{prefix}-{number}", "scoreIncrement": 1})]
    ]
    return itertools.cycle(requests)


def load(port: int, tokens: list[str], prefix: str, seconds: float) -> Counter[int]:
    """The answers by status, in a process of its own."""
    phases = [(float(UPDATES_PER_S), seconds)]
    arrivals = open_loop(port, updates(tokens, prefix), phases, CONNECTIONS_MAX)
    return Counter(arrival.status for arrival in arrivals)


@asynccontextmanager
async def under_load(stack: Stack, prefix: str, seconds: float) -> AsyncIterator[Watchers]:
    """
    Updates and watchers for as long as given; the block must end before.

    At the end each update was answered 200 and counts once, all watch, and were shown boards.
    """
    tokens = [stack.token(f"{prefix}-{number}") for number in range(USERS)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        async with leading(stack) as led, Watchers(stack).watching(WATCHERS) as watchers:
            loading = asyncio.get_running_loop().run_in_executor(
                pool, load, stack.port, tokens, prefix, seconds
            )
            began = time.monotonic()
            await asyncio.sleep(2)
            yield watchers
            took = time.monotonic() - began
            assert not loading.done(), f"the load ended before: {took:.0f} s"
            answers = await loading
            await eventually(
                lambda: watchers.connected == WATCHERS, within_s=30, what="all are back"
            )
            boards = watchers.messages / WATCHERS / (time.monotonic() - began)
            print(f"{prefix}: {took:.0f} s; answers {dict(answers)}; "
                  f"closed {dict(watchers.closed)}; refused {dict(watchers.refused)}; "
                  f"{boards:.1f} boards/s a watcher")  # fmt: skip
    if set(answers) | set(led) != {200} or watchers.refused:
        print(*stack.failures(), sep="\n")
    assert set(led) == {200}
    assert dict(answers) == {200: int(UPDATES_PER_S * seconds)}
    assert boards > BOARDS_PER_S_MIN
    await assert_counted_once(stack, prefix, sum(answers.values()))


@asynccontextmanager
async def leading(stack: Stack) -> AsyncIterator[Counter[int]]:
    """Ten who lead by far, and change the board all the time; how they are answered."""
    answers: Counter[int] = Counter()

    async def lead() -> None:
        async with stack.client() as client:
            for increment in itertools.chain([LEADER_SCORE], itertools.repeat(1)):
                for number in range(10):
                    answers[(await client.post(f"leader-{number}", increment)).status] += 1
                    await asyncio.sleep(BOARD_EVERY_S)

    task = asyncio.create_task(lead())
    try:
        yield answers
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def assert_counted_once(stack: Stack, prefix: str, sent: int) -> None:
    """Every user's score and operations are the updates sent for this user."""
    expected = {
        f"{prefix}-{number}": sent // USERS + (number < sent % USERS) for number in range(USERS)
    }
    stored: dict[str, tuple[int, int]] = {}
    for url in stack.shard_urls:
        shard = await asyncpg.connect(url)
        rows = await shard.fetch(
            """
            SELECT user_id, held.score, sum(delta)::integer AS total
            FROM user_scores AS held JOIN score_ops USING (user_id)
            WHERE user_id LIKE $1 GROUP BY user_id, held.score
            """,
            f"{prefix}-%",
        )
        await shard.close()
        stored |= {row["user_id"]: (row["score"], row["total"]) for row in rows}
    wrong = {user: stored.get(user) for user, n in expected.items() if stored.get(user) != (n, n)}
    assert wrong == {}


DONE = {
    "api": r'scoreboard_http_requests_total\{[^}]*route="/api/scores/update"[^}]*\} (\S+)',
    "gateway": r"^scoreboard_gateway_connections (\S+)",
}
"""What shows that a replica serves: updates answered, or connections held."""


async def done_by(stack: Stack, service: str, replica: Json) -> float:
    """What it has done so far."""
    address = stack.address(replica, "edge")
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"http://{address}:{OPERATIONS_PORTS[service]}/metrics")
    return sum(map(float, re.findall(DONE[service], answer.text, re.MULTILINE)))


async def served(stack: Stack, service: str) -> dict[str, float]:
    """What each replica has done so far, by id."""
    return {one["Id"]: await done_by(stack, service, one) for one in stack.containers(service)}


async def starts(stack: Stack, **counts: int) -> dict[str, list[float]]:
    """
    Seconds from the start of so many new replicas to their first answers, while they start.

    Nginx brings an API replica its updates; a gateway is asked for a board, for no client is new.
    The engine says who starts: to ask it again and again takes CPU from those who do.
    """
    engine = await asyncio.create_subprocess_exec(
        "docker", "events", f"--since={time.time():.0f}", "--filter=event=start",
        f"--filter=label=com.docker.compose.project={stack.project}", "--format={{json .}}",
        env=stack.environ, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert engine.stdout is not None
    took: dict[str, list[asyncio.Task[float]]] = {service: [] for service in counts}
    try:
        async with asyncio.TaskGroup() as asking:
            while any(len(took[service]) < count for service, count in counts.items()):
                event = json.loads(await engine.stdout.readline())
                replica, began = event["Actor"], event["timeNano"] / 1e9
                service = replica["Attributes"]["com.docker.compose.service"]
                if service in counts:
                    first = first_answer(stack, service, replica["ID"], began)
                    took[service].append(asking.create_task(first))
    finally:
        engine.terminate()
        await engine.wait()
    return {service: sorted(one.result() for one in asked) for service, asked in took.items()}


async def first_answer(stack: Stack, service: str, replica: str, began: float) -> float:
    """Seconds from ``began``, in Unix seconds, to the replica's first update or board."""
    container = json.loads(await asyncio.to_thread(stack.docker, "inspect", replica))[0]
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        # Not listening, and without a board, yet.
        with suppress(OSError, httpx.TransportError, websockets.InvalidStatus):
            if service == "api" and await done_by(stack, service, container):
                return time.time() - began
            if service == "gateway":
                address = stack.address(container, "edge")
                async with stack.live(port=PORTS[service], host=address) as socket:
                    await receive_board(socket)
                return time.time() - began


async def in_a_thread(work: object, *arguments: object, **options: object) -> object:
    """Have an operator do something while the rest goes on."""
    return await asyncio.to_thread(work, *arguments, **options)  # type: ignore[arg-type]


def roll_out(stack: Stack, service: str, image: str) -> "subprocess.CompletedProcess[str]":
    """As an operator does."""
    return subprocess.run(
        [ROOT / "deploy" / "rollout", service],
        env={**stack.environ, "SCOREBOARD_IMAGE": image},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def another_image(stack: Stack, tag: str, *lines: str) -> str:
    """The same program in another image, with these lines of a Dockerfile on top."""
    dockerfile = "\n".join((f"FROM {stack.environ['SCOREBOARD_IMAGE']}", *lines))
    subprocess.run(
        ["docker", "build", "--quiet", "--tag", tag, "-"],
        input=dockerfile, env={**stack.environ, "DOCKER_BUILDKIT": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return tag


def images(stack: Stack, service: str) -> set[str]:
    """What the replicas run."""
    return {one["Config"]["Image"] for one in stack.containers(service)}


async def test_scaling_up_and_down(busy: Stack) -> None:
    """To four of each and back: nobody's update fails, and the new ones serve at once."""
    driver = busy.docker("info", "--format", "{{.Driver}}")
    async with under_load(busy, "scaling", 60) as watchers:
        starting = asyncio.create_task(starts(busy, api=3, gateway=3))
        asked = time.monotonic()
        await in_a_thread(busy.up, api=4, gateway=4)
        print(f"up: {time.monotonic() - asked:.1f} s, until {time.strftime('%X')}")
        took = await asyncio.wait_for(starting, SERVES_SECONDS_MAX)
        for service, seconds in took.items():
            print(service, "answers after", *(f"{each:.1f}" for each in seconds), "s")
            if driver in COMMON_DRIVERS:
                assert max(seconds) <= SERVES_SECONDS_MAX
        # Only who comes now can be given to a new gateway.
        await watchers.leave(LEAVING)
        await eventually(lambda: watchers.connected == WATCHERS, what="those who left are back")
        held = await served(busy, "gateway")
        assert min(held.values()) > 0
        await in_a_thread(busy.up, api=1, gateway=1)
        print(f"down until {time.strftime('%X')}")
    (kept,) = await served(busy, "gateway")
    assert len(busy.containers("api")) == 1
    assert watchers.closed == {1000: LEAVING, 1012: WATCHERS - held[kept]}


async def test_rolling_out(busy: Stack) -> None:
    """A new image for both services; then two that do not work, which harms nobody."""
    image = another_image(busy, "scoreboard:test-next", "LABEL version=next")
    unset = another_image(busy, "scoreboard:test-unset", "ENV UPDATE_RATE_LIMIT=lots")
    broken = another_image(
        busy,
        "scoreboard:test-broken",
        "USER 0",
        "RUN echo 'raise SystemExit(\"it broke.\")' > services/api/__main__.py",
        "USER 10001:10001",
    )
    async with under_load(busy, "rollout", 60) as watchers:
        for service in ("api", "gateway"):
            starting = asyncio.create_task(starts(busy, **{service: 1}))
            done = await asyncio.to_thread(roll_out, busy, service, image)
            assert done.returncode == 0, done.stdout + done.stderr
            assert images(busy, service) == {image}
            (seconds,) = (await starting)[service]
            print(f"{service} answers after {seconds:.1f} s")
            assert seconds <= SERVES_SECONDS_MAX
        # The migration finds the one, and the other says nothing before it serves.
        for worse, sentence in (
            (unset, "UPDATE_RATE_LIMIT must be a quota"),
            (broken, "the new replica did not become healthy (it broke.)"),
        ):
            done = await asyncio.to_thread(roll_out, busy, "api", worse)
            print(done.stderr)
            assert done.returncode == 1
            assert sentence in done.stderr
            assert images(busy, "api") == {image}
    assert watchers.closed == {1012: WATCHERS}


async def test_losing_a_replica(busy: Stack) -> None:
    """SIGKILL of an API replica costs no request; that of a gateway, its own connections only."""
    await in_a_thread(busy.up, api=2, gateway=2)
    async with under_load(busy, "killed", 20) as watchers:
        busy.docker("kill", "--signal", "KILL", busy.containers("api")[0]["Id"])
        await asyncio.sleep(5)
        assert not watchers.closed
        victim = busy.containers("gateway")[0]["Id"]
        held = (await served(busy, "gateway"))[victim]
        busy.docker("kill", "--signal", "KILL", victim)
        await asyncio.sleep(3)
        assert watchers.closed == {1006: held}
        assert not watchers.refused
