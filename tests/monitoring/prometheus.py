"""The real Prometheus, with the configuration of operators but for where the replicas are."""

import asyncio
import json
import math
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml

from tests.cluster import Cluster, eventually, free_port
from tests.monitoring.queries import CONFIGURATION, ROOT

FETCHED = ROOT / ".venv/prometheus/usr/bin"
"""Where `make test-deploy` puts Debian's."""

START_SECONDS_MAX = 20.0


def tool(name: str) -> str:
    """A program that the tests of `deploy` need; without it they are skipped, in CI they fail."""
    found = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}{FETCHED}")
    if found is None:
        reason = f"{name} is not installed, and `make test-deploy` could not get it."
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Prometheus:
    """A server, running."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def _get(self, path: str, **parameters: str) -> Any:
        response = await self._http.get(f"/api/v1/{path}", params=parameters)
        answer = response.json()
        assert answer["status"] == "success", answer
        return answer["data"]

    async def query(self, expression: str) -> list[float]:
        """The values of an instant query, one a series, that are numbers."""
        data = await self._get("query", query=expression)
        values = [float(series["value"][1]) for series in data["result"]]
        return [value for value in values if not math.isnan(value)]

    async def healthy_targets(self) -> set[str]:
        """Jobs and addresses that answered the last scrape."""
        data = await self._get("targets", state="active")
        return {
            f"{target['labels']['job']} {target['labels']['instance']}"
            for target in data["activeTargets"]
            if target["health"] == "up"
        }

    async def alerts(self, state: str) -> dict[str, dict[str, str]]:
        """Annotations of the alerts in this state (`pending`, `firing`), by name."""
        data = await self._get("alerts")
        return {
            alert["labels"]["alertname"]: alert["annotations"]
            for alert in data["alerts"]
            if alert["state"] == state
        }


def replicas(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Job and address of each replica's metrics."""
    for process in cluster.status()["processes"]:
        job = process["name"].partition("-")[0]
        if job in ("api", "gateway"):
            yield job, f"127.0.0.1:{process['operations_port']}"


@asynccontextmanager
async def watching(cluster: Cluster, folder: Path) -> AsyncIterator[Prometheus]:
    """Prometheus that watches a cluster; it looks and evaluates each second."""
    program = tool("prometheus")
    port = free_port()
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    configuration["global"] = {
        "scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s",
    }  # fmt: skip
    configuration["rule_files"] = [str(CONFIGURATION.parent / "rules/*.yml")]
    for job in configuration["scrape_configs"]:
        if job.pop("dns_sd_configs", None):
            targets = [address for name, address in replicas(cluster) if name == job["job_name"]]
            job["static_configs"] = [{"targets": targets}]
        elif job["job_name"] == "prometheus":
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(configuration))
    with (folder / "prometheus.log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(
            program,
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:

            async def is_ready() -> bool:
                assert server.returncode is None, (folder / "prometheus.log").read_text()
                try:
                    return (await http.get("/-/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await eventually(is_ready, within_s=START_SECONDS_MAX, what="Prometheus is ready")
            yield Prometheus(http)
    finally:
        server.terminate()
        await server.wait()
