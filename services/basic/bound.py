"""How many requests may be under way: one more is refused before it costs anything."""

from collections.abc import Mapping

from services.api.endpoints import overloaded
from services.api.exchange import Answer, Endpoint, Exchange

UNDER_WAY_MAX = 512
"""Work for less than a tenth of a second."""


def bounded(endpoints: Mapping[bytes, Endpoint]) -> Mapping[bytes, Endpoint]:
    """The same endpoints, for so many requests at a time."""
    under_way = 0

    def bound(endpoint: Endpoint) -> Endpoint:
        async def handle(exchange: Exchange) -> Answer:
            nonlocal under_way
            if under_way >= UNDER_WAY_MAX:
                raise overloaded()
            under_way += 1
            try:
                return await endpoint.handle(exchange)
            finally:
                under_way -= 1

        return endpoint._replace(handle=handle)

    return {path: bound(endpoint) for path, endpoint in endpoints.items()}
