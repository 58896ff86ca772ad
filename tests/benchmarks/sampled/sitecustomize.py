"""Samples an API replica from inside: with this folder on PYTHONPATH, Python imports it by its name.

SIGUSR1 begins; a second one ends and writes how often which layer had the CPU. A sample belongs to
the innermost frame that has a layer; what a library does belongs to who called it.
"""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

INTERVAL_S = 0.001
"""Of CPU time; most kernels make it 4 ms."""

LAYERS = {
    "/uvicorn/": "server (uvicorn)",
    "/starlette/": "server (starlette)",
    "/api/exchange.py": "exchange, metrics",
    "/prometheus_client/": "exchange, metrics",
    "/api/endpoints.py": "endpoint",
    "/api/submission.py": "body",
    "/shared/token.py": "token",
    "/api/quota.py": "quota",
    "/asyncio/streams.py": "quota",  # Only redis-py reads so.
    "/api/writes.py": "batch",
    "/api/shards.py": "batch",
    "/asyncpg/": "batch",
    "/api/announcements.py": "leaderboard",
    "/shared/leaderboard.py": "leaderboard",
    "/api/batch.py": "queues",
}

_counts: Counter[str] = Counter()
_running = False


def _layer(frame: FrameType | None) -> str:
    while frame is not None:
        for part, layer in LAYERS.items():
            if part in frame.f_code.co_filename:
                return layer
        frame = frame.f_back
    return "loop (uvloop)"


def _sample(_number: int, frame: FrameType | None) -> None:
    _counts[_layer(frame)] += 1


def _toggle(_number: int, _frame: FrameType | None) -> None:
    global _running
    _running = not _running
    interval = INTERVAL_S if _running else 0
    signal.setitimer(signal.ITIMER_PROF, interval, interval)
    if not _running:
        path = Path(os.environ["SAMPLES"], f"{os.getpid()}.json")
        part = path.with_suffix(".part")
        part.write_text(json.dumps(_counts))
        part.rename(path)


if sys.orig_argv[-1] == "services.api":
    signal.signal(signal.SIGPROF, _sample)
    signal.signal(signal.SIGUSR1, _toggle)
