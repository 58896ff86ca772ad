"""Scores in PostgreSQL: who owns which user, and the one statement that adds to a score.

SQLAlchemy owns engines and pools; the hot statements run on its asyncpg driver connection, which
costs a third of the time and needs no explicit transaction (measured: 308 against 895 µs).
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Self

import asyncpg
import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.api import schema
from services.api.engine import LOCK_TIMEOUT_S, open_engine, sql
from services.api.partition import PARTITIONS, partition_of
from shared.board import BOARD_SIZE, Score, best

CHECK_PERIOD_S = 1.0
"""Between two looks for a shard that was away when the replica started."""

log = structlog.get_logger()


_RECORD = sql("record.sql")
_RECORDED = sql("recorded.sql")
_TOP = sql("top.sql").format(size=BOARD_SIZE)
_SCORES = sql("scores.sql")
_SPENT = sql("spent.sql")
_AGES = sql("ages.sql")
_TAKE_TURNS = sql("take_turns.sql")
_UPKEEP = sql("upkeep.sql")

TURN_MS_MAX = 500
"""A replica that freezes in its turn loses it after this long; the others try again until then."""


@dataclass(frozen=True, slots=True)
class Limit:
    """At most ``count`` operations of a user in any ``window_s`` seconds."""

    count: int
    window_s: int


class Operation(NamedTuple):
    """One increment, checked, with the id under which it counts once.

    Attributes:
        limit: What the user's operations must stay within, where Redis could not see to that.
    """

    user_id: str
    op_id: str
    delta: int
    limit: Limit | None = None


class Recorded(NamedTuple):
    """The increment is committed.

    Attributes:
        delta: What was added.
        score: The user's score right after it; on a replay, as the first time.
        latest: The user's score by now.
    """

    delta: int
    score: int
    latest: Score


class Refusal(Enum):
    """Why an increment was not added; only what is over a limit may be later under this id."""

    SCORE_TOO_HIGH = "the score would not fit its column"
    KEY_REUSED = "the id stands for another increment"
    OVER_LIMIT = "the user has as many operations as the limit allows"


@dataclass(frozen=True, slots=True)
class Moved:
    """The increment was not added: its partition is not on this shard any more."""


@dataclass(frozen=True, slots=True)
class Contended:
    """The increment was not added: somebody else holds the user's row for longer than that."""


Outcome = Recorded | Refusal | Moved | Contended


@dataclass(frozen=True, slots=True)
class Spent:
    """What a user has used of the quota, counted from the operations.

    Attributes:
        count: Operations within the window.
        oldest_s: Seconds since the first of them.
        newest_s: Seconds since the last of them.
    """

    count: int
    oldest_s: float
    newest_s: float


NOTHING_SPENT = Spent(count=0, oldest_s=0, newest_s=0)


@dataclass(frozen=True, slots=True)
class Upkeep:
    """How a shard's last audit and last pruning ended; NaN where there was none.

    Attributes:
        audited_at: Unix seconds.
        differences: Users whose score was not the sum of their operations.
        oldest_operation_at: Unix seconds, of the operations that were left.
    """

    audited_at: float
    differences: float
    oldest_operation_at: float


class NoOwner(Exception):
    """No shard has the user's partition attached, as far as the reachable ones say."""


# Classes and codes after which the same operations may be sent again. That is safe even where
# the first try may have been committed, because their ids are written with them.
_TRANSIENT_CLASSES = ("08", "53", "57")
_TRANSIENT_CODES = {
    "23505",  # A twin of an operation was committed meanwhile: the next try finds it.
    "25006",  # Read-only: a failover is under way.
    "25P03",
    "40001",
    "40003",
    "40P01",
    "55P03",
}


# A refused or timed-out connection is a plain OSError or TimeoutError, and SQLAlchemy's pool has a
# TimeoutError of its own.
_UNREACHABLE = (
    asyncpg.InterfaceError,
    # A connection whose last user was cancelled, and whose server has not answered that yet.
    asyncpg.InternalClientError,
    PoolTimeoutError,
    OSError,
    TimeoutError,
)

DATABASE_FAILURES = (asyncpg.PostgresError, DBAPIError, *_UNREACHABLE)
"""All the ways a statement fails: SQLAlchemy wraps what happens while it connects."""


