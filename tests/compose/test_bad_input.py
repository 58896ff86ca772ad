"""What an operator gets wrong is said in one sentence, and harms nothing else."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from services.api.schema import HEAD
from tests.compose.build import ROOT
from tests.compose.stack import Stack

pytestmark = pytest.mark.compose


@contextmanager
def changed(path: Path, text: str | None) -> Iterator[None]:
    """The file with another text, or without a file; as before afterwards."""
    before = path.read_text() if path.exists() else None
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
        path.chmod(0o444)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_text(before)
            path.chmod(0o444)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that has not been started yet."""
    other = Stack(tmp_path_factory.mktemp("other") / "home")
    yield other
    other.down()


def refused(stack: Stack) -> str:
    """What `make compose-up` shows where it fails: what `up --wait` says, and last words."""
    done = stack.up(check=False, api=1, gateway=1)
    assert done.returncode != 0
    why = subprocess.run([ROOT / "deploy" / "why"], env=stack.environ, capture_output=True,
                         text=True, check=True)  # fmt: skip
    print(done.stderr.splitlines()[-1], why.stdout, sep="\n")
    return done.stderr + why.stdout


def test_a_missing_secret_is_named(other: Stack) -> None:
    """By the engine, before anything of that service starts."""
    with changed(other.folder / "secrets" / "redis_url", None):
        assert "secrets/redis_url" in refused(other)


@pytest.mark.parametrize(
    ("secret", "text", "sentence"),
    [
        ("jwt_secret", "short", "JWT_SECRET must be a secret of at least 32 bytes (HS256)."),
        ("redis_url", "", "REDIS_URL must be a URL such as redis://"),
        ("shard_urls", "postgresql://scoreboard:x@shard-0/scoreboard",
         'Shard 0 of SHARD_URLS (shard-0) cannot be used: password authentication failed for user "scoreboard"'),
        ("shard_urls", "postgresql://scoreboard:x@shard-7/scoreboard",
         "Shard 0 of SHARD_URLS (shard-7) cannot be used: "),
    ],
    ids=["short-secret", "empty", "password", "host"],
)  # fmt: skip
def test_a_wrong_secret_is_named(other: Stack, secret: str, text: str, sentence: str) -> None:
    """By the migration, which looks before API and gateway start."""
    with changed(other.folder / "secrets" / secret, text):
        said = refused(other)
    assert 'service "migrate" didn\'t complete successfully: exit 1' in said
    assert sentence in said
    assert not other.containers("api") or not other.containers("api")[0]["State"]["Running"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("SCOREBOARD_QUOTA=5/hour", "SCOREBOARD_QUOTA is not a setting of this version."),
        ("UPDATE_RATE_LIMIT=lots", "UPDATE_RATE_LIMIT must be a quota such as 100/hour"),
        ("DRAIN_SECONDS=soon", "DRAIN_SECONDS must be seconds from 0 to 3600, not 'soon'."),
    ],
)
def test_a_wrong_setting_is_named(other: Stack, line: str, sentence: str) -> None:
    """Also one that is none."""
    with changed(other.settings, line + "\n"):
        assert sentence in refused(other)


def test_a_port_in_use_is_named(other: Stack) -> None:
    """By the engine; everything else has started by then, and is kept."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", other.port))
        taken.listen()
        assert str(other.port) in refused(other)
    assert all(one["State"]["Running"] for one in other.containers("api"))


async def test_a_shard_of_a_later_version_is_named(other: Stack) -> None:
    """And left as it is; replicas that run go on."""
    other.up(api=1, gateway=1)
    shard = await asyncpg.connect(other.shard_urls[1])
    await shard.execute("UPDATE alembic_version SET version_num = 'later'")
    said = refused(other)
    await shard.execute("UPDATE alembic_version SET version_num = $1", HEAD)
    await shard.close()
    assert "Shard 1 of SHARD_URLS has a schema revision that this version does not know" in said
    (api,) = other.containers("api")
    assert (api["State"]["Health"]["Status"], api["RestartCount"]) == ("healthy", 0)


def test_a_wrong_setting_does_not_stop_what_runs(other: Stack) -> None:
    """Compose would, before it starts the first new replica: `make compose-up` looks before."""
    other.up(api=1, gateway=1)
    before = {one["Id"]: one["State"]["StartedAt"] for one in other.containers()}
    with changed(other.settings, "SCOREBOARD_QUOTA=5/hour\n"):
        done = subprocess.run(["make", "compose-up"], cwd=ROOT, env=other.environ,
                              capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode != 0
    assert "SCOREBOARD_QUOTA is not a setting of this version." in done.stderr
    after = {one["Id"]: one["State"]["StartedAt"] for one in other.containers()}
    assert after == before
