"""What is installed is what was locked: each distribution by its hashes, and what builds ours as well."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.model import DISTRIBUTION
from gateway.ops.starter import starter
from tests.deploy.chart import ROOT

LOCKS = {file.name: file for file in sorted((ROOT / "requirements").glob("*.txt"))}
INSTALLERS = ("Dockerfile", "Makefile", "deploy/ci/action.yml", "deploy/systemd/gateway.service")
COMMAND = re.compile(r"\bpip\b.*\b(?:install|wheel)\b.*")
ENTRY = re.compile(
    r"[A-Za-z0-9._-]+(?:\[[a-z,]+\])?==[^ ]+(?: ;[^\\]+)?(?: \\\n +--hash=sha256:[0-9a-f]{64})+\n*", re.ASCII
)
OURS_ALONE = re.compile(r"(?=.*--no-deps)(?:.*--no-index|.*--no-build-isolation)")


def commands(text: str) -> list[str]:
    """Return what installs or builds something, each command by itself."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [command for line in lines for part in line.split("&&") for command in COMMAND.findall(part)]


@pytest.mark.parametrize("name", LOCKS)
def test_each_distribution_is_of_one_version_and_has_hashes(name: str) -> None:
    without_comments = re.sub(r"^ *#.*\n", "", LOCKS[name].read_text(), flags=re.MULTILINE)
    entries = re.split(r"\n(?=\w)", without_comments)
    assert len(entries) > 10
    assert [entry for entry in entries if not ENTRY.fullmatch(entry)] == []


@pytest.mark.parametrize("name", INSTALLERS)
def test_nothing_is_installed_that_is_not_locked(name: str) -> None:
    """Only our own files have no hashes; and what builds them is locked, and not what pip then finds anywhere."""
    found = commands((ROOT / name).read_text())
    assert any("--require-hashes" in command for command in found)
    assert [command for command in found if "--require-hashes" not in command and not OURS_ALONE.match(command)] == []


# ---- By name, from an index that anybody can publish to ----

BY_NAME = re.compile(r"\b(?:pip3?|pipx|uv|uvx)\b[^\n`]*?(?<=\s)(?:install|run|inject)(?=\s)(?P<rest>[^\n`&|;)]*)")
WITH_VALUE = ("-r", "-c", "--requirement", "--constraint", "--wheel-dir", "--index-url", "--only-binary", "--python")
THIRD_PARTY = re.compile(r"[\w.-]+==\d[\w.]*")
OURS = re.compile(rf"{re.escape(DISTRIBUTION)}(?:\[[a-z,]+\])?(?:==\d[\w.]*)?")
FOLDERS = (".ci", ".github", "benchmarks", "deploy", "dev", "docs", "gateway")


def installed_by_name(text: str) -> Iterator[str]:
    """Yield what commands install by its name; a word with a slash or braces is a file, an address or made later."""
    for found in BY_NAME.finditer(re.sub(r"\\\n\s*", " ", text)):
        is_value = False
        for word in found["rest"].split():
            name = word.strip("'\",.:)")
            if is_value or word.startswith("-"):
                is_value = word in WITH_VALUE
                continue
            if name and name != "." and not re.search(r"[/{$*]|\.whl$", name):
                yield name
            if not re.search(r"\bpip3?\b", found[0]):
                break  # the rest is for the command that it runs


def files_that_install() -> Iterator[Path]:
    yield from [file for file in ROOT.iterdir() if file.suffix in (".md", ".toml") or file.name in INSTALLERS]
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in (".md", ".py", ".yml", ".yaml", ".service", ".sh", ""):
                yield file


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("python -m pip install webhook-gateway==1.0", ["webhook-gateway==1.0"]),
        ("pip install 'webhook-gateway[otel]'", ["webhook-gateway[otel]"]),
        ("RUN pip install --quiet \\\n  left-pad", ["left-pad"]),
        ("pip install --require-hashes -r requirements/run.txt", []),
        ("pip install --no-deps dist/*.whl", []),
        ("pipx run uv==0.1 publish x", ["uv==0.1"]),
        ("uv pip install a b", ["a", "b"]),
        ("uv run dev/plot.py --minutes 5 docs", []),
    ],
)
def test_a_command_names_what_it_installs(command: str, names: list[str]) -> None:
    assert list(installed_by_name(command)) == names


def test_what_is_installed_by_name_is_ours_or_of_one_version() -> None:
    """A name that isn't ours is whoever's it is, on each machine that runs the line."""
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in files_that_install()}
    for path, text in starter("github", "https://ci.example/").items():
        texts[f"gateway init: {path}"] = text
    found = {(where, name) for where, text in texts.items() for name in installed_by_name(text)}
    assert {name for _, name in found if OURS.fullmatch(name)}
    assert [each for each in found if not OURS.fullmatch(each[1]) and not THIRD_PARTY.fullmatch(each[1])] == []
    assert not [each for each in found if each[1].startswith("webhook-gateway")]


def test_the_job_of_gateway_init_installs_this_distribution_by_its_version() -> None:
    [job] = [text for path, text in starter("github", "https://ci.example/").items() if path.suffix == ".yml"]
    [name] = installed_by_name(job)
    assert OURS.fullmatch(name)
    assert "==" in name


def test_the_project_has_the_name_by_which_it_finds_its_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    assert DISTRIBUTION != "webhook-gateway"  # https://pypi.org/project/webhook-gateway is another product
