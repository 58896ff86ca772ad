"""The supervisor's promises: nothing is left running, no secret is shown, a wish is granted whole."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import IO

import pytest

from services.scoreboard.home import ProcessState
from services.scoreboard.supervisor import Program, Supervised
from tests.cluster import COMMAND, Cluster
from tests.test_command import left_running

END_SECONDS_MAX = 10.0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One of each."""
    cluster = Cluster(tmp_path_factory.mktemp("small") / "home")
    cluster.up(api=1, gateway=1, shards=1)
    yield cluster
    cluster.down()


async def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it comes true in time."""
    return await asyncio.to_thread(wait_until, holds)


def wait_until(holds: Callable[[], bool]) -> bool:
    """The same where nothing else is to be done meanwhile."""
    give_up_at = time.monotonic() + END_SECONDS_MAX
    while not holds() and time.monotonic() < give_up_at:
        time.sleep(0.05)
    return holds()


def alive(pid: int) -> bool:
    """Whether that process runs; one that has ended but was not yet waited for does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def pids(cluster: Cluster) -> list[int]:
    return [process["pid"] for process in cluster.status()["processes"] if process["pid"]]


def test_nobody_but_postgresql_interrupts_who_runs(small: Cluster) -> None:
    """Linux's scheduling policy of each process."""
    policies = {
        process["name"].partition("-")[0]: os.sched_getscheduler(process["pid"])
        for process in small.status()["processes"]
        if process["pid"]
    }
    batch = dict.fromkeys(("api", "gateway", "nginx", "valkey"), os.SCHED_BATCH)
    assert policies == batch | {"postgres": os.SCHED_OTHER}


async def test_a_killed_supervisor_leaves_nothing_behind(fresh: Cluster) -> None:
    """Every server ends with it, no score is lost, and `up` works at once."""
    fresh.up(api=1, gateway=1, shards=1)
    async with fresh.client() as client:
        await client.post("alice", 3)
    servers = pids(fresh)
    assert len(servers) == 5
    os.kill(fresh.status()["pid"], signal.SIGKILL)
    fresh.up(api=1, gateway=1)
    assert await eventually(lambda: not any(map(alive, servers)))
    async with fresh.client() as client:
        assert (await client.post("alice", 4)).json["newScore"] == 7
    servers = pids(fresh)
    os.kill(fresh.status()["pid"], signal.SIGKILL)
    fresh.down()
    assert not any(map(alive, servers))
    assert await eventually(lambda: left_running(fresh.home) == [])


def until(said: IO[str], words: str) -> None:
    """Read until a line has the words."""
    assert any(words in line for line in said), words


def test_ctrl_c_leaves_nothing_whenever_it_comes(fresh: Cluster) -> None:
    """During initdb, during the migration, and when all runs and nobody reads what is said.

    Under nohup it does not end with its terminal.
    """
    up_command = [COMMAND, "up", f"--home={fresh.home}", f"--port={fresh.port}", "--shards=1"]
    for moment in ("postgres-0   creating", "migrate      starting", "nginx        ready"):
        with subprocess.Popen(
            ["/usr/bin/env", "nohup", *up_command], stdout=PIPE, stderr=PIPE, text=True
        ) as up:
            assert up.stdout
            assert up.stderr
            until(up.stderr, moment)
            if moment.startswith("nginx"):
                until(up.stdout, "Stop it with")
                up.stdout.close()
                up.stderr.close()
                up.send_signal(signal.SIGHUP)
                fresh.kill("api-0")
                assert wait_until(lambda: fresh.process("api-0")["restarts"] == 1)
                assert wait_until(lambda: fresh.process("api-0")["state"] == "ready")
            up.send_signal(signal.SIGINT)
            if not up.stdout.closed:
                assert up.stdout.read() == f"Stopped. The data stays in {fresh.home}\n"
                assert up.wait(END_SECONDS_MAX) == 0
        assert left_running(fresh.home) == []
        assert not fresh.status()["running"]
    assert (fresh.home / "postgres-0" / "PG_VERSION").exists()


