"""Faults of whole processes and disks. Each returns how to heal it."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cluster import Cluster

Heal = Callable[[], None]

DISK_ROOM_BYTES = 40 * 2**20
"""Left to a shard before its disk is filled: it takes 16 MB at a time for its log."""


def freeze(cluster: Cluster, *names: str) -> Heal:
    """Processes keep their connections and answer nothing: SIGSTOP, children included."""
    pids: list[int] = []
    for name in names:
        pid = cluster.process(name)["pid"]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pids += [pid, *map(int, children)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    def heal() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    return heal


def stop(cluster: Cluster, shard: str) -> Heal:
    """Crash a shard, and let it find no data when it is restarted."""
    data = cluster.home / shard
    away = data.with_suffix(".away")
    pid = cluster.process(shard)["pid"]
    data.rename(away)
    os.kill(pid, signal.SIGQUIT)

    def heal() -> None:
        away.rename(data)

    return heal


class MountRefused(Exception):
    """A disk of its own cannot be mounted here."""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """
    Put a folder on a disk of its own with little room left.

    Raises:
        MountRefused: Where that is not allowed.
    """
    used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
    away = folder.with_suffix(".copy")
    folder.rename(away)
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={used + DISK_ROOM_BYTES}", "tmpfs"]
    done = subprocess.run(
        ["/bin/mount", *options, folder], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise MountRefused(done.stderr.strip())
    try:
        subprocess.run(["/bin/cp", "-a", f"{away}/.", folder], check=True)
        yield
    finally:
        subprocess.run(["/bin/umount", folder], check=True)


def fill(folder: Path) -> Heal:
    """Leave no room on the folder's disk."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast.unlink
