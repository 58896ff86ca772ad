"""Whether a shard is asked at all, and whether it is asked again: a breaker and a retry budget.

Both are kept by each replica for each shard: one that is away must not cost the others' users
anything, neither their turn nor their retries.
"""

import time
from collections.abc import Callable


class Breaker:
    """
    Leaves a shard alone that does not take increments: closed, open for a rest, half open, closed.

    Half open, one increment tries the shard for all; if that fails, it rests again.
    """

    def __init__(
        self,
        *,
        failures_max: int,
        rest_s: float,
        trial_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            failures_max: Tries that fail in a row before it opens.
            rest_s: For how long nothing is sent then.
            trial_s: How long the one that tries may take before another one does.
            clock: Seconds.
        """
        self._failures_max = failures_max
        self._rest_s = rest_s
        self._trial_s = trial_s
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0
        self._trial_until = 0.0
        self.is_closed = True

    @property
    def is_open(self) -> bool:
        """Whether the shard rests."""
        return not self.is_closed and self._clock() < self._open_until

    def admits(self) -> bool:
        """Whether an increment may go to the shard; half open, that makes it the one that tries."""
        if self.is_closed:
            return True
        now = self._clock()
        if now < self._open_until or now < self._trial_until:
            return False
        self._trial_until = now + self._trial_s
        return True

    def succeeded(self) -> None:
        """The shard has answered."""
        self.is_closed = True
        self._failures = 0

    def failed(self, tries: int) -> None:
        """The shard has not answered so many tries, one after the other."""
        self._failures += tries
        if not self.is_closed or self._failures >= self._failures_max:
            self.is_closed = False
            self._open_until = self._clock() + self._rest_s
            self._trial_until = 0.0


class RetryBudget:
    """
    Keeps retries under a share of what is tried for the first time: a bucket of tokens.

    It counts increments, not commits. An increment sent again is a row that PostgreSQL writes
    again, and it is large batches, after a stall, that fail and would be sent again.
    """

    def __init__(self, *, share: float, reserve: int, saved_max: int) -> None:
        """
        Args:
            share: Of a token, for each first try. A retry costs a whole one.
            reserve: Tokens to begin with, so that a quiet system can try again as well.
            saved_max: Tokens, however long nothing fails.
        """
        self._share = share
        self._tokens = float(reserve)
        self._saved_max = saved_max

    def save(self, first_tries: int) -> None:
        """So many increments are tried for the first time."""
        self._tokens = min(self._saved_max, self._tokens + self._share * first_tries)

    def spend(self, retries: int) -> bool:
        """Whether so many increments may be tried again, together."""
        if self._tokens < retries:
            return False
        self._tokens -= retries
        return True