def is_transient(error: BaseException) -> bool:
    """
    Whether the same operations may succeed when sent again.

    By SQLSTATE where there is one: classes say little, SQLAlchemy's even less. The true code may
    stand behind the error: asyncpg reports a server's last words as a lost connection.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, asyncpg.PostgresError):
            code = cause.sqlstate or ""
            if code.startswith(_TRANSIENT_CLASSES) or code in _TRANSIENT_CODES:
                return True
        elif isinstance(cause, _UNREACHABLE):
            return True
        cause = cause.__cause__
    return False


class Shards:
    """All shards, and the map of partitions that their catalogs make up."""

    def __init__(self, engines: Sequence[AsyncEngine]) -> None:
        self._engines = engines
        self._unchecked = set(range(len(engines)))
        self._owner: dict[int, int] = {}
        self._owner_lock = asyncio.Lock()
        self._owners_read_at = 0.0
        self._kept: dict[int, tuple[AsyncConnection, Any]] = {}

    @classmethod
    @asynccontextmanager
    async def connect(cls, urls: Iterable[str]) -> AsyncIterator[Self]:
        """Engines for ``urls``; nothing is connected before it is needed."""
        async with AsyncExitStack() as stack:
            engines = []
            for url in urls:
                engine = open_engine(url)
                stack.push_async_callback(engine.dispose)
                engines.append(engine)
            shards = cls(engines)
            stack.push_async_callback(shards._let_go)
            yield shards

    @property
    def count(self) -> int:
        """How many shards there are; they are numbered from 0."""
        return len(self._engines)

    @property
    def is_known(self) -> bool:
        """Whether the owner of at least one partition is known."""
        return bool(self._owner)

    @property
    def is_complete(self) -> bool:
        """Whether the owner of every partition is known."""
        return len(self._owner) == PARTITIONS

    def shard_of(self, user_id: str) -> int:
        """
        The number of the shard that owns the user.

        Raises:
            NoOwner: If none is known to.
        """
        try:
            return self._owner[partition_of(user_id)]
        except KeyError:
            raise NoOwner from None

    async def check(self) -> None:
        """
        Read the owner map, and check that shards not yet heard of have this version's schema.

        Raises:
            SchemaError: If one has not, or refuses us, or if none has any users' place. A shard that
                is away is no error: the others serve.
        """
        for number in sorted(self._unchecked):
            name = f"Shard {number}"
            try:
                async with self._engines[number].connect() as connection:
                    await schema.check(connection, name)
            except DATABASE_FAILURES as error:
                if not is_transient(error):
                    raise schema.unusable(name, error) from error
                log.warning("shard.away", shard=number, error=repr(error))
            else:
                self._unchecked.discard(number)
        await self.refresh_owners()
        if not self._owner and not self._unchecked:
            raise schema.SchemaError(
                "There is no place for users any more: they were moved to a cluster."
            )

    async def keep_complete(self) -> None:
        """Check the shards that were away at the start once they are there, then end."""
        while self._unchecked or not self.is_complete:
            await asyncio.sleep(CHECK_PERIOD_S)
            await self.check()

    async def refresh_owners(self) -> None:
        """Read anew from every reachable shard which partitions it owns; who waits shares one read."""
        asked_at = time.monotonic()
        async with self._owner_lock:
            if self._owners_read_at > asked_at:
                return
            reading_at = time.monotonic()
            claims = await asyncio.gather(*map(self._claim, range(self.count)))
            schema.check_placement([claim or set() for claim in claims])
            owner: dict[int, int] = {}
            for number, claim in enumerate(claims):
                if claim is None:  # Away: what it owned it still owns.
                    claim = {part for part, shard in self._owner.items() if shard == number}
                owner |= {part: number for part in claim if part not in owner}
            self._owner = owner
            self._owners_read_at = reading_at

    async def _claim(self, number: int) -> set[int] | None:
        try:
            async with self._engines[number].connect() as connection:
                return await schema.owned_partitions(connection)
        except DATABASE_FAILURES as error:
            if not is_transient(error):
                raise
            log.warning("shard.away", shard=number, error=repr(error))
            return None

    async def record(self, shard: int, operations: Sequence[Operation]) -> list[Outcome]:
        """
        Add the increments in one commit, each exactly once.

        Args:
            operations: At most one for each pair of user and operation id.

        Returns:
            An outcome for each operation, in order.

        Raises:
            Exception: See :func:`is_transient`; nothing or everything of it was committed.
        """
        within, over = operations, set[Operation]()
        try:
            async with self._driver(shard) as driver:
                if any(operation.limit for operation in operations):
                    # Replicas take turns: what one has counted, none adds to before it is done. Each
                    # statement must see what was committed while the first one waited.
                    async with driver.transaction(isolation="read_committed"):
                        await driver.fetch(
                            _TAKE_TURNS,
                            schema.TURNS_LOCK,
                            str(TURN_MS_MAX),
                            f"{LOCK_TIMEOUT_S * 1000:.0f}",
                        )
                        over = await _over_limit(driver, operations)
                        within = [one for one in operations if one not in over]
                        rows = await driver.fetch(_RECORD, *_increments(within))
                else:
                    rows = await driver.fetch(_RECORD, *_increments(operations))
        except asyncpg.UniqueViolationError:
            return await self._record_unknown(shard, operations)
        except asyncpg.CheckViolationError:
            return await self._record_owned(shard, operations)
        added: dict[Operation, Recorded] = {}
        for place, score, latest, reached_us in rows:
            one = within[place - 1]
            added[one] = Recorded(one.delta, score, Score(one.user_id, latest, reached_us))
        outcomes: list[Outcome] = []
        for operation in operations:
            if operation in added:
                outcomes.append(added[operation])
            elif operation in over:
                outcomes.append(Refusal.OVER_LIMIT)
            elif len(operations) == 1:
                outcomes.append(Refusal.SCORE_TOO_HIGH)
            else:  # Together with the user's others it is too much; alone it may fit.
                outcomes += await self.record(shard, [operation])
        return outcomes

    async def _record_unknown(self, shard: int, operations: Sequence[Operation]) -> list[Outcome]:
        """Some are recorded already: answer those as the first time, and record the others."""
        async with self._driver(shard) as driver:
            rows = await driver.fetch(_RECORDED, *_ids(operations))
        known = {(row["user_id"], row["op_id"]): row for row in rows}
        unknown = [
            operation
            for operation in operations
            if (operation.user_id, operation.op_id) not in known
        ]
        fresh = iter(await self.record(shard, unknown) if unknown else [])
        return [
            next(fresh)
            if (row := known.get((operation.user_id, operation.op_id))) is None
            else _recorded(row)
            if row["delta"] == operation.delta
            else Refusal.KEY_REUSED
            for operation in operations
        ]

    async def _record_owned(self, shard: int, operations: Sequence[Operation]) -> list[Outcome]:
        """PostgreSQL has no partition for one of them (23514): the map is stale, or one moves."""
        await self.refresh_owners()
        owned = [
            operation
            for operation in operations
            if self._owner.get(partition_of(operation.user_id)) == shard
        ]
        if len(owned) == len(operations):  # Attached again in between, or not in every table.
            return [Moved()] * len(operations)
        kept = iter(await self.record(shard, owned) if owned else [])
        return [
            next(kept) if self._owner.get(partition_of(operation.user_id)) == shard else Moved()
            for operation in operations
        ]

    async def top(self) -> list[Score]:
        """
        The best of all shards, in the board's order.

        Raises:
            Exception: If one of them does not answer: without it the top is not known.
        """
        tops = await asyncio.gather(*(self._scores(shard, _TOP) for shard in range(self.count)))
        return best(score for top in tops for score in top)

    async def scores_of(self, user_ids: Iterable[str]) -> Mapping[str, Score]:
        """The scores of these users; who has none is not in it."""
        wanted = list(user_ids)
        found = await asyncio.gather(
            *(self._scores(shard, _SCORES, wanted) for shard in range(self.count))
        )
        return {score.user_id: score for scores in found for score in scores}

    async def _scores(self, shard: int, sql: str, *arguments: object) -> list[Score]:
        async with self._driver(shard) as driver:
            rows = await driver.fetch(sql, *arguments)
        return [Score(row["user_id"], row["score"], row["reached_us"]) for row in rows]

    async def spent(self, shard: int, user_ids: Sequence[str], window_s: float) -> dict[str, Spent]:
        """Count the operations of users of a shard in the last ``window_s`` seconds, where any."""
        async with self._driver(shard) as driver:
            return await _spent(driver, user_ids, window_s)

    async def ages(
        self, shard: int, user_ids: Sequence[str], limit: Limit
    ) -> Mapping[str, Sequence[float]]:
        """How many seconds ago users' newest operations within the limit were written, where any."""
        async with self._driver(shard) as driver:
            rows = await driver.fetch(_AGES, list(user_ids), limit.window_s, limit.count)
        return {row["user_id"]: row["ages_s"] for row in rows}

    async def upkeep(self, shard: int) -> Upkeep:
        """What the shard says of its last audit and pruning."""
        async with self._driver(shard) as driver:
            row = await driver.fetchrow(_UPKEEP)
        return Upkeep(**row)

    @asynccontextmanager
    async def _driver(self, shard: int) -> AsyncIterator[Any]:
        """
        An asyncpg connection; one that failed is not used again.

        One a shard is kept when it is not in use: to ask SQLAlchemy's pool for it took longer than
        to talk to it (190 of 311 µs a batch). The others go back to the pool.
        """
        if shard in self._kept:
            connection, driver = self._kept.pop(shard)
        else:
            connection, driver = await self._connect(shard)
        try:
            if driver.is_closed():
                # SQLAlchemy cannot know: its own check (pre-ping) is three round trips.
                await connection.invalidate()
                driver = await _driver_of(connection)
            try:
                yield driver
            except (*_UNREACHABLE, asyncio.CancelledError):
                # Else SQLAlchemy says goodbye first, and waits 2 s for a frozen server's answer.
                driver.terminate()
                await connection.invalidate()
                raise
        finally:
            if connection.invalidated or shard in self._kept:
                await connection.close()
            else:
                self._kept[shard] = connection, driver

    async def _connect(self, shard: int) -> tuple[AsyncConnection, Any]:
        connection = await self._engines[shard].connect()
        return connection, await _driver_of(connection)

    async def _let_go(self) -> None:
        for connection, _ in self._kept.values():
            await connection.close()


