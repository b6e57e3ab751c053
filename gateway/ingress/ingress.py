"""The aiohttp application that senders see: limit → look at the head → read → verify → handshake? → identify → append.

Built on `web.Server` with a dispatch of its own, which costs a third less than an application's router, and without
automatic decompression, since a signature covers the bytes as they came.

What is absent on purpose: nothing here reads a body whose head can't be let in with any, looks at one before its
signature has been verified, retries an append, or answers 2xx before the append has returned.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING, Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.ingress.body import BodyReader, overloaded, too_large
from gateway.ingress.body_memory import BodyMemory, Share
from gateway.ingress.responses import Accepted, answer, problem_response
from gateway.ingress.server import Connection, Limits, Server
from gateway.log.base import Log
from gateway.log.records import encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import Event, LogUnavailableError, RecordTooLargeError, RefusedError
from gateway.rules.event_builder import EventBuilder
from gateway.rules.rules import Rules, Source
from gateway.telemetry.log_quota import LogQuota
from gateway.telemetry.metrics import NO_SOURCE, Metrics
from gateway.verify.request import Request

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Span, Traces

# A successor (a retry or dead record) carries more headers than the event, and has to fit as well.
SUCCESSOR_ROOM = 64 * 1024
# Sockets that wait to be accepted: a burst of new connections, while the loop is busy for some milliseconds.
BACKLOG = 1024
# Seconds for which a process that ends still answers what comes on open connections.
KEEPALIVE_GRACE = 0.5
# Seconds of a window in which only so many refusals of one kind are told each in a line (`telemetry/log_quota.py`).
QUOTA_WINDOW = 10.0


class Ingress:
    """Serves `POST /in/<source>`, and `GET /healthz` for load balancers.

    `rules` returns the rules in force; a reload swaps them between two requests.
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
        self._body_limit = log.max_record_bytes - SUCCESSOR_ROOM
        self._memory = BodyMemory(self._limits.in_flight_bytes)
        self._quota = LogQuota()
        self._quota_ends: asyncio.TimerHandle | None = None
        self._known: Rules | None = None
        self._endpoints: dict[str, _Endpoint] = {}
        self._web: Server | None = None
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int, *, is_shared: bool = True) -> tuple[str, int]:
        """Listen, and return the address, which tells the port where 0 was asked for. Raises OSError for one in use.

        Several processes may share a port (SO_REUSEPORT), and the kernel spreads the connections over them.
        """
        self._web = Server(self.handle, self._limits, logger=self._logger, metrics=self._metrics)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._web, host, port, reuse_port=is_shared, backlog=BACKLOG)
        name = self._listener.sockets[0].getsockname()
        return name[0], name[1]

    async def stop(self, timeout: float) -> None:
        """Stop listening, and give requests under way `timeout` seconds to be answered.

        For a moment what comes on open connections is still answered, and each is closed with that: a sender learns
        from the answer to connect anew, and from a connection that is closed under its request nothing.
        """
        self._is_draining = True
        if self._listener is not None:
            self._listener.close()
        if self._web is not None:
            for _ in range(50):
                if self._web.connections:
                    await asyncio.sleep(min(KEEPALIVE_GRACE, timeout / 2) / 50)
            self._web.pre_shutdown()
            # aiohttp waits that long for the answer, and then once more for the connection.
            await self._web.shutdown(timeout / 2)
        if self._quota_ends is not None:
            self._quota_ends.cancel()
            self._tell_left_out()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, count it, and log it in one line; of many refusals that are alike, only the first."""
        began = perf_counter()
        path, _, query = request.raw_path.partition("?")
        if not path.startswith("/"):  # the absolute form, RFC 9112 §3.2.2
            path, query = request.rel_url.raw_path, request.rel_url.raw_query_string
        endpoint = self._endpoint(path)
        if endpoint is None and path == "/healthz":
            return self._health(request)
        line: dict[str, Any] = {
            "source": endpoint.name if endpoint else NO_SOURCE,
            "status": 500,
        }  # 500 if we have a bug
        try:
            response = await self._receive(request, endpoint, path, query, line, began=began)
            line["status"] = response.status
        except RefusedError as refusal:
            line["status"], line["reason"] = refusal.status, refusal.reason
            response = problem_response(refusal)
            if isinstance(request.protocol, Connection):
                request.protocol.unread = request.content
        except asyncio.CancelledError:
            line["status"], line["reason"] = 503, "draining"  # `stop` has given up on it; there is no answer
            raise
        finally:
            self._finished(endpoint, line, perf_counter() - began)
        if self._is_draining:
            response.force_close()
        return response

    async def _receive(
        self,
        request: web.BaseRequest,
        endpoint: "_Endpoint | None",
        path: str,
        query: str,
        line: dict[str, Any],
        *,
        began: float,
    ) -> web.StreamResponse:
        if endpoint is None:
            raise RefusedError(404, "unknown_source", "no source has this path")
        headers = request.raw_headers
        names = [name.lower() for name, _ in headers]
        head_bytes = self._take_head(request, query, names)
        verifier, stream, limit = endpoint.source.verifier, request.content, self._body_limit - head_bytes
        if stream.is_eof() and stream.exception() is None:
            sent = Request("POST", path, query, headers, stream.read_nowait(), names)
            line["bytes"] = len(sent.body)
            if len(sent.body) > limit:
                raise too_large(limit)
            identity_at = verifier.verify(sent, now=self._clock())
        else:
            head = Request("POST", path, query, headers, b"", names)
            sent, identity_at = await self._read_and_verify(request, endpoint, head, limit, line)
        line["is_verified"] = True
        body = sent.body
        if not self._memory.reserve(endpoint.share, len(body), now=perf_counter()):
            raise overloaded()
        try:
            if self._traces is not None:  # nothing of a request is traced before it is verified
                at = time.time() - (perf_counter() - began)
                line["span"] = self._traces.receive(
                    source=endpoint.name, path=endpoint.source.path, headers=headers, began=at, size=len(body)
                )
            if (handshake := verifier.handshake(sent)) is not None:
                line["handshake"] = True
                return answer(handshake.status, handshake.content_type, handshake.body)
            event = endpoint.event(sent, received_at=self._log.now(), identity_at=identity_at)
            line["event_id"], line["type"] = event.id, event.type
            if self._traces is None:
                began = perf_counter()
                await self._log.append(endpoint.topic, key=event_key(event), value=body, headers=encode_event(event))
                self._metrics.append_duration.observe(perf_counter() - began)
            else:
                await self._append_traced(self._traces, replace(event, trace=line["span"].context), endpoint.topic)
            endpoint.events.inc()
            endpoint.last.set(event.received_at)
        except LogUnavailableError as error:
            raise RefusedError(503, "log_unavailable", "the event can't be stored at the moment") from error
        except RecordTooLargeError as error:
            raise RefusedError(413, "body_too_large", "the event is larger than the log takes") from error
        finally:
            self._memory.release(endpoint.share, len(body))
        return Accepted(event.id)

    def _take_head(self, request: web.BaseRequest, query: str, names: Sequence[bytes]) -> int:
        """Return the bytes of a head that may be one of an event. Raises RefusedError."""
        if request.method != "POST":
            raise RefusedError(405, "method_not_allowed", f"expected POST, got {request.method[:20]}")
        head_bytes = len(query) + sum([len(name) + len(value) for name, value in request.raw_headers])
        if head_bytes > self._limits.head_bytes:
            limit = self._limits.head_bytes
            raise RefusedError(431, "head_too_large", f"expected at most {limit} bytes of headers and query")
        if TRANSFER_ENCODING in names:
            headers = zip(names, request.raw_headers, strict=True)
            _refuse_codings([value for name, (_, value) in headers if name == TRANSFER_ENCODING])
        return head_bytes

    async def _read_and_verify(
        self, request: web.BaseRequest, endpoint: "_Endpoint", head: Request, limit: int, line: dict[str, Any]
    ) -> tuple[Request, str | None]:
        """Read the rest of a request, if its head may be one of an event; return it, and where its identity is."""
        claim = endpoint.source.verifier.check_head(head, now=self._clock())
        reader = BodyReader(request, self._memory, endpoint.share, limit)
        try:
            sent = head._replace(body=await reader.read(self._limits.body_seconds))
            line["bytes"] = len(sent.body)
            return sent, claim.prove(sent)
        finally:
            self._memory.close(reader)

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

    def _endpoint(self, path: str) -> "_Endpoint | None":
        rules = self._rules()
        if rules is not self._known:
            sources = rules.sources.values()
            self._endpoints = {
                source.path: _Endpoint(source, self._topics, self._metrics, self._memory.share(source.name))
                for source in sources
            }
            self._known = rules
        return self._endpoints.get(path)

    def _health(self, request: web.BaseRequest) -> web.Response:
        # Not logged: a load balancer asks every few seconds.
        if request.method not in {"GET", "HEAD"}:
            refusal = RefusedError(405, "method_not_allowed", f"expected GET, got {request.method[:20]}")
            response = problem_response(refusal, allow="GET, HEAD")
        elif self._is_draining:
            response = problem_response(RefusedError(503, "draining", "this process is about to stop"))
            response.force_close()
        else:
            response = answer(200, "text/plain", b"ok\n")
        self._metrics.requests.labels(NO_SOURCE, str(response.status)).inc()
        return response

    def _finished(self, endpoint: "_Endpoint | None", line: dict[str, Any], seconds: float) -> None:
        source = line["source"]
        trace_id = None if self._traces is None else _ended(line)
        if endpoint is not None and line["status"] == _STORED:
            endpoint.accepted.inc()
            if trace_id is None:
                endpoint.seconds.observe(seconds)
            else:
                endpoint.seconds.observe_traced(seconds, trace_id)
        else:
            self._metrics.requests.labels(source, str(line["status"])).inc()
            self._metrics.request_duration.labels(source).observe(seconds)
            if "reason" in line:
                self._metrics.rejected.labels(source, line["reason"]).inc()
                if endpoint is not None:
                    taken = self._metrics.events.labels(source).value
                    self._metrics.refused_requests.add(source, line["reason"], at=self._log.now(), events=taken)
        line["seconds"] = round(seconds, 6)
        # A verified sender's 5xx has its line, as his 202 would have. What anybody may send has a quota.
        is_ours = line.pop("is_verified", False) and line["status"] >= _NOT_THE_SENDERS
        if "reason" in line and not is_ours and not self._has_quota(source, line["reason"]):
            return
        self._logger.info("request_finished", **line)

    def _has_quota(self, source: str, reason: str) -> bool:
        if self._quota_ends is None:
            self._quota_ends = asyncio.get_running_loop().call_later(QUOTA_WINDOW, self._tell_left_out)
        return self._quota.takes(source, reason)

    def _tell_left_out(self) -> None:
        self._quota_ends = None
        for source, reason, count in self._quota.end():
            self._logger.info("refusals_left_out", source=source, reason=reason, count=count)


def _ended(line: dict[str, Any]) -> str | None:
    """End the span of a request, if it has one, and put its trace into the line."""
    span: Span | None = line.pop("span", None)
    if span is None:
        return None
    span.set_attributes({name: line[key] for name, key in _TOLD if key in line})
    span.answered(line["status"], line.get("reason"))
    trace_id = span.context.recorded_id
    if trace_id is not None:
        line["trace_id"] = trace_id
    return trace_id


_STORED = int(HTTPStatus.ACCEPTED)


_NOT_THE_SENDERS = int(HTTPStatus.INTERNAL_SERVER_ERROR)


_TOLD = (("gateway.event.id", "event_id"), ("gateway.event.type", "type"), ("gateway.handshake", "handshake"))


class _Endpoint:
    """A source with what is worked out once per version of the rules."""

    __slots__ = ("accepted", "event", "events", "last", "name", "seconds", "share", "source", "topic")

    def __init__(self, source: Source, topics: Topics, metrics: Metrics, share: Share) -> None:
        self.name = source.name
        self.source = source
        self.topic = source.topic or topics.events(source.name)
        self.accepted = metrics.requests.labels(source.name, "202")
        self.events = metrics.events.labels(source.name)
        self.last = metrics.last_event_timestamp.labels(source.name)
        self.seconds = metrics.request_duration.labels(source.name)
        self.share = share
        self.event = EventBuilder(source).event


TRANSFER_ENCODING = b"transfer-encoding"


def _refuse_codings(values: Sequence[bytes]) -> None:
    """Refuse what RFC 9112 §6.1 has us refuse: a transfer coding that we would pass on without its header."""
    if b",".join(values).strip().lower() != b"chunked":
        raise RefusedError(501, "transfer_coding", "expected a body as it is or in chunks, got another transfer coding")
