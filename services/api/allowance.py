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

    def headers(self, name: str) -> list[tuple[bytes, bytes]]:
        """
        What the client is told: the three usual headers, and draft-ietf-httpapi-ratelimit-headers.

        Args:
            name: The quota's name in the draft's fields.
        """
        limit, remaining, reset = self.limit, self.remaining, math.ceil(self.whole_in_s)
        headers = [
            (b"x-ratelimit-limit", b"%d" % limit),
            (b"x-ratelimit-remaining", b"%d" % remaining),
            (b"x-ratelimit-reset", b"%d" % reset),
            (b"ratelimit", b'"%b";r=%d;t=%d' % (name.encode(), remaining, reset)),
            (b"ratelimit-policy", b'"%b";q=%d;w=%d' % (name.encode(), limit, self.window_s)),
        ]
        if not self.allowed:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_in_s))))
        return headers
