"""What processes cost, as the kernel counts it (Linux): CPU time of whole trees, and memory."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

_PARENT, _UTIME, _CUTIME = 1, 11, 13
"""Places in /proc/PID/stat after the name: parent; utime and stime, which end before cutime."""


def cpu_seconds(roots: Iterable[int]) -> dict[int, float]:
    """
    CPU seconds of these processes and what descends from them, by pid.

    Without autovacuum: it cleans up after whoever was measured before.
    """
    stats = _stats()
    children = defaultdict(list)
    for pid, fields in stats.items():
        children[int(fields[_PARENT])].append(pid)
    seconds, left = {}, list(roots)
    while left:
        pid = left.pop()
        if "autovacuum worker" in _title(pid):
            continue
        left += children[pid]
        seconds[pid] = sum(map(int, stats[pid][_UTIME:_CUTIME])) / _TICKS_PER_S
    return seconds


def cpu_spent(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """CPU seconds between two looks; what has ended meanwhile, such as others' sessions, is left out."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def thread_seconds(pids: Iterable[int]) -> float:
    """CPU seconds of all threads of just these processes, to the nanosecond."""
    return sum(
        int(schedstat.read_text().split()[0]) / 1e9
        for pid in pids
        for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat")
    )


def resident_bytes(pid: int) -> int:
    """What of a process is in memory (RSS), what it shares with others included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident_kib(pids: Iterable[int]) -> int:
    """Of these processes; what they share counts for each."""
    return sum(map(resident_bytes, pids)) // 1024


def proportional_bytes(roots: Iterable[int]) -> int:
    """What of these processes and their children is in memory; what is shared counts once (PSS)."""
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in cpu_seconds(roots))
    return sum(
        int(line.split()[1]) * 1024
        for rollup in rollups
        for line in rollup.splitlines()
        if line.startswith("Pss:")
    )


def titles(root: int) -> list[str]:
    """The command lines of a process's children: PostgreSQL says there what each one does."""
    return [_title(pid) for pid, fields in _stats().items() if int(fields[_PARENT]) == root]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:  # It has ended.
        return ""


def _stats() -> dict[int, list[str]]:
    stats = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                line = Path(entry.path, "stat").read_text(errors="replace")
            except OSError:  # It has ended.
                continue
            # The name, in brackets, may hold anything.
            stats[int(entry.name)] = line.rpartition(")")[2].split()
    return stats
