"""The settings of an API replica: the only process that is given database credentials."""

from typing import Annotated

from limits import parse
from pydantic import Field, StringConstraints

from services.api.submission import SCORE_MAX
from shared.settings import Listed, Network, Rate, ReplicaSettings, Settings
from shared.token import TokenSettings


class ShardSettings(Settings):
    """Where the shards are; all that `scoreboard migrate` needs."""

    shard_urls: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=r"^postgres(ql)?://")], ...], Listed
    ] = Field(
        min_length=1,
        repr=False,
        description="comma-separated URLs such as postgresql://user:password@host:5432/name",
    )


class ApiSettings(ReplicaSettings, TokenSettings, ShardSettings):
    """What one API replica reads from its environment."""

    update_rate_limit: Rate = Field(
        parse("100/hour"), description="a quota such as 100/hour, for POST by a user"
    )
    top_rate_limit: Rate = Field(
        parse("100/hour"), description="a quota such as 100/hour, for GET by a user or an address"
    )
    score_increment_max: int = Field(
        SCORE_MAX, ge=1, le=SCORE_MAX, description=f"a number from 1 to {SCORE_MAX}"
    )
    trusted_proxies: Annotated[tuple[Network, ...], Listed] = Field(
        ("127.0.0.1/32", "::1/128"),
        description="comma-separated networks whose X-Real-IP and X-Request-ID are believed",
    )
