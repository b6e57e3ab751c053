"""deploy/ci: the action's form, and its steps, run as a runner does; the hooks of pre-commit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = ROOT / "deploy/ci/action.yml"
RULES = """\
version: 1
sources:
  github:
    # allow unresolved: set where the gateway runs
    verify: {scheme: github, secrets: ["${GITHUB_SECRET}"]}
destinations: {ci: {url: "https://ci.example/", rate: 5/s}}
routes:
  - {name: build, from: github, match: {type: push}, to: ci}
tests:
  - name: a push is built
    event: {source: github, headers: {X-GitHub-Event: push}, body: {ref: main}}
    expect: {routes: [build]}
"""
EVENT = (
    '{"id":"evt_1","source":"github","type":"push","at":"2026-01-02T03:04:05Z","headers":[],"query":"","body":"{}"}\n'
)


def steps() -> dict[str, dict[str, Any]]:
    document = yaml.safe_load(ACTION.read_text())
    return {step["name"]: step for step in document["runs"]["steps"]}


@pytest.mark.parametrize(
    ("schema", "file"),
    [("vendor.github-actions", ACTION), ("vendor.github-workflows", ROOT / ".github/workflows/checks.yml")],
)
def test_the_action_has_the_form_that_github_publishes(schema: str, file: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_expression_is_in_a_script() -> None:
    """What a caller gives is in the environment: in the script it would be run."""
    for name, step in steps().items():
        assert "${{" not in step["run"], name
        assert step["shell"] == "bash"


def git(folder: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "t@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, env={**os.environ, **names}
    )
    return done.stdout.strip()


class Runner:
    """A folder with a repository, in which steps run as on a runner, but for the installation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.summary = folder / "summary.md"
        git(self.folder, "init", "-q")
        self.write(RULES)
        git(self.folder, "add", "-A")
        git(self.folder, "commit", "-qm", "rules")
        self.base = git(self.folder, "rev-parse", "HEAD")
        (self.folder / "events.jsonl").write_text(EVENT)

    def write(self, rules: str) -> None:
        (self.folder / "routes.yaml").write_text(rules)

    def run(self, name: str, **given: str) -> tuple[int, str]:
        inputs = {"RULES": "routes.yaml", "STRICT": "true", "JUNIT": "", "EVENTS": "events.jsonl", "BASE": self.base}
        step = steps()[name]
        environ = {
            **{key: (inputs | given)[key] for key in step["env"]},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RUNNER_TEMP": str(self.summary.parent),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "HOME": str(self.summary.parent),
        }
        # As the runner runs `shell: bash`.
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_rules_that_are_right_pass(runner: Runner) -> None:
    assert runner.run("Check")[0] == 0
    code, printed = runner.run("Test", JUNIT="results.xml")
    assert code == 0
    assert "1 test: ok" in printed
    assert "<testsuite" in (runner.folder / "results.xml").read_text()


def test_a_warning_fails_where_it_is_strict_and_stands_at_its_line(runner: Runner) -> None:
    runner.write(
        RULES.replace("destinations: {ci", "destinations: {unused: {url: 'https://x.example/', rate: 1/s}, ci")
    )
    code, printed = runner.run("Check")
    assert code == 1
    assert "::warning file=routes.yaml,line=6" in printed
    assert runner.run("Check", STRICT="false")[0] == 0


def test_a_failing_test_fails(runner: Runner) -> None:
    runner.write(RULES.replace("match: {type: push}", "match: {type: create}"))
    assert runner.run("Test")[0] == 1


def test_what_a_change_does_is_in_the_summary_and_fails_nothing(runner: Runner) -> None:
    runner.write(RULES.replace("match: {type: push}", "match: {type: create}"))
    code, _ = runner.run("Compare")
    assert code == 0
    assert "| build | 1 | 0 | 0 | 1 | 0 |" in runner.summary.read_text()


def test_without_a_change_the_summary_says_so(runner: Runner) -> None:
    assert runner.run("Compare")[0] == 0
    assert "no route changed" in runner.summary.read_text()


def test_without_a_base_nothing_is_compared(runner: Runner) -> None:
    code, printed = runner.run("Compare", BASE="")
    assert code == 0
    assert "nothing to compare with" in printed


def test_what_cannot_be_compared_is_told_and_fails_nothing(runner: Runner) -> None:
    runner.write("version: 2\n")
    assert runner.run("Compare")[0] == 0
    assert "It can't be told:" in runner.summary.read_text()


def test_a_name_is_no_command(runner: Runner) -> None:
    assert runner.run("Check", RULES="$(touch hacked); x")[0] == 2
    assert not (runner.folder / "hacked").exists()


def test_the_hooks_run_commands_that_there_are() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert [hook["id"] for hook in hooks] == ["gateway-fmt", "gateway-check", "gateway-test"]
    for hook in hooks:
        assert hook["language"] == "python"
        words = [str(Path(sys.executable).parent / "gateway"), *hook["entry"].split()[1:], "--help"]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 0
