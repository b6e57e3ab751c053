"""The endpoints for commands and what comes of them, and for who has given which."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from gateway.access.principal import AccessRole
from gateway.api import acts, audit, command_shapes, command_states, redeliveries
from gateway.api.endpoint import BODY_BYTES, Endpoint, Parameter
from gateway.api.json_shapes import Limits
from gateway.api.parameters import CURSOR, EVENT, LIMIT, TIME, named
from gateway.api.problems import Code

_COMMAND = Parameter(
    name="command",
    place="path",
    kind=Annotated[str, Limits(longest=255)],
    about="`id` of a command, percent-encoded",
    example="pause/destination/ci",
)
_REPLAY = Parameter(
    name="replay",
    place="path",
    kind=Annotated[str, Limits(longest=255)],
    about="the replay's id",
    example="19ab4c2f1d0-1f2e3d4c",
)
_REDELIVERY = Parameter(
    name="redelivery",
    place="path",
    kind=Annotated[str, Limits(longest=255)],
    about="the redelivery's id",
    example="19ab4c2f1d0-1f2e3d4c",
)
_OF_ACTS = (Code.NOT_FOUND, Code.CONFLICT, Code.KEY_REUSED, Code.LOG_UNAVAILABLE, Code.BUSY)


def _act(
    name: str,
    path: str,
    run: Callable[..., Awaitable[Any]],
    body: Any,  # noqa: ANN401 - a shape
    *parameters: Parameter,
    codes: tuple[Code, ...] = (),
    body_bytes: int = BODY_BYTES,
) -> Endpoint:
    """Return an endpoint that acts."""
    return Endpoint(
        name=name,
        method="POST",
        path=path,
        role=AccessRole.OPERATOR,
        run=run,
        answer=command_shapes.Command,
        tag="commands",
        parameters=parameters,
        body=body,
        body_bytes=body_bytes,
        status=202,
        codes=(*_OF_ACTS, *codes),
    )


ACTS = (
    _act("pauseRoute", "/routes/{name}/pause", acts.pause_route, command_shapes.Act, named("route", "build-on-push")),
    _act(
        "resumeRoute", "/routes/{name}/resume", acts.resume_route, command_shapes.Act, named("route", "build-on-push")
    ),
    _act("kickRoute", "/routes/{name}/kick", acts.kick_route, command_shapes.Act, named("route", "build-on-push")),
    _act(
        "pauseDestination",
        "/destinations/{name}/pause",
        acts.pause_destination,
        command_shapes.Act,
        named("destination", "ci"),
    ),
    _act(
        "resumeDestination",
        "/destinations/{name}/resume",
        acts.resume_destination,
        command_shapes.Act,
        named("destination", "ci"),
    ),
    _act(
        "kickDestination",
        "/destinations/{name}/kick",
        acts.kick_destination,
        command_shapes.Act,
        named("destination", "ci"),
    ),
    _act(
        "replayDeadLetters",
        "/dead-letters/replay",
        acts.replay_dead_letters,
        command_shapes.DeadSelection,
        body_bytes=command_shapes.SELECTION_BYTES,
    ),
    _act(
        "dropDeadLetters",
        "/dead-letters/drop",
        acts.drop_dead_letters,
        command_shapes.DeadSelection,
        body_bytes=command_shapes.SELECTION_BYTES,
    ),
    _act("startReplay", "/replays", acts.start_replay, command_shapes.ReplayRequest, codes=(Code.NOTHING_TO_DO,)),
    _act("cancelReplay", "/replays/{replay}/cancel", acts.cancel_replay, command_shapes.Act, _REPLAY),
    _act(
        "cancelRedelivery",
        "/redeliveries/{redelivery}/cancel",
        redeliveries.cancel_redelivery,
        command_shapes.Act,
        _REDELIVERY,
    ),
    _act(
        "redeliverEvent",
        "/events/{event}/redeliver",
        acts.redeliver_event,
        command_shapes.RedeliveryRequest,
        EVENT,
        codes=(Code.INDEX_UNAVAILABLE,),
    ),
)
"""What operators command. Each is stored in the log, and takes an idempotency key."""
COMMANDS = (
    Endpoint(
        name="getCommand",
        method="GET",
        path="/commands/{command}",
        role=AccessRole.VIEWER,
        run=command_states.get_command,
        answer=command_shapes.CommandState,
        tag="commands",
        parameters=(_COMMAND,),
        codes=(Code.NOT_FOUND, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="listReplays",
        method="GET",
        path="/replays",
        role=AccessRole.VIEWER,
        run=command_states.list_replays,
        answer=command_shapes.ReplayPage,
        tag="commands",
        parameters=(LIMIT, CURSOR),
        codes=(Code.INVALID_CURSOR, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="getReplay",
        method="GET",
        path="/replays/{replay}",
        role=AccessRole.VIEWER,
        run=command_states.get_replay,
        answer=command_shapes.Replay,
        tag="commands",
        parameters=(_REPLAY,),
        codes=(Code.NOT_FOUND, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="listRedeliveries",
        method="GET",
        path="/redeliveries",
        role=AccessRole.VIEWER,
        run=redeliveries.list_redeliveries,
        answer=command_shapes.RedeliveryPage,
        tag="commands",
        parameters=(LIMIT, CURSOR),
        codes=(Code.INVALID_CURSOR, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="getRedelivery",
        method="GET",
        path="/redeliveries/{redelivery}",
        role=AccessRole.VIEWER,
        run=redeliveries.get_redelivery,
        answer=command_shapes.Redelivery,
        tag="commands",
        parameters=(_REDELIVERY,),
        codes=(Code.NOT_FOUND, Code.LOG_UNAVAILABLE),
    ),
    Endpoint(
        name="listAudit",
        method="GET",
        path="/audit",
        role=AccessRole.OPERATOR,
        run=audit.list_audit,
        answer=audit.AuditPage,
        tag="commands",
        parameters=(
            Parameter(
                name="who",
                place="query",
                kind=Annotated[str, Limits(longest=255)],
                about="only what this user did, such as ada@laptop, or ada on any host",
                example="ada",
            ),
            Parameter(name="since", place="query", kind=TIME, about="only what began then or later"),
            LIMIT,
            CURSOR,
        ),
        codes=(Code.INVALID_CURSOR, Code.LOG_UNAVAILABLE, Code.BUSY),
    ),
)
"""What has come of commands, and who has given which."""
