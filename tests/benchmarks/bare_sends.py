"""The floor of a broadcast: one `os.write` a client and nothing else. A process of its own.

``python -m tests.benchmarks.bare_sends PORT``: whoever sends a request is a client, and gets each
line of standard input as a WebSocket frame. It checks nothing and never reads again.
"""

import os
import resource
import select
import socket
import sys

from services.gateway.audience import SEND_BUFFER_BYTES

REQUEST_BYTES_MAX = 8192
LINE_BYTES_MAX = 65536
BACKLOG = 2048

ANSWER = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


def frame(message: bytes) -> bytes:
    """An unmasked text frame of 126 to 65,535 bytes of payload."""
    return b"\x81\x7e" + len(message).to_bytes(2, "big") + message


def main(port: int) -> None:
    """Until standard input ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    newest = b""
    clients: list[int] = []
    epoll = select.epoll()
    lines = sys.stdin.fileno()
    with socket.create_server(("127.0.0.1", port), backlog=BACKLOG) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        epoll.register(door, select.EPOLLIN)
        epoll.register(lines, select.EPOLLIN)
        while True:
            for file, _ in epoll.poll():
                if file == lines:
                    data = os.read(lines, LINE_BYTES_MAX)
                    if not data:
                        return
                    newest = frame(data.splitlines()[-1])
                    write = os.write
                    for client in clients:
                        write(client, newest)
                elif file == door.fileno():
                    client = door.accept()[0].detach()
                    os.set_blocking(client, False)
                    epoll.register(client, select.EPOLLIN)
                else:
                    epoll.unregister(file)
                    if os.read(file, REQUEST_BYTES_MAX):
                        os.write(file, ANSWER + newest)
                        clients.append(file)


if __name__ == "__main__":
    main(int(sys.argv[1]))
