"""What is told by the environment to whoever has clients that watch."""

from typing import Annotated

from pydantic import Field, StringConstraints

from shared.settings import Listed, ReplicaSettings, Settings
from shared.token import TokenSettings


class LiveSettings(Settings):
    """How many may watch, from where, and how they are sent away."""

    operations_port: int = Field(
        8001, ge=1, le=65535, description="a port from 1 to 65535 for /livez, /readyz and /metrics"
    )
    # A common limit of open files is 20,000; the rest is for handshakes and the gateway itself.
    connections_max: int = Field(19_000, ge=1, description="a number of connections, at least 1")
    # A person's tabs and devices. More is a program that forgets to close.
    connections_per_user_max: int = Field(
        20, ge=1, description="a number of connections, at least 1"
    )
    # An address may be a company's, or a provider's for thousands of customers.
    connections_per_address_max: int = Field(
        10_000, ge=1, description="a number of connections, at least 1"
    )
    # A third of what one process can: the rest is for those who are connected already.
    handshakes_per_second_max: float = Field(
        1000, ge=1, le=1_000_000, description="new connections a second, from 1 to 1000000"
    )
    allowed_origins: Annotated[
        tuple[
            Annotated[
                str,
                StringConstraints(to_lower=True, pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+$"),
            ],
            ...,
        ],
        Listed,
    ] = Field(
        (),
        description="comma-separated origins of pages, such as https://scores.example; none: any",
    )
    compression: bool = Field(
        True, description="true or false: whether clients that offer it get boards compressed"
    )
    # Below the 30 s an orchestrator commonly waits before it kills.
    drain_seconds: float = Field(20.0, ge=0, le=3600, description="seconds from 0 to 3600")


class GatewaySettings(ReplicaSettings, TokenSettings, LiveSettings):
    """Read once, in the composition root."""
