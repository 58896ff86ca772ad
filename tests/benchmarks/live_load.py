"""WebSocket clients that cost little: raw sockets on one epoll, in processes of their own.

They share the machine with what they watch, so a board takes a client one `readv` into a buffer
that all share, and no parsing: what is as long as the board before is a board, and its number
stands at a fixed place, as its first score.
"""

import asyncio
import ipaddress
import multiprocessing
import os
import resource
import select
import socket
import time
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

from shared.token import mint

NUMBER_DIGITS = 10
"""Of a board's number: then all boards are of one length."""

FIRST_NUMBER = 10 ** (NUMBER_DIGITS - 1)

CLIENTS_PER_PROCESS_MAX = 17_000
"""A common limit is 20,000 open files."""

CLIENTS_PER_ADDRESS = 100
"""So that they are many clients and not one with many connections."""

FIRST_ADDRESS = ipaddress.IPv4Address("127.1.0.1")

HANDSHAKES_AT_ONCE = 64
"""Under way, of all processes together: fewer than any server's queue of connections holds."""

TOKEN_TTL_S = 3600.0

READ_BYTES = 65536

EVENTS_MAX = 512
"""Taken from epoll at once."""

PAUSE_S = 0.002
"""Between two looks at all clients. A load that slept on epoll would be woken by nearly every
frame, at the expense of whoever sends it; this is what an arrival may be noted too late."""

ANSWER_SECONDS_MAX = 300.0
"""For a command to the processes; joining takes longest."""

SETTLED_S = 1.0
"""A board that was there for longer must have reached whoever leaves."""

TEXT, CLOSE, PING = 0x81, 0x88, 0x89
"""First bytes of frames that are no fragments."""

PONG = bytes([0x8A, 0x80, 0, 0, 0, 0])
GOING_AWAY = bytes([0x88, 0x82, 0, 0, 0, 0]) + (1001).to_bytes(2, "big")
"""Masked, with zeros, as a client's frames must be."""

ABNORMAL = 1006
"""Stands for a connection that ended without a close frame."""

