"""Group commit: what arrives while a batch is under way is the next batch.

No timer: an idle system runs an item at once, a busy one shares the cost of a round trip, or of a
disk flush, among everyone who came meanwhile.
"""

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(Exception):
    """The queue is full, or the item has waited too long; nothing was done with it."""


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
        # Each with whom its result is for, and until when it may be started.
        self._queue: deque[tuple[Item, asyncio.Future[Result], float]] = deque()
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
        self._queue.append((item, future, time.monotonic() + self._patience_s))
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

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        now = time.monotonic()
        while self._queue and len(batch) < self._batch_max:
            item, future, until = self._queue.popleft()
            if future.done():  # Its client has gone.
                continue
            if until < now:
                future.set_exception(Overloaded())
            else:
                batch.append((item, future))
        return batch

    async def _do(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        results: Sequence[Result | Exception]
        try:
            results = await self._run([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - handed on to everyone who waits for it
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def drain(self) -> None:
        """Wait until everything that was submitted is done."""
        while self._worker is not None:
            await self._worker
