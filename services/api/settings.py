"""The settings of an API replica: the only process that is given database credentials."""

from typing import Annotated, Self

from limits import parse
from pydantic import Field, StringConstraints, model_validator

from services.api.submission import SCORE_MAX
from shared.settings import Duration, Listed, Rate, ReplicaSettings, Settings
from shared.token import TokenSettings

OPERATION_RETENTION_MIN_S = 86_400
"""What the contract promises for an `Idempotency-Key`."""


class ShardSettings(Settings):
    """Where the shards are; all that `scoreboard migrate` and `scoreboard audit` need."""

    shard_urls: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=r"^postgres(ql)?://")], ...], Listed
    ] = Field(
        min_length=1,
        repr=False,
        description="comma-separated URLs such as postgresql://user:password@host:5432/name",
    )


class ScoreSettings(Settings):
    """How much who may add, and how long it is remembered."""

    update_rate_limit: Rate = Field(
        parse("100/hour"), description="a quota such as 100/hour, for POST by a user"
    )
    top_rate_limit: Rate = Field(
        parse("100/hour"), description="a quota such as 100/hour, for GET by a user or an address"
    )
    score_increment_max: int = Field(
        SCORE_MAX, ge=1, le=SCORE_MAX, description=f"a number from 1 to {SCORE_MAX}"
    )
    operation_retention: Duration = Field(
        OPERATION_RETENTION_MIN_S,
        ge=OPERATION_RETENTION_MIN_S,
        description="seconds, or a duration such as 36h or 7d, of at least 24 hours",
    )

    @model_validator(mode="after")
    def _operations_outlive_the_quota(self) -> Self:
        # Without Redis updates are counted from operations; reads are not, so their quota is free.
        window_s = self.update_rate_limit.get_expiry()
        if self.operation_retention < window_s:
            raise ValueError(
                f"OPERATION_RETENTION must be at least {window_s} seconds, the window of "
                f"UPDATE_RATE_LIMIT, not {self.operation_retention}."
            )
        return self


class ApiSettings(ReplicaSettings, TokenSettings, ShardSettings, ScoreSettings):
    """What one API replica reads from its environment."""
