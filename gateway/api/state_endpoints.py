"""Endpoints about the state of all processes and of the rules' files: a part of the table of `endpoints.py`."""

from typing import Annotated

from gateway.access.principal import AccessRole
from gateway.api import event_tests, findings, quarantine_acts, refused, replay_counts, rule_files, spools, status
from gateway.api.command_shapes import ReplayRequest
from gateway.api.endpoint import Endpoint, Parameter
from gateway.api.json_shapes import NAME, Limits
from gateway.api.parameters import EVENT, named, only
from gateway.api.problems import Code

MOST_LINES = 500
"""Lines of a page of a rule file, at most."""
STATE: tuple[Endpoint, ...] = (
    Endpoint(
        name="listFindings",
        method="GET",
        path="/findings",
        role=AccessRole.VIEWER,
        run=findings.list_findings,
        answer=findings.Findings,
        tag="status",
        codes=(Code.LOG_UNAVAILABLE,),
    ),
    Endpoint(
        name="getStatus",
        method="GET",
        path="/status",
        role=AccessRole.VIEWER,
        run=status.get_status,
        answer=status.Status,
        tag="status",
        parameters=(only("destination", "only what is about this destination, with the last recorded attempts"),),
        codes=(Code.NOT_FOUND, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="countReplay",
        method="POST",
        path="/replays/count",
        role=AccessRole.READER,
        run=replay_counts.count_events,
        answer=replay_counts.CountedReplay,
        tag="commands",
        body=ReplayRequest,
        codes=(Code.NOT_FOUND, Code.CONFLICT, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="getEventRoutes",
        method="GET",
        path="/events/{event}/routes",
        role=AccessRole.READER,
        run=replay_counts.get_event_routes,
        answer=replay_counts.EventRoutes,
        tag="events",
        parameters=(
            EVENT,
            only("route", "only this route, if it takes the event"),
            only("destination", "only to this destination"),
        ),
        codes=(Code.NOT_FOUND, Code.CONFLICT, Code.INDEX_UNAVAILABLE, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
    Endpoint(
        name="listSpools",
        method="GET",
        path="/spools",
        role=AccessRole.VIEWER,
        run=spools.list_spools,
        answer=spools.Spools,
        tag="status",
        codes=(Code.BUSY,),
    ),
    Endpoint(
        name="getRefused",
        method="GET",
        path="/sources/{name}/refused",
        role=AccessRole.VIEWER,
        run=refused.get_refused,
        answer=refused.Refused,
        tag="status",
        parameters=(named("source", "github"),),
        codes=(Code.NOT_FOUND, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="retryRefused",
        method="POST",
        path="/sources/{name}/refused/retry",
        role=AccessRole.OPERATOR,
        run=quarantine_acts.retry_refused,
        answer=quarantine_acts.RetriedRefused,
        tag="commands",
        parameters=(named("source", "github"),),
        body=quarantine_acts.RetryRefused,
        codes=(Code.NOT_FOUND, Code.CONFLICT, Code.KEY_REUSED, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="getEventTest",
        method="GET",
        path="/events/{event}/test",
        role=AccessRole.READER,
        run=event_tests.get_event_test,
        answer=event_tests.EventTest,
        tag="events",
        parameters=(EVENT,),
        codes=(
            Code.NOT_FOUND,
            Code.CONFLICT,
            Code.RULES_UNAVAILABLE,
            Code.INDEX_UNAVAILABLE,
            Code.LOG_UNAVAILABLE,
        ),
    ),
    Endpoint(
        name="getRuleFile",
        method="GET",
        path="/rules/file",
        role=AccessRole.VIEWER,
        run=rule_files.get_rule_file,
        answer=rule_files.RuleFile,
        tag="rules",
        parameters=(
            Parameter(
                name="number",
                place="query",
                kind=Annotated[int, Limits(minimum=0, maximum=100_000)],
                about="which of the files, from 0 on, which is the root",
            ),
            Parameter(
                name="line",
                place="query",
                kind=Annotated[int, Limits(minimum=1, maximum=100_000_000)],
                about="the first line",
                example=1,
            ),
            Parameter(
                name="limit",
                place="query",
                kind=Annotated[int, Limits(minimum=1, maximum=MOST_LINES)],
                about="lines, at most",
                example=20,
            ),
            Parameter(
                name="kind",
                place="query",
                kind=rule_files.Kind,
                about="with `name`, where a source, destination or route is, instead of `number` and `line`",
            ),
            Parameter(name="name", place="query", kind=Annotated[str, NAME], about="its name"),
            Parameter(
                name="traffic", place="query", kind=bool, about="each route's line with its traffic of the last day"
            ),
        ),
        codes=(Code.NOT_FOUND, Code.BUSY),
    ),
)
