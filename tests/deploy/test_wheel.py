"""The wheel in an environment that has nothing else but what it says that it needs, as pipx and uv make it."""

import json
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

from dev.release import build
from gateway.model import DISTRIBUTION
from gateway.ops.fixtures import fixtures
from tests.deploy.chart import ROOT

RULES = """
version: 1
sources:
  crm:
    verify: {scheme: token, header: X-Token, secrets: ["a-long-enough-token"]}
destinations: {}
routes: []
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build(folder)
    return folder


@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_wheel_has_what_pages_are_made_of(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    files = [*(ROOT / "gateway" / "console").glob("templates/*"), *(ROOT / "gateway" / "console").glob("static/*")]
    assert len(files) > 20
    assert {file.relative_to(ROOT).as_posix() for file in files} <= names


@pytest.fixture(scope="module")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an environment with the wheel and what it says that it needs, in locked versions."""
    folder = tmp_path_factory.mktemp("environment")
    [wheel] = dist.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = (folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    locked = re.findall(r"^[\w.-]+==\S+", (ROOT / "requirements/run.txt").read_text(), re.MULTILINE)
    (folder / "versions.txt").write_text("\n".join(locked))
    subprocess.run([*pip, "--constraint", folder / "versions.txt", wheel], check=True)
    return folder


@pytest.mark.full
@pytest.mark.timeout(300)
def test_it_runs_and_takes_events_in(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text(RULES)
    path = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "PYTHON"))}
    addresses = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    command = [str(environment / "bin/gateway"), "run", *addresses]
    with subprocess.Popen(command, cwd=tmp_path, env=path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = (json.loads(line) for line in process.stdout)
            address = next(line["ingress"] for line in lines if line["event"] == "listening")
            request = urllib.request.Request(f"{address}/in/crm", b"{}", {"X-Token": "a-long-enough-token"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.status == 202
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.mark.full
@pytest.mark.timeout(300)
def test_it_says_which_version_it_is(environment: Path, dist: Path) -> None:
    told = subprocess.run([environment / "bin/gateway", "--version"], capture_output=True, text=True, check=True)
    [wheel] = dist.glob("*.whl")
    assert re.fullmatch(r"gateway \d+\.\d+\.\d+\n", told.stdout)
    assert told.stdout.split()[1] in wheel.name


@pytest.mark.full
@pytest.mark.timeout(300)
def test_it_has_the_fixtures_of_trigger(environment: Path) -> None:
    command = [str(environment / "bin/gateway"), "trigger", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=environment)
    found = {(line["provider"], line["name"]) for line in map(json.loads, told.stdout.splitlines())}
    assert found == {(each.provider, each.name) for each in fixtures()}


@pytest.mark.full
@pytest.mark.timeout(300)
def test_its_bill_of_materials_names_its_packages(dist: Path) -> None:
    bom = json.loads((dist / "bom.cdx.json").read_text())
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements/run.txt").read_text(), re.MULTILINE))
    named = {component["name"].lower().replace("_", "-") for component in bom["components"]}
    assert {"aiohttp", "aiokafka", "orjson"} <= named <= locked | {DISTRIBUTION}
    assert {file.suffix for file in dist.iterdir()} == {".whl", ".gz", ".json"}
