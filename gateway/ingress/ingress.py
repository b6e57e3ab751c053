"""The aiohttp application that senders see.

address → limits → check the head → read → verify → admit → handshake? → identify → append

Built on `web.Server` with a dispatch of its own, which costs a third less than an application's router, and without
automatic decompression, since a signature covers the bytes as they came.

What is absent on purpose: the body isn't read if the headers already rule the request out, and isn't parsed before it
is verified; no append is retried; there is no 2xx before the append has returned.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING, Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.ingress.admission import Admission
from gateway.ingress.batches import split
from gateway.ingress.body import TRANSFER_ENCODING, BodyReader, no_room, refuse_codings, too_large
from gateway.ingress.body_memory import BodyMemory
from gateway.ingress.client_address import Networks
from gateway.ingress.endpoint import Endpoint
from gateway.ingress.key_fetcher import Fetch, KeyFetcher
from gateway.ingress.pending_tokens import PendingTokens
from gateway.ingress.responses import (
    Accepted,
    batch_response,
    handshake_response,
    make_response,
    problem_response,
    stored_response,
)
from gateway.ingress.server import Connection, Limits, Server
from gateway.log.base import Log
from gateway.log.records import encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import Event, LogUnavailableError, RecordTooLargeError, RefusedError
from gateway.rules.event_view import EventView
from gateway.rules.rules import Rules, StoredResponse
from gateway.telemetry.log_quota import LogQuota
from gateway.telemetry.metrics import NO_SOURCE, Metrics
from gateway.verify.handshakes import HandshakeResponse
from gateway.verify.remote_keys import KeyNeededError
from gateway.verify.request import Request
from gateway.verify.verifier import Verified

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Span, Traces

# A successor (a retry or dead-letter record) carries more headers than the event, and has to fit as well.
SUCCESSOR_HEADROOM = 64 * 1024
# Connections that may wait to be accepted: a burst of new ones while the event loop is busy for some milliseconds.
BACKLOG = 1024
# Seconds for which a stopping process still serves open connections.
KEEPALIVE_GRACE = 0.5
# Length of the window within which only a limited number of refusals per source and reason are logged.
QUOTA_WINDOW = 10.0


class Ingress:
    """Serves `POST /in/<source>`, and `GET /healthz` for load balancers.

    `rules` returns the active rules; a reload replaces them between two requests. `fetch` is for keys of senders.
    """

    def __init__(
        self,
        *,
        rules: Callable[[], Rules],
        log: Log,
        topics: Topics,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        clock: Callable[[], float] = time.time,
        limits: Limits | None = None,
        traces: "Traces | None" = None,
        fetch: Fetch | None = None,
    ) -> None:
        self._is_draining = False
        self._rules = rules
        self._log = log
        self._topics = topics
        self._metrics = metrics
        self._logger = logger
        self._clock = clock
        self._limits = limits or Limits()
        self._traces = traces
        self._body_limit = log.max_record_bytes - SUCCESSOR_HEADROOM
        self._memory = BodyMemory(self._limits.in_flight_bytes)
        self._keys = KeyFetcher(fetch, memory=self._memory, clock=clock, logger=logger)
        self.tokens = PendingTokens(logger)
        self._quota = LogQuota()
        self._own_quota = LogQuota()
        """For refusals of verified senders, which are our fault: no stranger's lines leave them out."""
        self._quota_timer: asyncio.TimerHandle | None = None
        self._cached_rules: Rules | None = None
        self._admissions: dict[str, Admission] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._web: Server | None = None
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int, *, is_shared: bool = True) -> tuple[str, int]:
        """Listen, and return the bound address (with the actual port for port 0). Raises OSError if it is in use.

        Several processes may share a port (SO_REUSEPORT), and the kernel spreads the connections over them.
        """
        self._web = Server(self.handle, self._limits, logger=self._logger, metrics=self._metrics)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._web, host, port, reuse_port=is_shared, backlog=BACKLOG)
        name = self._listener.sockets[0].getsockname()
        return name[0], name[1]

    async def stop(self, timeout: float) -> None:
        """Stop listening, and give requests in progress `timeout` seconds to finish.

        For a moment, requests on open connections are still served. Each gets `Connection: close`, so its sender
        reconnects; a connection closed in the middle of a request would give the sender no response at all.
        """
        self._is_draining = True
        if self._listener is not None:
            self._listener.close()
        if self._web is not None:
            for _ in range(50):
                if self._web.connections:
                    await asyncio.sleep(min(KEEPALIVE_GRACE, timeout / 2) / 50)
            self._web.pre_shutdown()
            # aiohttp waits that long for the responses, and then once more for the connections.
            await self._web.shutdown(timeout / 2)
        if self._quota_timer is not None:
            self._quota_timer.cancel()
            self._log_suppressed()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Respond to a request, count it, and log it in one line; of many similar refusals, only the first ones."""
        began = perf_counter()
        path, _, query = request.raw_path.partition("?")
        if not path.startswith("/"):  # the absolute form, RFC 9112 §3.2.2
            path, query = request.rel_url.raw_path, request.rel_url.raw_query_string
        endpoint = self._endpoint(path)
        if endpoint is None and path == "/healthz":
            return self._health(request)
        fields: dict[str, Any] = {
            "source": endpoint.name if endpoint else NO_SOURCE,
            "status": 500,
        }  # 500 if we have a bug
        try:
            if endpoint is not None and endpoint.allow_from is not None:  # before anything else of it is looked at
                endpoint.check_address(request, fields)
            handshake = None
            if endpoint is not None and endpoint.handshake_methods:
                handshake = _unverified_handshake(request, endpoint, path, query, fields, now=self._clock())
            if handshake is None:
                response = await self._receive(request, endpoint, path, query, fields, began=began)
            else:
                response = handshake
            fields["status"] = response.status
        except RefusedError as refusal:
            fields["status"], fields["reason"] = refusal.status, refusal.reason
            response = problem_response(refusal, allow=endpoint.allow if endpoint else "POST")
            _leave_body(request)
        except asyncio.CancelledError:
            fields["status"], fields["reason"] = 503, "draining"  # `stop` has given up on it; there is no response
            raise
        finally:
            self._record(endpoint, fields, perf_counter() - began)
        if self._is_draining:
            response.force_close()
        return response

    async def _receive(
        self,
        request: web.BaseRequest,
        endpoint: Endpoint | None,
        path: str,
        query: str,
        fields: dict[str, Any],
        *,
        began: float,
    ) -> web.StreamResponse:
        if endpoint is None:
            raise RefusedError(404, "unknown_source", "no source has this path")
        headers = request.raw_headers
        names = [name.lower() for name, _ in headers]
        head_bytes = self._check_head(request, query, names)
        verifier, stream = endpoint.source.verifier, request.content
        limit = min(endpoint.body_limit, self._body_limit - head_bytes)
        if stream.is_eof() and stream.exception() is None:
            sent = Request("POST", path, query, headers, stream.read_nowait(), names)
            fields["bytes"] = len(sent.body)
            if len(sent.body) > limit:
                raise too_large(limit)
            verified = (
                await self._verify(endpoint, sent)
                if endpoint.fetches_keys
                else verifier.verify(sent, now=self._clock())
            )
        else:
            head = Request("POST", path, query, headers, b"", names)
            sent, verified = await self._read_and_verify(request, endpoint, head, limit, fields)
        fields["is_verified"] = True
        body = sent.body
        self._admit(endpoint, len(body))
        try:
            if self._traces is not None:  # nothing of a request is traced before it is verified
                at = time.time() - (perf_counter() - began)
                fields["span"] = self._traces.receive(
                    source=endpoint.name, path=endpoint.source.shown_path, headers=headers, began=at, size=len(body)
                )
            if verifier.respond_to_handshake is not None and (handshake := verifier.handshake(sent, now=self._clock())):
                return await self._answer(endpoint, handshake, fields)
            store = self._store if endpoint.split is None else self._store_batch
            return await store(endpoint, sent, verified, fields)
        except LogUnavailableError as error:
            raise RefusedError(503, "log_unavailable", "the event can't be stored at the moment") from error
        except RecordTooLargeError as error:
            raise RefusedError(413, "body_too_large", "the event is larger than the log allows") from error
        finally:
            self._memory.release(endpoint.share, len(body))
            if endpoint.admission is not None:
                endpoint.admission.leave()

    def _admit(self, endpoint: Endpoint, size: int) -> None:
        """Give a verified request its place and its memory. Raises RefusedError, having given neither."""
        now = perf_counter()
        if endpoint.admission is not None:
            endpoint.admission.enter(now)
        if not self._memory.reserve(endpoint.share, size, now=now):
            if endpoint.admission is not None:
                endpoint.admission.leave()
            raise no_room(self._memory)

    async def _store(
        self, endpoint: Endpoint, sent: Request, verified: Verified, fields: dict[str, Any]
    ) -> web.StreamResponse:
        event = endpoint.event(sent, received_at=self._log.now(), identity_expression=verified.identity)
        fields["event_id"], fields["type"] = event.id, event.type
        if self._traces is None:  # as `_append` does, without the cost of another coroutine for each event
            began = perf_counter()
            await self._log.append(endpoint.topic, key=event_key(event), value=event.body, headers=encode_event(event))
            self._metrics.append_duration.observe(perf_counter() - began)
            endpoint.count(event.received_at, verified.secret)
        else:
            await self._append(endpoint, event, verified.secret, fields)
        return Accepted(event.id) if endpoint.response is None else _respond(endpoint.response, event, fields)

    async def _store_batch(
        self,
        endpoint: Endpoint,
        sent: Request,
        verified: Verified,
        fields: dict[str, Any],
    ) -> web.StreamResponse:
        """Store each event of a request. If one can't be stored, all are sent again, and have their ids again."""
        bodies = split(sent.body, endpoint.split or ())
        if bodies is None:
            return await self._store(endpoint, sent, verified, fields)
        head_bytes = sum([len(name) + len(value) for name, value in sent.headers])
        memory = len(sent.body) + len(bodies) * head_bytes  # each event has the headers
        if not self._memory.reserve(endpoint.share, memory, now=perf_counter()):
            raise no_room(self._memory)
        try:
            events = endpoint.events_of(
                sent, bodies, received_at=self._log.now(), identity_expression=verified.identity
            )
            fields["events"] = len(events)
            appends = [
                asyncio.ensure_future(self._append(endpoint, event, verified.secret, fields)) for event in events
            ]
            await asyncio.wait(appends)
            for append in appends:
                append.result()
        finally:
            self._memory.release(endpoint.share, memory)
        return batch_response(endpoint.status, [event.id for event in events])

    async def _append(self, endpoint: Endpoint, event: Event, secret: int | None, fields: dict[str, Any]) -> None:
        if self._traces is None:
            began = perf_counter()
            await self._log.append(endpoint.topic, key=event_key(event), value=event.body, headers=encode_event(event))
            self._metrics.append_duration.observe(perf_counter() - began)
        else:
            await self._append_traced(self._traces, replace(event, trace=fields["span"].context), endpoint.topic)
        endpoint.count(event.received_at, secret)

    async def _answer(self, endpoint: Endpoint, handshake: HandshakeResponse, fields: dict[str, Any]) -> web.Response:
        fields["handshake"] = True
        if handshake.token:
            self.tokens.show(endpoint.name, handshake.token)
        if handshake.visit:
            await self._keys.visit(endpoint.name, handshake.visit)
        return handshake_response(handshake)

    def _check_head(self, request: web.BaseRequest, query: str, names: Sequence[bytes]) -> int:
        """Check method, size and transfer coding of the request head; return its size in bytes. Raises RefusedError."""
        if request.method != "POST":
            raise RefusedError(405, "method_not_allowed", f"expected POST, got {request.method[:20]}")
        head_bytes = len(query) + sum([len(name) + len(value) for name, value in request.raw_headers])
        if head_bytes > self._limits.head_bytes:
            limit = self._limits.head_bytes
            raise RefusedError(431, "head_too_large", f"expected at most {limit} bytes of headers and query")
        if TRANSFER_ENCODING in names:
            headers = zip(names, request.raw_headers, strict=True)
            refuse_codings([value for name, (_, value) in headers if name == TRANSFER_ENCODING])
        return head_bytes

    async def _read_and_verify(
        self, request: web.BaseRequest, endpoint: Endpoint, head: Request, limit: int, fields: dict[str, Any]
    ) -> tuple[Request, Verified]:
        """Check the head, then read and verify the body; return the request, and by what it is verified."""
        pending = endpoint.source.verifier.check_head(head, now=self._clock())
        if endpoint.admission is not None and (refusal := endpoint.admission.refusal(perf_counter())) is not None:
            raise refusal
        reader = BodyReader(request, self._memory, endpoint.share, limit)
        try:
            sent = head._replace(body=await reader.read(self._limits.body_seconds))
            fields["bytes"] = len(sent.body)
            with suppress(KeyNeededError):
                return sent, pending.verify(sent, endpoint.keys)
        finally:
            self._memory.close(reader)
        return sent, await self._verify(endpoint, sent)

    async def _verify(self, endpoint: Endpoint, sent: Request) -> Verified:
        """Verify a request, with the key that it names if it does; return by what."""

        def verify() -> Verified:
            return endpoint.source.verifier.verify(sent, now=self._clock(), keys=endpoint.keys)

        try:
            return verify()
        except KeyNeededError:
            return await self._keys.verify(endpoint.name, endpoint.share, len(sent.body), verify)

    async def _append_traced(self, traces: "Traces", event: Event, topic: str) -> None:
        began = perf_counter()
        with traces.send(event, topic) as span:
            event = replace(event, trace=span.context)
            headers = encode_event(event)
            position = await self._log.append(topic, key=event_key(event), value=event.body, headers=headers)
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

    def _endpoint(self, path: str) -> Endpoint | None:
        rules = self._rules()
        if rules is not self._cached_rules:
            self._use(rules)
        # A path may be a secret. A dict finds it by a hash of the whole, of a key that only this process knows
        # (SipHash, https://peps.python.org/pep-0456/), and compares texts only if all 64 bits of their hashes are the
        # same. So the time doesn't depend on how much of a wrong path is right.
        return self._endpoints.get(path)

    def _use(self, rules: Rules) -> None:
        now = perf_counter()
        self._admissions = {
            name: self._admissions.get(name) or Admission()
            for name, source in rules.sources.items()
            if source.limits.rate is not None or source.limits.concurrent is not None
        }
        for name, admission in self._admissions.items():
            limits = rules.sources[name].limits
            admission.set_limits(rate=limits.rate, concurrent=limits.concurrent, now=now)
        trusted = Networks(rules.trusted_proxies)
        self._endpoints = {
            source.path: Endpoint(
                source,
                self._topics,
                self._metrics,
                share=self._memory.share(source.name),
                keys=self._keys.cache(source.name),
                admission=self._admissions.get(source.name),
                trusted_proxies=trusted,
            )
            for source in rules.sources.values()
        }
        self._keys.retain(rules.sources)
        self.tokens.retain(rules.sources)
        self._cached_rules = rules

    def _health(self, request: web.BaseRequest) -> web.Response:
        # Not logged: a load balancer sends one every few seconds.
        if request.method not in {"GET", "HEAD"}:
            refusal = RefusedError(405, "method_not_allowed", f"expected GET, got {request.method[:20]}")
            response = problem_response(refusal, allow="GET, HEAD")
        elif self._is_draining:
            response = problem_response(RefusedError(503, "draining", "this process is about to stop"))
            response.force_close()
        else:
            response = make_response(200, "text/plain", b"ok\n")
        self._metrics.requests.labels(NO_SOURCE, str(response.status)).inc()
        return response

    def _record(self, endpoint: Endpoint | None, fields: dict[str, Any], seconds: float) -> None:
        source = fields["source"]
        trace_id = None if self._traces is None else _end_span(fields)
        if endpoint is not None and fields["status"] == endpoint.status and "handshake" not in fields:
            endpoint.accepted.inc()
            if trace_id is None:
                endpoint.seconds.observe(seconds)
            else:
                endpoint.seconds.observe_traced(seconds, trace_id)
        else:
            self._metrics.requests.labels(source, str(fields["status"])).inc()
            self._metrics.request_duration.labels(source).observe(seconds)
            if "reason" in fields:
                self._metrics.rejected.labels(source, fields["reason"]).inc()
                if endpoint is not None:
                    taken = self._metrics.events.labels(source).value
                    self._metrics.refusal_runs.add(source, fields["reason"], at=self._log.now(), events=taken)
        fields["seconds"] = round(seconds, 6)
        # A bug has no reason, and always has its line.
        is_server_error = fields.pop("is_verified", False) and fields["status"] >= _SERVER_ERROR
        quota = self._own_quota if is_server_error else self._quota
        if "reason" in fields and not self._take_quota(quota, source, fields["reason"]):
            return
        self._logger.info("request_finished", **fields)

    def _take_quota(self, quota: LogQuota, source: str, reason: str) -> bool:
        if self._quota_timer is None:
            self._quota_timer = asyncio.get_running_loop().call_later(QUOTA_WINDOW, self._log_suppressed)
        return quota.take(source, reason)

    def _log_suppressed(self) -> None:
        self._quota_timer = None
        for source, reason, count in (*self._own_quota.next_window(), *self._quota.next_window()):
            self._logger.info("refusals_left_out", source=source, reason=reason, count=count)


