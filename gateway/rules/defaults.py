"""`defaults:`: the default settings of the routes and destinations in a file and the files that it includes."""

from collections.abc import Iterable, Mapping
from typing import Any

from gateway.rules.rules import Contact
from gateway.rules.schema_reader import ParsedMapping
from gateway.turns import give_way

OF_DESTINATIONS = ("timeout", "concurrency", "rate")
"""Keys besides `headers` that destinations inherit unchanged."""


def inherit(file: ParsedMapping, parent: ParsedMapping | None) -> None:
    """Add the including file's defaults and owner to an included file."""
    above: Mapping[str, Any] = {} if parent is None else parent.values
    file.values["defaults"] = inherited(above.get("defaults"), file.values.get("defaults"))
    if "owner" not in file.values:  # a different owner has a different runbook
        file.values |= {key: above[key] for key in ("owner", "runbook") if key in above and key not in file.values}


def contact_of(read: ParsedMapping, file: ParsedMapping) -> Contact:
    """Return the contact for something that a file defines."""
    give_way()
    own = [key for key in ("owner", "runbook") if key in read.values]
    values = {**file.values, **read.values} if "owner" not in own else read.values
    return Contact(values.get("owner", ""), values.get("runbook", ""))


def contacts_of(files: Iterable[ParsedMapping]) -> Mapping[tuple[str, str], Contact]:
    """Return the contacts by kind and name, without those that are empty."""
    found: dict[tuple[str, str], Contact] = {}
    for file in files:
        routes = file.values.get("routes", ())
        uses = [use for route in routes for use in route.values.get("to", ())]
        its = [("source", *each) for each in file.values.get("sources", {}).items()]
        its += [("destination", *each) for each in file.values.get("destinations", {}).items()]
        its += [("destination", use.values["name"], use) for use in uses if isinstance(use, ParsedMapping)]
        its += [("route", route.values["name"], route) for route in routes]
        found |= {(kind, name): contact_of(read, file) for kind, name, read in its}
    return {key: contact for key, contact in found.items() if any(contact)}


def inherited(above: ParsedMapping | None, own: ParsedMapping | None) -> ParsedMapping | None:
    """Return the defaults of a file: its own, completed by those of the including file."""
    if above is None or own is None:
        return own or above
    values = above.values | own.values
    if "retry" in above.values and "retry" in own.values:
        values["retry"] = _filled(own.values["retry"], above.values["retry"].values)
    if headers := _with_headers(above.values, own.values):
        values["headers"] = headers
    return ParsedMapping(own.node, values)


def fill_route(route: ParsedMapping, defaults: ParsedMapping) -> None:
    """Complete a route's retry policy from the defaults."""
    if retry := defaults.values.get("retry"):
        own = route.values.get("retry")
        route.values["retry"] = retry if own is None else _filled(own, retry.values)


def fill_destination(destination: ParsedMapping, defaults: ParsedMapping) -> None:
    """Complete a destination from the defaults. Its own headers take precedence."""
    for key in OF_DESTINATIONS:
        if key in defaults.values:
            destination.values.setdefault(key, defaults.values[key])
    if headers := _with_headers(defaults.values, destination.values):
        destination.values["headers"] = headers


def _filled(own: ParsedMapping, defaults: Mapping[str, Any]) -> ParsedMapping:
    return ParsedMapping(own.node, {**defaults, **own.values})


def _with_headers(above: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    mine: dict[str, str] = own.get("headers", {})
    names = {name.lower() for name in mine}
    return {name: value for name, value in above.get("headers", {}).items() if name.lower() not in names} | mine
