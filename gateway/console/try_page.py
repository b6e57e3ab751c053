"""What the gateway would do with a request that is tried out, by the active rules or others."""

from base64 import b64decode, b64encode
from collections.abc import Mapping

from gateway.api import events as event_api
from gateway.api import names as api
from gateway.api.explaining import ExplainRequest, Explanation, explain_request
from gateway.api.problems import ApiError, Code
from gateway.console.asking import Asking
from gateway.console.forms import Form, asked
from gateway.console.page import Given, Page
from gateway.ops.output import header_text

MOST_SOURCES = 200
MOST_BYTES = 4 << 20
"""Of a form: a body of 1 MiB, most of whose bytes are written as three, and rules beside it."""
MOST_LINES = 1_000
"""Of the field for headers, blank ones included."""
TYPICAL = "Content-Type: application/json"


def _text(packed: str) -> str:
    return header_text(b64decode(packed))


async def form(asking: Asking, given: Given) -> Page:
    """Show the form in which a request is tried out, empty or with an event."""
    values = {"source": given.text("source"), "headers": TYPICAL, "query": "", "body": "{}", "rules": ""}
    if event := given.text("event"):
        raw = await asking.ask(event_api.get_raw, event=event)
        lines = [f"{_text(each.name_base64)}: {_text(each.value_base64)}" for each in raw.headers]
        body = b64decode(raw.body_base64).decode("utf-8", "replace")
        values |= {"source": raw.source, "headers": "\n".join(lines), "query": raw.query, "body": body}
    return await _page(asking, values, None)


async def tried(asking: Asking, _: Given, form: Form) -> Page:
    """Show what the gateway would do with what the form has."""
    values = {name: form.text(name).replace("\r\n", "\n") for name in ("source", "headers", "query", "body", "rules")}
    try:
        wanted = asked(
            ExplainRequest,
            {
                "source": values["source"],
                "headers": headers_of(values["headers"]),
                "query": values["query"],
                "body_base64": b64encode(values["body"].encode("utf-8", "replace")).decode(),
                "rules": values["rules"] if values["rules"].strip() else None,
                "include_unmatched": True,
            },
        )
        found: Explanation | ApiError = await asking.ask(explain_request, given=wanted)
    except ApiError as error:
        found = error
    return await _page(asking, values, found)


def headers_of(text: str) -> list[Mapping[str, str]]:
    """Read headers, one a line. Raises ApiError."""
    headers: list[Mapping[str, str]] = []
    lines = text.split("\n", MOST_LINES)
    if len(lines) > MOST_LINES:
        raise ApiError(Code.INVALID_REQUEST, f"headers: expected at most {MOST_LINES} lines")
    for number, line in enumerate(lines, start=1):
        name, colon, value = line.partition(":")
        if not line.strip():
            continue
        if not colon or not name.strip():
            raise ApiError(Code.INVALID_REQUEST, f"headers, line {number}: expected Name: value")
        headers.append({"name": name.strip(), "value": value.strip()})
    return headers


async def _page(asking: Asking, values: dict[str, str], found: Explanation | ApiError | None) -> Page:
    page = await asking.ask(api.list_sources, limit=MOST_SOURCES)
    names = [each.name for each in page.items]
    known = names if not values["source"] or values["source"] in names else [values["source"], *names]
    return Page(
        template="try.html",
        title="Try out",
        section="rules",
        values={**values, "sources": known, "found": found, "may": asking.may(explain_request)},
    )
