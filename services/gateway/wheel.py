"""When to look at which connection again: one timer for all of them.

A timer or a task a connection is what a hundred thousand idle connections would mostly consist of.
A connection is looked at when the earliest of its deadlines has come, and says itself when next.
"""

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

TICK_S = 0.5
"""Width of a slot: the most a deadline is late. Half of what a token's expiry allows (1 s)."""


class Timed(Protocol):
    """What the wheel can hold; the slot is the wheel's own note on it."""

    slot: int


T = TypeVar("T", bound=Timed)


class Wheel(Generic[T]):
    """Items by the slot in which they are due; each is in one slot at most. Pure: no clock."""

    def __init__(self, now: float) -> None:
        self._turned = int(now / TICK_S)
        self._slots: dict[int, set[T]] = {}

    def put(self, item: T, at: float) -> None:
        """Look at ``item`` at the time ``at`` or up to ``TICK_S`` later, instead of as before."""
        self.drop(item)
        item.slot = max(int(at / TICK_S), self._turned) + 1
        self._slots.setdefault(item.slot, set()).add(item)

    def drop(self, item: T) -> None:
        """Forget ``item``, also while :meth:`due` is under way."""
        if items := self._slots.get(item.slot):
            items.discard(item)

    def due(self, now: float) -> Iterator[T]:
        """Take out what is due, one at a time; what the caller puts back comes in a later slot."""
        while self._turned < int(now / TICK_S):
            self._turned += 1
            items = self._slots.get(self._turned, set())
            while items:
                yield items.pop()
            self._slots.pop(self._turned, None)
