"""The files that a new set of rules begins with: a route from a provider, its test, and a job for CI that passes."""

import json
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from urllib.parse import urlsplit

from gateway.model import DISTRIBUTION, UsageError
from gateway.ops.provider_guide import provider_guide
from gateway.rules.addresses import http_url
from gateway.rules.load import check_rules
from gateway.text import did_you_mean
from gateway.verify.presets import PRESETS

_NOT_IN_A_NAME = re.compile(r"[^a-z0-9]+")
PLACEHOLDER = "https://hooks.example.com/"
"""How the address of the gateway begins in a provider's example."""
RULES, TESTS = Path("routes.yaml"), Path("tests/first.yaml")


def repository_of(folder: Path) -> tuple[Path, Path]:
    """Return the root of the Git repository that a folder is in, where GitHub looks for jobs, and the folder in it.

    Outside of any, the root is the folder itself.
    """
    inside = Path(os.path.abspath(folder))  # noqa: PTH100 - without `..`, and with links as they are
    root = next((each for each in (inside, *inside.parents) if (each / ".git").exists()), inside)
    return root, inside.relative_to(root)


def job_of(folder: Path, root: Path = Path()) -> Path:
    """Return a new file for the job that checks the rules of a folder; it and the folder are within a repository.

    Each folder has a job of its own, as several teams may have their rules in one repository. `root` is where that is.
    """
    name = _NOT_IN_A_NAME.sub("-", "-".join(["rules", *folder.parts]).lower()).strip("-")
    names = (name, *[f"{name}-{number}" for number in range(2, 1000)])  # other folders may have a name like it
    paths = [Path(".github/workflows") / f"{each}.yml" for each in names]
    return next(path for path in paths if not (root / path).exists())


def starter(provider: str, to: str, folder: Path = Path(), *, root: Path = Path()) -> dict[Path, str]:
    """Return the files, by their paths within a repository at `root`, with the rules in a folder of it.

    Raises UsageError for an unknown provider, or no URL.
    """
    if provider not in PRESETS:
        hint = did_you_mean(provider, PRESETS) or "; `gateway providers` lists those that are known"
        raise UsageError(f"expected a provider's name, got {provider!r}{hint}")
    try:
        http_url(to)
    except ValueError as error:
        raise UsageError(f"--to: {error}") from error
    guide = provider_guide(provider, PRESETS[provider])
    name = _NOT_IN_A_NAME.sub("-", (urlsplit(to).hostname or "").lower()).strip("-")[:60] or "destination"
    name = f"to-{name}" if name[0].isdigit() else name  # a number would be no string in YAML
    route = f"{provider}-to-{name}"[:63].rstrip("-")
    setup = [f"# {line}" for line in wrap(f"At {guide.title}: {guide.setup}", 100)] if guide.setup else []
    address = json.dumps(to, ensure_ascii=False)
    lines = [
        "version: 1",
        *setup,
        *_with_placeholders_told(guide.snippet.splitlines()),
        "destinations:",
        f"  {name}:",
        f"    url: {address}",
        "    timeout: 10s",
        "    rate: 50/s",
        "routes:",
        f"  - name: {route}",
        f"    from: {provider}",
        "    # match: {type: …}   # which of its events; without it, all",
        f"    to: {name}",
        "",
    ]
    job = job_of(folder, root)
    return {
        folder / RULES: "\n".join(_with_allowances(lines)),
        folder / TESTS: "\n".join(
            [
                "tests:",
                f"  - name: an event of {guide.title} is sent on",
                "    event:",
                f"      source: {provider}",
                "      body: {example: true}",
                "    expect:",
                f"      routes: [{route}]",
                "      requests:",
                f"        - route: {route}",
                f"          url: {address}",
                "",
            ]
        ),
        job: _JOB.format(
            name=job.stem,
            package=f"{DISTRIBUTION}=={version(DISTRIBUTION)}",
            rules=shlex.quote((folder / RULES).as_posix()),
        ),
    }


def _with_placeholders_told(lines: list[str]) -> Iterator[str]:
    """Yield the lines of a source with a comment for what is only an example: the address that its sender calls."""
    for line in lines:
        if PLACEHOLDER in line:
            yield "    # replace this by the address that you give to the provider: what it signs begins with it"
        yield line


def _with_allowances(lines: list[str]) -> Iterator[str]:
    """Yield the lines with a comment for each warning: what to know of the provider, and what isn't set here."""
    with TemporaryDirectory(prefix="gateway-init-") as folder:
        file = Path(folder) / RULES
        file.write_text("\n".join(lines))
        _, problems = check_rules(file, environ={}, lints=True)
    reasons: dict[int, dict[str, str]] = defaultdict(dict)
    for problem in problems:
        is_unset = problem.code == "unresolved"
        reasons[problem.line][problem.code] = "set where the gateway runs" if is_unset else problem.message
    for number, line in enumerate(lines, 1):
        indent = line[: len(line) - len(line.lstrip())]
        yield from [f"{indent}# allow {code}: {reason}" for code, reason in reasons[number].items()]
        yield line


_JOB = """\
name: {name}
on:
  push:
    branches: [main]
  pull_request:
permissions:
  contents: read
jobs:
  check:
    runs-on: ubuntu-24.04
    timeout-minutes: 10
    steps:
      - uses: actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1
        with:
          persist-credentials: false
      - uses: actions/setup-python@5fda3b95a4ea91299a34e894583c3862153e4b97 # v7.0.0
        with:
          python-version: "3.13"
      - run: python -m pip install {package}
      - run: gateway fmt --check {rules}
      - run: gateway check {rules} --strict --format github
      - run: gateway test {rules}
"""
