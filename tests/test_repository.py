"""What the documents say is so, and nothing lies about unused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

import services.api.metrics
import services.gateway.metrics
from tests.settings_table import rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
TRACKED = [
    path
    for place in ("services", "shared", "nginx", "deploy", "tests", "*.md", "Makefile", "*.toml")
    for top in ROOT.glob(place)
    for path in ([top] if top.is_file() else top.rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
]
SOURCES = [
    path for path in TRACKED if path.suffix == ".py" and path.is_relative_to(ROOT / "services")
]


def test_module_boundaries() -> None:
    """The contracts of import-linter in pyproject.toml."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_setting_is_in_the_readme() -> None:
    """With its default and what it may be, word for word."""
    assert [row for row in rows() if row not in README] == []


def test_the_architecture_names_every_module() -> None:
    """And no file that is not there."""
    modules = [
        path.relative_to(ROOT)
        for path in TRACKED
        if path.suffix in (".py", ".lua", ".sql")
        and path.parts[len(ROOT.parts)] in ("services", "shared")
        and path.name not in ("__init__.py", "__main__.py")
        and "migrations" not in path.parts
    ]
    missing = [str(path) for path in modules if f"`{path.name}`" not in ARCHITECTURE]
    assert missing == []
    named = set(re.findall(r"`([a-z_0-9/]+\.(?:py|lua|sql|js|template))`", ARCHITECTURE))
    names = {path.name for path in TRACKED} | {str(path.relative_to(ROOT)) for path in TRACKED}
    assert named - names == set()


@pytest.mark.parametrize("suffix", [".sql", ".lua"])
def test_every_script_is_used(suffix: str) -> None:
    """By its name, in the code beside it."""
    code = "".join(path.read_text() for path in TRACKED if path.suffix == ".py")
    unused = [
        path.name for path in TRACKED if path.suffix == suffix and f'"{path.name}"' not in code
    ]
    assert unused == []


@pytest.mark.parametrize("module", [services.api.metrics, services.gateway.metrics])
def test_every_metric_is_used_and_well_named(module: object) -> None:
    """A prefix, base units, `_total` on counters; no metric that nothing moves."""
    code = "".join(path.read_text() for path in SOURCES if path.name != "metrics.py")
    for name, metric in vars(module).items():
        if not name.isupper() or name.startswith("_"):
            continue
        assert f"metrics.{name}" in code, f"{name} is never moved"
        (family,) = metric.collect()
        assert family.name.startswith("scoreboard_")
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_operations"))
        assert "user" not in metric._labelnames
    assert REGISTRY is not None


def test_nothing_points_outside() -> None:
    """No path of a machine, no host of a registry."""
    pattern = re.compile(
        r"/(?:work|root|home/[a-z]+)/|\.pyenv|files\.pythonhosted|pypi\.org/simple"
    )
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in TRACKED
        if path.suffix not in (".png",) and path != Path(__file__)
        for match in [pattern.search(path.read_text())]
        if match
    ]
    assert found == []
