"""A Node.js API to measure beside ours: behind an Nginx of its own, on a Valkey of its own.

It is no part of the project: a folder with `api.js`, which serves POST /api/scores/update and reads
PORT, SHARDS, REDIS_URL and JWT_SECRET; with `gateway.js`, which sends what is published on
scores_channel to every WebSocket and reads PORT, REDIS_URL and JWT_SECRET (`broadcasters.py` runs
it); and with `install DIR`, which puts the modules they need into DIR and prints the NODE_PATH.
"""

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from services.scoreboard.servers import NGINX_WORKERS, Binaries
from tests.cluster import Cluster, free_port

PROCESSES = 2
"""As many as the cluster has API replicas."""

INSTALL_SECONDS_MAX = 300
START_SECONDS_MAX = 30
STOP_SECONDS_MAX = 10

NGINX = """
worker_processes {workers};
daemon off;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    upstream api {{
        {servers}
        keepalive 64;
        # Less than the 5 s after which Node.js closes an idle connection.
        keepalive_timeout 4s;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://api;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


def install(source: Path, folder: Path) -> str:
    """Put the modules into the folder; the NODE_PATH to use."""
    done = subprocess.run(
        ["/bin/sh", source / "install", folder],
        stdout=subprocess.PIPE,
        text=True,
        timeout=INSTALL_SECONDS_MAX,
        check=True,
    )
    return done.stdout.strip()


class Yardstick:
    """The running API.

    Attributes:
        trees: The processes that answer its requests, PostgreSQL's apart, by what they are.
    """

    def __init__(self, port: int, trees: Mapping[str, Sequence[int]]) -> None:
        self.port = port
        self.trees = trees


@contextmanager
def running(
    source: Path, work: Path, cluster: Cluster, shard_urls: Sequence[str]
) -> Iterator[Yardstick]:
    """
    Install and start it, and stop it in the end.

    Args:
        work: An empty folder.
        shard_urls: Databases with the table user_scores.
    """
    modules = install(source, work / "modules")
    binaries = Binaries.find(os.environ)
    valkey_port, port, *api_ports = (free_port() for _ in range(2 + PROCESSES))
    with ExitStack() as stack:

        def start(name: str, argv: Sequence[str | Path], environ: Mapping[str, str]) -> int:
            log = stack.enter_context((work / f"{name}.log").open("wb"))
            process = subprocess.Popen(argv, env=environ, cwd=work, stdout=log, stderr=log)
            stack.callback(process.wait, STOP_SECONDS_MAX)
            stack.callback(process.terminate)
            return process.pid

        # The cluster's own settings, in another place.
        (work / "valkey").mkdir()
        settings = re.sub(r"(?m)^port .*$", f"port {valkey_port}", cluster.secret("valkey.conf"))
        settings = re.sub(r"(?m)^dir .*$", f'dir "{work / "valkey"}"', settings)
        (work / "valkey.conf").write_text(settings)
        valkey = start("valkey", [binaries.valkey, work / "valkey.conf"], os.environ)
        environ = {
            **os.environ,
            "NODE_ENV": "production",
            "NODE_PATH": modules,
            "JWT_SECRET": cluster.secret("jwt_secret"),
            "SHARDS": ",".join(shard_urls),
            "REDIS_URL": re.sub(r":\d+/0$", f":{valkey_port}", cluster.secret("redis_url")),
        }
        _wait_for(valkey_port)
        api = [
            start(f"api-{number}", ["node", source / "api.js"], {**environ, "PORT": str(api_port)})
            for number, api_port in enumerate(api_ports)
        ]
        (work / "nginx.conf").write_text(
            NGINX.format(
                workers=NGINX_WORKERS,
                port=port,
                servers=" ".join(f"server 127.0.0.1:{api_port};" for api_port in api_ports),
            )
        )
        nginx = start(
            "nginx",
            [binaries.nginx, "-p", work, "-c", work / "nginx.conf", "-e", "stderr"],
            os.environ,
        )
        for one in (*api_ports, port):
            _wait_for(one)
        yield Yardstick(port, {"nginx": [nginx], "api": api, "valkey": [valkey]})


def _wait_for(port: int) -> None:
    give_up_at = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.05)
