"""The Helm chart, rendered by Helm."""

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy" / "kubernetes" / "webhook-gateway"
EXAMPLES = ROOT / "deploy" / "kubernetes" / "examples"
Manifest = dict[str, Any]


class Chart:
    """The chart, and a Helm that renders it. `folder` is the tests' own."""

    def __init__(self, helm: Path, folder: Path) -> None:
        self._helm = helm
        self._folder = folder
        self._rendered: dict[str, list[Manifest]] = {}

    def render(self, example: str | None, changes: Mapping[str, Any] | None = None) -> list[Manifest]:
        """Return the manifests for an example (or the defaults alone), with some values changed.

        Raises AssertionError, with Helm's words, where it refuses them.
        """
        key = json.dumps([example, changes])
        if key not in self._rendered:
            output = self._run("template", "gateway", str(CHART), *self._values(example, changes))
            self._rendered[key] = [manifest for manifest in yaml.load_all(output, Loader=yaml.CSafeLoader) if manifest]
        return self._rendered[key]

    def lint(self, example: str) -> str:
        return self._run("lint", str(CHART), "--strict", *self._values(example))

    def _values(self, example: str | None, changes: Mapping[str, Any] | None = None) -> list[str]:
        files = [] if example is None else [EXAMPLES / f"{example}.yaml"]
        if changes is not None:
            files.append(self._folder / "changes.json")
            files[-1].write_text(json.dumps(changes))
        return [f"--values={file}" for file in files]

    def _run(self, *arguments: str) -> str:
        result = subprocess.run(
            [self._helm, *arguments, "--namespace=hooks"],
            capture_output=True,
            text=True,
            check=False,
            env={"HOME": str(self._folder)},  # nothing of the user's own Helm, nor of a cluster
        )
        assert result.returncode == 0, result.stderr or result.stdout
        return result.stdout


def of_kind(manifests: Iterable[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pods_of(manifests: Iterable[Manifest]) -> dict[str, Manifest]:
    """Return the templates of pods by the names of what makes them."""
    makers = of_kind(manifests, "Deployment", "StatefulSet", "Job")
    return {f"{each['kind']}/{each['metadata']['name']}": each["spec"]["template"] for each in makers}


def environment_of(container: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}
