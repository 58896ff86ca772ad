"""The manifests, as kustomize builds them: valid, `restricted`, and what the services need."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.api.app import GRACE_S
from services.api.engine import POOL_CONNECTIONS
from services.api.settings import ApiSettings
from services.api.writes import DEADLINE_S
from services.gateway.clients import CLOSE_TIMEOUT_S
from services.gateway.settings import GatewaySettings
from services.gateway.wheel import TICK_S
from services.scoreboard.servers import POSTGRES_CONNECTIONS_MAX
from tests.monitoring.prometheus import tool

ROOT = Path(__file__).parent.parent
OVERLAYS = ("demo", "production")
VERSIONS = 3

pytestmark = [pytest.mark.deploy, pytest.mark.parametrize("overlay", OVERLAYS)]

Object = dict[str, Any]

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip
"""Pod Security Standards, `restricted`."""

FOLDER = "/run/secrets/scoreboard/"


@cache
def build(overlay: str) -> str:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", ROOT / "deploy/kubernetes/overlays" / overlay],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@cache
def objects(overlay: str) -> list[Object]:
    """The same, read."""
    return [document for document in yaml.safe_load_all(build(overlay)) if document]


def find(overlay: str, kind: str, name: str) -> Object:
    """One object."""
    (found,) = (
        one for one in objects(overlay) if (one["kind"], one["metadata"]["name"]) == (kind, name)
    )
    return found


def pods(overlay: str) -> Iterator[tuple[str, Object]]:
    """Name and template of everything that runs."""
    for one in objects(overlay):
        spec = one.get("spec", {})
        template = spec.get("template") or spec.get("jobTemplate", {}).get("spec", {}).get(
            "template"
        )
        if template is not None:
            yield one["metadata"]["name"], template


def violations(pod: Object) -> list[str]:
    """What `restricted` forbids, and of our own: writing into the image, a token nobody needs."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    found += [
        f"volume {volume['name']}"
        for volume in pod.get("volumes", [])
        if VOLUMES.isdisjoint(volume)
    ]
    if pod.get("automountServiceAccountToken", True):
        found.append("service account token")
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        name = container["name"]
        security = pod.get("securityContext", {}) | container.get("securityContext", {})
        wanted = {
            "runAsNonRoot": True, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        }  # fmt: skip
        found += [
            f"{name}: {key}" for key, value in wanted.items() if security.get(key) is not value
        ]
        if security.get("privileged") or security.get("runAsUser") == 0:
            found.append(f"{name}: root")
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            found.append(f"{name}: seccompProfile")
        if security.get("capabilities") != {"drop": ["ALL"]}:
            found.append(f"{name}: capabilities")
        if any("hostPort" in port for port in container.get("ports", [])):
            found.append(f"{name}: hostPort")
    return found


def test_the_newest_schemas_accept_it(overlay: str, tmp_path: Path) -> None:
    """Each object, strictly: a field that is misspelt is unknown."""
    specification = importlib.util.find_spec("kubernetes_validate")
    if specification is None or specification.origin is None:
        tool("kubernetes-validate")
    assert specification is not None
    assert specification.origin is not None
    schemas = Path(specification.origin).with_name("kubernetes-json-schema")
    versions = {
        tuple(map(int, match.groups()))
        for folder in schemas.iterdir()
        if (match := re.match(r"v(\d+)\.(\d+)\.", folder.name))
    }
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(build(overlay))
    for major, minor in sorted(versions)[-VERSIONS:]:
        done = subprocess.run(
            [
                Path(sys.executable).with_name("kubernetes-validate"),
                *("-k", f"{major}.{minor}", "--strict", manifest),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        # It also ends with 0 where it has no schema.
        accepted = re.findall(
            rf"^INFO .* against version {major}\.{minor}$", done.stdout, re.MULTILINE
        )
        assert len(accepted) == len(objects(overlay)), done.stdout


def test_every_container_is_restricted(overlay: str) -> None:
    """And the namespace refuses any that is not."""
    assert {name: violations(pod["spec"]) for name, pod in pods(overlay)} == {
        name: [] for name, _ in pods(overlay)
    }
    labels = find(overlay, "Namespace", "scoreboard")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_a_container_that_is_not_restricted_is_found(overlay: str) -> None:
    """The check itself: each line that is taken out is missed."""
    pod = yaml.safe_load(
        yaml.safe_dump(find(overlay, "Deployment", "api")["spec"]["template"]["spec"])
    )
    (container,) = pod["containers"]
    container["securityContext"]["capabilities"] = {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    del container["securityContext"]["allowPrivilegeEscalation"]
    del pod["securityContext"]["seccompProfile"]
    pod["securityContext"]["runAsUser"] = 0
    pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}})
    pod["hostNetwork"] = True
    assert violations(pod) == [
        "hostNetwork", "volume host", "api: allowPrivilegeEscalation", "api: root",
        "api: seccompProfile", "api: capabilities",
    ]  # fmt: skip


