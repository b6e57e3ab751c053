"""dev/tools.py: what is on the path is used, what isn't is fetched once, and what can't be fetched is told."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from dev import tools


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a machine that has nothing: no program on its path, and nothing fetched."""
    path = tmp_path / "path"
    path.mkdir()
    monkeypatch.setattr(tools, "HOME", tmp_path / "tools")
    monkeypatch.setenv("PATH", str(path))
    return path


def a_program(file: Path, script: str) -> None:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def a_go(folder: Path) -> None:
    """Put a `go` on the path that counts its calls and installs what it is asked for."""
    a_program(
        folder / "go",
        f'echo "$@" >> {folder}/calls; echo "#!/bin/sh" > "$GOBIN/helm"; /bin/chmod +x "$GOBIN/helm"',
    )


def an_apt(folder: Path, *, names: Sequence[str], content: Path) -> None:
    """Put an apt-get and a dpkg-deb on the path, by which all of these packages are missing and have this content."""
    simulated = "".join([f"echo 'Inst {name} (1.0 Debian [amd64])';" for name in names])
    downloaded = "".join([f": > {name}.deb;" for name in names])
    a_program(
        folder / "apt-get",
        f'echo "$@" >> {folder}/calls\ncase "$*" in *--simulate*) {simulated}; *download*) {downloaded}; esac',
    )
    a_program(folder / "dpkg-deb", f'/bin/mkdir -p "$3"; /bin/cp -R {content}/. "$3"')


def test_a_program_on_the_path_is_not_fetched(bare: Path) -> None:
    a_program(bare / "helm", "")
    assert tools.fetch("helm") == tools.find("helm") == bare / "helm"
    assert not tools.HOME.exists()


def test_a_program_is_found_by_the_name_that_debian_gives_it(bare: Path) -> None:
    a_program(bare / "prometheus-alertmanager", "")
    assert tools.find("alertmanager") == bare / "prometheus-alertmanager"


def test_a_file_of_an_npm_package_is_the_one_that_was_pinned(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = bare / "axe.tar"
    with tarfile.open(archive, "w:gz") as packed:
        content = b"the script"
        entry = tarfile.TarInfo("package/axe.min.js")
        entry.size = len(content)
        packed.addfile(entry, io.BytesIO(content))
    a_program(bare / "npm", f'echo "$@" >> {bare}/calls; /bin/cp {archive} axe-core.tgz')
    source = tools.TOOLS["axe"]
    assert isinstance(source, tools.NpmFile)
    with pytest.raises(tools.ToolMissingError, match="expected an archive of digest"):
        tools.fetch("axe")
    assert tools.find("axe") is None
    digest = b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    monkeypatch.setitem(tools.TOOLS, "axe", replace(source, digest=digest))
    for _ in range(2):
        assert tools.fetch("axe").read_bytes() == content
    assert len((bare / "calls").read_text().splitlines()) == 2


def test_a_program_for_node_has_the_packages_of_its_lock_file_and_runs_no_script_of_them(bare: Path) -> None:
    a_program(bare / "npm", f'echo "$PWD $@" >> {bare}/calls')
    with pytest.raises(tools.ToolMissingError, match="expected npm and node"):
        tools.fetch("oidc-provider")
    a_program(bare / "node", 'echo "$@"')
    fetched = tools.fetch("oidc-provider")
    assert tools.fetch("oidc-provider") == fetched
    output = subprocess.run([fetched, "a word"], capture_output=True, text=True, check=True).stdout
    assert output == f"{fetched.parent / 'provider.mjs'} a word\n"
    [call] = (bare / "calls").read_text().splitlines()
    assert call == f"{fetched.parent} ci --ignore-scripts --no-audit --no-fund"
    lock = orjson.loads((fetched.parent / "package-lock.json").read_bytes())
    assert all(each.get("integrity") for name, each in lock["packages"].items() if name)


def test_a_go_command_is_built_once(bare: Path) -> None:
    a_go(bare)
    assert tools.find("helm") is None
    fetched = tools.fetch("helm")
    assert os.access(fetched, os.X_OK)
    assert tools.fetch("helm") == tools.find("helm") == fetched
    [call] = (bare / "calls").read_text().splitlines()
    source = tools.TOOLS["helm"]
    assert isinstance(source, tools.GoModule)
    assert call.endswith(f"{source.command}@{source.version}")


def test_a_debian_package_is_unpacked_with_its_libraries_and_starts(bare: Path, tmp_path: Path) -> None:
    content = tmp_path / "content"
    (content / "usr/sbin").mkdir(parents=True)
    a_program(content / "usr/sbin/debootstrap", 'echo "$DEBOOTSTRAP_DIR $LD_LIBRARY_PATH $@"')
    (content / "usr/lib/here").mkdir(parents=True)
    (content / "usr/lib/here/lib.so.1").touch()
    an_apt(bare, names=["debootstrap", "wget"], content=content)
    fetched = tools.fetch("debootstrap")
    tree = tools.HOME / "debian" / "debootstrap"
    output = subprocess.run([fetched, "a word"], capture_output=True, text=True, check=True).stdout
    assert output == f"{tree}/usr/share/debootstrap {tree}/usr/lib/here a word\n"
    assert tools.fetch("debootstrap") == fetched
    calls = (bare / "calls").read_text().splitlines()
    assert calls[1:] == ["-q download debootstrap wget"]


@pytest.mark.parametrize(("name", "needed"), [("helm", "Go to build it with"), ("promtool", "apt-get and dpkg-deb")])
def test_missing_prerequisites_are_named(bare: Path, name: str, needed: str) -> None:
    with pytest.raises(tools.ToolMissingError, match=needed):
        tools.fetch(name)
    assert tools.find(name) is None
    assert not list(bare.iterdir())


def test_a_failure_is_reported_in_the_commands_words(bare: Path) -> None:
    a_program(bare / "go", "echo no such module >&2; exit 1")
    with pytest.raises(tools.ToolMissingError, match=r"go install .*: no such module"):
        tools.fetch("helm")
    assert tools.find("helm") is None


def test_one_that_cannot_be_had_keeps_no_other_back(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_go(bare)
    monkeypatch.setattr(sys, "argv", ["tools.py", "promtool", "helm"])
    with pytest.raises(SystemExit, match=r"^promtool: expected prometheus on the path, or apt-get"):
        tools.main()
    told = capsys.readouterr()
    assert told.out == f"{tools.find('helm')}\n"
    assert told.err.splitlines() == [
        "promtool is fetched into .tools/ and unpacked …",
        "helm is fetched into .tools/ and built (some minutes) …",
    ]
