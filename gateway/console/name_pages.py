"""Sources, routes and destinations: lists of them, and one of them with what belongs to it."""

from typing import Any

from gateway.api import acts, shapes
from gateway.api import dead_letters as dead_api
from gateway.api import events as event_api
from gateway.api import names as api
from gateway.api import refused as refused_api
from gateway.api.deliveries import ListedPage, list_waiting
from gateway.api.problems import ApiError
from gateway.api.quarantine_acts import retry_refused
from gateway.console.asking import Asking
from gateway.console.page import Given, Page
from gateway.console.text import term
from gateway.console.traffic import periods
from gateway.ops.output import rfc3339
from gateway.ops.secret_expiry import EXPIRY_ALERT

PAGE = 100
FEW = 10


async def destinations(asking: Asking, given: Given) -> Page:
    """List destinations, with what stops them."""
    asked = {"name": given.text("name"), "stopped": given.is_set("stopped")}
    page = await asking.ask(api.list_destinations, **asked, traffic=True, limit=PAGE, cursor=given.cursor())
    values = {**asked, "page": page, "is_first": given.cursor() is None}
    return Page(template="destinations.html", title="Destinations", section="destinations", values=values)


async def destination(asking: Asking, given: Given) -> Page:
    """Show a destination: what stops it, what waits for it, what it has refused for good, and its routes."""
    name = given.path["name"]
    found = await asking.ask(api.get_destination, name=name)
    values: dict[str, Any] = {
        "destination": found,
        "acts": asking.may(acts.pause_destination),
        "traffic": await periods(asking, destination=name),
        "routes": await asking.try_asking(api.list_routes, destination=name, limit=FEW),
        "letters": await asking.try_asking(dead_api.list_dead_letters, destination=name, limit=FEW),
        **await _events(asking, "destination", name),
    }
    return Page(template="destination.html", title=f"Destination {name}", section="destinations", values=values)


async def routes(asking: Asking, given: Given) -> Page:
    """List routes: all, those from a source, or to a destination."""
    asked = {
        "name": given.text("name"),
        "source": given.text("source") or None,
        "destination": given.text("destination") or None,
        "stopped": given.is_set("stopped"),
    }
    page = await asking.ask(api.list_routes, **asked, traffic=True, limit=PAGE, cursor=given.cursor())
    values = {**asked, "page": page, "is_first": given.cursor() is None}
    return Page(template="routes.html", title="Routes", section="routes", values=values)


async def route(asking: Asking, given: Given) -> Page:
    """Show a route: its condition, how it retries, what waits, and what has failed for good."""
    name = given.path["name"]
    values: dict[str, Any] = {
        "route": await asking.ask(api.get_route, name=name),
        "acts": asking.may(acts.pause_route),
        "traffic": await periods(asking, route=name),
        "letters": await asking.try_asking(dead_api.list_dead_letters, route=name, limit=FEW),
        **await _events(asking, "route", name),
    }
    return Page(template="route.html", title=f"Route {name}", section="routes", values=values)


async def sources(asking: Asking, given: Given) -> Page:
    """List sources, with the address of each."""
    name = given.text("name")
    page = await asking.ask(api.list_sources, name=name, limit=PAGE, cursor=given.cursor())
    values = {"name": name, "page": page, "is_first": given.cursor() is None}
    return Page(template="sources.html", title="Sources", section="sources", values=values)


async def source(asking: Asking, given: Given) -> Page:
    """Show a source: what to give to its vendor, its last events, what was refused, its secrets, and its routes."""
    name = given.path["name"]
    found = await asking.ask(api.get_source, name=name)
    values: dict[str, Any] = {
        "source": found,
        "acts": asking.may(retry_refused) and not asking.backend.are_rules_bare,
        "refused": await asking.try_asking(refused_api.get_refused, name=name),
        "moment_now": rfc3339(asking.now),
        "soon": rfc3339(asking.now + EXPIRY_ALERT),
        "traffic": await periods(asking, source=name),
        "routes": await asking.try_asking(api.list_routes, source=name, limit=FEW),
        "recent": await asking.try_asking(event_api.search_events, query=term("source", name), limit=FEW),
    }
    return Page(template="source.html", title=f"Source {name}", section="sources", values=values)


async def _events(asking: Asking, kind: str, name: str) -> dict[str, shapes.EventPage | ListedPage | ApiError]:
    """Return the deliveries that wait, and the last events."""
    which = term(kind, name)
    return {
        "waiting": await asking.try_asking(list_waiting, **{kind: name}, limit=FEW),
        "recent": await asking.try_asking(event_api.search_events, query=which, limit=FEW),
    }