def test_all_is_in_one_namespace_and_every_image_has_a_version(overlay: str) -> None:
    """In production not `latest` either."""
    for one in objects(overlay):
        if one["kind"] != "Namespace":
            assert one["metadata"]["namespace"] == "scoreboard"
    for _, pod in pods(overlay):
        for container in pod["spec"]["containers"]:
            version = container["image"].rpartition("/")[2].partition(":")[2]
            assert version
            assert (overlay, version) != ("production", "latest")


def test_every_selector_selects_a_pod(overlay: str) -> None:
    """Of Services, budgets, policies, autoscalers and spreads."""
    # The pods of StatefulSets are named by the controller.
    labels = [
        pod["metadata"]["labels"] | {"statefulset.kubernetes.io/pod-name": f"{name}-{number}"}
        for name, pod in pods(overlay)
        for number in range(2)
    ]

    def selects(selector: Object) -> bool:
        wanted = selector.get("matchLabels", {})
        among = {one["key"]: one["values"] for one in selector.get("matchExpressions", [])}
        covered = [
            pod
            for pod in labels
            if wanted.items() <= pod.items()
            and all(pod.get(key) in values for key, values in among.items())
        ]
        names = {pod["app.kubernetes.io/name"] for pod in labels}
        return bool(covered) and all(set(values) <= names for values in among.values())

    for one in objects(overlay):
        spec, name = one.get("spec", {}), one["metadata"]["name"]
        if one["kind"] == "Service":
            assert selects({"matchLabels": spec["selector"]}), name
        elif one["kind"] == "PodDisruptionBudget":
            assert selects(spec["selector"]), name
        elif one["kind"] == "NetworkPolicy":
            ends = [end for rule in spec.get("ingress", []) for end in rule.get("from", [])]
            ends += [end for rule in spec.get("egress", []) for end in rule.get("to", [])]
            chosen = [end["podSelector"] for end in ends if "podSelector" in end]
            assert all(map(selects, (spec["podSelector"], *chosen))), name
        elif one["kind"] == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            assert "replicas" not in find(overlay, target["kind"], target["name"])["spec"]
    for _, pod in pods(overlay):
        for spread in pod["spec"].get("topologySpreadConstraints", []):
            assert (
                spread["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
            )


def test_replicas_are_spread_and_not_all_disrupted_at_once(overlay: str) -> None:
    """Over zones and hosts; two at least, and a budget."""
    for name in ("nginx", "api", "gateway"):
        deployment = find(overlay, "Deployment", name)["spec"]
        keys = {
            one["topologyKey"]
            for one in deployment["template"]["spec"]["topologySpreadConstraints"]
        }
        assert keys == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
        assert find(overlay, "PodDisruptionBudget", name)["spec"]["maxUnavailable"] == 1
        if (overlay, name) == ("demo", "gateway"):
            assert deployment["replicas"] == 2
        else:
            scaler = find(overlay, "HorizontalPodAutoscaler", name)["spec"]
            assert scaler["minReplicas"] >= 2
        assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_grace_is_longer_than_the_drain(overlay: str) -> None:
    """preStop counts, too."""
    drains = {
        "api": GRACE_S + DEADLINE_S,
        "gateway": GatewaySettings.model_fields["drain_seconds"].default
        + CLOSE_TIMEOUT_S
        + 2 * TICK_S,
    }
    for name, drain_s in drains.items():
        pod = find(overlay, "Deployment", name)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert sleep_s >= 5
        assert pod["terminationGracePeriodSeconds"] >= sleep_s + drain_s + 5


@pytest.mark.parametrize(("name", "settings"), [("api", ApiSettings), ("gateway", GatewaySettings)])
def test_the_settings_are_some_that_the_service_accepts(
    overlay: str, name: str, settings: type[ApiSettings] | type[GatewaySettings], tmp_path: Path
) -> None:
    """With secrets like those that are mounted, from the files that are mounted."""
    secrets = {
        "jwt_secret": "s" * 32,
        "shard_urls": "postgresql://user:password@shard-0/scoreboard",
        "redis_url": "redis://:password@valkey:6379/0",
    }
    pod = find(overlay, "Deployment", name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (config,) = container["envFrom"]
    environ = dict(find(overlay, "ConfigMap", config["configMapRef"]["name"])["data"])
    (volume,) = pod["volumes"]
    mounted = {item["path"] for item in volume["secret"]["items"]}
    for key in mounted:
        (tmp_path / key).write_text(secrets[key])
    for variable in container["env"]:
        if variable["name"].endswith("_FILE"):
            assert variable["value"].removeprefix(FOLDER) in mounted
            variable = variable | {"value": variable["value"].replace(FOLDER, f"{tmp_path}/")}
        environ[variable["name"]] = variable["value"]
    known = {*ApiSettings.model_fields, *GatewaySettings.model_fields}
    assert {key.removesuffix("_FILE").lower() for key in environ} <= known
    read = settings.from_environ(environ)
    assert read.host == "0.0.0.0"  # noqa: S104 - in a pod of its own
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == read.port
    if isinstance(read, GatewaySettings):
        assert ports["operations"] == read.operations_port
        assert "shard_urls" not in mounted


def test_nginx_is_given_all_that_its_template_asks_for(overlay: str) -> None:
    """The same template as everywhere, in the ConfigMap and filled in."""
    pod = find(overlay, "Deployment", "nginx")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    names = {volume["name"]: volume.get("configMap", {}).get("name") for volume in pod["volumes"]}
    template = find(overlay, "ConfigMap", names["template"])["data"]["scoreboard.conf.template"]
    assert template == (ROOT / "nginx/scoreboard.conf.template").read_text()
    asked = set(re.findall(r"\$\{([A-Z_]+)\}", template))
    assert asked <= {variable["name"] for variable in container["env"]}
    page = find(overlay, "ConfigMap", names["page"])["data"]
    assert set(page) == {path.name for path in (ROOT / "nginx/html").iterdir()}


def test_no_autoscaler_goes_beyond_what_there_is(overlay: str) -> None:
    """API replicas share a shard's connections; a gateway's target is below its limit."""
    most = find(overlay, "HorizontalPodAutoscaler", "api")["spec"]["maxReplicas"]
    pruning = 1
    assert most * (POOL_CONNECTIONS + pruning) < POSTGRES_CONNECTIONS_MAX
    if overlay == "production":
        (metric,) = find(overlay, "HorizontalPodAutoscaler", "gateway")["spec"]["metrics"]
        target = int(metric["pods"]["target"]["averageValue"])
        assert target < 0.7 * GatewaySettings.model_fields["connections_max"].default
