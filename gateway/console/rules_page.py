"""The rules in force: which, since when, what the last reload changed, what is refused, and each route's traffic."""

from gateway.api import names as api
from gateway.console.asking import Asking
from gateway.console.page import Given, Page

ROUTES = 100
"""Listed beside the rules, with their traffic; the others are on pages of their own."""


async def rules(asking: Asking, _: Given) -> Page:
    """Show the rules in force in this process."""
    values = {
        "rules": await asking.ask(api.get_rules),
        "routes": await asking.try_asking(api.list_routes, traffic=True, limit=ROUTES),
    }
    return Page(template="rules.html", title="Rules", section="rules", values=values)
