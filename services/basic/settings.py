"""The settings of the one process."""

from typing import Annotated

from pydantic import Field

from services.api.settings import ScoreSettings, ShardSettings
from services.gateway.settings import LiveSettings
from shared.settings import Listed, Network, ProcessSettings, RedisSettings, Settings
from shared.token import TokenSettings


class DatabaseSettings(Settings):
    """Where PostgreSQL is."""

    database_url: str = Field(
        pattern=r"^postgres(ql)?://[^,]+$",
        repr=False,
        description="a URL such as postgresql://user:password@host:5432/name",
    )


class BasicSettings(ProcessSettings, TokenSettings, ScoreSettings, LiveSettings, DatabaseSettings):
    """What it reads from its environment."""

    # A common limit of open files is 20,000; HTTP has some too.
    connections_max: int = Field(16_000, ge=1, description="a number of connections, at least 1")
    # Its clients come straight to it: what they say of themselves is not believed.
    trusted_proxies: Annotated[tuple[Network, ...], Listed] = Field(
        (),
        description="comma-separated networks whose X-Real-IP and X-Request-ID are believed",
    )


class MoveSettings(DatabaseSettings, ShardSettings, RedisSettings, ScoreSettings):
    """From where to where users are moved, and the quota that has to hold on both sides."""
