"""How commands show events and explanations: as JSON fields for scripts, as text for people."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from gateway.client.request import Outbound
from gateway.log.base import TopicSpec
from gateway.model import Event
from gateway.ops.dead_letters import ListedLetter, result_of
from gateway.ops.explain import Explained, ExplainedRoute, Planned
from gateway.ops.findings import Finding
from gateway.ops.log_search import Found
from gateway.ops.output import Output, body_fields, body_text, header_text, rfc3339, when
from gateway.ops.replays import ReplayStatus
from gateway.ops.source_presentation import dedupe_text
from gateway.ops.waiting_deliveries import AttemptInfo

if TYPE_CHECKING:  # with aiohttp, which few commands need
    from gateway.ops.send import Response


MAX_BODY_LINES = 40
MAX_REQUESTS = 20
"""Requests of one route that are shown, of an event that is split."""


def explained_fields(
    explained: Explained, duplicate_of: str = "", dead: Sequence[ListedLetter] = ()
) -> dict[str, object]:
    event = explained.event
    return {
        "event": {"id": event.id, "source": event.source, "type": event.type, "key": event.key},
        **({"duplicate_of": duplicate_of} if duplicate_of else {}),
        **({"dead_letters": [_dead_fields(each) for each in dead]} if dead else {}),
        "rules": explained.rules,
        "identity": {"from": explained.identified_by or None, "dedupe_seconds": explained.dedupe},
        **({"body_warnings": explained.body_warnings} if explained.body_warnings else {}),
        **({"body_as_read": json.loads(explained.body_as_read)} if explained.body_as_read else {}),
        "routes": [
            {
                "name": route.name,
                "matched": route.is_matched,
                "reason": route.reason,
                "owner": route.contact.owner or None,
                "runbook": route.contact.runbook or None,
                **({"wait": route.wait} if route.wait else {}),
                "requests": [
                    {
                        "destination": planned.destination or None,
                        **_part_fields(planned),
                        "error": planned.problem,
                        "reason": planned.reason,
                        "available_fields": planned.available_fields or None,
                    }
                    if planned.request is None
                    else {
                        "destination": planned.destination,
                        **_part_fields(planned),
                        "method": planned.request.method,
                        "url": planned.request.address,
                        "headers": _joined(planned.request.headers),
                        "not_forwarded": _not_forwarded(event, planned.request),
                        **body_fields(planned.request.body),
                    }
                    for planned in route.requests
                ],
            }
            for route in explained.routes
        ],
    }


def _dead_fields(letter: ListedLetter) -> dict[str, object]:
    return {
        "delivery_id": letter.delivery_id or "",
        "route": letter.route,
        "destination": letter.destination,
        "reason": letter.reason,
        "last_result": letter.last_result,
    }


def print_explained(
    output: Output,
    explained: Explained,
    position: str = "",
    duplicate_of: str = "",
    dead: Sequence[ListedLetter] = (),
) -> None:
    """Print what happens to an event.

    One in the log has a `position`, may be a duplicate of another, and may have open `dead` letters.
    """
    event = explained.event
    key = f"  key {event.key}" if event.key is not None else ""
    output.print(("event ", "bold"), f"{event.id}  source {event.source}  type {event.type}{key}")
    output.print(("identity ", "bold"), _identity_text(explained))
    output.print(("rules ", "bold"), f"version {explained.rules}")
    for problem in explained.body_warnings:
        output.print((problem, "yellow"))
    if explained.body_as_read:
        output.print(("body as rules read it", "bold"))
        output.block(_indented(explained.body_as_read))
    if duplicate_of:
        text = (
            f"a duplicate of {duplicate_of}, within its source's dedupe window: acknowledged, and delivered by no route"
        )
        output.print((text, "bold yellow"))
        output.print("if it weren't a duplicate:")
    for route in explained.routes:
        mark = ("✓ ", "bold green") if route.is_matched else ("✗ ", "dim")
        output.print(mark, (route.name, "bold" if route.is_matched else ""), ("  " + route.reason, "dim"))
        if route.is_matched and any(route.contact):
            output.print((f"    owner: {', '.join(filter(None, route.contact))}", "dim"))
        if route.wait:
            output.print((f"    {route.wait}", "dim"))
        _print_requests(output, route, event)
    for letter in dead:
        output.print(
            ("an open dead letter: ", "bold red"),
            f"{letter.route} → {letter.destination}  {letter.reason}, {letter.last_result}",
        )
        output.print(f"  gateway dead show {letter.delivery_id}")
    if not any(route.is_matched for route in explained.routes):
        output.print(("no route matches: the event would be acknowledged and delivered nowhere", "yellow"))
    elif duplicate_of:
        output.print("to deliver it anyway, by each route that matches it:")
        output.print(f"  gateway replay --event {position}")


def _indented(document: str) -> str:
    """Return JSON with a member on each line, of which there are at most MAX_BODY_LINES."""
    lines = json.dumps(json.loads(document), indent=2, ensure_ascii=False).splitlines()
    shown = [f"  {line}" for line in lines[:MAX_BODY_LINES]]
    if len(lines) > MAX_BODY_LINES:
        shown.append(f"  … and {len(lines) - MAX_BODY_LINES:,} more lines")
    return "\n".join(shown)


def _identity_text(explained: Explained) -> str:
    if not explained.identified_by:
        return "none: each request counts as a new event, and dedupe finds no duplicates"
    return dedupe_text(explained.identified_by, explained.dedupe)


def _print_requests(output: Output, route: ExplainedRoute, event: Event) -> None:
    if route.is_matched and not route.requests:
        output.print(("    no requests: the list that it splits has no items", "dim"))
    for planned in route.requests[:MAX_REQUESTS]:
        if planned.request is None:
            end = f"halts its key ({planned.reason})" if route.halts else f"dead-lettered as {planned.reason}"
            # A condition that failed is the route's own reason, which stands above.
            problem = "" if planned.problem == route.reason else f": {planned.problem}"
            output.print(f"    {_to(planned)}: ", (end, "red"), problem)
            if planned.available_fields:
                output.print(f"      {planned.available_fields}")
            continue
        request = planned.request
        output.print(f"    {_to(planned)}: ", (f"{request.method} ", "bold cyan"), request.address)
        for name, value in request.headers:
            output.print((f"      {header_text(name)}: ", "dim"), header_text(value))
        if not_forwarded := _not_forwarded(event, request):
            output.print((f"      not forwarded of the sender's headers: {', '.join(not_forwarded)}", "dim"))
        if not request.body:
            output.print(("      no body", "dim"))
        elif request.body == event.body:
            output.print((f"      the event's own body, {len(event.body):,} bytes", "dim"))
        else:
            output.block("\n".join(f"      {line}" for line in body_text(request.body).splitlines()))
    if (left := len(route.requests) - MAX_REQUESTS) > 0:
        output.print((f"    … and {left:,} more requests", "dim"))


def _part_fields(planned: Planned) -> dict[str, int]:
    return {} if planned.part is None else {"item": planned.part}


def _to(planned: Planned) -> str:
    to = planned.destination or "no destination"
    return to if planned.part is None else f"{to}, item {planned.part}"


def _not_forwarded(event: Event, request: Outbound) -> list[str]:
    """Return the names of the sender's headers that aren't in the request, each once."""
    sent = {name.lower() for name, _ in request.headers}
    return list(dict.fromkeys([header_text(name) for name, _ in event.headers if name.lower() not in sent]))


def print_response(output: Output, response: "Response") -> None:
    style = "bold green" if is_success(response.status) else "bold red"
    result = response.event_id or response.detail
    output.print((f"{response.status}  ", style), result, (f"  {response.seconds * 1000:.1f} ms", "dim"))


def print_responses(output: Output, responses: Sequence["Response"]) -> None:
    rows = []
    for status in sorted({response.status for response in responses}):
        of_status = [response for response in responses if response.status == status]
        times = sorted(response.seconds * 1000 for response in of_status)
        detail = "" if is_success(status) else of_status[0].detail
        rows.append(
            (
                str(status),
                str(len(times)),
                f"{times[len(times) // 2]:.1f}",
                f"{times[-1 - len(times) // 100]:.1f}",
                detail,
            )
        )
    output.table(["status", "responses", "p50 ms", "p99 ms", ""], rows, right=("responses", "p50 ms", "p99 ms"))


def is_success(status: int) -> bool:
    return 200 <= status < 300  # noqa: PLR2004 - the class of successes


def topic_fields(spec: TopicSpec) -> dict[str, object]:
    return {
        "topic": spec.name,
        "partitions": spec.partitions,
        "retention_seconds": spec.retention,
        "compacted": spec.compacted,
    }


def replay_fields(progress: ReplayStatus) -> dict[str, object]:
    command = progress.command
    return {
        "replay": command.name,
        "state": command.state,
        "scanned": progress.scanned,
        "total": progress.total,
        "injected": progress.injected,
        **({"detail": command.detail} if command.detail else {}),
        **({"unreadable_partitions": progress.unread} if progress.unread else {}),
    }


Row = Mapping[str, str | Text]
"""A row of a table: column title → content."""
NUMBERS = ("count", "attempts", "bytes", "partitions")
"""Columns that are aligned to the right."""


def print_rows(output: Output, rows: Sequence[Row], *, unbroken: Sequence[str] = ()) -> None:
    """Print rows with the same titles as a table; nothing without rows."""
    if rows:
        output.table(list(rows[0]), [list(row.values()) for row in rows], right=NUMBERS, unbroken=unbroken)


def topic_row(spec: TopicSpec, state: str | Text) -> Row:
    retention = "forever" if spec.retention is None else f"{spec.retention / 86400:.3g} d"
    return {
        "topic": spec.name,
        "partitions": str(spec.partitions),
        "retention": retention + (", compacted" if spec.compacted else ""),
        "": state,
    }


def event_fields(found: Found, event: Event | None, problem: str, *, size: int | None = None) -> dict[str, object]:
    """Return an event as JSON has it, without its content; `size` is that of its body, if that is hidden in part."""
    position = {"topic": found.partition.topic, "partition": found.partition.number, "offset": found.record.offset}
    if event is None:
        return {"at": rfc3339(found.record.appended_at), "problem": problem, **position}
    return {
        "at": rfc3339(event.received_at),
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "key": event.key,
        "size": len(event.body) if size is None else size,
        **position,
    }


def event_content(event: Event) -> dict[str, object]:
    return {
        "query": event.query,
        "headers": [[header_text(name), header_text(value)] for name, value in event.headers],
        **body_fields(event.body),
    }


def event_row(found: Found, event: Event | None, problem: str) -> Row:
    return {
        "received": when(found.record.appended_at if event is None else event.received_at),
        "event": f"can't be read: {problem}" if event is None else event.id,
        "source": "" if event is None else event.source,
        "type": "" if event is None else event.type,
        "key": "" if event is None else event.key or "",
        "bytes": f"{len(found.record.value):,}",
    }


def print_event(output: Output, event: Event, position: str, duplicate_of: str = "") -> None:
    output.print(("event ", "bold"), event.id)
    if duplicate_of:
        text = (
            f"a duplicate of {duplicate_of}, within its source's dedupe window: acknowledged, and not delivered again"
        )
        output.print(("  " + text, "yellow"))
    about = {"source": event.source, "type": event.type, "key": event.key, "received": when(event.received_at)}
    print_fields(output, {**about, "query": event.query or None, "stored at": position})
    for name, value in event.headers:
        output.print((f"  {header_text(name)}: ", "dim"), header_text(value))
    output.print()
    output.block(body_text(event.body))


def print_status(output: Output, findings: Sequence[Finding], attempts: Sequence[AttemptInfo]) -> None:
    for each in findings:
        fields: dict[str, object] = {"what": each.what, "why": each.why, "needs_attention": each.needs_attention}
        for name, at in (("since", each.since), ("until", each.until)):
            fields[name] = None if at is None else rfc3339(at)
        if output.json:
            output.line({**fields, "by": each.by, "next": list(each.next), "count": each.count})
    for tried in attempts:
        if output.json:
            ids = {"event_id": tried.event_id, "delivery_id": tried.delivery_id, "route": tried.route}
            attempt = tried.attempt
            output.line({**ids, "at": rfc3339(attempt.at), "attempt": attempt.number, "result": result_of(attempt)})
    rows = [
        (
            each.what,
            "" if each.count is None else f"{each.count:,}",
            each.why,
            "" if each.since is None else when(each.since),
            "" if each.until is None else f"{'due since ' if each.is_due else ''}{when(each.until)}",
            each.by,
        )
        for each in findings
    ]
    if rows:
        output.table(["what", "number", "why", "since", "until or next attempt", "by"], rows, right=("number",))
        _print_steps(output, findings)
    else:
        output.print("no deliveries are held up")
    if attempts:
        output.print()
        output.print("the last attempts that are recorded:")
        cells = [
            (when(each.attempt.at), each.route, each.event_id, str(each.attempt.number), result_of(each.attempt))
            for each in attempts
        ]
        output.table(["at", "route", "event", "attempt", "result"], cells, right=("attempt",))


def _print_steps(output: Output, findings: Sequence[Finding]) -> None:
    """Print the next steps for each, one command a line, outside of any table that would wrap it."""
    by_steps: dict[tuple[str, ...], dict[str, None]] = {}
    for each in findings:
        if each.next:
            by_steps.setdefault(each.next, {})[each.what] = None
    for steps, names in by_steps.items():
        output.print()
        output.print(("next: ", "bold"), ", ".join(names))
        for step in steps:
            output.print("  ", (step, "dim") if step.startswith("#") else step)


def _joined(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return headers by name; repeats are joined by a comma, as RFC 9110 §5.3 allows."""
    joined: dict[str, str] = {}
    for name, value in headers:
        key = header_text(name)
        joined[key] = f"{joined[key]}, {header_text(value)}" if key in joined else header_text(value)
    return joined


def print_fields(output: Output, fields: Mapping[str, str | None]) -> None:
    for name, value in fields.items():
        if value is not None:
            output.print((f"  {name:<12}", "dim"), value)
