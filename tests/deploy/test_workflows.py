"""What .github/ says is so: its workflows are valid, pin what they use, and call what is there."""

import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dev.release import ReleaseError, chart_bom, check, notes
from tests.deploy.chart import ROOT

GITHUB = ROOT / ".github"
Tool = Callable[[str], Path]
CHART = "deploy/kubernetes/webhook-gateway/Chart.yaml"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in WORKFLOWS:
        for name, job in yaml.safe_load(file.read_text())["jobs"].items():
            yield from ((f"{file.name}: {name}", step) for step in job["steps"])


def test_actionlint_finds_nothing(tool: Tool) -> None:
    result = subprocess.run(
        [tool("actionlint"), "-shellcheck=", "-pyflakes=", *WORKFLOWS], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


def test_dependabot_reads_what_there_is_and_leaves_nothing_out() -> None:
    """By GitHub's own schema, and each folder has what its kind is made of."""
    settings = yaml.safe_load((GITHUB / "dependabot.yml").read_text())
    text = resources.files("check_jsonschema.builtin_schemas").joinpath("vendor/dependabot.json").read_text()
    schema = json.loads(text)
    jsonschema.validators.validator_for(schema)(schema).validate(settings)
    read: dict[str, set[Path]] = {}
    for each in settings["updates"]:
        folders = each.get("directories") or [each["directory"]]
        read[each["package-ecosystem"]] = {ROOT / folder.strip("/") for folder in folders}
    assert read["uv"] == {ROOT / "requirements"}
    assert "uv pip compile" in (ROOT / "Makefile").read_text()
    assert read["maven"] == {file.parent for file in ROOT.glob("dev/*/pom.xml")}
    assert all((folder / "compose.yaml").exists() for folder in read["docker-compose"])
    assert read["github-actions"] == {ROOT}


def test_each_action_is_pinned_to_a_commit_and_says_of_which_version() -> None:
    """A tag can be moved to anything."""
    used = [
        line.partition("uses: ")[2] for file in WORKFLOWS for line in file.read_text().splitlines() if "uses:" in line
    ]
    assert used
    assert [each for each in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each)] == []


def test_a_job_has_only_the_rights_it_needs() -> None:
    for file in WORKFLOWS:
        workflow = yaml.safe_load(file.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    checkouts = [step for _, step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_targets_and_paths_in_steps_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for where, step in steps():
        run = step.get("run", "")
        assert set(re.findall(r"\bmake ([a-z-]+)", run)) <= targets, where
        for path in re.findall(r"(?:^|\s)(\.ci/\w+|dev/\w+\.py|deploy/[\w/-]+)", run):
            assert (ROOT / path).exists(), (where, path)
        # What comes from outside is no part of a script (it could end a word of it), but a variable.
        assert "${{" not in run, where


def test_what_shows_the_guarantees_is_run_by_itself() -> None:
    """With each change, or every week on other seeds; but for benchmarks, which compare times on one quiet machine."""
    table = (ROOT / "docs" / "guarantees.md").read_text()
    named = set(re.findall(r"^\| `make ([a-z]+)", table, re.MULTILINE))
    assert {"test", "faults", "mutants", "simulate", "fuzz"} <= named
    run = {target for _, step in steps() for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))}
    assert named - run == {"test", "bench"}
    assert "exec make test\n" in (ROOT / ".ci" / "run").read_text()
    weekly = yaml.load((GITHUB / "workflows" / "weekly.yml").read_text(), yaml.BaseLoader)
    [when] = weekly["on"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \d", when["cron"])
    [simulate] = [step["run"] for step in weekly["jobs"]["simulate"]["steps"] if "run" in step]
    assert simulate == 'make simulate SEEDS=50000 FIRST="${GITHUB_RUN_NUMBER}00000"'


def test_what_takes_full_is_run_by_itself() -> None:
    """Else nobody would notice for how long it has failed."""
    by_hand = {
        "tests/deploy/test_image.py",  # `make image`, as root: the checks build the same Dockerfile
        "tests/spool/test_cost.py",  # compares times, which takes a quiet machine
        "tests/verify/test_timing.py",
    }
    makefile = (ROOT / "Makefile").read_text()
    folders = ("tests/faults/", "tests/acceptance/")
    assert all(f"pytest {folder.rstrip('/')} " in makefile for folder in folders)
    named = set(re.findall(r"tests/[\w/]+\.py", makefile))
    takes = re.compile(r"pytest\.mark\.full\b|\bis_full: bool|getoption\(\"--full\"\)")
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        if takes.search(path.read_text()) and not file.startswith(folders) and file != "tests/deploy/test_workflows.py":
            assert file in named | by_hand, file
    run = {target for _, step in steps() for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))}
    assert {"faults", "acceptance", "full", "installed"} <= run


