"""Stores the events of verified requests, and makes the responses to their senders: none before the log has them."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from gateway.ingress.body import no_room
from gateway.ingress.body_memory import BodyMemory
from gateway.ingress.destination_responses import DestinationResponses
from gateway.ingress.request_state import RequestState
from gateway.ingress.responses import Accepted, batch_response, marked, passed_on_response, stored_response
from gateway.ingress.server import Connection
from gateway.ingress.source_endpoint import SourceEndpoint
from gateway.log.base import Log, Position, RecordHeaders
from gateway.log.records import encode_event, event_key
from gateway.model import Event, RecordTooLargeError, identity_of
from gateway.rules.event_view import EventView
from gateway.rules.rules import StoredResponse
from gateway.telemetry.metrics import Metrics
from gateway.verify.request import Request
from gateway.verify.verifier import Verified

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces


_DEFAULT_RESPONSE = StoredResponse()


class Append(Protocol):
    """How events are stored."""

    async def __call__(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> Position | None:
        """Store an event, durably: in the log or, then it returns None, in this process's spool.

        Raises LogUnavailableError, RecordTooLargeError.
        """


class EventWriter:
    """Appends events to the log, once for each of them; no append is retried. Its callers hold the body's memory.

    What it learns of a request goes into its `RequestState`. `size_limit` is the bytes that an event may have
    with its headers. `append` is the log's own, unless there is a spool.
    """

    def __init__(
        self,
        *,
        log: Log,
        append: Append,
        metrics: Metrics,
        memory: BodyMemory,
        traces: "Traces | None",
        responses: DestinationResponses | None,
        size_limit: int,
    ) -> None:
        self._now = log.now
        self._append_record = append
        self._size_limit = size_limit
        self._metrics = metrics
        self._memory = memory
        self._traces = traces
        self._responses = responses

    async def store(
        self, endpoint: SourceEndpoint, received: Request, verified: Verified, state: RequestState
    ) -> web.StreamResponse:
        """Store the event of a request; return the response to its sender.

        Raises RefusedError, LogUnavailableError, RecordTooLargeError.
        """
        event = endpoint.event(received, received_at=self._now(), identity_expression=verified.identity)
        redaction = endpoint.source.redaction
        state.fields["event_id"] = event.id
        state.fields["type"] = event.type if redaction is None else redaction.quick_type(event)
        if endpoint.after_delivery is not None and self._responses is not None:
            state.waits = True
            state.waiting = self._responses.expect(event, endpoint.after_delivery)
        if self._traces is None:  # as `_append` does, without the cost of another coroutine for each event
            began = perf_counter()
            headers = encode_event(event)
            position = await self._append_record(
                endpoint.topic, key=event_key(event), value=event.body, headers=headers
            )
            if position is None:
                self._note_spooled(state)
            else:
                self._metrics.append_duration.observe(perf_counter() - began)
            endpoint.count(event.received_at, verified.secret)
        else:
            await self._append(endpoint, event, event_key(event), verified.secret, state)
        if endpoint.response is None:
            return Accepted(event.id, is_spooled=state.is_spooled)
        return marked(_respond(endpoint.response, event, state.fields), is_spooled=state.is_spooled)

    async def store_batch(
        self,
        endpoint: SourceEndpoint,
        received: Request,
        verified: Verified,
        state: RequestState,
    ) -> web.StreamResponse:
        """Store each event of a request. If one can't be stored, all are sent again.

        Then those with an identity have their ids again, and the others, which share a record key, have new ones.
        Raises as `store` does. None is stored if one is too large: it would be so each time, and the others would come
        again and again.
        """
        bodies = endpoint.source.split_body(received)
        if bodies is None:
            return await self.store(endpoint, received, verified, state)
        head_bytes = sum([len(name) + len(value) for name, value in received.headers])
        if max(map(len, bodies), default=0) + head_bytes > self._size_limit:
            raise RecordTooLargeError
        # Each event has the headers. What was decompressed of the request is gone but for their bodies.
        memory = sum([len(body) for body in bodies]) + len(bodies) * head_bytes
        if not self._memory.reserve(endpoint.share, memory, now=perf_counter()):
            raise no_room(self._memory)
        try:
            events = endpoint.events_of(
                received, bodies, received_at=self._now(), identity_expression=verified.identity
            )
            state.fields["events"] = len(events)
            keys = _record_keys(events)
            appends = [
                self._append(endpoint, event, key, verified.secret, state)
                for event, key in zip(events, keys, strict=True)
            ]
            for failure in await asyncio.gather(*appends, return_exceptions=True):  # none is left in flight
                if failure is not None:
                    raise failure
        finally:
            self._memory.release(endpoint.share, memory)
        response = batch_response(endpoint.response or _DEFAULT_RESPONSE, [event.id for event in events])
        return marked(response, is_spooled=state.is_spooled)

    async def destination_response(
        self, default: web.StreamResponse, state: RequestState, request: web.BaseRequest, *, began: float
    ) -> web.StreamResponse:
        """Return what the destination responds to an event that is stored, or else the default response."""
        found, outcome, fields = None, "overloaded", state.fields
        if state.waiting is not None:
            with _told_if_lost(request, state.waiting.leave):
                found, outcome = await state.waiting.response(began)
        fields["destination_response"] = outcome
        self._metrics.destination_responses.labels(fields["source"], outcome).inc()
        if found is None:
            return default
        fields.pop("response_error", None)  # of the default response, which nobody gets
        return passed_on_response(found, fields["event_id"])

    async def _append(
        self, endpoint: SourceEndpoint, event: Event, key: bytes, secret: int | None, state: RequestState
    ) -> None:
        if self._traces is None or state.span is None:
            began = perf_counter()
            headers = encode_event(event)
            position = await self._append_record(endpoint.topic, key=key, value=event.body, headers=headers)
            if position is not None:
                self._metrics.append_duration.observe(perf_counter() - began)
        else:
            traced = replace(event, trace=state.span.context)
            position = await self._append_traced(self._traces, traced, key, endpoint.topic)
        if position is None:
            self._note_spooled(state)
        endpoint.count(event.received_at, secret)

    def _note_spooled(self, state: RequestState) -> None:
        """Note that an event is in the spool: its sender doesn't wait for a destination."""
        fields = state.fields
        state.is_spooled, fields["durability"] = True, "spooled"
        if state.waits:
            state.waits, fields["destination_response"] = False, "spooled"
            self._metrics.destination_responses.labels(fields["source"], "spooled").inc()

    async def _append_traced(self, traces: "Traces", event: Event, key: bytes, topic: str) -> Position | None:
        began = perf_counter()
        with traces.send(event, topic) as span:
            event = replace(event, trace=span.context)
            headers = encode_event(event)
            position = await self._append_record(topic, key=key, value=event.body, headers=headers)
            if position is None:
                span.set_attributes({"gateway.durability": "spooled"})
                return None
            span.set_attributes(
                {
                    "messaging.destination.partition.id": str(position.partition),
                    "messaging.kafka.offset": position.offset,
                }
            )
        seconds, trace_id = perf_counter() - began, span.context.recorded_id
        if trace_id is None:
            self._metrics.append_duration.observe(seconds)
        else:
            self._metrics.append_duration.observe_traced(seconds, trace_id)
        return position


def _record_keys(events: Sequence[Event]) -> Sequence[bytes]:
    """Return the record keys of the events of a request; those with neither an identity nor an order key share one.

    They get other ids when the request is sent again. So they shouldn't be stored if others of it aren't: in several
    partitions, some would be whenever one of these takes no appends.
    """
    shared = b""
    keys = []
    for event in events:
        key = event_key(event)
        if not event.key and identity_of(event.id) is None:
            key = shared = shared or key
        keys.append(key)
    return keys


def _respond(response: StoredResponse, event: Event, fields: dict[str, Any]) -> web.Response:
    made, problem = stored_response(response, event, EventView.of(event))
    if problem:
        fields["response_error"] = problem
    return made


@contextmanager
def _told_if_lost(request: web.BaseRequest, tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` once if the request's connection is lost within the context, or was before."""
    connection = request.protocol
    if request.transport is None:
        tell()
    elif isinstance(connection, Connection):
        connection.on_lost = tell
    try:
        yield
    finally:
        if isinstance(connection, Connection):
            connection.on_lost = None
