"""Many users at once, written as increments would have left them."""

from collections.abc import Sequence

import asyncpg

_STATEMENTS = (
    """
    INSERT INTO user_scores (user_id, score, last_updated)
    SELECT 'user-' || n, n % 1000 + 3 + 7, LOCALTIMESTAMP - n % 977 * interval '1 ms'
    FROM generate_series(1, $1) AS n
    """,
    """
    INSERT INTO score_ops (user_id, op_id, delta, score, created_at)
    SELECT 'user-' || n, 'k:' || op, CASE op WHEN 0 THEN n % 1000 + 1 ELSE 1 END,
           n % 1000 + 8 + op, LOCALTIMESTAMP - interval '2 hours'
    FROM generate_series(1, $1) AS n, generate_series(0, 2) AS op
    """,
    """
    INSERT INTO score_ops_pruned (user_id, delta, operations)
    SELECT 'user-' || n, 7, 2 FROM generate_series(1, $1) AS n
    """,
)


async def write_users(url: str, count: int) -> None:
    """``user-1`` and so on: scores, operations and what was removed of them add up."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            for statement in _STATEMENTS:
                await connection.execute(statement, count)
    finally:
        await connection.close()


async def rows_of(urls: Sequence[str], table: str) -> list[tuple[object, ...]]:
    """All that the table's partitions hold, attached or not, in order."""
    rows: list[tuple[object, ...]] = []
    for url in urls:
        connection = await asyncpg.connect(url)
        names = await connection.fetch(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ $1",
            f"^{table}_p[0-9]{{3}}$",
        )
        for (name,) in names:
            rows += [tuple(row) for row in await connection.fetch(f"TABLE {name}")]
        await connection.close()
    return sorted(rows)
