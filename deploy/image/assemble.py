"""Copy only what the gateway needs to run into a folder that becomes the image's file system.

    python assemble.py --environment /opt/gateway --bom environment.json /image

That is: Python with its standard library, the virtual environment, the shared libraries that either loads, the
certificates of public authorities, and an unprivileged user. No shell, no package manager, no pip. In
addition an SBOM (CycloneDX): `--bom`, which lists the environment's distributions, plus Python and the system's
libraries.
"""
# ruff: noqa: INP001, S603, S607 - a script that runs while an image is built, and starts that image's own programs

import argparse
import compileall
import json
import os
import platform
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# From requirements/build.txt, which this runs with; nothing of it goes into the image.
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

UID = 10001
HOME = "var/lib/gateway"
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
BOM = "usr/share/doc/webhook-gateway/bom.cdx.json"

# Parts of the standard library that serve people at a terminal, its own tests, and builds.
UNUSED = (
    "_pyrepl",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tkinter",
    "turtledemo",
    "venv",
    "config-*",
)
UNUSED_MODULES = ("_test*.so", "_tkinter*.so", "xxlimited*.so", "_xx*.so", "_ctypes_test*.so", "turtle.py")

# What compilers, type checkers and generators read of distributions.
SOURCES = ("*.pyi", "*.pyx", "*.pxd", "*.pxi", "*.c", "*.h", "*.proto")
# Rich has it for showing source code, which the gateway doesn't do: it stays, but its 4 MB aren't doubled.
UNCOMPILED = re.compile(r"/site-packages/pygments/")

FILES = {
    "etc/passwd": f"root:x:0:0:root:/:/none\ngateway:x:{UID}:{UID}:gateway:/{HOME}:/none\n",
    "etc/group": f"root:x:0:\ngateway:x:{UID}:\n",
    # Without it glibc queries the name servers first, and reads /etc/hosts only if there are none.
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    # Where the official images of Python have its library; the system's own folders need no mention.
    "etc/ld.so.conf": "/usr/local/lib\n",
}

# `ldd` writes `libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x…)`, or the loader's path alone.
LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x[0-9a-f]+\)")


def main() -> None:
    parser = argparse.ArgumentParser(description="assemble the image's file system")
    parser.add_argument("--environment", type=Path, required=True, help="the virtual environment")
    parser.add_argument("--bom", type=Path, required=True, help="the environment's bill of materials, as JSON")
    parser.add_argument("root", type=Path, help="the folder to fill")
    options = parser.parse_args()
    root: Path = options.root
    _copy_python(root)
    _copy_tree(options.environment, root)
    for library in sorted(_libraries(root)):
        _copy_file(library, root)
    _copy_file(Path("/", CERTIFICATES), root)
    for name, text in FILES.items():
        _place(root, name).write_text(text)
    subprocess.run(["/sbin/ldconfig", "-r", str(root)], check=True)
    _make_folder(root, "tmp", mode=0o1777)
    _make_folder(root, HOME, mode=0o750, owner=UID)
    _compile(root)
    # Last, so that it lists what is there.
    bom = json.loads(options.bom.read_text())
    bom["components"] += [_python(), *_system_packages(root)]
    _validate(bom)
    _place(root, BOM).write_text(json.dumps(bom, indent=1))


# ---- Files ----


def _copy_python(root: Path) -> None:
    interpreter = Path(sys.base_prefix, "bin", f"python{sysconfig.get_python_version()}")
    _copy_file(interpreter, root)
    _place(root, str(interpreter.with_name("python3"))).symlink_to(interpreter.name)
    library = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(
        library,
        _place(root, str(library)),
        ignore=shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages", *UNUSED, *UNUSED_MODULES),
        ignore_dangling_symlinks=True,  # Debian's sitecustomize.py points into /etc.
    )


def _copy_tree(folder: Path, root: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", *SOURCES)
    shutil.copytree(folder, _place(root, str(folder)), symlinks=True, ignore=ignored)


def _copy_file(file: Path, root: Path) -> None:
    """Copy a path's target to that path: libraries are found by the name of a link."""
    shutil.copy2(file, _place(root, str(file)), follow_symlinks=True)


def _place(root: Path, name: str) -> Path:
    place = root / name.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _make_folder(root: Path, name: str, *, mode: int, owner: int = 0) -> None:
    folder = _place(root, name)
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, owner, owner)


def _libraries(root: Path) -> set[Path]:
    """Find the shared libraries that programs and modules below `root` load, by where the loader finds them here."""
    found: set[Path] = set()
    for file in _binaries(root):
        result = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=False)
        if "not found" in result.stdout:
            sys.exit(f"{file}: expected every library, got\n{result.stdout}")
        found |= {Path(path) for path in LIBRARY.findall(result.stdout)}
    return {path for path in found if not path.is_relative_to(root)}


def _binaries(root: Path) -> Iterator[Path]:
    for file in root.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as content:
                if content.read(4) == b"\x7fELF":
                    yield file


def _compile(root: Path) -> None:
    """Compile every module, since nothing can be written at run time; unchecked, since no source will change."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(
        str(root), maxlevels=20, quiet=2, rx=UNCOMPILED, stripdir=str(root), invalidation_mode=mode, workers=0
    )


# ---- Bill of materials ----


def _python() -> dict[str, Any]:
    number = platform.python_version()
    return {
        "type": "platform",
        "bom-ref": f"pkg:generic/python@{number}",
        "name": "python",
        "version": number,
        "purl": f"pkg:generic/python@{number}",
        "cpe": f"cpe:2.3:a:python:python:{number}:*:*:*:*:*:*:*",
        "licenses": [{"license": {"id": "PSF-2.0"}}],
    }


def _system_packages(root: Path) -> list[dict[str, Any]]:
    """Return which system packages the files below `root` are from; those of no package are Python's own."""
    if shutil.which("dpkg-query") is None:
        return []
    files = [Path("/", file.relative_to(root)) for file in _binaries(root)]
    owners = _owners([*files, Path("/usr/sbin/update-ca-certificates")])
    shown = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\\n", *sorted(owners)],
        capture_output=True,
        text=True,
        check=True,
    )
    distribution = platform.freedesktop_os_release()["ID"]
    components = []
    for line in shown.stdout.splitlines():
        name, number, architecture = line.split()
        purl = PackageURL("deb", distribution, name, number, {"arch": architecture}).to_string()
        components.append({"type": "library", "bom-ref": purl, "name": name, "version": number, "purl": purl})
    return components


def _owners(files: Iterable[Path]) -> set[str]:
    # A package may say /lib of what the loader finds in /usr/lib, and the other way round.
    names = {name for file in files for name in (str(file), str(file).removeprefix("/usr"), f"/usr{file}")}
    found = subprocess.run(["dpkg-query", "--search", *sorted(names)], capture_output=True, text=True, check=False)
    return {
        owner.strip()
        for line in found.stdout.splitlines()
        if not line.startswith("diversion ")
        for owner in line.rpartition(": ")[0].split(",")
    }


def _validate(bom: dict[str, Any]) -> None:
    number = "V" + bom["specVersion"].replace(".", "_")
    error = JsonStrictValidator(SchemaVersion[number]).validate_str(json.dumps(bom))
    if error is not None:
        sys.exit(f"bill of materials, by cyclonedx-python-lib {version('cyclonedx-python-lib')}: {error}")


if __name__ == "__main__":
    main()
