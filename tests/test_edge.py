"""What Nginx answers by itself: the contract's shape, whatever was wrong with the request."""

import json
import re
import socket
from http.client import HTTPMessage, parse_headers
from io import BytesIO

import pytest

from tests.cluster import Scoreboard, eventually

ANSWER_SECONDS_MAX = 20.0


def send(cluster: Scoreboard, request: bytes) -> tuple[int, HTTPMessage, bytes]:
    """Send these bytes and read until Nginx closes: status, headers, body."""
    with socket.create_connection(("127.0.0.1", cluster.port), ANSWER_SECONDS_MAX) as connection:
        connection.sendall(request)
        answer = BytesIO(b"".join(iter(lambda: connection.recv(65536), b"")))
    status = int(answer.readline().split()[1])
    headers = parse_headers(answer)
    return status, headers, answer.read()


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: board", "Connection: close", *headers]
    return "\r\n".join((*lines, "", "")).encode()


@pytest.mark.parametrize(
    ("request_bytes", "status", "message"),
    [
        pytest.param(b"what?\r\n\r\n", 400, "Bad request", id="not-http"),
        pytest.param(b"GET /api/x HTTP/1.1\r\n\r\n", 400, "Bad request", id="no-host"),
        pytest.param(get("/api/%00"), 400, "Bad request", id="nul-in-path"),
        pytest.param(get("/nothing"), 404, "Not found", id="unknown"),
        pytest.param(get("/api/../metrics"), 404, "Not found", id="metrics-by-detour"),
        pytest.param(get("/error"), 404, "Not found", id="internal"),
        pytest.param(
            get("/api/scores/top", method="TRACE"), 405, "Method not allowed", id="trace"
        ),
        pytest.param(
            get("/api/scores/update", "Content-Length: 5000", method="POST") + b"x" * 5000,
            413, "Request body too large", id="long-body",
        ),
        pytest.param(get("/api/" + "a" * 9300), 414, "URI too long", id="long-path"),
        pytest.param(
            get("/api/scores/top", "Cookie: " + "a" * 9300),
            431, "Request header fields too large", id="long-header",
        ),
        pytest.param(
            get("/api/scores/update", "Transfer-Encoding: gzip, chunked", method="POST"),
            501, "Not implemented", id="transfer-encoding",
        ),
        pytest.param(
            b"GET /api/x HTTP/3.7\r\n\r\n", 505, "HTTP version not supported", id="version"
        ),
    ],
)  # fmt: skip
def test_a_refused_request_is_answered_in_the_contracts_shape(
    cluster: Scoreboard, request_bytes: bytes, status: int, message: str
) -> None:
    """JSON, one request id, and no more about the server than it has to say."""
    answered, headers, body = send(cluster, request_bytes)
    assert answered == status
    assert json.loads(body) == {"status": "error", "message": message}
    assert headers["Content-Type"] == "application/json"
    assert re.fullmatch(r"[0-9a-f]{32}", ", ".join(headers.get_all("X-Request-ID", [])))
    assert headers["Server"] == cluster.server


@pytest.mark.parametrize(
    ("path", "allowed"), [("/api/scores/update", "POST"), ("/api/scores/top", "GET, HEAD")]
)
def test_a_405_says_what_is_allowed(cluster: Scoreboard, path: str, allowed: str) -> None:
    """Also where Nginx refuses before the API is asked."""
    assert send(cluster, get(path, method="TRACE"))[1]["Allow"] == allowed


def test_a_header_of_8_kb_passes(cluster: Scoreboard) -> None:
    """The limit is above what browsers send."""
    assert send(cluster, get("/api/scores/top", "Cookie: " + "a" * 8192))[0] == 200


def test_the_page_runs_only_its_own_scripts(cluster: Scoreboard) -> None:
    """The demo page comes with a strict policy, and is asked for anew."""
    status, headers, body = send(cluster, get("/"))
    assert (status, headers["Content-Type"]) == (200, "text/html")
    assert headers["Content-Security-Policy"].startswith("default-src 'self'; connect-src 'self';")
    assert headers["Cache-Control"] == "no-cache"
    assert len(headers.get_all("X-Request-ID", [])) == 1
    for script in re.findall(rb'src="([^"]+\.js)"', body):
        status, headers, _ = send(cluster, get(f"/{script.decode().lstrip('/')}"))
        assert (status, headers["Content-Type"]) == (200, "text/javascript")


@pytest.mark.nginx
async def test_no_query_reaches_a_log(cluster: Scoreboard) -> None:
    """The access log has path and request id, and no log has what stands behind the `?`."""
    ids = [
        send(cluster, get(f"{path}?token=canary-of-a-token"))[1]["X-Request-ID"]
        for path in ("/scores/live", "/scores/live/", "/api/scores/top", "/board.js", "/%00")
    ]

    def logged() -> dict[str, str]:
        lines = cluster.logs()["nginx"].splitlines()
        answers = [json.loads(line) for line in lines if line.startswith("{")]
        return {line["http.request.id"]: line["url.path"] for line in answers}

    # Nginx writes once a second.
    await eventually(lambda: set(ids[:4]) <= set(logged()), what="a line for each")
    logs, paths = cluster.logs(), logged()
    assert [paths[one] for one in ids[:4]] == [
        "/scores/live", "/scores/live/", "/api/scores/top", "/board.js",
    ]  # fmt: skip
    assert [name for name, text in logs.items() if "canary-of-a-token" in text] == []


@pytest.mark.nginx
async def test_the_access_log_is_json_and_says_what_was_asked(cluster: Scoreboard) -> None:
    """Also of what is refused: the method that was sent, and no byte that is no JSON."""
    asked = {
        "a long body": get("/api/scores/update", "Content-Length: 5000", method="POST")
        + b"x" * 5000,
        "no ASCII": b"PUT /caf\xe9\xff?token=x HTTP/1.0\r\nHost: board\r\n\r\n",
        "quotes": get('/"quoted"', method="DELETE"),
        "no HTTP": b"\xff\xfe\r\n\r\n",
    }
    ids = {send(cluster, request)[1]["X-Request-ID"]: name for name, request in asked.items()}

    def logged() -> dict[str, tuple[str, str]]:
        lines = cluster.logs()["nginx"].splitlines()
        answers = [json.loads(line) for line in lines if line.startswith("{")]
        return {
            ids[line["http.request.id"]]: (line["http.request.method"], line["url.path"])
            for line in answers
            if line["http.request.id"] in ids
        }

    # Nginx writes the line once it has let go of the connection, and once a second.
    await eventually(lambda: len(logged()) == len(ids), what="a line for each")
    assert logged() == {
        "a long body": ("POST", "/api/scores/update"),
        "no ASCII": ("PUT", "(not ASCII)"),
        "quotes": ("DELETE", '/"quoted"'),
        "no HTTP": ("", ""),
    }
