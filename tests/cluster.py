"""A cluster as its users see it: the command, the HTTP API and the WebSocket, through Nginx.

Every answer received here is held against the published descriptions.
"""

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import websockets
from prometheus_client.parser import text_string_to_metric_families

from shared.token import mint
from tests.openapi import check_answer, check_live_message

COMMAND = str(Path(sys.executable).with_name("scoreboard"))

UP_SECONDS_MAX = 120
ANSWER_SECONDS_MAX = 20
EVENTUALLY_S = 5.0

Json = dict[str, Any]

_readers = itertools.count()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, already checked against the description."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


class Scoreboard(ABC):
    """A scoreboard as its clients see it, whatever runs it.

    Attributes:
        port: Of Nginx, or of whatever else has the clients, on 127.0.0.1.
        server: What it calls itself.
    """

    port: int
    server: str | None = "nginx"

    @abstractmethod
    def secret(self, name: str) -> str:
        """What its services were given: ``jwt_secret``, ``shard_urls``, ``redis_url``."""

    @abstractmethod
    def replicas(self, service: str) -> Sequence[tuple[str, int]]:
        """Host and port on which each API replica or each gateway takes its clients."""

    @abstractmethod
    def logs(self) -> Mapping[str, str]:
        """What each process has written, by name; Nginx's is ``nginx``."""

    @property
    def shard_urls(self) -> list[str]:
        """The shards, as the API has them."""
        return self.secret("shard_urls").split(",")

    def token(self, user: str, ttl_s: float = 3600) -> str:
        """A token of that user."""
        return mint(self.secret("jwt_secret"), user, ttl_s)

    @property
    def url(self) -> str:
        """Through Nginx."""
        return f"http://127.0.0.1:{self.port}"

    async def metric(self, name: str, **labels: str) -> float:
        """A metric of all API replicas: see :func:`metric`."""
        urls = [f"http://{host}:{port}" for host, port in self.replicas("api")]
        return sum([await metric(url, name, **labels) for url in urls])

    @asynccontextmanager
    async def client(
        self, address: str = "127.0.0.1", url: str | None = None
    ) -> AsyncIterator["Client"]:
        """A client that calls from this loopback address, through Nginx unless a URL is given."""
        transport = httpx.AsyncHTTPTransport(local_address=address)
        async with httpx.AsyncClient(
            transport=transport, base_url=url or self.url, timeout=ANSWER_SECONDS_MAX
        ) as http:
            yield Client(self, http)

    @asynccontextmanager
    async def live(
        self, user: str = "watcher", port: int | None = None, host: str = "127.0.0.1"
    ) -> AsyncIterator[websockets.ClientConnection]:
        """A WebSocket through Nginx, or straight to the gateway there."""
        headers = {"Authorization": f"Bearer {self.token(user)}"}
        url = f"ws://{host}:{port or self.port}/scores/live"
        async with websockets.connect(url, additional_headers=headers, proxy=None) as socket:
            yield socket


