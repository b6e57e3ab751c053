"""What the release of a tag needs: `python dev/release.py check v1.2.3`, `build DIR`, `notes v1.2.3`, `chart-bom …`.

`.github/workflows/release.yml` calls it; it needs python3 alone, and for `build` a package index.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAG = re.compile(r"v(\d+\.\d+\.\d+)")
SECTION = re.compile(r"^## \[(?P<version>[^]]+)\][^\n]*\n(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class ReleaseError(Exception):
    """The tag can't be released; the message says what was expected where."""


def check(tag: str, root: Path = ROOT) -> str:
    """Return the version of a tag. Raises ReleaseError unless project, chart and changelog have the same one."""
    found = TAG.fullmatch(tag)
    if found is None:
        raise ReleaseError(f"tag: expected vMAJOR.MINOR.PATCH, got {tag!r}")
    version = found[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    if project != version:
        raise ReleaseError(f"pyproject.toml: expected version {version} of the tag, got {project}")
    chart = (root / "deploy/kubernetes/webhook-gateway/Chart.yaml").read_text()
    for key, found_there in re.findall(r'^(version|appVersion): "?([^"\n]*)"?$', chart, re.MULTILINE):
        if found_there != version:
            raise ReleaseError(f"Chart.yaml: expected {key} {version} of the tag, got {found_there}")
    notes(tag, root)
    return version


def notes(tag: str, root: Path = ROOT) -> str:
    """Return what the changelog says of a tag's version. Raises ReleaseError if there is nothing."""
    version = tag.removeprefix("v")
    sections = {
        found["version"]: found["text"].strip() for found in SECTION.finditer((root / "CHANGELOG.md").read_text())
    }
    if not sections.get(version):
        raise ReleaseError(f"CHANGELOG.md: expected a section [{version}] that says what changes, got none")
    return sections[version]


def build(folder: Path, root: Path = ROOT) -> None:
    """Write the wheel, the source and a bill of materials (CycloneDX) of the wheel's dependencies."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tools, env = Path(scratch, "tools"), Path(scratch, "env")
        _run(sys.executable, "-m", "venv", tools)
        _run(sys.executable, "-m", "venv", "--without-pip", env)
        pip = (tools / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check")
        _run(*pip, "install", "--require-hashes", "-r", root / "requirements/build.txt")
        _run(tools / "bin/hatchling", "build", "-d", folder.resolve(), cwd=root)
        into = (*pip, "--python", env, "install")
        _run(*into, "--require-hashes", "-r", root / "requirements/run.txt")
        [wheel] = folder.glob("*.whl")
        _run(*into, "--no-deps", wheel)
        bom = ("--mc-type", "application", "--output-reproducible", "--spec-version", "1.6", "--output-format", "JSON")
        project = ("--pyproject", root / "pyproject.toml", "--output-file", folder / "bom.cdx.json")
        _run(tools / "bin/cyclonedx-py", "environment", *project, *bom, env / "bin/python")


def chart_bom(version: str, image: str, digest: str) -> str:
    """Return a bill of materials (CycloneDX 1.6, JSON) of the chart: what it installs is the image of that digest."""
    name = image.rpartition("/")[2]
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": "chart", "name": "webhook-gateway", "version": version}
        },
        "components": [
            {
                "type": "container",
                "bom-ref": "image",
                "name": image,
                "version": version,
                # https://github.com/package-url/purl-spec/blob/main/types-doc/oci-definition.md
                "purl": f"pkg:oci/{name}@{digest.replace(':', '%3A')}?repository_url={image}&tag={version}",
                "hashes": [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}],
            }
        ],
        "dependencies": [{"ref": "chart", "dependsOn": ["image"]}],
    }
    return json.dumps(bom, indent=2)


def _run(*command: object, cwd: Path | None = None) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="whether the tag may be released").add_argument("tag")
    commands.add_parser("notes", help="what the changelog says of it").add_argument("tag")
    commands.add_parser("build", help="the wheel, the source, and what is in them").add_argument("folder", type=Path)
    bom = commands.add_parser("chart-bom", help="what the chart installs")
    bom.add_argument("tag")
    bom.add_argument("image")
    bom.add_argument("digest")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            build(arguments.folder)
        elif arguments.command == "chart-bom":
            sys.stdout.write(chart_bom(arguments.tag.removeprefix("v"), arguments.image, arguments.digest) + "\n")
        else:
            sys.stdout.write({"check": check, "notes": notes}[arguments.command](arguments.tag) + "\n")
    except ReleaseError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
