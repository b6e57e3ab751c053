"""What is installed is what was locked: each distribution by its hashes, and what builds ours as well."""

import re

import pytest

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
