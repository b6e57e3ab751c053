"""Every endpoint of the API, in one table: of it are made the routes, the OpenAPI document, and the check of roles."""

from typing import Annotated

from gateway.access.principal import AccessRole
from gateway.api import dead_letters, deliveries, events, explaining, exporting, names, shapes, tail, traffic
from gateway.api.command_endpoints import ACTS, COMMANDS
from gateway.api.endpoint import BYTES, Endpoint, Parameter
from gateway.api.event_stream import EVENT_STREAM
from gateway.api.json_shapes import Limits
from gateway.api.parameters import CURSOR, EVENT, LIMIT, TIME, named, only
from gateway.api.problems import Code
from gateway.api.state_endpoints import STATE
from gateway.index.event_numbers import END
from gateway.index.query import MAX_QUERY
from gateway.model import DeadReason

BASE = "/api/v1"

_NAMED = Parameter(
    name="name", place="query", kind=Annotated[str, Limits(longest=63)], about="only those with this in their names"
)


def _stopped(about: str) -> Parameter:
    return Parameter(name="stopped", place="query", kind=bool, about=f"only those that are {about}")


_TRAFFIC = Parameter(
    name="traffic", place="query", kind=bool, about="each with its traffic of the last day, by the hour", example=True
)
_RESPONSES = Parameter(
    name="include_responses",
    place="query",
    kind=bool,
    about="also the beginning of what was responded to their last attempts; for the role reader",
    example=True,
)
_OF_DELIVERIES = (
    only("route", "only those by this route"),
    only("destination", "only those to this destination"),
    only("source", "only those of this source's events"),
)

