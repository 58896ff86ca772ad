"""Scores, the operations they are the sum of, and what became of older ones.

``user_scores`` is the specification's table, partitioned. ``score_ops`` has a row for each recent
increment: its key is what makes a retry harmless, ``score`` is what the first answer said.
``score_ops_pruned`` has what the rows that were removed added up to, so that at every moment a
score is the sum of both. The same partitioning keeps a user's rows together.

``upkeep`` is one row about the shard itself: how its last audit and its last pruning ended.
"""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the parents; which node holds which partition is decided by the placement."""
    op.execute(
        """
        CREATE TABLE user_scores (
            user_id VARCHAR(255) PRIMARY KEY,
            score INTEGER NOT NULL DEFAULT 0,
            last_updated TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
        ) PARTITION BY HASH (user_id)
        """
    )
    op.execute("CREATE INDEX idx_user_scores_score ON user_scores (score DESC)")
    # No index on `created_at`: every writer would pay for what one job a shard can look up.
    op.execute(
        """
        CREATE TABLE score_ops (
            user_id VARCHAR(255) NOT NULL,
            op_id VARCHAR(257) NOT NULL,
            delta INTEGER NOT NULL,
            score INTEGER NOT NULL,
            created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
            PRIMARY KEY (user_id, op_id)
        ) PARTITION BY HASH (user_id)
        """
    )
    op.execute(
        """
        CREATE TABLE score_ops_pruned (
            user_id VARCHAR(255) PRIMARY KEY,
            delta BIGINT NOT NULL,
            operations BIGINT NOT NULL
        ) PARTITION BY HASH (user_id)
        """
    )
    op.execute(
        """
        CREATE TABLE upkeep (
            audited_at TIMESTAMP,
            users BIGINT,
            differences BIGINT,
            pruned_at TIMESTAMP,
            oldest_operation_at TIMESTAMP
        )
        """
    )
    op.execute("INSERT INTO upkeep DEFAULT VALUES")
