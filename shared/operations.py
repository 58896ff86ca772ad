"""What operators ask of a replica: is it alive, can it serve, and how is it doing.

Reachable from inside only; Nginx routes none of it.
"""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Readiness = Callable[[], str | None]
"""Returns why the replica cannot serve, or None when it can."""


def operations_routes(readiness: Readiness) -> list[Route]:
    """``/livez``, ``/readyz`` and ``/metrics`` of one replica."""

    async def livez(_request: Request) -> Response:
        # Checks nothing but the loop: restarting a replica mends no database.
        return JSONResponse({"status": "alive"})

    async def readyz(_request: Request) -> Response:
        reason = readiness()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, 503)

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return [
        Route("/livez", livez),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
    ]
