"""An event for a file, as `gateway events export` writes it: without what proves who sent it."""

from dataclasses import dataclass

from gateway.access.principal import Principal
from gateway.api import shapes
from gateway.api.backend import Backend, must_be_available
from gateway.api.events import find_event
from gateway.api.json_shapes import Time
from gateway.api.problems import ApiError, Code
from gateway.api.shares import whose_turn
from gateway.ops.event_export import TOO_SHORT, withhold
from gateway.ops.output import body_fields, header_text, rfc3339


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedEvent:
    """An event without signatures and credentials, and without what its source hides, to be kept in a file.

    `withheld` names where something was left out or masked. A body that isn't UTF-8 is in base64.
    """

    at: Time
    id: str
    source: str
    type: str
    key: str | None
    size: int
    topic: str
    partition: int
    offset: int
    query: str
    headers: tuple[shapes.Header, ...]
    body: str | None
    body_base64: str | None
    withheld: tuple[str, ...]


async def export_event(backend: Backend, principal: Principal, *, event: str) -> ExportedEvent:
    """Return an event as a file may have it, without what proves who sent it."""
    rules = backend.rules()
    async with must_be_available():
        found = await find_event(backend, principal, event)
        content = await backend.open_index().content(found)
        safe = None if content is None else await backend.aside(whose_turn(principal), lambda: withhold(rules, content))
    if content is None or found.partition is None:
        raise ApiError(Code.NOT_FOUND, f"expected the record of {found.id} in the log, got none: it was deleted by age")
    if safe is None:
        raise ApiError(Code.CONFLICT, f"{found.id}: expected an event that can be exported, got one that {TOO_SHORT}")
    its, body = safe.event, body_fields(safe.event.body)
    return ExportedEvent(
        at=rfc3339(its.received_at),
        id=its.id,
        source=its.source,
        type=its.type,
        key=its.key,
        size=len(its.body),
        topic=found.partition.topic,
        partition=found.partition.number,
        offset=found.offset,
        query=its.query,
        headers=tuple([shapes.Header(name=header_text(name), value=header_text(value)) for name, value in its.headers]),
        body=body.get("body"),
        body_base64=body.get("body_base64"),
        withheld=safe.names,
    )
