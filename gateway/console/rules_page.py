"""The rules in force: which, since when, what the last reload changed, and what is refused."""

from gateway.api import names as api
from gateway.console.asking import Asking
from gateway.console.page import Given, Page


async def rules(asking: Asking, _: Given) -> Page:
    """Show the rules in force in this process."""
    found = await asking.ask(api.get_rules)
    return Page(template="rules.html", title="Rules", section="rules", values={"rules": found})