async def _driver_of(connection: AsyncConnection) -> Any:
    return (await connection.get_raw_connection()).driver_connection


def _ids(operations: Sequence[Operation]) -> tuple[list[str], list[str]]:
    return [one.user_id for one in operations], [one.op_id for one in operations]


def _increments(operations: Sequence[Operation]) -> tuple[str, ...]:
    """The parameters of `record.sql`."""
    totals: dict[str, int] = {}
    behind = []
    for one in reversed(operations):
        later = totals.get(one.user_id, 0)
        behind.append(later)
        totals[one.user_id] = later + one.delta
    behind.reverse()
    deltas = [one.delta for one in operations]
    return (
        _texts(totals), _numbers(totals.values()), *map(_texts, _ids(operations)),
        _numbers(deltas), _numbers(behind),
    )  # fmt: skip


# PostgreSQL's own notation of arrays: the driver looks at each element for one more dimension, and
# takes twice as long.


def _texts(values: Collection[str]) -> str:
    if not values:
        return "{}"
    # No text that is stored can have the separator in it.
    escaped = "\0".join(values).replace("\\", "\\\\").replace('"', '\\"')
    return '{"' + escaped.replace("\0", '","') + '"}'


def _numbers(values: Iterable[int]) -> str:
    return "{" + ",".join(map(str, values)) + "}"


