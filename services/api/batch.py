"""Group commit: what arrives while a batch is under way is the next batch.

No timer: an idle system runs an item at once, a busy one shares the cost of a round trip, or of a
disk flush, among everyone who came meanwhile.
"""

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(Exception):
    """The queue is full, or the item has waited too long; nothing was done with it."""


@dataclass(slots=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Result]
    until: float


class Batches(Generic[Item, Result]):
    """A bounded queue of items and the one batch of them that is under way."""

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        batch_max: int,
        queue_max: int,
        patience_s: float,
    ) -> None:
        """
        Args:
            run: Does a batch, at most ``batch_max`` items, and returns a result or an exception
                for each, in order. What it raises is everyone's result.
            queue_max: Items that may wait; the next one is refused.
            patience_s: Seconds an item may wait before it is refused unstarted.
        """
        self._run = run
        self._batch_max = batch_max
        self._queue_max = queue_max
        self._patience_s = patience_s
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Items waiting."""
        return len(self._queue)

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """
        Have the item done in the next batch; to be awaited, or cancelled.

        Raises:
            Overloaded: If it was not started.
        """
        if len(self._queue) >= self._queue_max:
            raise Overloaded
        future: asyncio.Future[Result] = asyncio.Future()
        self._queue.append(_Waiting(item, future, time.monotonic() + self._patience_s))
        if self._worker is None:
            # In no request's context: what it logs is not about the one that happened to be first.
            self._worker = asyncio.create_task(self._work(), context=contextvars.Context())
        return future

    async def _work(self) -> None:
        try:
            while self._queue:
                await self._let_arrive()
                batch = self._next_batch()
                if batch:
                    await self._do(batch)
        finally:
            self._worker = None

    async def _let_arrive(self) -> None:
        """Let the loop take in what has arrived already, for as long as that brings more items."""
        waiting = 0
        while waiting < len(self._queue) < self._batch_max:
            waiting = len(self._queue)
            await asyncio.sleep(0)

    def _next_batch(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        now = time.monotonic()
        while self._queue and len(batch) < self._batch_max:
            waiting = self._queue.popleft()
            if waiting.future.done():  # Its client has gone.
                continue
            if waiting.until < now:
                waiting.future.set_exception(Overloaded())
            else:
                batch.append(waiting)
        return batch

    async def _do(self, batch: list[_Waiting[Item, Result]]) -> None:
        results: Sequence[Result | Exception]
        try:
            results = await self._run([waiting.item for waiting in batch])
        except Exception as error:  # noqa: BLE001 - handed on to everyone who waits for it
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            if waiting.future.done():
                continue
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)

    async def drain(self) -> None:
        """Wait until everything that was submitted is done."""
        while self._worker is not None:
            await self._worker
