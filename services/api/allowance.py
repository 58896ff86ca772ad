"""What is left of a client's quota, and how the client is told."""

import math
from typing import NamedTuple

from services.api.shards import Limit


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
        lines = (
            f"x-ratelimit-limit: {limit}\r\nx-ratelimit-remaining: {remaining}\r\n"
            f'x-ratelimit-reset: {reset}\r\nratelimit: "{name}";r={remaining};t={reset}\r\n'
            f'ratelimit-policy: "{name}";q={limit};w={self.window_s}\r\n'
        )
        if not self.allowed:
            lines += f"retry-after: {max(1, math.ceil(self.retry_in_s))}\r\n"
        return lines.encode()