def test_the_checks_run_on_each_version_that_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {each.rpartition(" ")[2] for each in project["classifiers"] if re.search(r":: 3\.\d+$", each)}
    matrix = yaml.safe_load((GITHUB / "workflows/checks.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert named <= set(matrix["python"])
    assert {"3.11", "3.12", "3.13", "3.14"} == set(matrix["python"])


def test_templates_ask_for_something() -> None:
    for file in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text())
        if file.name != "config.yml":
            assert form["name"]
            assert any(field.get("validations", {}).get("required") for field in form["body"]), file.name


# ---- A release ----


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    sections = (
        "# Changelog",
        "## [Unreleased]\n\n- Later.",
        "## [1.2.3] - 2026-11-27\n\n- This.\n- That.",
        "## [1.2.2]",
    )
    (tmp_path / "CHANGELOG.md").write_text("\n\n".join([*sections, "- Old.\n"]))
    (tmp_path / CHART).parent.mkdir(parents=True)
    (tmp_path / CHART).write_text("name: webhook-gateway\nversion: 1.2.3\nappVersion: 1.2.3\n")
    return tmp_path


def test_release_notes_are_the_changelogs_section(project: Path) -> None:
    assert check("v1.2.3", project) == "1.2.3"
    assert notes("v1.2.3", project) == "- This.\n- That."
    assert notes("v1.2.2", project) == "- Old."


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("1.2.3", "tag: expected vMAJOR.MINOR.PATCH, got '1.2.3'"),
        ("v1.2.3; true", "tag: expected vMAJOR.MINOR.PATCH, got 'v1.2.3; true'"),
        ("v1.2.4", "pyproject.toml: expected version 1.2.4 of the tag, got 1.2.3"),
    ],
)
def test_a_tag_that_is_not_this_version_is_not_released(project: Path, tag: str, message: str) -> None:
    with pytest.raises(ReleaseError, match=re.escape(message)):
        check(tag, project)


@pytest.mark.parametrize("key", ["version", "appVersion"])
def test_a_chart_of_another_version_is_not_released(project: Path, key: str) -> None:
    chart = project / CHART
    chart.write_text(re.sub(rf"^{key}: .*", f"{key}: 1.2.2", chart.read_text(), flags=re.MULTILINE))
    with pytest.raises(ReleaseError, match=rf"Chart.yaml: expected {key} 1.2.3 of the tag, got 1.2.2"):
        check("v1.2.3", project)


def test_the_chart_installs_the_image_of_a_digest() -> None:
    digest = "sha256:" + "0a" * 32
    bom = json.loads(chart_bom("1.2.3", "ghcr.io/example/webhook-gateway", digest))
    [image] = bom["components"]
    assert image["purl"].startswith(f"pkg:oci/webhook-gateway@sha256%3A{'0a' * 32}?")
    assert image["hashes"] == [{"alg": "SHA-256", "content": "0a" * 32}]
    assert bom["metadata"]["component"]["version"] == image["version"] == "1.2.3"


def test_what_cannot_be_taken_back_is_published_last() -> None:
    jobs = yaml.safe_load((GITHUB / "workflows/release.yml").read_text())["jobs"]
    publishing = [
        name for name, job in jobs.items() if any("publish --trusted" in step.get("run", "") for step in job["steps"])
    ]
    assert publishing == ["publish"]
    assert set(jobs["publish"]["needs"]) == jobs.keys() - {"check", "publish"}


def test_a_version_without_notes_is_not_released(project: Path) -> None:
    (project / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.3]\n\n## [1.2.2]\n\n- Old.\n")
    with pytest.raises(ReleaseError, match=r"expected a section \[1.2.3\]"):
        check("v1.2.3", project)
