"""Events: searched; and one of them: its journey, its body, its headers."""

from base64 import b64decode
from collections import Counter
from typing import Any

from gateway.api import events as api
from gateway.api import names, shapes
from gateway.api.acts import redeliver_event
from gateway.api.explaining import explain_stored
from gateway.api.problems import ApiError, Code
from gateway.console.asking import Asking
from gateway.console.body_views import View, download_name, view_of
from gateway.console.curl import curl_of
from gateway.console.page import Download, Given, Page
from gateway.index.statuses import Status
from gateway.ops.output import header_text

PAGE = 50
MOST_DELIVERIES = 50
MOST_ROUTES = 200
"""Routes whose destinations are offered where an event is delivered again."""
PERIODS = {"15m": "Last 15 minutes", "1h": "Last hour", "24h": "Last day", "7d": "Last week"}
"""What can be chosen beside a query, and how it is called."""
STATUSES = {
    "dead": "Dead",
    "waiting": "Waiting",
    **{each.value: each.capitalize() for each in Status if each is not Status.DEAD},
}
_WAITING = (Status.PARKED, Status.RETRYING, Status.PENDING)
TABS = ("journey", "routes", "body", "headers")


async def events(asking: Asking, given: Given) -> Page:
    """Search events: the newest that match, page by page."""
    query, status, since = given.text("query"), given.choice("status", (*STATUSES,)), given.choice("since", (*PERIODS,))
    values: dict[str, Any] = {
        "query": query,
        "status": status,
        "since": since,
        "statuses": STATUSES,
        "periods": PERIODS,
        "is_live": given.is_set("live") and given.cursor() is None,
        "is_first": given.cursor() is None,
        "problem": None,
        "page": None,
    }
    try:
        values["page"] = await asking.ask(
            api.search_events, query=composed(query, status, since), limit=PAGE, cursor=given.cursor()
        )
    except ApiError as error:
        if error.code not in (Code.INVALID_QUERY, Code.FORBIDDEN):
            raise
        values["problem"] = error
    return Page(template="events.html", title="Events", section="events", values=values)


def composed(query: str, status: str, since: str) -> str:
    """Return a query with what else was chosen. That follows, so that columns of problems are the query's own."""
    statuses = ",".join(_WAITING) if status == "waiting" else status
    return " ".join([each for each in (query, statuses and f"status:{statuses}", since and f"since:{since}") if each])


async def event(asking: Asking, given: Given) -> Page:
    """Show an event: its journey, its body or its headers, as the address says."""
    name = given.path["event"]
    detail = await asking.ask(api.get_event, event=name)
    tab = given.choice("tab", TABS) or "journey"
    values: dict[str, Any] = {"name": name, "detail": detail, "event": detail.event, "tab": tab}
    values["reads"] = asking.may(api.get_body)
    if tab == "journey":
        page = await asking.ask(api.list_deliveries, event=name, limit=MOST_DELIVERIES, cursor=given.cursor())
        values |= {"deliveries": page, "outcomes": outcomes(detail.event)}
        values["acts"] = asking.may(redeliver_event)
        values["destinations"] = await _destinations(asking, detail.event.source) if values["acts"] else ()
    elif tab == "routes" and values["reads"] and detail.is_stored:
        values["found"] = await asking.try_asking(explain_stored, event=name, include_unmatched=True)
    elif tab == "body" and values["reads"] and detail.is_stored:
        raw = await asking.ask(api.get_raw, event=name)
        content = b64decode(raw.body_base64)
        asked = given.choice("view", (*View,))
        values["body"] = await asking.aside(lambda: view_of(content, View(asked) if asked else None))
        values["views"] = tuple(View)
        values["curl"] = await _curl(asking, raw, content)
    return Page(template="event.html", title=f"Event {detail.event.id}", section="events", values=values)


async def _destinations(asking: Asking, source: str) -> list[str]:
    """Return the names of where routes of a source deliver to, of the first of these routes."""
    page = await asking.try_asking(names.list_routes, source=source, limit=MOST_ROUTES)
    return [] if isinstance(page, ApiError) else sorted({name for each in page.items for name in each.destinations})


async def _curl(asking: Asking, raw: shapes.RawEvent, content: bytes) -> str | None:
    """Return the command that sends an event again; None for one whose source isn't in the rules."""
    source = await asking.try_asking(names.get_source, name=raw.source)
    if isinstance(source, ApiError):
        return None
    headers = [(_text(each.name_base64), _text(each.value_base64)) for each in raw.headers]
    return curl_of(source.path, raw.query, headers, content, file=download_name(raw.id))


def _text(packed: str) -> str:
    return header_text(b64decode(packed))


def outcomes(event: shapes.EventSummary) -> list[tuple[Status, int]]:
    """Return how many of an event's deliveries have which status, the worst first."""
    counts: Counter[Status] = Counter()
    for each in event.deliveries:
        counts[each.status] += each.count
    return [(status, counts[status]) for status in Status if counts[status]]


async def body(asking: Asking, given: Given) -> Download:
    """Return all of an event's body, as a file."""
    name = given.path["event"]
    return Download(content=await asking.ask(api.get_body, event=name), name=download_name(name))


async def attempt(asking: Asking, given: Given) -> Page:
    """Show an attempt: the request's outline, and the beginning of the answer."""
    found = await asking.ask(api.get_attempt, position=given.path["position"])
    title = f"Attempt {found.number} of {found.route} to {found.destination}"
    return Page(template="attempt.html", title=title, section="events", values={"attempt": found})
