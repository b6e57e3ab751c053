"""Which gateway a process runs: this tree's, the one before it, or one that differs in a line.

    version = previous(folder)
    async with GatewayProcess(…, command=version.command, home=version.home):

Python looks for modules first where it is run (`python -m`), so that other code needs a folder and no installation.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.gateway_process import COMMAND, ROOT

VARIABLE = "GATEWAY_TEST_PREVIOUS"


class PreviousMissingError(Exception):
    """There is no other version here to run beside this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A gateway to run: the command, `run` included, and the folder to run it in."""

    name: str
    command: tuple[str, ...] = COMMAND
    home: Path = ROOT

    def code(self) -> Path | None:
        """Return where its modules come from; None for an executable, which alone knows."""
        if self.command != COMMAND:
            return None
        command = [sys.executable, "-c", "import gateway; print(gateway.__path__[0])"]
        return Path(subprocess.run(command, cwd=self.home, capture_output=True, text=True, check=True).stdout.strip())


THIS = Version(name="this")


def previous(folder: Path) -> Version:
    """Return the version before this one; its code is put into `folder`. Raises PreviousMissingError.

    It is what GATEWAY_TEST_PREVIOUS names: an executable, or a checkout. Else it's that of the newest tag that isn't
    this commit, or where there is none, of the commit before the last one that changed the package.
    """
    given = os.environ.get(VARIABLE)
    if given:
        path = Path(given).resolve()
        if path.is_file():
            return Version(name=given, command=(str(path), "run"))
        if (path / "gateway").is_dir():
            return Version(name=given, home=path)
        raise PreviousMissingError(f"{VARIABLE}: expected an executable or a checkout, got {given}")
    commit = _previous_commit()
    archive = _git("archive", "--format=tar", commit, "gateway", "pyproject.toml")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    _name_distribution(folder)
    return Version(name=commit, home=folder)


def _name_distribution(folder: Path) -> None:
    """Have code find its version by the name that its own project has, which may be another than that of this tree."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    name, number = project["name"].replace("-", "_"), project["version"]
    about = folder / f"{name}-{number}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {number}\n")


def changed(folder: Path, file: str, before: str, after: str) -> Version:
    """Return this version with one change, made in a copy. Raises ValueError if it can't be made in just one place."""
    shutil.copytree(ROOT / "gateway", folder / "gateway", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / file
    text = path.read_text()
    if text.count(before) != 1:
        raise ValueError(f"{file}: expected {before!r} once, got it {text.count(before)} times")
    path.write_text(text.replace(before, after))
    return Version(name=f"this with {after}", home=folder)


def _previous_commit() -> str:
    try:
        for tag in _git("tag", "--merged", "HEAD", "--sort=-creatordate").decode().split():
            if _git("diff", "--name-only", tag, "HEAD", "--", "gateway"):
                return tag
        last = _git("rev-list", "--max-count=1", "HEAD", "--", "gateway").decode().strip()
        return _git("rev-parse", "--short", "--verify", f"{last}^").decode().strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise PreviousMissingError(
            f"previous version: expected git and the history of this tree, got {error}; or set {VARIABLE}"
        ) from error


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
