"""The HTTP server inside a process, by its bytes."""

import asyncio

from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from shared.server import HttpServer, listen

REQUESTS = 200


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Closes the connection where it is asked to."""
    headers = {"connection": "close"} if scope["path"] == "/last" else {}
    await PlainTextResponse("whole", headers=headers)(scope, receive, send)


async def test_an_answer_leaves_in_one_piece() -> None:
    """Or else a process that is killed leaves half of one with Nginx."""
    door = listen("PORT", "127.0.0.1", 0)
    server = HttpServer(app, grace_s=1)
    serving = asyncio.create_task(server.serve([door]))
    reader, writer = await asyncio.open_connection(*door.getsockname())
    for _ in range(REQUESTS):
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        answer = await reader.read(65536)
        assert answer.endswith(b"\r\n\r\nwhole"), answer
    writer.write(b"HEAD / HTTP/1.1\r\nHost: here\r\n\r\n")
    assert (await reader.read(65536)).endswith(b"\r\n\r\n")
    writer.write(b"GET /last HTTP/1.1\r\nHost: here\r\n\r\n")
    assert (await reader.read()).endswith(b"\r\n\r\nwhole")
    writer.close()
    server.should_exit = True
    await serving