ENDPOINTS: tuple[Endpoint, ...] = (
    *ACTS,
    *COMMANDS,
    *STATE,
    Endpoint(
        name="explain",
        method="POST",
        path="/explain",
        role=AccessRole.READER,
        run=explaining.explain_request,
        answer=explaining.Explanation,
        tag="rules",
        body=explaining.ExplainRequest,
        body_bytes=explaining.REQUEST_BYTES,
        codes=(Code.NOT_FOUND, Code.CONFLICT, Code.INVALID_RULES, Code.NOT_ACCEPTED_BY_INGRESS, Code.BUSY),
    ),
    Endpoint(
        name="tailEvents",
        method="GET",
        path="/tail",
        role=AccessRole.VIEWER,
        run=tail.tail_events,
        answer=EVENT_STREAM,
        tag="events",
        parameters=(
            Parameter(
                name="query",
                place="query",
                kind=Annotated[str, Limits(longest=MAX_QUERY)],
                about="as in a search; its times don't count",
                example="source:github status:dead",
            ),
            Parameter(
                name="after",
                place="query",
                kind=Annotated[int, Limits(minimum=0, maximum=END)],
                about="the last `id` that was sent, as in `Last-Event-ID`, which counts instead if it is there",
            ),
        ),
        codes=(Code.INVALID_QUERY, Code.INDEX_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="getMe",
        method="GET",
        path="/me",
        role=AccessRole.VIEWER,
        run=names.me,
        answer=shapes.Me,
        tag="access",
    ),
    Endpoint(
        name="searchEvents",
        method="GET",
        path="/events",
        role=AccessRole.VIEWER,
        run=events.search_events,
        answer=shapes.EventPage,
        tag="events",
        parameters=(
            Parameter(
                name="query",
                place="query",
                kind=Annotated[str, Limits(longest=MAX_QUERY)],
                about="as `gateway events search` takes it; by what bodies have, only for the role reader",
                example="source:github -status:delivered since:2h",
            ),
            LIMIT,
            CURSOR,
        ),
        codes=(Code.INVALID_QUERY, Code.INVALID_CURSOR, Code.INDEX_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="getEvent",
        method="GET",
        path="/events/{event}",
        role=AccessRole.VIEWER,
        run=events.get_event,
        answer=shapes.EventDetail,
        tag="events",
        parameters=(EVENT,),
        codes=(Code.NOT_FOUND, Code.INDEX_UNAVAILABLE, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="getEventBody",
        method="GET",
        path="/events/{event}/body",
        role=AccessRole.READER,
        run=events.get_body,
        answer=BYTES,
        tag="events",
        parameters=(EVENT,),
        codes=(Code.NOT_FOUND, Code.INDEX_UNAVAILABLE, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="getEventRaw",
        method="GET",
        path="/events/{event}/raw",
        role=AccessRole.READER,
        run=events.get_raw,
        answer=shapes.RawEvent,
        tag="events",
        parameters=(EVENT,),
        codes=(Code.NOT_FOUND, Code.INDEX_UNAVAILABLE, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="exportEvent",
        method="GET",
        path="/events/{event}/exported",
        role=AccessRole.READER,
        run=exporting.export_event,
        answer=exporting.ExportedEvent,
        tag="events",
        parameters=(EVENT,),
        codes=(Code.NOT_FOUND, Code.CONFLICT, Code.INDEX_UNAVAILABLE, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="explainEvent",
        method="GET",
        path="/events/{event}/explanation",
        role=AccessRole.READER,
        run=explaining.explain_stored,
        answer=explaining.Explanation,
        tag="rules",
        parameters=(
            EVENT,
            Parameter(name="include_unmatched", place="query", kind=bool, about="also routes that don't match"),
        ),
        codes=(Code.NOT_FOUND, Code.CONFLICT, Code.INDEX_UNAVAILABLE, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="listDeliveries",
        method="GET",
        path="/events/{event}/deliveries",
        role=AccessRole.VIEWER,
        run=events.list_deliveries,
        answer=shapes.DeliveryPage,
        tag="deliveries",
        parameters=(EVENT, _RESPONSES, LIMIT, CURSOR),
        codes=(Code.NOT_FOUND, Code.INVALID_CURSOR, Code.INDEX_UNAVAILABLE, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="searchDeliveries",
        method="GET",
        path="/deliveries",
        role=AccessRole.VIEWER,
        run=deliveries.search_deliveries,
        answer=deliveries.ListedPage,
        tag="deliveries",
        parameters=(
            Parameter(
                name="status",
                place="query",
                kind=deliveries.STATUSES,
                about="only those with this status; several are divided by commas",
                example="retrying,parked",
            ),
            *_OF_DELIVERIES,
            _RESPONSES,
            LIMIT,
            CURSOR,
        ),
        codes=(Code.INVALID_CURSOR, Code.INDEX_UNAVAILABLE, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="listWaiting",
        method="GET",
        path="/deliveries/waiting",
        role=AccessRole.VIEWER,
        run=deliveries.list_waiting,
        answer=deliveries.ListedPage,
        tag="deliveries",
        parameters=(*_OF_DELIVERIES, LIMIT, CURSOR),
        codes=(Code.INVALID_CURSOR, Code.INDEX_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="getAttempt",
        method="GET",
        path="/attempts/{position}",
        role=AccessRole.READER,
        run=events.get_attempt,
        answer=shapes.AttemptRecord,
        tag="deliveries",
        parameters=(
            Parameter(
                name="position",
                place="path",
                kind=Annotated[str, Limits(longest=300)],
                about="`position` of an attempt of a delivery, percent-encoded",
                example="gateway.attempts/0@7",
            ),
        ),
        codes=(Code.NOT_FOUND, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="listDeadLetters",
        method="GET",
        path="/dead-letters",
        role=AccessRole.VIEWER,
        run=dead_letters.list_dead_letters,
        answer=shapes.DeadLetterPage,
        tag="dead letters",
        parameters=(
            Parameter(
                name="id",
                place="query",
                kind=Annotated[str, Limits(longest=400)],
                about="only those of the delivery, or the event, with this id",
                example="dlv_1b2f0e8c5a7d8e3fb1c2d3e4f5061728",
            ),
            only("route", "only those of this route"),
            only("destination", "only those for this destination"),
            Parameter(name="reason", place="query", kind=DeadReason, about="only those with this reason"),
            Parameter(name="since", place="query", kind=TIME, about="only those written then or later"),
            Parameter(name="until", place="query", kind=TIME, about="only those written before then"),
            Parameter(
                name="include_resolved", place="query", kind=bool, about="also those that were replayed or dropped"
            ),
            LIMIT,
            CURSOR,
        ),
        codes=(Code.INVALID_CURSOR, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="getDeadLetter",
        method="GET",
        path="/dead-letters/{position}",
        role=AccessRole.VIEWER,
        run=dead_letters.get_dead_letter,
        answer=shapes.DeadLetterDetail,
        tag="dead letters",
        parameters=(
            Parameter(
                name="position",
                place="path",
                kind=Annotated[str, Limits(longest=400)],
                about="its position, PARTITION@OFFSET",
                example="0@0",
            ),
        ),
        codes=(Code.NOT_FOUND, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="listSources",
        method="GET",
        path="/sources",
        role=AccessRole.VIEWER,
        run=names.list_sources,
        answer=shapes.SourcePage,
        tag="rules",
        parameters=(_NAMED, _TRAFFIC, LIMIT, CURSOR),
        codes=(Code.INVALID_CURSOR, Code.BUSY),
    ),
    Endpoint(
        name="getSource",
        method="GET",
        path="/sources/{name}",
        role=AccessRole.VIEWER,
        run=names.get_source,
        answer=shapes.Source,
        tag="rules",
        parameters=(named("source", "github"),),
        codes=(Code.NOT_FOUND, Code.BUSY),
    ),
    Endpoint(
        name="listDestinations",
        method="GET",
        path="/destinations",
        role=AccessRole.VIEWER,
        run=names.list_destinations,
        answer=shapes.DestinationPage,
        tag="rules",
        parameters=(_NAMED, _stopped("paused, or held by this process"), _TRAFFIC, LIMIT, CURSOR),
        codes=(Code.INVALID_CURSOR, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="getDestination",
        method="GET",
        path="/destinations/{name}",
        role=AccessRole.VIEWER,
        run=names.get_destination,
        answer=shapes.Destination,
        tag="rules",
        parameters=(named("destination", "ci"),),
        codes=(Code.NOT_FOUND, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="listRoutes",
        method="GET",
        path="/routes",
        role=AccessRole.VIEWER,
        run=names.list_routes,
        answer=shapes.RoutePage,
        tag="rules",
        parameters=(
            _NAMED,
            only("source", "only those from this source"),
            only("destination", "only those to this destination"),
            _stopped("paused"),
            _TRAFFIC,
            LIMIT,
            CURSOR,
        ),
        codes=(Code.INVALID_CURSOR, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="getRoute",
        method="GET",
        path="/routes/{name}",
        role=AccessRole.VIEWER,
        run=names.get_route,
        answer=shapes.Route,
        tag="rules",
        parameters=(named("route", "build-on-push"),),
        codes=(Code.NOT_FOUND, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="getTraffic",
        method="GET",
        path="/traffic",
        role=AccessRole.VIEWER,
        run=traffic.get_traffic,
        answer=traffic.TrafficAnswer,
        tag="traffic",
        parameters=(
            only("source", "only that of this source's events"),
            only("route", "only that by this route"),
            only("destination", "only that to this destination"),
            Parameter(
                name="since",
                place="query",
                kind=TIME,
                about="from then on, as far back as steps of that length are kept; without it, of the last day",
                example="2026-11-30T20:00:00Z",
            ),
            Parameter(
                name="step",
                place="query",
                kind=traffic.StepName,
                about="how long steps are: 5 minutes (kept for 3 hours), an hour (50 hours), or a day of UTC (as long"
                " as events); without it, the shortest that is kept for so long",
                example="1h",
            ),
        ),
        codes=(Code.INDEX_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="getRules",
        method="GET",
        path="/rules",
        role=AccessRole.VIEWER,
        run=names.get_rules,
        answer=shapes.RulesInForce,
        tag="rules",
    ),
    Endpoint(
        name="getIndex",
        method="GET",
        path="/index",
        role=AccessRole.VIEWER,
        run=events.get_index,
        answer=shapes.IndexState,
        tag="events",
        codes=(Code.INDEX_UNAVAILABLE,),
    ),
)