def _end_span(fields: dict[str, Any]) -> str | None:
    """End the span of a request, if it has one, and add its trace's id to the log fields; return the id."""
    span: Span | None = fields.pop("span", None)
    if span is None:
        return None
    span.set_attributes({name: fields[key] for name, key in _SPAN_ATTRIBUTES if key in fields})
    span.end_request(fields["status"], fields.get("reason"))
    trace_id = span.context.recorded_id
    if trace_id is not None:
        fields["trace_id"] = trace_id
    return trace_id


_SERVER_ERROR = int(HTTPStatus.INTERNAL_SERVER_ERROR)


_SPAN_ATTRIBUTES = (
    ("gateway.event.id", "event_id"),
    ("gateway.event.type", "type"),
    ("gateway.handshake", "handshake"),
)


def _respond(response: StoredResponse, event: Event, fields: dict[str, Any]) -> web.Response:
    made, problem = stored_response(response, event, EventView.of(event))
    if problem:
        fields["response_error"] = problem
    return made


def _unverified_handshake(
    request: web.BaseRequest, endpoint: Endpoint, path: str, query: str, fields: dict[str, Any], *, now: float
) -> web.Response | None:
    """Return the response to a handshake that its head alone decides; None for every other request."""
    if request.method not in endpoint.handshake_methods:
        return None
    head = Request(request.method, path, query, request.raw_headers, b"")
    handshake = endpoint.source.verifier.unverified_handshake(head, now=now)
    if handshake is None:
        return None
    fields["handshake"] = True
    _leave_body(request)
    return handshake_response(handshake)


def _leave_body(request: web.BaseRequest) -> None:
    """Tell the connection that nobody will read what is left of a body."""
    if isinstance(request.protocol, Connection):
        request.protocol.unread = request.content
