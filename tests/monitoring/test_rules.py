"""The rules, judged by promtool."""

import subprocess

import pytest

from tests.monitoring.prometheus import tool
from tests.monitoring.queries import CONFIGURATION, ROOT

pytestmark = pytest.mark.deploy


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["check", "config", "--lint-fatal", CONFIGURATION], id="configuration"),
        pytest.param(
            ["test", "rules", *sorted((ROOT / "tests/monitoring").glob("alerts*.yml"))],
            id="every-alert-fires-and-stays-quiet",
        ),
    ],
)
def test_promtool_finds_nothing(words: list[str]) -> None:
    """Neither in what is written nor in what it does."""
    done = subprocess.run(
        [tool("promtool"), *words], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
