"""What operators and attackers meet: health, hardening, secrets, and what answers from outside."""

import asyncio
import json
import re
import subprocess

import httpx2 as httpx
import pytest
import yaml

from services.api.app import GRACE_S
from services.api.writes import DEADLINE_S
from services.gateway.clients import CLOSE_TIMEOUT_S
from services.gateway.settings import GatewaySettings
from services.gateway.wheel import TICK_S
from tests.cluster import Json, eventually
from tests.compose.build import COMPOSE_FILE, OFFICIAL, ROOT
from tests.compose.stack import Stack
from tests.monitoring.prometheus import Prometheus

pytestmark = pytest.mark.compose

DOCKERFILE = ROOT / "deploy/Dockerfile"

IMAGE_BYTES_MAX = 90_000_000
"""Of the project's image over its base."""

HEALTHY_SECONDS_MAX = 60
"""From `up` to all healthy, once the images are there."""

FOUND_SECONDS_MAX = 15
SPARE_S = 5
"""To start and to end a drain, on a busy machine."""

METRICS_PORTS = {"api": 8000, "gateway": 8001}

FROM_ANOTHER_ADDRESS = """
import urllib.error, urllib.request, collections
answers = collections.Counter()
for _ in range(101):
    request = urllib.request.Request("http://nginx:8080/api/scores/top",
                                     headers={"X-Forwarded-For": "10.9.8.7", "X-Real-IP": "10.9.8.7"})
    try:
        answers[urllib.request.urlopen(request).status] += 1
    except urllib.error.HTTPError as error:
        answers[error.code] += 1
print(dict(answers))
"""


def test_every_image_can_be_set_and_is_the_official_one_unless_it_is() -> None:
    """The one that a stand-in stands in for; and the base of our own is a build argument."""
    services: Json = yaml.safe_load(COMPOSE_FILE.read_text())["services"]
    images = {one["image"] for one in services.values()}
    images |= {one["build"]["args"]["PYTHON_IMAGE"] for one in services.values() if "build" in one}
    defaults = dict(re.findall(r"^\$\{(\w+):-([^}]+)\}$", "\n".join(images), re.MULTILINE))
    assert len(defaults) == len(images)
    assert defaults == OFFICIAL | {"SCOREBOARD_IMAGE": "scoreboard:latest"}
    dockerfile = DOCKERFILE.read_text()
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${PYTHON_IMAGE}"}
    assert f"ARG PYTHON_IMAGE={OFFICIAL['PYTHON_IMAGE']}\n" in dockerfile


def test_every_container_is_healthy(stack: Stack) -> None:
    """Within a minute of `up`, and the migration has ended well."""
    print(f"all healthy {stack.up_s:.1f} s after `up`")
    assert stack.up_s <= HEALTHY_SECONDS_MAX
    states = {one["Config"]["Labels"]["com.docker.compose.service"]: one["State"]
              for one in stack.containers()}  # fmt: skip
    assert states.pop("migrate")["ExitCode"] == 0
    assert {name: state["Health"]["Status"] for name, state in states.items()} == dict.fromkeys(
        states, "healthy"
    )


def test_every_container_is_confined(stack: Stack) -> None:
    """No root, no capability, nothing to write to but its volumes, and a bound on everything."""
    for one in stack.containers():
        name, host = one["Name"], one["HostConfig"]
        assert one["Config"]["User"] not in ("", "0", "root"), name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"] and not host["CapAdd"], name
        assert host["SecurityOpt"] == ["no-new-privileges:true"], name
        assert not host["Privileged"] and host["PidsLimit"] > 0 and host["Memory"] > 0, name
        assert host["LogConfig"]["Config"] == {"max-file": "5", "max-size": "10m"}, name
        # What is so by configuration is so in the kernel as well.
        if one["State"]["Running"]:
            status = stack.docker("exec", one["Id"], "cat", "/proc/1/status")
            assert not re.search(r"^Uid:.*\b0\b", status, re.MULTILINE), name
            assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE), name
            written = stack.docker("exec", one["Id"], "touch", "/etc/x", check=False)
            assert written == "", name


