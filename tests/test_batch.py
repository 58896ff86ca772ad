"""Group commit, driven by hand."""

import asyncio
from collections.abc import Sequence

import pytest

from services.api.batch import Batches, Overloaded


class Commits:
    """A slow resource: each batch is held until the test lets it go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.released = asyncio.Semaphore(0)

    async def run(self, items: Sequence[int]) -> Sequence[int | Exception]:
        """Doubles even numbers and refuses odd ones."""
        self.batches.append(list(items))
        await self.released.acquire()
        return [item * 2 if item % 2 == 0 else ValueError(item) for item in items]


def make(commits: Commits, **limits: float) -> Batches[int, int]:
    """Batches with limits out of the way, but for those given."""
    return Batches(
        commits.run,
        batch_max=int(limits.get("batch_max", 100)),
        queue_max=int(limits.get("queue_max", 100)),
        patience_s=limits.get("patience_s", 60),
    )


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_arrives_meanwhile_is_the_next_batch() -> None:
    """The first goes alone and at once, the others together."""
    commits = Commits()
    batches = make(commits)
    submitted = [batches.submit(0)]
    await settle()
    submitted += [batches.submit(item) for item in (2, 4, 6)]
    await settle()
    commits.released.release()
    commits.released.release()

    assert await asyncio.gather(*submitted) == [0, 4, 8, 12]
    assert commits.batches == [[0], [2, 4, 6]]


async def test_a_batch_has_a_limit() -> None:
    """What is past it waits for the one after."""
    commits = Commits()
    batches = make(commits, batch_max=2)
    submitted = [batches.submit(item) for item in (0, 2, 4)]
    await settle()
    commits.released.release()
    commits.released.release()
    await asyncio.gather(*submitted)

    assert commits.batches == [[0, 2], [4]]


async def test_one_item_fails_alone() -> None:
    """Its neighbours have their results."""
    commits = Commits()
    batches = make(commits)
    submitted = [batches.submit(item) for item in (2, 3, 4)]
    await settle()
    commits.released.release()
    results = await asyncio.gather(*submitted, return_exceptions=True)

    assert [results[0], results[2]] == [4, 8]
    assert isinstance(results[1], ValueError)


async def test_a_full_queue_refuses_at_once() -> None:
    """Nothing is done with what it refuses."""
    commits = Commits()
    batches = make(commits, queue_max=1)
    first = batches.submit(0)
    await settle()
    second = batches.submit(2)
    await settle()
    with pytest.raises(Overloaded):
        await batches.submit(4)
    commits.released.release()
    commits.released.release()
    await asyncio.gather(first, second)

    assert commits.batches == [[0], [2]]


async def test_who_waited_too_long_is_refused_unstarted() -> None:
    """Nobody waits for the answer any more."""
    commits = Commits()
    batches = make(commits, patience_s=-1)
    with pytest.raises(Overloaded):
        await batches.submit(0)

    assert commits.batches == []


async def test_a_client_that_left_is_passed_over() -> None:
    """Its item is not started, and the others are."""
    commits = Commits()
    batches = make(commits)
    first = batches.submit(0)
    await settle()
    gone, stays = batches.submit(2), batches.submit(4)
    await settle()
    gone.cancel()
    await settle()
    commits.released.release()
    commits.released.release()

    assert [await first, await stays] == [0, 8]
    assert commits.batches == [[0], [4]]


async def test_draining_waits_for_all_that_was_submitted() -> None:
    """Also for what is still in the queue."""
    commits = Commits()
    batches = make(commits, batch_max=1)
    submitted = [batches.submit(item) for item in (0, 2)]
    await settle()
    commits.released.release()
    commits.released.release()
    await batches.drain()

    assert [task.done() for task in submitted] == [True, True]
