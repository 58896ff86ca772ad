"""Many users at once, written as increments would have left them."""

import asyncpg

_OPERATIONS = 3
"""Of each user: some recent ones, and a sum of removed ones."""

_STATEMENTS = (
    """
    INSERT INTO user_scores (user_id, score, last_updated)
    SELECT 'user-' || n, n % 1000 + 3 + 7, LOCALTIMESTAMP - n % 977 * interval '1 ms'
    FROM generate_series(1, $1) AS n
    """,
    f"""
    INSERT INTO score_ops (user_id, op_id, delta, score, created_at)
    SELECT 'user-' || n, 'k:' || op, CASE op WHEN 0 THEN n % 1000 + 1 ELSE 1 END,
           n % 1000 + 8 + op, LOCALTIMESTAMP - interval '2 hours'
    FROM generate_series(1, $1) AS n, generate_series(0, {_OPERATIONS - 1}) AS op
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


async def all_rows(urls: list[str], table: str) -> list[tuple[object, ...]]:
    """Every row of all shards, in order."""
    rows: list[tuple[object, ...]] = []
    for url in urls:
        connection = await asyncpg.connect(url)
        rows += [tuple(row) for row in await connection.fetch(f"SELECT * FROM {table}")]  # noqa: S608
        await connection.close()
    return sorted(rows)
