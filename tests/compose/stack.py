"""The compose file's containers, seen as any other scoreboard and as their operator sees them."""

import json
import os
import random
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from tests.cluster import Json, Scoreboard
from tests.compose.build import COMPOSE_FILE, ENVIRON, OFFICIAL, ROOT

UP_SECONDS_MAX = 180
DOWN_SECONDS_MAX = 120

PORTS = {"api": 8000, "gateway": 8000}
OPERATIONS_PORTS = {"api": 8000, "gateway": 8001}


LOGGED = (
    "@timestamp", "message", "event.duration", "nginx.upstream.address", "nginx.upstream.status",
    "nginx.upstream.response_time",
)  # fmt: skip
"""Of a failed request."""

FIRST = 8
"""Failed requests that are shown."""

CALM_PORTS = range(20_000, 30_000)
"""No system takes its clients' ports from here: one of those would keep the engine from listening."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on at the moment."""
    found: list[int] = []
    for port in random.sample(CALM_PORTS, len(CALM_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def free_network() -> str:
    """The first three bytes of a network that the engine has none of."""
    names = _docker("network", "ls", "--quiet").split()
    networks = json.loads(_docker("network", "inspect", *names))
    taken = {
        config["Subnet"].rpartition(".")[0]
        for network in networks
        for config in network["IPAM"]["Config"] or ()
    }
    free = [prefix for third in range(256) if (prefix := f"172.30.{third}") not in taken]
    return random.choice(free)


def _docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout


class Stack(Scoreboard):
    """
    One project of Compose, with secrets, ports, volumes and networks of its own.

    Attributes:
        up_s: Seconds that the first `up` took.
    """

    def __init__(self, folder: Path, **environ: str) -> None:
        """
        Args:
            folder: For secrets and settings.
            environ: Of `docker compose`, beside what `tests.compose.build` found out.
        """
        found: dict[str, str] = json.loads(ENVIRON.read_text())
        self.folder = folder
        self.up_s = 0.0
        self.port, self.prometheus_port, grafana_port = free_ports(3)
        self.project = f"scoreboard-test-{self.port}"
        self.settings = folder / "settings.env"
        self.environ = {
            **{name: value for name, value in os.environ.items() if name not in OFFICIAL},
            "SCOREBOARD_IMAGE": "scoreboard:test",
            **found,
            "COMPOSE_PROJECT_NAME": self.project,
            "SCOREBOARD_PORT": f"127.0.0.1:{self.port}",
            "SCOREBOARD_NETWORK": free_network(),
            "SCOREBOARD_SECRETS": str(folder / "secrets"),
            "SCOREBOARD_SETTINGS": str(self.settings),
            "SCOREBOARD_TLS": str(folder / "tls"),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            "GRAFANA_PORT": str(grafana_port),
            **environ,
        }
        (folder / "tls").mkdir(parents=True)
        # Where no registry has Grafana nothing stands in for it.
        stood_in = "PYTHON_IMAGE" in found and found["GRAFANA_IMAGE"] == found["PYTHON_IMAGE"]
        self._without = ["grafana"] if stood_in else []
        subprocess.run(
            [ROOT / "deploy" / "make-secrets", folder / "secrets"], check=True, capture_output=True
        )

    def compose(
        self, *words: str, timeout: float = UP_SECONDS_MAX, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Run `docker compose` on this project."""
        return self._run("docker", "compose", "-f", str(COMPOSE_FILE), *words, timeout=timeout,
                         check=check)  # fmt: skip

    def docker(self, *words: str, check: bool = True) -> str:
        """What `docker` says."""
        return self._run("docker", *words, timeout=DOWN_SECONDS_MAX, check=check).stdout.strip()

    def _run(self, *argv: str, timeout: float, check: bool) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            argv,
            env=self.environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def up(self, *, check: bool = True, **counts: int) -> "subprocess.CompletedProcess[str]":
        """Start it, or change the number of replicas, and wait until all are healthy."""
        scales = {**dict.fromkeys(self._without, 0), **counts}
        options = [f"--scale={service}={count}" for service, count in scales.items()]
        began = time.monotonic()
        done = self.compose("up", "--detach", "--wait", *options, check=False)
        self.up_s = self.up_s or time.monotonic() - began
        if check and done.returncode != 0:
            last = {name: log.splitlines()[-5:] for name, log in self.logs().items()}
            raise AssertionError(f"{done.stderr}\n{last}")
        return done

    def down(self) -> None:
        """Stop it and forget its data."""
        self.compose("down", "--volumes", "--timeout", "5", timeout=DOWN_SECONDS_MAX)

    def containers(self, service: str = "") -> list[Json]:
        """What `docker inspect` says of each container, of a service or of all."""
        labels = [f"label=com.docker.compose.project={self.project}"]
        if service:
            labels.append(f"label=com.docker.compose.service={service}")
        filters = [f"--filter={label}" for label in labels]
        ids = self.docker("ps", "--all", "--quiet", "--no-trunc", *filters).split()
        return cast("list[Json]", json.loads(self.docker("inspect", *ids))) if ids else []

    def container(self, service: str) -> Json:
        """The only one of a service."""
        (container,) = self.containers(service)
        return container

    def address(self, container: Mapping[str, Any], network: str) -> str:
        """Its address there; the engine's host reaches it."""
        networks = container["NetworkSettings"]["Networks"]
        return cast("str", networks[f"{self.project}_{network}"]["IPAddress"])

    def replicas(self, service: str) -> list[tuple[str, int]]:
        """Where each replica takes its clients."""
        return [(self.address(one, "edge"), PORTS[service]) for one in self.containers(service)]

    def secret(self, name: str) -> str:
        """A secret; in URLs the services are addresses, for there is no DNS out here."""
        text = (self.folder / "secrets" / name).read_text()
        if name in ("shard_urls", "redis_url"):
            for service in ("shard-0", "shard-1", "valkey"):
                if f"@{service}" in text:
                    address = self.address(self.container(service), "data")
                    text = text.replace(f"@{service}", f"@{address}")
        return text

    def logs(self) -> dict[str, str]:
        """All that each container has written."""
        return {
            one["Name"].removeprefix(f"/{self.project}-").rpartition("-")[0]: self.log(one["Id"])
            for one in self.containers()
        }

    def failures(self) -> list[str]:
        """What Nginx answered with 500 or more: how many a second, and its log of the first ones."""
        lines = [line for line in self.logs()["nginx"].splitlines() if line.startswith("{")]
        failed = [one for one in map(json.loads, lines) if one["http.response.status_code"] >= 500]
        first = [
            " ".join(f"{name.rpartition('.')[2]}={one[name]}" for name in LOGGED)
            for one in failed[:FIRST]
        ]
        return [str(dict(Counter(one["@timestamp"] for one in failed))), *first]

    def log(self, container: str) -> str:
        """All that one container has written."""
        done = self._run("docker", "logs", container, timeout=30, check=True)
        return done.stdout + done.stderr
