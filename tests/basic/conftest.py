"""One basic installation for these tests, whatever the others are run against."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Basic


@pytest.fixture(scope="session")
def basic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Basic]:
    """Ready, and with no process of its own but the one and PostgreSQL."""
    basic = Basic(tmp_path_factory.mktemp("basic") / "home")
    basic.up()
    yield basic
    basic.down()


@pytest.fixture
def fresh_basic(tmp_path: Path) -> Iterator[Basic]:
    """One of the test's own, not started; stopped if it was."""
    basic = Basic(tmp_path / "basic")
    yield basic
    basic.command("down")