async def _spent(driver: Any, user_ids: Sequence[str], window_s: float) -> dict[str, Spent]:
    rows = await driver.fetch(_SPENT, sorted(set(user_ids)), window_s)
    return {row["user_id"]: Spent(row["count"], row["oldest_s"], row["newest_s"]) for row in rows}


async def _over_limit(driver: Any, operations: Sequence[Operation]) -> set[Operation]:
    """Those that their limit has no room for; a recorded one needs none."""
    rows = await driver.fetch(_RECORDED, *_ids(operations))
    known = {(row["user_id"], row["op_id"]) for row in rows}
    over = set()
    for limit in {operation.limit for operation in operations if operation.limit}:
        asking = [
            one
            for one in operations
            if one.limit == limit and (one.user_id, one.op_id) not in known
        ]
        spent = await _spent(driver, [one.user_id for one in asking], limit.window_s)
        used = Counter({user_id: one.count for user_id, one in spent.items()})
        for one in asking:
            if used[one.user_id] < limit.count:
                used[one.user_id] += 1
            else:
                over.add(one)
    return over


def _recorded(row: Mapping[str, Any]) -> Recorded:
    latest = Score(row["user_id"], row["latest"], row["reached_us"])
    return Recorded(delta=row["delta"], score=row["score"], latest=latest)
