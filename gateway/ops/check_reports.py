"""What `gateway check` has found, for CI systems; and which warnings the rule files allow.

A warning is allowed by a comment at the end of its line, or in a line of its own above it, with its code and a reason:

    verify: {scheme: none}   # allow unverified: only our own network reaches it
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from urllib.parse import quote

from gateway.model import DISTRIBUTION
from gateway.rules.yaml_document import Problem

_ALLOWED = re.compile(r"#\s*allow\s+([a-z_]+(?:\s*,\s*[a-z_]+)*)\s*(?::\s*(.*))?$")


def without_allowed(problems: Iterable[Problem]) -> tuple[list[Problem], int]:
    """Return the problems that no comment allows, and how many one does.

    Errors can't be allowed; a comment without a reason is a problem itself.
    """
    files: dict[str, Sequence[str]] = {}
    left: list[Problem] = []
    allowed = 0
    for problem in problems:
        found = None if problem.severity == "error" else _comment(problem, files)
        if found is None:
            left.append(problem)
        elif found:
            allowed += 1
        else:
            message = f"expected a reason, as in `# allow {problem.code}: why`, got none; {problem.message}"
            left.append(replace(problem, message=message))
    return left, allowed


def _comment(problem: Problem, files: dict[str, Sequence[str]]) -> str | None:
    """Return the reason for which a problem is allowed, "" if there is none; None if it isn't allowed."""
    if not problem.line:
        return None
    if problem.file not in files:
        try:
            files[problem.file] = Path(problem.file).read_text("utf-8").splitlines()
        except (OSError, ValueError):
            files[problem.file] = ()
    lines = files[problem.file]
    own = lines[problem.line - 1 : problem.line]
    above = takewhile(lambda line: line.lstrip().startswith("#"), reversed(lines[: problem.line - 1]))
    for line in (*own, *above):
        found = _ALLOWED.search(line)
        if found and problem.code in re.split(r"\s*,\s*", found[1]):
            return (found[2] or "").strip()
    return None


def github(problems: Iterable[Problem]) -> str:
    """Return the problems as commands of GitHub Actions, which shows them at their lines.

    https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
    """
    lines = []
    for each in problems:
        place = {"file": each.file, "line": str(each.line), "col": str(each.column)} if each.line else {}
        if each.file and not each.line:
            place = {"file": each.file}
        named = {**place, "title": each.code}
        properties = ",".join([f"{name}={_escaped(value, ':,')}" for name, value in named.items()])
        message = _escaped(": ".join(filter(None, (each.path, each.message))), "")
        lines.append(f"::{each.severity} {properties}::{message}\n")
    return _utf8("".join(lines))


def _escaped(text: str, also: str) -> str:
    for each in f"%\r\n{also}":
        text = text.replace(each, f"%{ord(each):02X}")
    return text


def sarif(problems: Sequence[Problem]) -> str:
    """Return the problems in SARIF 2.1.0: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html."""
    rules = [{"id": code} for code in sorted({each.code for each in problems})]
    driver = {"name": "gateway check", "version": version(DISTRIBUTION), "rules": rules}
    run = {"tool": {"driver": driver}, "results": [_result(each) for each in problems]}
    document = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return _utf8(json.dumps(document, indent=2, ensure_ascii=False)) + "\n"


def _utf8(text: str) -> str:
    """Return a text with bytes of a file's name that aren't UTF-8 escaped, as in JSON."""
    return text.encode("utf-8", "backslashreplace").decode()


def _result(problem: Problem) -> dict[str, object]:
    text = ": ".join(filter(None, (problem.path, problem.message)))
    result: dict[str, object] = {"ruleId": problem.code, "level": problem.severity, "message": {"text": text}}
    if problem.file:
        uri = quote(Path(problem.file).as_posix(), errors="surrogateescape")
        location: dict[str, object] = {"artifactLocation": {"uri": uri}}
        if problem.line:
            location["region"] = {"startLine": problem.line, "startColumn": problem.column}
        result["locations"] = [{"physicalLocation": location}]
    return result


FORMATS: Mapping[str, Callable[[Sequence[Problem]], str]] = {"github": github, "sarif": sarif}
