"""The way of an increment into PostgreSQL: queued, committed with its neighbours, tried again.

This is the only layer of ours that tries again: redis-py's own retries are off. Nginx sends a request
again whose replica died or froze, under the same id.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import asyncpg
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
from services.api.breaker import Breaker, RetryBudget
from services.api.shards import (
    DATABASE_FAILURES,
    Contended,
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

DEADLINE_S = 3.0
"""For one batch, retries included: four statements that time out, and the waits between them.
With the queue before it and the announcement after it, still under the 5 s that Nginx waits."""

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.05, 0.4
"""Full jitter over min(0.4, 0.05 * 2**n): a shard that restarts is back within a few tenths."""

BATCH_MAX = 500
"""Operations in one commit. Beyond a few hundred the rows, not the commit, are what costs."""

QUEUE_MAX = 4096
"""Operations waiting for one shard: about a tenth of a second of its capacity."""

QUEUE_PATIENCE_S = 0.75

RETRY_SHARE = 0.1
"""Retries to first tries, at most: what a shard in trouble is asked to do on top of its work."""

RETRY_RESERVE = 30
"""Retries beyond that share, once in a replica's life: ten increments' that fail one by one."""

RETRIES_SAVED_MAX = (ATTEMPTS_MAX - 1) * BATCH_MAX
"""All retries of one full batch."""

FAILURES_MAX = 3
"""Tries in a row: on a busy machine the deadline ends a batch before its third retry."""

REST_S = 0.25
"""For which a shard that does not take increments is left alone; then one tries it for all."""

OWNER_WAIT_S = 0.05
"""Between two looks at the catalogs for the owner of a partition that moves or whose shard is away."""

log = structlog.get_logger()


Result = Outcome | Exception


class NotWritten(Exception):
    """The increment was not seen to be committed; sent again under its id it counts once."""


class Writes:
    """Two queues a shard: a slow shard delays its own users only, and a locked row its own user."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._queues = [
            self._queue(shard, self._commit, BATCH_MAX) for shard in range(shards.count)
        ]
        # Whose row somebody else holds waits here, one by one, and nobody waits behind them.
        self._contended = [self._queue(shard, self._commit, 1) for shard in range(shards.count)]
        self._breakers = [
            Breaker(failures_max=FAILURES_MAX, rest_s=REST_S, trial_s=DEADLINE_S)
            for _ in range(shards.count)
        ]
        self._budgets = [
            RetryBudget(share=RETRY_SHARE, reserve=RETRY_RESERVE, saved_max=RETRIES_SAVED_MAX)
            for _ in range(shards.count)
        ]
        metrics.QUEUE_LIMIT.set(QUEUE_MAX)
        for shard, queue in enumerate(self._queues):
            metrics.QUEUE.labels(shard).set_function(queue.__len__)
            metrics.RESTING.labels(shard).set_function(partial(_is_resting, self._breakers[shard]))

    def _queue(
        self, shard: int, commit: Callable[..., Awaitable[list[Result]]], batch_max: int
    ) -> Batches[Operation, Outcome]:
        return Batches(
            partial(commit, shard),
            batch_max=batch_max,
            queue_max=QUEUE_MAX,
            patience_s=QUEUE_PATIENCE_S,
        )

    async def submit(self, operation: Operation) -> Recorded | Refusal:
        """
        Add an increment; when this returns it is durable, or refused for good.

        Raises:
            Overloaded: If it was not started.
            NotWritten: If it could not be written within tries and deadline.
        """
        queues = self._queues
        until = time.monotonic() + DEADLINE_S
        while True:
            try:
                shard = self._shards.shard_of(operation.user_id)
            except NoOwner:
                await self._wait_for_owner(until)
                continue
            if not self._breakers[shard].admits():
                raise NotWritten
            outcome = await queues[shard].submit(operation)
            if isinstance(outcome, Contended):
                queues = self._contended
            elif isinstance(outcome, Moved):
                await self._wait_for_owner(until)
            else:
                return outcome

    async def _wait_for_owner(self, until: float) -> None:
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await asyncio.sleep(OWNER_WAIT_S)
                await self._shards.refresh_owners()
        except TimeoutError:
            raise NotWritten from None

    async def _commit(self, shard: int, operations: Sequence[Operation]) -> list[Result]:
        """Commit a batch; the same operation twice in it is sent once."""
        if self._breakers[shard].is_open:
            return [NotWritten()] * len(operations)  # They waited behind the batch that failed.
        self._budgets[shard].save(len(operations))
        first = {(one.user_id, one.op_id): one for one in reversed(operations)}
        if len(first) == len(operations):
            return list(await self._try(shard, operations))
        sent = list(first.values())
        outcomes = dict(zip(sent, await self._try(shard, sent), strict=True))
        return [
            _as_twin(one, outcomes[sent_one]) if one is not sent_one else outcomes[sent_one]
            for one in operations
            for sent_one in [first[one.user_id, one.op_id]]
        ]

    async def _try(self, shard: int, operations: Sequence[Operation]) -> Sequence[Result]:
        started = time.perf_counter()
        breaker = self._breakers[shard]
        retrying: AsyncRetrying | None = None
        outcomes: Sequence[Outcome]
        try:
            async with asyncio.timeout(DEADLINE_S):
                try:
                    outcomes = await self._record(shard, operations)
                except DATABASE_FAILURES as error:
                    # Not before: tenacity takes 0.1 ms of a batch, also of one that it only watches.
                    left_s = DEADLINE_S - (time.perf_counter() - started)
                    retrying = self._retrying(shard, len(operations), left_s)
                    record = _failed_once(error, self._record)
                    outcomes = await retrying(record, shard, operations)
        except DATABASE_FAILURES as error:
            metrics.WRITE_FAILURES.labels(shard).inc(len(operations))
            log.error("write.failed", shard=shard, operations=len(operations), error=repr(error))
            # It is not the shard that is away where somebody holds a row for long, or where this
            # replica has been frozen itself: then far more than the deadline is over.
            was_frozen = time.perf_counter() - started > DEADLINE_S + REST_S
            is_locked = isinstance(error, asyncpg.LockNotAvailableError)
            if is_locked:
                breaker.succeeded()
            elif is_transient(error) and not was_frozen:
                breaker.failed(tries=retrying.statistics["attempt_number"] if retrying else 1)
            if is_transient(error) or len(operations) == 1:
                return [NotWritten()] * len(operations)
            # Something about one of them: the others must not suffer for it.
            return [(await self._try(shard, [operation]))[0] for operation in operations]
        breaker.succeeded()
        metrics.BATCH_SECONDS.labels(shard).observe(time.perf_counter() - started)
        metrics.BATCH_OPERATIONS.labels(shard).observe(len(operations))
        return outcomes

    async def _record(self, shard: int, operations: Sequence[Operation]) -> list[Outcome]:
        try:
            return await self._shards.record(shard, operations)
        except asyncpg.LockNotAvailableError:
            if len(operations) == 1:
                raise
        # Somebody holds one of the rows, and the statement failed for all.
        outcomes: list[Outcome] = []
        for operation in operations:
            try:
                outcomes += await self._shards.record(shard, [operation])
            except asyncpg.LockNotAvailableError:
                outcomes.append(Contended())
        return outcomes

    def _retrying(self, shard: int, operations: int, left_s: float) -> AsyncRetrying:
        """Of one batch: more tries are paid from the budget, and who tries the shard for all has one."""
        has_tried_enough = stop_after_attempt(ATTEMPTS_MAX) | stop_before_delay(left_s)

        def must_stop(state: RetryCallState) -> bool:
            if has_tried_enough(state) or not self._breakers[shard].is_closed:
                return True
            if self._budgets[shard].spend(operations):
                return False
            metrics.RETRIES_REFUSED.labels(shard).inc(operations)
            return True

        def count(state: RetryCallState) -> None:
            metrics.WRITE_RETRIES.labels(shard).inc(operations)
            error = state.outcome.exception() if state.outcome else None
            log.warning("write.retry", shard=shard, attempt=state.attempt_number, error=repr(error))

        return AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=BACKOFF_FIRST_S, max=BACKOFF_MAX_S),
            stop=must_stop,
            before_sleep=count,
            reraise=True,
        )

    async def drain(self) -> None:
        """Wait until everything that was submitted is committed or failed."""
        await asyncio.gather(*(queue.drain() for queue in (*self._queues, *self._contended)))


def _failed_once(
    error: Exception, record: Callable[..., Awaitable[list[Outcome]]]
) -> Callable[..., Awaitable[list[Outcome]]]:
    """The same with its first try behind it: called for the first time, it says what came of that."""
    failed = [error]

    async def tried(*arguments: Any) -> list[Outcome]:
        if failed:
            raise failed.pop()
        return await record(*arguments)

    return tried


def _is_resting(breaker: Breaker) -> bool:
    return not breaker.is_closed


def _as_twin(operation: Operation, outcome: Result) -> Result:
    """What the second of two operations with one id gets for the outcome of the first."""
    if isinstance(outcome, Recorded) and operation.delta != outcome.delta:
        return Refusal.KEY_REUSED
    # Where the first one was refused as too much, the second may be less: it is sent by itself.
    return Moved() if outcome is Refusal.SCORE_TOO_HIGH else outcome
