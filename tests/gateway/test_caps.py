"""Counting connections, by hand: no clock, no loop."""

from collections import Counter
from dataclasses import dataclass

from services.gateway.caps import AcceptRate, Caps


@dataclass
class Connection:
    """One to be counted."""

    subject: str
    address: str = "192.0.2.1"
    counted: bool = False
    refused: bool = False

    def refuse(self) -> None:
        """As the caps ask."""
        self.refused = True


def test_a_user_and_an_address_have_their_own_limits() -> None:
    """One too many of either is refused, and counts for nobody."""
    caps = Caps(total=10, per_user=2, per_address=3)
    first, second = Connection("ana"), Connection("ana")

    assert caps.join(first)
    assert caps.join(second)
    assert not caps.join(Connection("ana", "192.0.2.2"))
    assert caps.join(Connection("ben"))
    assert not caps.join(Connection("cleo"))
    assert caps.join(Connection("cleo", "192.0.2.2"))
    caps.leave(first)
    caps.leave(first)
    assert caps.join(Connection("ana", "192.0.2.3"))
    assert caps.users == 3
    assert caps.connections == {
        "u:ana": 2, "u:ben": 1, "u:cleo": 1, "a:192.0.2.1": 2, "a:192.0.2.2": 1, "a:192.0.2.3": 1,
    }  # fmt: skip


def test_changes_are_taken_once() -> None:
    """Each name that is counted otherwise, and everyone who has come."""
    caps = Caps(total=10, per_user=2, per_address=3)
    ana, ben = Connection("ana"), Connection("ben", "192.0.2.2")
    caps.join(ana)
    caps.join(ben)
    caps.leave(ben)

    names, newcomers = caps.take_changes()
    assert set(names) == {"u:ana", "a:192.0.2.1", "u:ben", "a:192.0.2.2"}
    assert newcomers == [ana, ben]
    assert not caps.changed
    assert caps.take_changes() == ([], [])


def test_those_who_came_last_are_withdrawn() -> None:
    """As many as there are too many, and none of another name."""
    caps = Caps(total=10, per_user=9, per_address=9)
    anas = [Connection("ana") for _ in range(3)]
    ben = Connection("ben", "192.0.2.2")
    for connection in (*anas, ben):
        caps.join(connection)
    _, newcomers = caps.take_changes()

    caps.withdraw(newcomers, Counter({"u:ana": 2, "a:192.0.2.1": 1, "u:ben": 0}))

    assert [connection.refused for connection in (*anas, ben)] == [False, True, True, False]
    assert caps.connections["u:ana"] == 1


def test_the_bucket_holds_a_second_s_worth() -> None:
    """It fills at its rate, whatever the time between two looks, and never over the brim."""
    rate = AcceptRate(10, now=100.0)
    for _ in range(10):
        assert rate.has_room(100.0)
        rate.take()
    assert not rate.has_room(100.0)
    assert not rate.has_room(100.09)
    assert rate.has_room(100.11)
    rate.take()
    assert not rate.has_room(100.11)

    taken = 0
    while rate.has_room(1000.0):
        rate.take()
        taken += 1
    assert taken == 10
