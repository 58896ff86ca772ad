"""Moving windows in memory: at most so many requests of a client in any stretch of that length."""

import math
import time
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable

from limits import RateLimitItem

from services.api.allowance import Allowance

CLIENTS_MAX = 100_000
"""Clients remembered: 26 MB, and 106 at 100 requests each. Past that, whoever has asked for nothing for the
longest is forgotten."""


class Windows:
    """
    The windows of one quota, as long as they hold anything.

    Attributes:
        forgotten_until: Until when, by the clock, the window of a forgotten client would have held
            something: nothing is missing after that.
    """

    def __init__(
        self,
        rate: RateLimitItem,
        *,
        clients_max: int = CLIENTS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now = clock
        self.window_s = rate.get_expiry()
        self.forgotten_until = -math.inf
        self._limit = rate.amount
        self._clients_max = clients_max
        # When each request counted, in order; the clients in the order of their last.
        self._times: OrderedDict[str, array[float]] = OrderedDict()

    def __contains__(self, client: str) -> bool:
        return client in self._times

    def __len__(self) -> int:
        """Clients remembered."""
        return len(self._times)

    def restore(self, client: str, ages_s: Iterable[float]) -> None:
        """Take over what a client has used, as the seconds since each, unless one is known already."""
        if client not in self._times:
            now = self.now()
            self._times[client] = array("d", sorted(now - age for age in ages_s))

    def spend(self, client: str) -> Allowance:
        """Count a request, if it is allowed."""
        now = self.now()
        times = self._times.setdefault(client, array("d"))
        ended = bisect_right(times, now - self.window_s)
        allowed = len(times) - ended < self._limit
        if allowed:
            times.append(now)
        if 2 * ended >= len(times):  # else it costs more to move the others than they take
            del times[:ended]
            ended = 0
        self._times.move_to_end(client)
        self._forget(now)
        used = len(times) - ended
        return Allowance(
            allowed=allowed,
            limit=self._limit,
            window_s=self.window_s,
            remaining=max(0, self._limit - used),
            # In this order no rounding makes a window longer than it is.
            whole_in_s=self.window_s - (now - times[-1]),
            retry_in_s=0 if used < self._limit else self.window_s - (now - times[ended]),
        )

    def _forget(self, now: float) -> None:
        """Drop whose window is over, two at most for the one that came; and who is too many."""
        for _ in range(2):
            client, times = next(iter(self._times.items()))
            free_at = times[-1] + self.window_s if times else now
            if free_at > now:
                if len(self._times) <= self._clients_max:
                    return
                self.forgotten_until = max(self.forgotten_until, free_at)
            del self._times[client]