class Cluster(Scoreboard):
    """One home and its cluster, up or down."""

    def __init__(self, home: Path, environ: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.port = free_port()
        self.environ = {**os.environ, **(environ or {})}

    def command(
        self, *words: str, timeout: float = UP_SECONDS_MAX
    ) -> "subprocess.CompletedProcess[str]":
        """Run `scoreboard` on this home."""
        return subprocess.run(
            [COMMAND, words[0], "--home", str(self.home), *words[1:]],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def up(self, **counts: int) -> None:
        """Start it and wait until it is ready."""
        options = [f"--{name}={count}" for name, count in counts.items()]
        done = self.command("up", "--detach", f"--port={self.port}", *options)
        assert done.returncode == 0, done.stdout + done.stderr

    def down(self) -> None:
        """Stop it."""
        done = self.command("down")
        assert done.returncode == 0, done.stdout + done.stderr

    def status(self) -> Json:
        """What `scoreboard status` says."""
        status: Json = json.loads(self.command("status", "--json").stdout)
        return status

    def process(self, name: str) -> Json:
        """One process of the status."""
        return next(process for process in self.status()["processes"] if process["name"] == name)

    def names(self, prefix: str) -> list[str]:
        """The processes whose name starts so."""
        return [p["name"] for p in self.status()["processes"] if p["name"].startswith(prefix)]

    def kill(self, name: str) -> None:
        """SIGKILL one process."""
        os.kill(self.process(name)["pid"], signal.SIGKILL)

    def secret(self, name: str) -> str:
        """A secret of the home."""
        return (self.home / "secrets" / name).read_text()

    def replicas(self, service: str) -> list[tuple[str, int]]:
        """Where each takes its clients."""
        return [("127.0.0.1", self.process(name)["port"]) for name in self.names(f"{service}-")]

    def logs(self) -> dict[str, str]:
        """Each of the home's, by the process's name."""
        return {path.stem: path.read_text() for path in (self.home / "log").glob("*.log")}


class Basic(Cluster):
    """One home and its basic installation, up or down."""

    server = None

    def up(self, **counts: int) -> None:
        """Start it and wait until it is ready."""
        done = self.command("basic", "--detach", f"--port={self.port}")
        assert done.returncode == 0, done.stdout + done.stderr

    def replicas(self, service: str) -> list[tuple[str, int]]:
        """The one process is both."""
        return [("127.0.0.1", self.port)]

    async def metric(self, name: str, **labels: str) -> float:
        """A metric of the process."""
        port = self.process("basic")["operations_port"]
        return await metric(f"http://127.0.0.1:{port}", name, **labels)


class Client:
    """HTTP by one client."""

    def __init__(self, cluster: Scoreboard, http: httpx.AsyncClient) -> None:
        self._cluster = cluster
        self.http = http

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        """Any request; the answer is one that the description has."""
        response = await self.http.request(method, path, **options)
        answer = Answer(response.status_code, response.headers, response.content)
        if path.startswith("/api/"):
            check_answer(method, path, answer.status, answer.headers, answer.body)
        return answer

    async def post(
        self, user: str, increment: object = 1, *, key: str | None = None, token: str | None = None
    ) -> Answer:
        """An increment by the user, with the user's own token unless another is given."""
        headers = {"Authorization": f"Bearer {token or self._cluster.token(user)}"}
        if key is not None:
            headers["Idempotency-Key"] = key
        return await self.request(
            "POST",
            "/api/scores/update",
            headers=headers,
            json={"userId": user, "scoreIncrement": increment},
        )

    async def send(self, user: str, body: bytes, **headers: str) -> Answer:
        """Any body, as this user."""
        return await self.request(
            "POST",
            "/api/scores/update",
            headers={
                "Authorization": f"Bearer {self._cluster.token(user)}",
                "Content-Type": "application/json",
                **headers,
            },
            content=body,
        )

    async def top(self, user: str = "") -> list[Json]:
        """The board, on the quota of this user, or of one whom nobody else is."""
        user = user or f"reader-{next(_readers)}"
        answer = await self.request(
            "GET",
            "/api/scores/top",
            headers={"Authorization": f"Bearer {self._cluster.token(user)}"},
        )
        assert answer.status == 200, answer
        rows: list[Json] = answer.json["topScores"]
        return rows


async def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a replica's samples of that name that have these labels; 0 if there is none."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{url}/metrics")).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def receive_board(socket: websockets.ClientConnection) -> list[Json]:
    """The next board a WebSocket receives, checked against the description."""
    text = await asyncio.wait_for(socket.recv(), ANSWER_SECONDS_MAX)
    assert isinstance(text, str)
    check_live_message(text)
    rows: list[Json] = json.loads(text)["topScores"]
    return rows


async def receive_until(
    socket: websockets.ClientConnection, wanted: Callable[[list[Json]], bool]
) -> list[Json]:
    """Boards, until one is as wanted."""
    while not wanted(board := await receive_board(socket)):
        pass
    return board


async def eventually(
    condition: Callable[[], Any], *, within_s: float = EVENTUALLY_S, what: str = ""
) -> float:
    """Poll until the (perhaps async) condition holds; how many seconds that took."""
    started = time.monotonic()
    while True:
        holds = condition()
        if asyncio.iscoroutine(holds):
            holds = await holds
        if holds:
            return time.monotonic() - started
        if time.monotonic() - started > within_s:
            raise AssertionError(f"not within {within_s} s: {what or condition}")
        await asyncio.sleep(0.02)
