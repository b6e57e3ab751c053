"""Rule files as newcomers break them, and what they are told: `python -m tests.rules.test_mistakes` writes it anew.

Read what has changed in mistakes/messages.txt as somebody would who has never seen the rules: it should say where, what
was expected, what is there, and how to mend it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.rules.load import check_rules

FOLDER = Path(__file__).parent / "mistakes"
MESSAGES = FOLDER / "messages.txt"
CASES = sorted([path.name for path in FOLDER.iterdir() if path != MESSAGES])
UNSET = re.compile(r"environment variable [A-Z_]+, got none$|expected a file at ")


def told(case: str) -> list[str]:
    """Return the problems of a case, but for variables and files that aren't set here."""
    path = FOLDER / case
    _, problems = check_rules(path / "routes.yaml" if path.is_dir() else path, environ={}, now=1.8e9)
    found = [each for each in problems if not UNSET.search(each.message)]
    return [f"{each.severity}: {each}".replace(f"{FOLDER}/", "") for each in found]


def messages() -> Iterator[str]:
    for case in CASES:
        yield from [f"# {case}", *told(case), ""]


def expected() -> dict[str, list[str]]:
    blocks = [block.splitlines() for block in MESSAGES.read_text().strip().split("\n\n")]
    return {first.removeprefix("# "): rest for first, *rest in blocks}


@pytest.mark.parametrize("case", CASES)
def test_a_newcomers_mistake_is_told_with_what_mends_it(case: str) -> None:
    assert told(case) == expected()[case]


@pytest.mark.parametrize("case", ["61-twenty-errors.yaml", "62-twenty-in-expressions.yaml"])
def test_a_file_with_twenty_mistakes_names_all_of_them(case: str) -> None:
    """The comment at its end has their lines and columns, and perhaps in brackets what else is in the message."""
    places = re.findall(r"^# +\d+\. +(\d+:\d+) +(?:\[(.*)\] )?", (FOLDER / case).read_text(), re.MULTILINE)
    found = [each.split(":", 2)[2].partition(": ") for each in told(case) if each.startswith("error")]
    assert len(places) == 20
    missing = [place for place in places if not any(at == place[0] and place[1] in told for at, _, told in found)]
    assert missing == []


if __name__ == "__main__":
    MESSAGES.write_text("\n".join(messages()))
