"""Scores, and the operations they are the sum of.

``user_scores`` is the specification's table, partitioned. ``score_ops`` has a row for each
increment ever counted: its key is what makes a retry harmless, ``score`` is what the first answer
said, and together they are the audit trail. The same partitioning keeps a user's rows together.
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
