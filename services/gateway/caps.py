"""How many connections there may be, whose, and how fast they may come. Pure: no clock, no I/O.

A connection counts for its user and for its address. What is counted here is this process's share;
where Redis is reached, ``leases.py`` adds the shares of the other gateways.
"""

from collections import Counter
from typing import Protocol


class Counted(Protocol):
    """A connection, as far as it is counted.

    Attributes:
        subject: The user.
        address: The client's.
        counted: The counter's own note on it.
    """

    subject: str
    address: str
    counted: bool

    def refuse(self) -> None:
        """End it: there are too many."""


class Caps:
    """The connections of this process by user and by address.

    Attributes:
        connections: By name, ``u:`` with a user or ``a:`` with an address.
    """

    def __init__(self, *, total: int, per_user: int, per_address: int) -> None:
        self.total = total
        self._per_user = per_user
        self._per_address = per_address
        self.connections: Counter[str] = Counter()
        self._changed: set[str] = set()
        self._newcomers: list[Counted] = []

    def join(self, connection: Counted) -> bool:
        """Count it in; False if its user or its address has as many as it may here already."""
        names = _names(connection)
        if any(self.connections[name] >= self.limit(name) for name in names):
            return False
        self.connections.update(names)
        connection.counted = True
        self._changed.update(names)
        self._newcomers.append(connection)
        return True

    def leave(self, connection: Counted) -> None:
        """Count it out, if it is counted."""
        if not connection.counted:
            return
        connection.counted = False
        for name in _names(connection):
            self.connections[name] -= 1
            if not self.connections[name]:
                del self.connections[name]
            self._changed.add(name)

    def limit(self, name: str) -> int:
        """The most connections that may be counted for the name."""
        return self._per_user if name.startswith("u:") else self._per_address

    @property
    def users(self) -> int:
        """How many users have a connection here."""
        return sum(name.startswith("u:") for name in self.connections)

    @property
    def changed(self) -> bool:
        """Whether :meth:`take_changes` has any."""
        return bool(self._changed)

    def take_changes(self) -> tuple[list[str], list[Counted]]:
        """The names counted otherwise since the last call, and who has come since then."""
        changes = list(self._changed), self._newcomers
        self._changed, self._newcomers = set(), []
        return changes

    def withdraw(self, newcomers: list[Counted], excess: Counter[str]) -> None:
        """Refuse, of those who came last, as many as there are too many of their names."""
        for connection in reversed(newcomers):
            names = _names(connection)
            if connection.counted and any(excess[name] > 0 for name in names):
                excess.subtract(names)
                self.leave(connection)
                connection.refuse()


def _names(connection: Counted) -> tuple[str, str]:
    return f"u:{connection.subject}", f"a:{connection.address}"


class AcceptRate:
    """A token bucket that holds a second's worth."""

    def __init__(self, per_second: float, now: float) -> None:
        self._per_second = per_second
        self._left = per_second
        self._at = now

    def has_room(self, now: float) -> bool:
        """Whether one more may come now."""
        self._left = min(self._left + (now - self._at) * self._per_second, self._per_second)
        self._at = now
        return self._left >= 1

    def take(self) -> None:
        """One more has come."""
        self._left -= 1
