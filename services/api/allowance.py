"""What is left of a client's quota, and how the client is told."""

import math
from typing import NamedTuple

from services.api.shards import Limit

_HEADERS = (
    b"x-ratelimit-limit: %d\r\nx-ratelimit-remaining: %d\r\nx-ratelimit-reset: %d\r\n"
    b'ratelimit: "%b";r=%d;t=%d\r\nratelimit-policy: "%b";q=%d;w=%d\r\n'
)


class Allowance(NamedTuple):
    """What is left of a client's quota after this request.

    Attributes:
        whole_in_s: Seconds until nothing of it is used any more.
        retry_in_s: Seconds until the next request is allowed; 0 when it is now.
        at_write: What the write has to keep to, because counting and writing are two steps here.
    """

    allowed: bool
    limit: int
    window_s: int
    remaining: int
    whole_in_s: float
    retry_in_s: float
    at_write: Limit | None = None

    def headers(self, name: str) -> bytes:
        """
        What the client is told: the three usual headers, and draft-ietf-httpapi-ratelimit-headers.

        Args:
            name: The quota's name in the draft's fields.
        """
        limit, remaining, reset = self.limit, self.remaining, math.ceil(self.whole_in_s)
        quota = name.encode()
        lines = _HEADERS % (
            limit, remaining, reset, quota, remaining, reset, quota, limit, self.window_s,
        )  # fmt: skip
        if self.allowed:
            return lines
        return lines + b"retry-after: %d\r\n" % max(1, math.ceil(self.retry_in_s))