REQUEST = (
    "GET /scores/live?token={token} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
    "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

_SCORE = b'"score":'

_BIND_ADDRESS_NO_PORT = 24
"""Linux's IP_BIND_ADDRESS_NO_PORT: the port is chosen at connect, by the whole four-tuple."""


@dataclass
class Seen:
    """What clients have seen since the last report.

    Attributes:
        arrivals: When each client had a board, on the machine's monotonic clock, by its number;
            without the one that a client is shown when it joins.
        replaced: When the last of those who had this board had another.
        missed: Boards between the one a client had and its next.
        backwards: Older boards after newer ones.
        left_behind: Clients that left without a board that others had had for ``SETTLED_S``.
        joined: Clients that have joined.
        closed: Connections the server has ended, by close code.
        holding: How many clients hold which board now; 0 for none yet.
        opening: Handshakes that are not answered yet.
        cpu_s: CPU seconds of the load itself.
    """

    arrivals: dict[int, "array[float]"] = field(default_factory=dict)
    replaced: dict[int, float] = field(default_factory=dict)
    missed: int = 0
    backwards: int = 0
    left_behind: int = 0
    joined: int = 0
    closed: Counter[int] = field(default_factory=Counter)
    holding: Counter[int] = field(default_factory=Counter)
    opening: int = 0
    cpu_s: float = 0.0

    def add(self, other: "Seen") -> None:
        """Take over what the clients of another process have seen."""
        for number, times in other.arrivals.items():
            self.arrivals.setdefault(number, array("d")).extend(times)
        for number, at in other.replaced.items():
            self.replaced[number] = max(at, self.replaced.get(number, 0.0))
        self.missed += other.missed
        self.backwards += other.backwards
        self.left_behind += other.left_behind
        self.joined += other.joined
        self.closed += other.closed
        self.holding += other.holding
        self.opening += other.opening
        self.cpu_s += other.cpu_s

    @property
    def frames(self) -> int:
        """Boards received, by all clients together."""
        return sum(map(len, self.arrivals.values()))


class _Clients:
    """Those of one process."""

    def __init__(self, commands: Connection, secret: str, first: int, at_once: int) -> None:
        """Clients are numbered from ``first``; each is a user with a token."""
        self._commands = commands
        self._secret = secret
        self._numbers = iter(range(first, first + 10_000_000))
        self._at_once = at_once
        self._waiting: deque[tuple[int, str, bytes]] = deque()  # port, address, request
        self._opening: dict[int, tuple[int, bytes]] = {}  # port and answer so far, by file
        self._held: dict[int, int] = {}  # the board last shown, by file; the oldest client first
        self._port: dict[int, int] = {}
        self._rest: dict[int, bytes] = {}  # of a frame that was not read whole
        self._usual = 0  # bytes of a frame
        self._number_at = 0  # in it
        self._first_seen: dict[int, float] = {}  # of the newest boards
        self._seen = Seen()
        self._cpu_s = time.process_time()
        self._joining = 0.0  # since when
        self._leave_every_s = self._leave_at = float("inf")
        self._epoll = select.epoll()
        self._epoll.register(commands, select.EPOLLIN)

    def run(self) -> None:
        """Until the commands end."""
        readv, now = os.readv, time.monotonic
        buffer = bytearray(READ_BYTES)
        into = [buffer]
        held, rest = self._held, self._rest
        while True:
            for file, _ in self._epoll.poll(self._idle_s(), EVENTS_MAX):
                if file == self._commands.fileno():
                    try:
                        command, *arguments = self._commands.recv()
                    except EOFError:
                        return
                    getattr(self, command)(*arguments)
                    continue
                try:
                    size = readv(file, into)
                except BlockingIOError:
                    continue
                except ConnectionError:
                    size = 0
                if size == self._usual and buffer[0] == TEXT and file in held and not rest:
                    number = int(buffer[self._number_at : self._number_at + NUMBER_DIGITS])
                    self._shown(file, number, now())
                else:
                    self._receive(file, bytes(buffer[:size]))
            if not self._waiting:
                time.sleep(PAUSE_S)
            while self._waiting and len(self._opening) < self._at_once:
                self._connect(*self._waiting.popleft())
            if self._joining and not self._waiting and not self._opening:
                self._commands.send(now() - self._joining)
                self._joining = 0.0
            if now() >= self._leave_at:
                self._leave_at += self._leave_every_s
                self._exchange()

    def _idle_s(self) -> float:
        return min(1.0, max(0.0, self._leave_at - time.monotonic()))

    def join(self, port: int, count: int) -> None:
        """Connect so many to the port; answers how long it took until each was accepted."""
        self._waiting.extend(self._newcomer(port) for _ in range(count))
        self._joining = time.monotonic()

    def leave(self, every_s: float) -> None:
        """From now on let the oldest client leave and a new one come in its place, so often."""
        self._leave_every_s = every_s
        self._leave_at = time.monotonic() + every_s

    def report(self) -> None:
        """Answer what was seen since the last report."""
        seen, self._seen = self._seen, Seen()
        seen.holding.update(self._held.values())
        seen.opening = len(self._opening) + len(self._waiting)
        spent, self._cpu_s = self._cpu_s, time.process_time()
        seen.cpu_s = self._cpu_s - spent
        self._commands.send(seen)

    def _newcomer(self, port: int) -> tuple[int, str, bytes]:
        number = next(self._numbers)
        token = mint(self._secret, f"watcher-{number}", TOKEN_TTL_S)
        address = FIRST_ADDRESS + number // CLIENTS_PER_ADDRESS
        return port, str(address), REQUEST.format(token=token).encode()

    def _connect(self, port: int, address: str, request: bytes) -> None:
        client = socket.socket()
        client.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        client.bind((address, 0))
        client.connect(("127.0.0.1", port))
        client.send(request)
        client.setblocking(False)
        file = client.detach()
        self._opening[file] = port, b""
        # Edge-triggered, as each read takes all there is: epoll looks at nobody twice.
        self._epoll.register(file, select.EPOLLIN | select.EPOLLET)

    def _exchange(self) -> None:
        file = next(iter(self._held))
        settled = time.monotonic() - SETTLED_S
        if any(
            at < settled for number, at in self._first_seen.items() if number > self._held[file]
        ):
            self._seen.left_behind += 1
        port = self._port[file]
        os.write(file, GOING_AWAY)
        self._forget(file)
        self._waiting.append(self._newcomer(port))

    def _forget(self, file: int) -> None:
        os.close(file)
        for kept in (self._held, self._port, self._opening, self._rest):
            kept.pop(file, None)

    def _receive(self, file: int, data: bytes) -> None:
        """What is not just the usual frame."""
        if not data:
            if file in self._opening:
                raise RuntimeError(f"the handshake was not answered: {self._opening[file]}")
            self._ended(file, ABNORMAL)
            return
        if file in self._opening:
            port, before = self._opening[file]
            head, blank, data = (before + data).partition(b"\r\n\r\n")
            if not blank:
                self._opening[file] = port, head
                return
            del self._opening[file]
            if not head.startswith(b"HTTP/1.1 101 "):
                raise RuntimeError(f"the handshake was refused: {head!r} {data!r}")
            self._port[file] = port
            self._held[file] = 0
            self._seen.joined += 1
        data = self._rest.pop(file, b"") + data
        while data:
            frame = _split(data)
            if frame is None:
                self._rest[file] = data
                return
            start, end = frame
            kind, payload, data = data[0], data[start:end], data[end:]
            if kind == TEXT:
                at = payload.index(_SCORE) + len(_SCORE)
                self._usual, self._number_at = end, start + at
                self._shown(file, int(payload[at : at + NUMBER_DIGITS]), time.monotonic())
            elif kind == PING:
                os.write(file, PONG)
            elif kind == CLOSE:
                self._ended(file, int.from_bytes(payload[:2], "big"))
                return
            else:
                raise RuntimeError(f"a frame of an unknown kind: {kind:#x} {payload!r}")

    def _ended(self, file: int, code: int) -> None:
        self._seen.closed[code] += 1
        self._forget(file)

    def _shown(self, file: int, number: int, now: float) -> None:
        held = self._held[file]
        self._held[file] = number
        if not held:
            return
        if number != held + 1:
            if number <= held:
                self._seen.backwards += 1
            else:
                self._seen.missed += number - held - 1
        arrivals = self._seen.arrivals
        if number not in arrivals:
            arrivals[number] = array("d")
            self._first_seen[number] = now
            if len(self._first_seen) > 100:
                del self._first_seen[min(self._first_seen)]
        arrivals[number].append(now)
        self._seen.replaced[held] = now


def _split(data: bytes) -> tuple[int, int] | None:
    """Where the payload of the first frame starts and ends; None if not all of it is there."""
    if len(data) < 4 and data[1:2] != b"\0":
        return None
    start, length = 2, data[1]
    if length == 126:
        start, length = 4, int.from_bytes(data[2:4], "big")
    return (start, start + length) if len(data) >= start + length else None


def _work(commands: Connection, secret: str, first: int, at_once: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _Clients(commands, secret, first, at_once).run()


class Load:
    """Clients in so many processes as their number needs, for as long as the block."""

    def __init__(self, secret: str, clients: int, *, first: int = 0, processes: int = 1) -> None:
        """
        Args:
            secret: What tokens are signed with.
            clients: At most.
            first: Number of the first; those of two loads must differ.
            processes: At least.
        """
        count = max(processes, -(-clients // CLIENTS_PER_PROCESS_MAX))
        context = multiprocessing.get_context("spawn")
        self._commands: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for place in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, secret, first + place * 1_000_000, HANDSHAKES_AT_ONCE // count),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._commands.append(ours)
            self._processes.append(process)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for commands in self._commands:
            commands.close()
        for process in self._processes:
            await asyncio.to_thread(process.join, ANSWER_SECONDS_MAX)

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [process.pid for process in self._processes if process.pid is not None]

    async def join(self, port: int, count: int) -> float:
        """Connect so many clients more to this port; the seconds until each was accepted."""
        share, more = divmod(count, len(self._commands))
        for place, commands in enumerate(self._commands):
            commands.send(("join", port, share + (place < more)))
        times: list[float] = [await self._answer(commands) for commands in self._commands]
        return max(times)

    def leave(self, per_s: float) -> None:
        """From now on let so many a second leave, and new ones come in their place."""
        for commands in self._commands:
            commands.send(("leave", len(self._commands) / per_s))

    async def report(self) -> Seen:
        """What was seen since the last report."""
        seen = Seen()
        for commands in self._commands:
            commands.send(("report",))
        for commands in self._commands:
            seen.add(await self._answer(commands))
        return seen

    async def _answer(self, commands: Connection) -> Any:
        if not await asyncio.to_thread(commands.poll, ANSWER_SECONDS_MAX):
            raise TimeoutError("the load does not answer")
        return await asyncio.to_thread(commands.recv)