async def test_a_defect_costs_a_life_not_the_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is reported, and the process started anew."""
    defects = [KeyError("unforeseen")]

    async def ready(_pid: int) -> bool:
        if defects:
            raise defects.pop()
        return True

    state = ProcessState(name="sleeper", log=str(tmp_path / "sleeper.log"))
    program = Program(
        argv=["/bin/sleep", "60"],
        environ={},
        ready=ready,
        stop=((signal.SIGTERM, END_SECONDS_MAX),),
        parent_death=signal.SIGKILL,
    )
    sleeper = Supervised(program, state, lambda: None)
    try:
        await sleeper.start()
        assert (state.state, state.restarts) == ("ready", 1)
    finally:
        await sleeper.stop()
    assert "KeyError: 'unforeseen'" in caplog.text


def test_no_secret_is_shown(cluster: Cluster) -> None:
    """No secret of the home stands among a process's arguments, in a log or in the state."""
    secrets = [
        cluster.secret(name) for name in ("jwt_secret", "postgres_password", "valkey_password")
    ]
    shown = {
        path.name: path.read_text()
        for folder in ("log", "run")
        for path in (cluster.home / folder).iterdir()
        if path.is_file()
    }
    for pid in pids(cluster):
        shown[f"arguments of {pid}"] = Path(f"/proc/{pid}/cmdline").read_text()
    assert [name for name, text in shown.items() if any(one in text for one in secrets)] == []


def test_a_wish_that_cannot_be_granted_changes_nothing(fresh: Cluster) -> None:
    """`scale` says why, where a replica does not start or Nginx cannot be told; all go on."""
    fresh.up(api=1, gateway=1, shards=1)
    before = pids(fresh)
    secret = fresh.home / "secrets" / "jwt_secret"
    kept = secret.read_text()
    secret.write_text("short")
    done = fresh.command("scale", "api=2")
    secret.write_text(kept)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "Error: api-1 died 3 times at start: JWT_SECRET must be "
    )
    assert pids(fresh) == before

    # Whoever rotates its log does not matter to it.
    (fresh.home / "log" / "nginx.log").unlink()
    assert fresh.command("scale", "api=2").returncode == 0
    before = pids(fresh)
    blocked = fresh.home / "run" / "nginx" / f".scoreboard.conf.{fresh.status()['pid']}"
    blocked.mkdir()
    done = fresh.command("scale", "api=1")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        f"Error: [Errno 21] Is a directory: '{blocked}'",
    )
    assert fresh.names("api-") == ["api-0", "api-1"]
    assert pids(fresh) == before


async def test_a_frozen_replica_fails_no_request(fresh: Cluster) -> None:
    """Nginx asks the other one under the same id; the increment counts once."""
    fresh.up(api=2, gateway=1, shards=1)
    frozen = fresh.process("api-0")["pid"]
    os.kill(frozen, signal.SIGSTOP)
    try:
        async with fresh.client() as client:
            answers = [await client.post("alice", 1) for _ in range(10)]
            assert [answer.json.get("newScore") for answer in answers] == list(range(1, 11))
    finally:
        os.kill(frozen, signal.SIGCONT)
    # What it had begun before, it must not add once it wakes up.
    async with fresh.client() as client:
        assert (await client.post("alice", 1)).json["newScore"] == 11


async def test_without_a_replica_the_answer_is_to_come_back(small: Cluster, user: str) -> None:
    """503 in the contract's shape until the only API is back."""
    small.kill("api-0")
    async with small.client() as client:
        answer = await client.post(user, 1)
        assert answer.status == 503
        assert answer.json == {"status": "error", "message": "Service overloaded"}
        assert answer.headers["Retry-After"] == "1"
        assert await eventually(lambda: small.process("api-0")["state"] == "ready")
        assert (await client.post(user, 1)).json["newScore"] == 1


async def test_without_an_answer_nobody_says_that_nothing_was_done(
    small: Cluster, user: str
) -> None:
    """500, not 503: the frozen API may have written; the client's key settles it."""
    frozen = small.process("api-0")["pid"]
    async with small.client() as client:
        os.kill(frozen, signal.SIGSTOP)
        try:
            answer = await client.post(user, 1, key="late")
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert answer.status == 500
        assert answer.json["message"] == "Internal server error after retries"
        assert (await client.post(user, 1, key="late")).json["newScore"] == 1
        assert (await client.post(user, 1)).json["newScore"] == 2
