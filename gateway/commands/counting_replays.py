"""What `gateway replay --dry-run` says, whether it asks the log or the API."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from gateway.commands.base import Invocation
from gateway.commands.replaying import WAITS
from gateway.ops.command_texts import replay_words
from gateway.ops.kick_report import unread_text
from gateway.ops.output import Output, count, rfc3339
from gateway.ops.replay_counts import Counted, ReplayCount


def suggest_end(output: Output, route: str, since: float, until: float | None, changed_at: float | None) -> None:
    """Print since when a route has delivered events by itself, if a replay from `since` on includes later ones."""
    if changed_at is None or changed_at <= since:
        return
    told = rfc3339(changed_at)
    if until is None or told < rfc3339(until):  # in milliseconds, as they are told: `--to` has them
        output.note(
            f"route {route}, or the `dedupe` of its sources, last changed at {told}; events after that were "
            f"already routed by the current rules: use --to {told} or --undelivered to leave them out"
        )


def print_count(output: Output, found: ReplayCount) -> None:
    """Print a replay's events, and deliveries by what is known of them."""
    route = found.selection.route
    for name in found.under_way:
        output.note(
            f"replay {name} of route {route} hasn't ended: what it queues may be counted here, too; count again once "
            "it has"
        )
    if found.unread:
        output.note(f"{unread_text(found.unread)}: not counted")
    if found.dead_items:
        left = count(found.dead_items, "dead letter")
        output.note(f"{left} of items: not counted; `gateway dead replay --route {route}` delivers them")
    if output.json:
        for (source, type_), each in sorted(found.by.items()):
            output.line({"route": route, "source": source, "type": type_, **asdict(each)})
        return
    total = found.in_all
    output.print(("route ", "bold"), route)
    rows = [(*which, f"{each.count:,}") for which, each in sorted(found.by.items()) if each.count]
    if rows:
        output.table(["source", "type", "events"], rows, right=("events",))
    if found.failing:
        what = "the route's condition, or `to`," if found.is_chosen else "the route's condition"
        output.note(f"for {count(found.failing, 'event')} {what} fails: each would become another dead letter")
    output.print(_fates_text(total))
    output.print(f"would queue {_queued_text(total.count, found.destinations)}; nothing was done")


def print_counts(call: Invocation, counts: Sequence[ReplayCount]) -> None:
    """Print what all of several replays would do, and the command for exactly that."""
    output = call.output
    if len(counts) > 1:
        queued = sum([each.in_all.deliveries for each in counts])
        output.print(f"in all, would queue {count(queued, 'delivery')} by {count(len(counts), 'route')}")
    first = counts[0].selection
    exactly = replay_words(first if call.arguments.route else replace(first, route=""))
    output.print(f"to replay exactly these: gateway replay {exactly}")


def print_event_count(output: Output, event: str, route: str, destinations: Sequence[str]) -> None:
    """Print what the replay of one event by a route would do."""
    what = f"{count(len(destinations), 'delivery')}: {event} by {route} to {', '.join(destinations) or 'nowhere'}"
    output.print(f"would queue {what}; nothing was done")
    if output.json:
        output.line({"event": event, "route": route, "destinations": list(destinations)})


def _fates_text(total: Counted) -> str:
    """Return what is known of the matching deliveries, as text; no success is recorded."""
    others = total.matching - total.undelivered - total.unknown
    way = "its way" if others == 1 else "their way"
    under_way = f"; {others:,} delivered, dropped or on {way} ({WAITS})" if others else ""
    unknown = f"; {total.unknown:,} unknown" if total.unknown else ""
    return (
        f"{count(total.matching, 'delivery')} {'matches' if total.matching == 1 else 'match'}; "
        f"as far as the log shows, {total.undelivered:,} missed or dead-lettered{under_way}{unknown}"
    )


def _queued_text(events: int, destinations: Mapping[str, int]) -> str:
    """Return how many deliveries of that many events go to which destinations, as text."""
    deliveries, of = count(sum(destinations.values()), "delivery"), count(events, "event")
    to = {name: number for name, number in destinations.items() if number}
    if not to:
        return deliveries
    if set(to.values()) == {events}:
        return f"{deliveries}: {of} to {', '.join(to)}"
    return f"{deliveries} of {of}: {', '.join([f'{number:,} to {name}' for name, number in to.items()])}"
