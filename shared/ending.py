"""How a process ends: when a signal or an operator asks, and at once when asked again."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class Ending:
    """Waits to be asked; made on the loop whose process it ends."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._asked_again = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        (self._asked_again if self._asked.is_set() else self._asked).set()

    async def asked(self) -> None:
        """Wait for the signal, or for an operator."""
        await self._asked.wait()

    async def unless_asked_again(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this before the end, or leave off at a second signal."""
        tasks = [asyncio.create_task(work), asyncio.create_task(self._asked_again.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if not tasks[0].cancelled():
            tasks[0].result()

    @property
    def route(self) -> Route:
        """``POST /drain``: asks as a signal does, but once only."""

        async def drain(_request: Request) -> Response:
            self._asked.set()
            return JSONResponse({"status": "draining"}, 202)

        return Route("/drain", drain, methods=["POST"])
