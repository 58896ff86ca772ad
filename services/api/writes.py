"""The way of an increment into PostgreSQL: queued, committed with its neighbours, retried once safe.

This is the only layer that retries: redis-py's and SQLAlchemy's own retries are off, and Nginx
replays only a request whose replica died, under the same id.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import structlog
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from services.api import metrics
from services.api.batch import Batches
from services.api.shards import (
    DATABASE_FAILURES,
    Moved,
    NoOwner,
    Operation,
    Outcome,
    Recorded,
    Refusal,
    Shards,
    is_transient,
)

ATTEMPTS_MAX = 4
"""The first try and three retries: the contract's number."""

DEADLINE_S = 2.0
"""For one batch, retries included. Nginx waits 5 s, and the queue before it takes at most 1 s."""

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.05, 0.4
"""Full jitter over min(0.4, 0.05 * 2**n): a shard that restarts is back within a few tenths."""

BATCH_MAX = 500
"""Operations in one commit. Beyond a few hundred the rows, not the commit, are what costs."""

QUEUE_MAX = 4096
"""Operations waiting for one shard: about a tenth of a second of its capacity."""

QUEUE_PATIENCE_S = 1.0

OWNER_WAIT_S = 0.05
"""Between two looks at the catalogs for the owner of a partition that moves or whose shard is away."""

log = structlog.get_logger()


class NotWritten(Exception):
    """The increment was not seen to be committed; sent again under its id it counts once."""


class Writes:
    """One queue a shard, so that a slow shard delays its own users only."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._queues = [
            Batches[Operation, Outcome](
                partial(self._commit, shard),
                batch_max=BATCH_MAX,
                queue_max=QUEUE_MAX,
                patience_s=QUEUE_PATIENCE_S,
            )
            for shard in range(shards.count)
        ]
        for shard, queue in enumerate(self._queues):
            metrics.QUEUE.labels(shard).set_function(queue.__len__)

    async def submit(self, operation: Operation) -> Recorded | Refusal:
        """
        Add an increment; when this returns it is durable, or refused for good.

        Raises:
            Overloaded: If it was not started.
            NotWritten: If it could not be written within tries and deadline.
        """
        until = time.monotonic() + DEADLINE_S
        while True:
            try:
                shard = self._shards.shard_of(operation.user_id)
            except NoOwner:
                pass
            else:
                outcome = await self._queues[shard].submit(operation)
                if not isinstance(outcome, Moved):
                    return outcome
            if time.monotonic() > until:
                raise NotWritten
            await asyncio.sleep(OWNER_WAIT_S)
            await self._shards.refresh_owners()

    async def _commit(
        self, shard: int, operations: Sequence[Operation]
    ) -> list[Outcome | Exception]:
        """Commit a batch; an operation id that occurs twice in it is taken in turn."""
        outcomes: dict[int, Outcome | Exception] = {}
        left = list(enumerate(operations))
        while left:
            turn: dict[tuple[str, str], tuple[int, Operation]] = {}
            for place, operation in left:
                turn.setdefault((operation.user_id, operation.op_id), (place, operation))
            places = [place for place, _ in turn.values()]
            found = await self._try([operation for _, operation in turn.values()], shard)
            outcomes |= zip(places, found, strict=True)
            left = [entry for entry in left if entry[0] not in outcomes]
        return [outcomes[place] for place in range(len(operations))]

    async def _try(
        self, operations: Sequence[Operation], shard: int
    ) -> Sequence[Outcome | Exception]:
        started = time.perf_counter()
        outcomes: Sequence[Outcome | Exception]
        try:
            outcomes = await self._retrying(shard)(self._shards.record, shard, operations)
        except DATABASE_FAILURES as error:
            metrics.WRITE_FAILURES.labels(shard).inc(len(operations))
            log.error("write.failed", shard=shard, operations=len(operations), error=repr(error))
            if is_transient(error) or len(operations) == 1:
                return [NotWritten()] * len(operations)
            # Something about one of them: the others must not suffer for it.
            return [(await self._try([operation], shard))[0] for operation in operations]
        metrics.BATCH_SECONDS.labels(shard).observe(time.perf_counter() - started)
        metrics.BATCH_OPERATIONS.labels(shard).observe(len(operations))
        return outcomes

    def _retrying(self, shard: int) -> AsyncRetrying:
        def count(state: RetryCallState) -> None:
            metrics.WRITE_RETRIES.labels(shard).inc()
            error = state.outcome.exception() if state.outcome else None
            log.warning("write.retry", shard=shard, attempt=state.attempt_number, error=repr(error))

        return AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=BACKOFF_FIRST_S, max=BACKOFF_MAX_S),
            stop=stop_after_attempt(ATTEMPTS_MAX) | stop_before_delay(DEADLINE_S),
            before_sleep=count,
            reraise=True,
        )

    async def drain(self) -> None:
        """Wait until everything that was submitted is committed or failed."""
        await asyncio.gather(*(queue.drain() for queue in self._queues))
