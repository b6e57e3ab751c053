"""What a replay would deliver, as a process counts it: as the log would have said."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from gateway.engine.control.records import Selection
from gateway.ops.api_answers import Answer, time_of
from gateway.ops.api_client import ApiClient
from gateway.ops.output import rfc3339
from gateway.ops.replay_counts import Counted, ReplayCount


class ToldCount(NamedTuple):
    """What would be delivered, and since when the route does so by itself; `is_cut_short`: there may be more."""

    found: ReplayCount
    changed_at: float | None
    is_cut_short: bool


class EventRoutes(NamedTuple):
    """An event by its id and position, the routes by which it would be delivered, and all that match it.

    Each route has its destinations, and whether it is ordered.
    """

    event: str
    position: str
    routes: Sequence[tuple[str, Sequence[str], bool]]
    matched: Sequence[str]


async def counted(client: ApiClient, asked: Selection) -> ToldCount:
    """Return what a replay of a selection would deliver."""
    body: dict[str, object] = {
        "route": asked.route,
        "since": rfc3339(asked.since),
        "until": None if asked.until is None else rfc3339(asked.until),
        "destination": asked.destination,
        "source": asked.source,
        "undelivered": asked.undelivered,
    }
    answer = await client.ask("replays", "count", body=body)
    changed_at = None if answer["changed_at"] is None else time_of(answer["changed_at"])
    return ToldCount(_count(answer), changed_at, answer["is_cut_short"])


async def routes_of_event(client: ApiClient, event: str, *, route: str | None, destination: str | None) -> EventRoutes:
    """Return by which routes an event would be delivered again."""
    answer = await client.get("events", event, "routes", route=route, destination=destination)
    routes = [(item["route"], tuple(item["destinations"]), item["is_ordered"]) for item in answer["items"]]
    return EventRoutes(answer["event"], answer["position"], routes, answer["matched"])


def _count(answer: Answer) -> ReplayCount:
    selection = Selection(
        route=answer["route"],
        destination=answer["destination"],
        source=answer["source"],
        since=time_of(answer["since"]),
        until=time_of(answer["until"]),
        undelivered=answer["undelivered"],
    )
    by: defaultdict[tuple[str, str], Counted] = defaultdict(Counted)
    for item in answer["items"]:
        by[item["source"], item["type"]] = Counted(
            item["count"], item["deliveries"], item["matching"], item["undelivered"], item["unknown"]
        )
    return ReplayCount(
        selection=selection,
        total=answer["total"],
        destinations={item["name"]: item["count"] for item in answer["destinations"]},
        is_chosen=answer["is_chosen"],
        under_way=tuple(answer["under_way"]),
        dead_items=answer["dead_items"],
        unread=answer["unread_partitions"],
        failing=answer["failing"],
        looked=answer["looked"],
        by=by,
    )
