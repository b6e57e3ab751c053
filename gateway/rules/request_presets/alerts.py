"""Alerts and annotations: PagerDuty, Opsgenie and Grafana."""

import re
from collections.abc import Mapping
from typing import Any

from gateway.model import ExpressionError
from gateway.rules.request_presets.preset import (
    Field,
    Kind,
    RequestPreset,
    as_message,
    escaped_html,
    facts_within,
    segment,
)
from gateway.rules.request_templates import Message

MAX_DETAILS = 8000
"""Maximum characters of all names and values in Opsgenie's details together."""


def _pagerduty(values: Mapping[str, Any]) -> Message:
    action = values.get("action", "trigger")
    event = {"routing_key": values["routing_key"], "event_action": action}
    if values.get("dedup_key"):
        event["dedup_key"] = values["dedup_key"]
    if action != "trigger":
        if "dedup_key" not in event:
            raise ExpressionError(f"expected a dedup_key to {action}, got none")
        return as_message(event)
    if not values.get("summary"):
        raise ExpressionError("summary: expected a string with something in it, got an empty one")
    payload = {
        "summary": values["summary"],
        "source": values.get("source") or "webhook-gateway",
        "severity": values.get("severity", "error"),
        **{key: values[key] for key in ("component", "group", "class", "timestamp") if values.get(key)},
        **({"custom_details": values["details"]} if "details" in values else {}),
    }
    links = [{"href": values["url"], "text": values.get("button") or "Open"}] if "url" in values else None
    return as_message(event | {"payload": payload} | ({"links": links} if links else {}))


PAGERDUTY = RequestPreset(
    name="pagerduty",
    about="An event of the Events API v2, which triggers, acknowledges or resolves an alert.",
    url="https://events.pagerduty.com/v2/enqueue",
    source="https://developer.pagerduty.com/docs/events-api-v2/trigger-events/",
    fields=(
        Field(
            name="routing_key",
            kind=Kind.LINE,
            about="The integration key: a reference, such as ${PAGERDUTY_KEY}.",
            is_required=True,
        ),
        Field(
            name="action",
            kind=Kind.CHOICE,
            about="`trigger` by default, `acknowledge` or `resolve`.",
            choices=("trigger", "acknowledge", "resolve"),
        ),
        Field(
            name="dedup_key",
            kind=Kind.LINE,
            about="What the alert is about: events with the same key are one alert.",
            limit=255,
            is_exact=True,
        ),
        Field(name="summary", kind=Kind.LINE, about="What has happened, in one line.", is_required=True, limit=1024),
        Field(name="source", kind=Kind.LINE, about="Where: a host, a service.", limit=1024),
        Field(
            name="severity",
            kind=Kind.CHOICE,
            about="`critical`, `error` by default, `warning` or `info`.",
            choices=("critical", "error", "warning", "info"),
        ),
        Field(name="component", kind=Kind.LINE, about="The part of the source.", limit=1024),
        Field(name="group", kind=Kind.LINE, about="The group of parts.", limit=1024),
        Field(name="class", kind=Kind.LINE, about="The class of the event.", limit=1024),
        Field(name="timestamp", kind=Kind.LINE, about="When (RFC 3339).", limit=40),
        Field(name="details", kind=Kind.JSON, about="A mapping of anything else."),
        Field(name="url", kind=Kind.URL, about="A link in the alert."),
        Field(name="button", kind=Kind.LINE, about="The text of the link: `Open`.", limit=255),
    ),
    build=_pagerduty,
    max_bytes=512 * 1024,  # https://developer.pagerduty.com/docs/events-api-v2/overview/#size-limits
)


def _opsgenie(values: Mapping[str, Any]) -> Message:
    alias = values.get("alias")
    if values.get("action", "create") == "close":
        if not alias:
            raise ExpressionError("alias: expected one to close, got none")
        note = {key: values[key] for key in ("source",) if values.get(key)}
        return as_message(note, path=f"/{segment(alias)}/close", query="identifierType=alias")
    if not values.get("message"):
        raise ExpressionError("message: expected a string with something in it, got an empty one")
    kept = ("message", "alias", "description", "tags", "entity", "source", "priority")
    alert = {key: values[key] for key in kept if values.get(key)}
    if "tags" in alert:
        alert["tags"] = [tag for tag in alert["tags"][:20] if tag]
    if facts := facts_within(values.get("facts", ()), MAX_DETAILS, lambda fact: len(fact[0]) + len(fact[1])):
        alert["details"] = dict(facts)
    return as_message(alert)


OPSGENIE = RequestPreset(
    name="opsgenie",
    about="An alert, or with `action: close` the end of the one with that alias.",
    url="https://api.opsgenie.com/v2/alerts with `headers: {Authorization: GenieKey …}`",
    source="https://docs.opsgenie.com/docs/alert-api#create-alert",
    fields=(
        Field(
            name="action",
            kind=Kind.CHOICE,
            about="`create` by default, or `close`.",
            choices=("create", "close"),
        ),
        Field(name="message", kind=Kind.LINE, about="What has happened, in one line.", is_required=True, limit=130),
        Field(
            name="alias",
            kind=Kind.LINE,
            about="What the alert is about: one alias is one open alert.",
            limit=512,
            is_exact=True,
        ),
        Field(name="description", kind=Kind.TEXT, about="More of it.", limit=15_000),
        Field(
            name="priority",
            kind=Kind.CHOICE,
            about="`P1` to `P5`; without it `P3`.",
            choices=("P1", "P2", "P3", "P4", "P5"),
        ),
        Field(name="tags", kind=Kind.LINES, about="A tag, or a list of at most 20.", limit=50),
        Field(name="facts", kind=Kind.FACTS, about="Names with their values; 8,000 characters in all.", limit=1000),
        Field(name="entity", kind=Kind.LINE, about="What it is related to.", limit=512),
        Field(name="source", kind=Kind.LINE, about="Where it is from.", limit=100),
    ),
    build=_opsgenie,
)


def _grafana(values: Mapping[str, Any]) -> Message:
    if not values.get("text"):
        raise ExpressionError("text: expected a string with something in it, got an empty one")
    names = {"text": "text", "tags": "tags", "dashboard": "dashboardUID", "panel": "panelId", "time": "time"}
    names |= {"time_end": "timeEnd"}
    return as_message({theirs: values[ours] for ours, theirs in names.items() if ours in values})


GRAFANA_ANNOTATION = RequestPreset(
    name="grafana-annotation",
    about="An annotation of a dashboard, or of all that show its tags.",
    url="https://grafana.example/api/annotations with `auth: {bearer: …}`",
    source="https://grafana.com/docs/grafana/latest/developers/http_api/annotations/",
    fields=(
        Field(name="text", kind=Kind.TEXT, about="What has happened; with HTML's tags.", is_required=True, limit=4000),
        Field(name="tags", kind=Kind.LINES, about="A tag, or a list of them.", limit=100),
        Field(name="dashboard", kind=Kind.LINE, about="The UID of a dashboard.", limit=100),
        Field(name="panel", kind=Kind.NUMBER, about="The id of a panel on it."),
        Field(name="time", kind=Kind.NUMBER, about="When, in milliseconds since 1970; without it, now."),
        Field(name="time_end", kind=Kind.NUMBER, about="Until when, of what has lasted, likewise."),
    ),
    build=_grafana,
    escape=escaped_html,
    link_after=re.compile(r"(?:href\s*=\s*[\"']?|<)$"),
)
