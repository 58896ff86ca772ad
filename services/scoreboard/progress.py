"""What people see: progress while they wait, the table of `status`, the lines of `logs`."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

import click

from services.scoreboard.home import ProcessState, State

if TYPE_CHECKING:
    from rich.table import Table

LOG_POLL_S = 0.2

LOG_LINES_BEFORE_FOLLOWING = 10
"""Of each log, as `tail -f` does."""

STYLES = {
    "ready": "green",
    "done": "green",
    "waiting": "dim",
    "stopping": "yellow",
    "stopped": "dim",
}
"""Everything else is on its way, and cyan."""


class Progress:
    """Shows states as they come: a live table on a terminal, else a line for each news."""

    def __init__(self, known: State | None = None) -> None:
        """What stands in ``known`` is no news."""
        self._news = {one.name: (_news(one), "") for one in (known.processes if known else ())}
        self._began = time.monotonic()
        self._live = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # No thread of its own: the supervisor forks, and shows only what is new anyway.
            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, state: State) -> None:
        """Show what is new in it."""
        elapsed = f"{time.monotonic() - self._began:.1f} s"
        for process in state.processes:
            news = _news(process)
            if self._news.get(process.name, ("waiting",))[0] != news:
                self._news[process.name] = news, elapsed
                if self._live is None:
                    click.echo(f"{elapsed:>7}  {process.name:<12} {news}", err=True)
        if self._live is not None:
            self._live.update(self._table(state), refresh=True)

    def _table(self, state: State) -> "Table | str":
        from rich.table import Table

        if state.phase == "ready" and all(
            one.state in ("ready", "done") for one in state.processes
        ):
            return ""  # It just runs.
        table = Table.grid(padding=(0, 2))
        for process in state.processes:
            news, elapsed = self._news.get(process.name, ("waiting", ""))
            table.add_row(process.name, news, elapsed, style=STYLES.get(process.state, "cyan"))
        return table


def _news(process: ProcessState) -> str:
    return process.state + (f", restart {process.restarts}" if process.restarts else "")


def greeting(state: State, token: str, command: str, home_option: str) -> str:
    """How to look at the board and move it, for who has just started it."""
    url = state.url.rstrip("/")
    return "\n".join(
        (
            f"The board is at {url}/#token={token}",
            "",
            "A first score:",
            f'  curl -X POST {url}/api/scores/update -H "Content-Type: application/json" \\',
            f'    -H "Authorization: Bearer $({command} token alice{home_option})" \\',
            '    -d \'{"userId":"alice","scoreIncrement":10}\'',
            "",
            f"Stop it with: {command} down{home_option}",
        )
    )


def table(processes: Iterable[ProcessState]) -> str:
    """Name, state, pid, address, restarts and time since the last start, in columns."""
    rows = [("NAME", "STATE", "PID", "ADDRESS", "RESTARTS", "UPTIME")]
    for process in processes:
        alive = process.pid is not None and process.started_at is not None
        rows.append(
            (
                process.name,
                process.state,
                str(process.pid or ""),
                f"127.0.0.1:{process.port}" if process.port else "",
                str(process.restarts),
                _span(time.time() - process.started_at) if alive and process.started_at else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _span(seconds: float) -> str:
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def read_logs(logs: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Every line of every log as ``(name, line)``."""
    for name, path in logs.items():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from ((name, line.rstrip("\n")) for line in file)


def follow_logs(folder: Path, wanted: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The last lines of each log and then, without end, what is added; also by new processes."""
    names = tuple(wanted)
    files: dict[str, IO[str]] = {}
    rests: dict[str, str] = {}
    while True:
        for name, path in find_logs(folder, names).items():
            known = files.get(name)
            if known is None:
                files[name] = path.open(encoding="utf-8", errors="replace")
                lines = files[name].read().splitlines(keepends=True)
                tail = "".join(lines[-LOG_LINES_BEFORE_FOLLOWING:])
            else:
                tail = known.read()
                if _rotated(known, path):
                    known.close()
                    del files[name]
            whole, _, rests[name] = (rests.get(name, "") + tail).rpartition("\n")
            yield from ((name, line) for line in whole.splitlines())
        time.sleep(LOG_POLL_S)


def _rotated(file: IO[str], path: Path) -> bool:
    try:
        return path.stat().st_ino != Path(f"/dev/fd/{file.fileno()}").stat().st_ino
    except FileNotFoundError:
        return True


def find_logs(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The logs in the folder by process; ``api`` stands for all of api-0, api-1, …"""
    wanted = tuple(names)
    return {
        path.stem: path
        for path in sorted(folder.glob("*.log"))
        if not wanted or path.stem in wanted or path.stem.rpartition("-")[0] in wanted
    }
