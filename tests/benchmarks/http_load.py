"""HTTP load that costs little: prebuilt bytes on kept connections, one epoll, no event loop.

It shares the machine with what it measures, so a request takes it two system calls and a few
microseconds of Python. Answers are read no further than status and length.
"""

import gc
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

ANSWER_BYTES_MAX = 65536

DRAIN_SECONDS_MAX = 15.0
"""For what is under way at the end; Nginx gives up earlier."""

UNSENT = 0
"""The status of an arrival that found every connection busy, or whose connection broke."""

RECONNECTS_MAX = 3
"""In a row on one connection: a server may close it, but it has to answer in the end."""


REST_S = 0.0005
"""Between two looks at all connections of an open loop: a load that is woken by every answer costs
half as much again, at the expense of whom it measures. Latencies contain it."""


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the pauses of garbage collection: 0.3 s with as many answers as an open loop keeps."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Connection:
    """A socket with at most one request under way."""

    __slots__ = ("broken", "due", "received", "request", "sock")

    def __init__(self) -> None:
        self.received = b""
        self.request = b""
        self.due = 0.0
        self.broken = 0

    def open(self, port: int) -> None:
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect_ex(("127.0.0.1", port))

    def receive(self) -> tuple[int, bool] | None:
        """
        The status of the answer and whether the connection ends with it; None if more is to come.

        Raises:
            OSError: If it was closed instead.
        """
        data = self.sock.recv(ANSWER_BYTES_MAX)
        if not data:
            raise ConnectionResetError
        if self.received:
            data = self.received + data
        end = data.find(b"\r\n\r\n")
        # As Nginx writes it, or as uvicorn does.
        at = max(
            data.find(b"\r\nContent-Length: ", 0, end), data.find(b"\r\ncontent-length: ", 0, end)
        )
        if end < 0 or at < 0 or len(data) < end + 4 + int(data[at + 18 : data.find(b"\r", at + 2)]):
            self.received = data
            return None
        self.received = b""
        return int(data[9:12]), b"\r\nconnection: close" in data[:end].lower()


@dataclass
class Sample:
    """What a closed loop saw.

    Attributes:
        cpu_s: CPU seconds of the load itself.
        latencies_s: Of answers with status 200.
    """

    seconds: float = 0.0
    cpu_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


class ClosedLoop:
    """So many clients, each of which sends its next request when it has its answer."""

    def __init__(self, port: int, connections: int, requests: Iterator[bytes]) -> None:
        self._port = port
        self._requests = requests
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        for _ in range(connections):
            connection = _Connection()
            connection.request = next(requests)
            self._open(connection)

    def _open(self, connection: _Connection) -> None:
        connection.due = time.perf_counter()
        connection.open(self._port)
        self._connections[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock, select.EPOLLOUT)

    def _reopen(self, connection: _Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.sock.close()
        connection.received = b""
        self._open(connection)

    def run(self, seconds: float) -> Sample:
        """Go on for so long; what is under way at the end stays under way."""
        return self._turn(time.perf_counter() + seconds, draining=False)

    def drain(self) -> Sample:
        """Take the answers that are still due, and close."""
        sample = self._turn(time.perf_counter() + DRAIN_SECONDS_MAX, draining=True)
        for connection in self._connections.values():
            connection.sock.close()
        self._epoll.close()
        return sample

    def _turn(self, until: float, *, draining: bool) -> Sample:
        sample = Sample()
        began, cpu = time.perf_counter(), time.process_time()
        while (now := time.perf_counter()) < until and self._connections:
            for number, event in self._epoll.poll(until - now):
                connection = self._connections[number]
                try:
                    if event & select.EPOLLOUT:
                        connection.sock.send(connection.request)
                        self._epoll.modify(number, select.EPOLLIN)
                        continue
                    answer = connection.receive()
                except OSError:
                    connection.broken += 1
                    if connection.broken > RECONNECTS_MAX:
                        raise
                    self._reopen(connection)
                    continue
                if answer is None:
                    continue
                status, closing = answer
                connection.broken = 0
                answered = time.perf_counter()
                sample.statuses[status] += 1
                if status == 200:
                    sample.latencies_s.append(answered - connection.due)
                if draining:
                    connection.sock.close()
                    del self._connections[number]
                    continue
                connection.request = next(self._requests)
                if closing:
                    self._reopen(connection)
                    continue
                connection.due = answered
                connection.sock.send(connection.request)
        sample.seconds = time.perf_counter() - began
        sample.cpu_s = time.process_time() - cpu
        return sample


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of an open loop.

    Attributes:
        due_s: When it was to be sent, from the start.
        latency_s: From then to its answer, whenever it was really sent.
        request: What was, or should have been, sent.
    """

    due_s: float
    latency_s: float
    status: int
    request: bytes


@no_collection()
def open_loop(
    port: int, requests: Iterator[bytes], phases: Sequence[tuple[float, float]], connections: int
) -> list[Arrival]:
    """
    Requests at fixed times, whether earlier ones are answered or not.

    Args:
        phases: Requests per second, and for how many seconds, one after the other.
        connections: At most; an arrival that finds all of them busy is not sent.

    Returns:
        All of them, in the order of their answers; what never was answered is ``UNSENT``.
    """
    ends = list(accumulate(seconds for _, seconds in phases))
    due = (
        end - seconds + number / rate
        for (rate, seconds), end in zip(phases, ends, strict=True)
        for number in range(int(rate * seconds))
    )
    arrivals: list[Arrival] = []
    idle: list[_Connection] = []
    open_: dict[int, _Connection] = {}
    epoll = select.epoll()
    began = time.perf_counter()

    def lose(connection: _Connection) -> None:
        del open_[connection.sock.fileno()]
        connection.sock.close()

    following = next(due, None)
    while following is not None or len(open_) > len(idle):
        now = time.perf_counter() - began
        while following is not None and following <= now:
            connection = None
            request = next(requests)
            if idle:
                connection = idle.pop()
                connection.due, connection.request = following, request
                try:
                    connection.sock.send(connection.request)
                except OSError:  # It was closed while idle.
                    lose(connection)
                    connection = None
            if connection is None and len(open_) < connections:
                connection = _Connection()
                connection.due, connection.request = following, request
                connection.open(port)
                open_[connection.sock.fileno()] = connection
                epoll.register(connection.sock, select.EPOLLOUT)
            if connection is None:
                arrivals.append(Arrival(following, now - following, UNSENT, request))
            following = next(due, None)
        if now > ends[-1] + DRAIN_SECONDS_MAX:
            break
        time.sleep(REST_S)
        now = time.perf_counter() - began
        wait = DRAIN_SECONDS_MAX if following is None else max(0.0, following - now)
        for number, event in epoll.poll(wait):
            connection = open_[number]
            try:
                if event & select.EPOLLOUT:
                    connection.sock.send(connection.request)
                    epoll.modify(number, select.EPOLLIN)
                    continue
                answer = connection.receive()
            except OSError:
                if connection in idle:
                    idle.remove(connection)
                else:
                    now = time.perf_counter() - began
                    arrivals.append(
                        Arrival(connection.due, now - connection.due, UNSENT, connection.request)
                    )
                lose(connection)
                continue
            if answer is None:
                continue
            status, closing = answer
            now = time.perf_counter() - began
            arrivals.append(
                Arrival(connection.due, now - connection.due, status, connection.request)
            )
            if closing:
                lose(connection)
            else:
                idle.append(connection)
    for connection in open_.values():
        connection.sock.close()
    epoll.close()
    return arrivals
