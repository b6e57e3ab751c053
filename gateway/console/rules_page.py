"""The active rules: which, since when, what changed, what is refused; each route's traffic; the files themselves."""

import re
from typing import Any

from gateway.api import names as api
from gateway.api import rule_files as file_api
from gateway.console.asking import Asking
from gateway.console.page import Given, Page

LINES = 300
"""Of a page of a rule file."""
KINDS = ("source", "destination", "route")
_NUMBER = re.compile(r"[0-9]{1,6}", re.ASCII)


async def rules(asking: Asking, given: Given) -> Page:
    """Show the active rules in this process, and lines of a rule file: from one on, or about a name."""
    found = await asking.ask(api.get_rules)
    kind, name = given.choice("kind", KINDS) or None, given.text("name") or None
    asked: dict[str, Any] = {"number": _whole(given, "file", 0), "line": max(1, _whole(given, "line", 1))}
    if kind is not None and name is not None:
        asked |= {"kind": kind, "name": name}
    file = await asking.try_asking(file_api.get_rule_file, **asked, limit=LINES, traffic=True)
    values = {
        "rules": found,
        "file": file,
        "line": asked["line"],
    }
    return Page(template="rules.html", title="Rules", section="rules", values=values)


def _whole(given: Given, name: str, default: int) -> int:
    text = given.text(name)
    return int(text) if _NUMBER.fullmatch(text) else default