def test_only_nginx_is_published(stack: Stack) -> None:
    """Prometheus is on loopback, and nothing else of the host leads inside."""
    published = {
        (one["Config"]["Labels"]["com.docker.compose.service"], bound["HostIp"])
        for one in stack.containers()
        for bindings in one["NetworkSettings"]["Ports"].values()
        for bound in bindings or ()
    }
    inside = {("prometheus", "127.0.0.1"), ("grafana", "127.0.0.1")}
    # The tests say SCOREBOARD_PORT=127.0.0.1:…
    assert published - inside == {("nginx", "127.0.0.1")}
    networks = json.loads(stack.docker("network", "inspect", f"{stack.project}_data"))
    assert networks[0]["Internal"] is True


def test_stores_are_out_of_reach_of_the_edge(stack: Stack) -> None:
    """Nginx, Prometheus and Grafana do not even know their names."""
    for service in ("nginx", "prometheus", "grafana"):
        for one in stack.containers(service):
            assert list(one["NetworkSettings"]["Networks"]) == [f"{stack.project}_edge"]
    for service in ("shard-0", "shard-1", "valkey", "migrate"):
        (one,) = stack.containers(service)
        assert list(one["NetworkSettings"]["Networks"]) == [f"{stack.project}_data"]


def test_no_secret_is_seen(stack: Stack) -> None:
    """Not in an environment, an argument, an image or a log."""
    secrets = {
        name: (stack.folder / "secrets" / name).read_text()
        for name in ("jwt_secret", "postgres_password", "valkey_password", "grafana_password")
    }
    seen: dict[str, str] = stack.logs()
    for one in stack.containers():
        seen[f"inspect of {one['Name']}"] = json.dumps(one)
    image = stack.environ["SCOREBOARD_IMAGE"]
    seen["history"] = stack.docker("history", "--no-trunc", image)
    seen["image"] = stack.docker("image", "inspect", image)
    found = [(where, name) for where, text in seen.items()
             for name, secret in secrets.items() if secret in text]  # fmt: skip
    assert found == []
    # A tar of tars, none of them compressed.
    layers = subprocess.run(["docker", "save", image], capture_output=True, check=True).stdout
    assert b"services/api/app.py" in layers
    assert [name for name, secret in secrets.items() if secret.encode() in layers] == []
    mode = (stack.folder / "secrets").stat().st_mode
    assert mode & 0o077 == 0


def test_the_image_is_small_and_can_build_nothing(stack: Stack) -> None:
    """At most 90 MB over its base; no compiler, no pip, no secret, no test."""
    base = stack.environ.get("PYTHON_IMAGE", OFFICIAL["PYTHON_IMAGE"])
    sizes = [int(stack.docker("image", "inspect", "--format", "{{.Size}}", image))
             for image in (stack.environ["SCOREBOARD_IMAGE"], base)]  # fmt: skip
    print(f"{(sizes[0] - sizes[1]) / 1e6:.0f} MB over the base")
    assert sizes[0] - sizes[1] <= IMAGE_BYTES_MAX
    api = stack.containers("api")[0]["Id"]
    assert stack.docker("exec", api, "ls", "-A", "/opt/scoreboard/app") == "services\nshared"
    for program in ("pip", "pip3", "cc", "gcc", "make"):
        assert stack.docker("exec", api, "sh", "-c", f"command -v {program}", check=False) == ""
    with pytest.raises(AssertionError, match="No module named pip"):
        stack.docker("exec", api, "python3", "-m", "pip")


