"""What people see: progress while they wait, the table of `status`, the lines of `logs`."""

import os
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

import click

from services.scoreboard.home import ProcessState, State

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.table import Table

LINES_OF_STEPS = 8
"""Where there is no terminal for a bar: enough to see that it goes on, and how fast."""

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
            with suppress(OSError):  # The terminal may be gone.
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


class Steps:
    """How far something of a known length has got: a bar on a terminal, else a few lines."""

    def __init__(self, name: str, unit: str, total: int) -> None:
        self._name = name
        self._unit = unit
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn(unit),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self._done * LINES_OF_STEPS % self._total < LINES_OF_STEPS:
            elapsed = f"{time.monotonic() - self._began:.1f} s"
            line = f"{elapsed:>7}  {self._name:<12} {self._done} of {self._total} {self._unit}"
            click.echo(line, err=True)


def _news(process: ProcessState) -> str:
    return process.state + (f", restart {process.restarts}" if process.restarts else "")


def greeting(state: State, token: str, token_command: str, down_command: str) -> str:
    """How to look at the board and move it, for who has just started it."""
    url = state.url.rstrip("/")
    return "\n".join(
        (
            f"The board is at {url}/#token={token}",
            "",
            "A first score:",
            f'  curl -X POST {url}/api/scores/update -H "Content-Type: application/json" \\',
            f'    -H "Authorization: Bearer $({token_command})" \\',
            '    -d \'{"userId":"alice","scoreIncrement":10}\'',
            "",
            f"Stop it with: {down_command}",
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


def log_lines(
    folder: Path, name: str | None, *, follow: bool
) -> Generator[tuple[str, str], None, None]:
    """
    Every line of every log as ``(process, line)``; see :func:`find_logs` for ``name``.

    To follow begins with the last lines of each and never ends: what is added, also by processes
    that are new, and after the next `up`.
    """
    files: dict[Path, IO[str]] = {}
    begun: dict[Path, str] = {}
    try:
        while True:
            for path in find_logs(folder, name):
                # After a rotation the path is another file.
                if path in files and path.stat().st_ino != os.fstat(files[path].fileno()).st_ino:
                    files.pop(path).close()
                    begun.pop(path, None)
                known = path in files
                file = files[path] if known else path.open(encoding="utf-8", errors="replace")
                files[path] = file
                text = begun.pop(path, "") + file.read()
                if follow and not text.endswith("\n"):
                    # The rest of the line is yet to be written.
                    text, _, begun[path] = text.rpartition("\n")
                lines = text.splitlines()
                shown = lines[-LOG_LINES_BEFORE_FOLLOWING:] if follow and not known else lines
                yield from ((path.stem, line) for line in shown)
            if not follow:
                return
            time.sleep(LOG_POLL_S)
    finally:
        for file in files.values():
            file.close()


def find_logs(folder: Path, name: str | None) -> list[Path]:
    """The logs in the folder: all, or those of a process; ``api`` means api-0, api-1, …"""
    return [
        path
        for path in sorted(folder.glob("*.log"))
        if name is None or name in (path.stem, path.stem.rpartition("-")[0])
    ]
