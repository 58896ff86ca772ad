"""What a basic installation consists of: one process, and PostgreSQL unless there is one already."""

import os
from collections.abc import Callable, Mapping

from services.scoreboard.home import ClusterError, Home, State
from services.scoreboard.installation import Installation
from services.scoreboard.servers import Postgres, postgres_binaries
from services.scoreboard.supervisor import Supervised

DATABASE_VARIABLES = ("DATABASE_URL", "DATABASE_URL_FILE")


class Basic(Installation):
    """The one process, and its PostgreSQL."""

    def __init__(self, home: Home, *, port: int, shown: Callable[[State], None]) -> None:
        super().__init__(home, port=port, shown=shown)
        self._process: Supervised | None = None

    async def _start(self) -> None:
        # All that can be found wrong beforehand is, with nothing started.
        port = self._edge_port()
        postgres = None
        if any(name in os.environ for name in DATABASE_VARIABLES):
            url = database_url(os.environ)
        else:
            postgres = Postgres(postgres_binaries(os.environ), self._home)
            shard_port = self._port()
            url = postgres.url(shard_port)
        # Here `audit`, `migrate` and `move` look for it.
        self._home.write_secret("shard_urls", url)
        self._home.secret("jwt_secret")
        check_settings(self._environ())
        self._home.rotate_logs()

        if postgres is not None:
            self._plan_shards(postgres, [shard_port])
        migration = self._process_state("migrate")
        self._process = self._service("basic", "basic", port, self._port())
        if postgres is not None:
            await self._create_shards(postgres)
            await self._shards[0].start()
        await self._migrate(migration)
        await self._process.start()
        self._phase("ready")

    async def _stop(self) -> None:
        for server in (self._process, *self._shards):
            if server is not None:
                await server.stop()

    async def _scale(self, counts: Mapping[str, int]) -> None:
        raise ClusterError(
            "A basic installation is one process: `scoreboard move` makes it a cluster."
        )

    def _environ(self) -> dict[str, str]:
        return super()._environ() | {"DATABASE_URL_FILE": str(self._home.secrets / "shard_urls")}


def one_shard(home: Home) -> None:
    """
    See that the home's data, if there is any, is on one shard.

    Raises:
        ClusterError: If not.
    """
    if home.shards() > 1:
        raise ClusterError(
            f"The data in {home.path} lives on {home.shards()} shards: start them with "
            "`scoreboard up`, or choose another --home."
        )


def database_url(environ: Mapping[str, str]) -> str:
    """
    The database that the environment names.

    Raises:
        ClusterError: If that is none.
    """
    # Here, as below, because nothing else of the command needs them: they take a while.
    from services.basic.settings import DatabaseSettings
    from shared.settings import SettingsError

    names = {name: environ[name] for name in DATABASE_VARIABLES if name in environ}
    try:
        return DatabaseSettings.from_environ(names).database_url
    except SettingsError as error:
        raise ClusterError(str(error)) from None


def check_settings(environ: Mapping[str, str]) -> None:
    """
    See whether the process would start with this environment.

    Raises:
        ClusterError: With the sentence it would end with.
    """
    from services.basic.settings import BasicSettings
    from shared.settings import SettingsError

    try:
        BasicSettings.from_environ(environ)
    except SettingsError as error:
        raise ClusterError(str(error)) from None
