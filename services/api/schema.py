"""What a shard must be like: this revision of the schema, each partition once, durable commits."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

TABLES = ("user_scores", "score_ops", "score_ops_pruned")
"""What is partitioned. A user's rows of all three are on one shard, and move together."""

HEAD = "0001"
"""The newest revision in `migrations/versions`; a test compares."""

TURNS_LOCK = 5_072_611_366
"""Key of the advisory lock on each shard under which quotas are counted from the operations."""

PRUNE_LOCK = 5_072_611_365
"""Key of the advisory lock on each shard under which a partition is pruned. Whoever moves one takes
it first: operations that vanish between two looks would spoil the copy."""

# In the middle of a move one table's partition may be attached and the other's not.
_OWNED = text(
    """
    SELECT pg_get_expr(child.relpartbound, child.oid) AS bound
    FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
    WHERE inhparent = ANY (CAST(:parents AS regclass[])) AND NOT inhdetachpending
    GROUP BY bound
    HAVING count(*) = :tables
    """
)

_REMAINDER = re.compile(r"remainder (\d+)")


class SchemaError(Exception):
    """A shard is not as this version needs it; the text is one line for a person."""


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what a background task found wrong as such: a task group wraps it."""
    try:
        yield
    except ExceptionGroup as failures:
        wrong_schema = failures.subgroup(SchemaError)
        if wrong_schema is None:
            raise
        raise wrong_schema.exceptions[0] from None


def unusable(name: str, error: BaseException) -> SchemaError:
    """
    A shard that refuses us, or is not where its URL says, in the words of whatever came first.

    Args:
        name: What the error calls the shard.
    """
    # What is behind a timeout is only how it was brought about.
    while error.__cause__ is not None and not isinstance(error, TimeoutError):
        error = error.__cause__
    words = " ".join(str(error).split()).removesuffix(".")
    if isinstance(error, TimeoutError):
        words = "it does not answer"
    return SchemaError(f"{name} cannot be used: {words or repr(error)}.")


def check_placement(claims: Sequence[set[int]]) -> None:
    """
    Check that no partition is attached on two shards.

    Raises:
        SchemaError: Naming the partition and the two shards, by their place in SHARD_URLS.
    """
    for number, claim in enumerate(claims):
        for other in range(number):
            if twice := claim & claims[other]:
                raise SchemaError(
                    f"Partition {min(twice)} is attached on shards {other} and {number}."
                )


async def owned_partitions(shard: AsyncConnection) -> set[int]:
    """The partitions whose every table a shard has attached, by its catalog: there is no other map."""
    tables = {"parents": list(TABLES), "tables": len(TABLES)}
    bounds = (await shard.scalars(_OWNED, tables)).all()
    return {int(match[1]) for bound in bounds if (match := _REMAINDER.search(bound))}


async def check(shard: AsyncConnection, name: str) -> None:
    """
    Check that a shard has this version's schema and keeps what it has acknowledged.

    Args:
        name: What the error calls the shard.

    Raises:
        SchemaError: If it does not.
    """
    revision = None
    if await shard.scalar(text("SELECT to_regclass('alembic_version')")) is not None:
        revision = await shard.scalar(text("SELECT version_num FROM alembic_version"))
    if revision != HEAD:
        raise SchemaError(
            f"{name} has schema revision {revision}, this version needs {HEAD}; "
            "run `scoreboard migrate`."
        )
    for setting in ("fsync", "full_page_writes"):
        if (
            await shard.scalar(text("SELECT current_setting(:setting)"), {"setting": setting})
            != "on"
        ):
            raise SchemaError(
                f"{name} runs with {setting}=off: it could lose scores it has acknowledged."
            )
