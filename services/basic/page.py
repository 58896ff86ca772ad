"""The page with the live board, as Nginx serves it in a cluster."""

from collections.abc import Awaitable, Callable
from hashlib import blake2s
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
"""By the end of a file's name."""

HEADERS = {
    # The page changes with a deployment: a browser may keep it, but must ask.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # The token is in the page's fragment.
    "Referrer-Policy": "no-referrer",
}


def page_routes() -> list[Route]:
    """A route for each of its files, which are read once."""
    routes = []
    for file in files("nginx").joinpath("html").iterdir():
        answer = _file(file.read_bytes(), TYPES[file.name.rpartition(".")[2]])
        routes.append(Route(f"/{file.name}", answer, methods=["GET"]))
        if file.name == "index.html":
            routes.append(Route("/", answer, methods=["GET"]))
    return routes


def _file(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{blake2s(content, digest_size=12).hexdigest()}"'

    async def answer(request: Request) -> Response:
        headers = HEADERS | {"ETag": etag}
        if etag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers | {"Content-Type": media_type})

    return answer