def test_every_address_has_its_own_quota(stack: Stack) -> None:
    """The client's address is the one Nginx saw, whatever the client says."""
    gateway = stack.containers("gateway")[0]["Id"]
    answers = stack.docker("exec", gateway, "python3", "-c", FROM_ANOTHER_ADDRESS)
    assert answers == "{200: 100, 429: 1}"
    # A replica believes nobody but Nginx: this is another container than the one before.
    other = stack.containers("gateway")[1]["Id"]
    straight = FROM_ANOTHER_ADDRESS.replace("nginx:8080", "api:8000")
    assert stack.docker("exec", other, "python3", "-c", straight) == "{200: 100, 429: 1}"


def test_nothing_but_the_contract_answers(stack: Stack) -> None:
    """Of what replicas and servers have for the inside."""
    for path in ("livez", "readyz", "metrics", "nginx_status", "-/healthy", "api/health", ".env"):
        code = subprocess.run(
            ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{stack.url}/{path}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert code.stdout == "404", path


async def test_prometheus_finds_every_replica(stack: Stack) -> None:
    """Within 15 seconds of scaling, up and down."""
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{stack.prometheus_port}", trust_env=False
    ) as http:
        prometheus = Prometheus(http)
        for count in (3, 1):
            await asyncio.to_thread(stack.up, api=count, gateway=count)
            expected = {
                f"{service} {stack.address(replica, 'edge')}:{port}"
                for service, port in METRICS_PORTS.items()
                for replica in stack.containers(service)
            }
            assert len(expected) == 2 * count

            async def sees_them(these: set[str] = expected) -> bool:
                seen = await prometheus.healthy_targets()
                return {one for one in seen if one.split()[0] in METRICS_PORTS} == these

            found_s = await eventually(sees_them, within_s=FOUND_SECONDS_MAX)
            print(f"{count} of each: all up after {found_s:.1f} s")


def test_the_file_says_what_it_runs_on() -> None:
    """Every service is restarted and bounded, only one-shots are not; none is cut while it drains."""
    services: Json = yaml.safe_load(COMPOSE_FILE.read_text())["services"]
    drains = {
        "api": GRACE_S + DEADLINE_S,
        "gateway": GatewaySettings.model_fields["drain_seconds"].default
        + CLOSE_TIMEOUT_S
        + 2 * TICK_S,
    }
    for name, drain_s in drains.items():
        (grace_s,) = re.findall(r"(\d+)s\b", services[name]["stop_grace_period"])
        assert int(grace_s) >= drain_s + SPARE_S, name
    for name, service in services.items():
        assert service["restart"] == ("no" if name == "migrate" else "unless-stopped"), name
        assert "memory" in service["deploy"]["resources"]["limits"], name
        assert "healthcheck" in service or name == "migrate", name


def test_a_mounted_certificate_makes_it_tls(stack: Stack) -> None:
    """On the same port, for everything; who speaks plain HTTP there is told so."""
    tls = stack.folder / "tls"
    make = ["req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=board", "-days", "1"]
    image = stack.environ.get("PYTHON_IMAGE", OFFICIAL["PYTHON_IMAGE"])
    stack.docker("run", "--rm", "--network=none", f"--volume={tls}:/tls", "--entrypoint=sh", image,
                 "-c", f"openssl {' '.join(make)} -keyout /tls/tls.key -out /tls/tls.crt"
                 " && chmod 444 /tls/*")  # fmt: skip

    def answer(url: str) -> str:
        curl = ["curl", "-sk", "--max-time", "5", "-w", " %{http_code}", url]
        return subprocess.run(curl, capture_output=True, text=True, check=False).stdout

    top = f"127.0.0.1:{stack.port}/api/scores/top"
    try:
        stack.compose("restart", "nginx")
        stack.up(api=2, gateway=2)
        assert answer(f"https://{top}").endswith(" 200")
        assert answer(f"http://{top}") == '{"status":"error","message":"Bad request"} 400'
    finally:
        stack.docker("run", "--rm", f"--volume={tls}:/tls", "--entrypoint=sh", image, "-c",
                     "rm /tls/*")  # fmt: skip
        stack.compose("restart", "nginx")
        stack.up(api=2, gateway=2)
    assert answer(f"http://{top}").endswith(" 200")
