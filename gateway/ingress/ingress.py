"""The aiohttp application that senders see.

client → head → body → verify → admit → handshake? → identify → append

Built on `web.Server` with a dispatch of its own, which costs a third less than an application's router, and without
automatic decompression, since a signature covers the bytes as they came.

What holds: if the headers already rule a request out, its body isn't read (for the quarantine, only after the
response). Before it is verified, a body is parsed only where the signature, or a pending source's token, is in it. No
append is retried, there is no 2xx before the append has returned, and no response waits for the quarantine.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING, Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.ingress.admission import Admission
from gateway.ingress.body import BodyReader, no_room, too_large
from gateway.ingress.body_memory import BodyMemory
from gateway.ingress.client_address import network_of
from gateway.ingress.destination_responses import DestinationResponses
from gateway.ingress.event_writer import Append, EventWriter
from gateway.ingress.fetch_turns import FetchTurns
from gateway.ingress.key_fetcher import KeyFetcher
from gateway.ingress.listener import ConnectionSetup, Listener
from gateway.ingress.pending_tokens import PendingTokens
from gateway.ingress.quarantine import HeadRefusedError, Quarantine, Unread
from gateway.ingress.request_head import check_head, check_source, refusal_response
from gateway.ingress.request_state import RequestState
from gateway.ingress.responses import (
    handshake_response,
    make_response,
    problem_response,
)
from gateway.ingress.server import Limits, Server
from gateway.ingress.source_endpoint import Proxies, SourceEndpoint
from gateway.ingress.subscriptions import Subscriptions
from gateway.log.base import Log
from gateway.log.topics import Topics
from gateway.model import SUCCESSOR_HEADROOM, LogUnavailableError, RecordTooLargeError, RefusedError
from gateway.rules.rules import Rules, Source
from gateway.telemetry.log_quota import LogQuota
from gateway.telemetry.metrics import NO_SOURCE, Metrics
from gateway.verify.handshakes import HandshakeResponse
from gateway.verify.remote_keys import Fetch, KeyNeededError
from gateway.verify.request import Request
from gateway.verify.verifier import Verified

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Span, Traces

# Connections that may wait to be accepted: a burst of new ones while the event loop is busy for some milliseconds.
BACKLOG = 1024
# Seconds for which a stopping process still serves open connections.
KEEPALIVE_GRACE = 0.5
# Seconds at a stop for storing refused requests that are to be kept.
FLUSH_TIMEOUT = 1.0
# Length of the window within which only a limited number of refusals per source and reason are logged.
QUOTA_WINDOW = 10.0
# Endpoints of former rules that are freed in one turn of the event loop.
FREED_AT_ONCE = 200


class Ingress:
    """Serves `POST /in/<source>`, and `GET /healthz` for load balancers.

    `rules` returns the active rules; a reload replaces them between two requests. `fetch` is for keys of senders.
    Events are stored by `append`, in a spool or, without one, in the log.
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
        responses: DestinationResponses | None = None,
        append: Append | None = None,
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
        self._responses = responses
        self._body_limit = log.max_record_bytes - SUCCESSOR_HEADROOM
        self._memory = BodyMemory(self._limits.in_flight_bytes)
        self._writer = EventWriter(
            log=log,
            append=append or log.append,
            metrics=metrics,
            memory=self._memory,
            traces=traces,
            responses=responses,
            size_limit=self._body_limit,
        )
        self.quarantine = Quarantine(log=log, topics=topics, metrics=metrics, logger=logger)
        """The caller runs its `run` while this serves."""
        fetches = None if fetch is None else FetchTurns(fetch)
        self._keys = KeyFetcher(
            fetches,
            memory=self._memory,
            clock=clock,
            logger=logger,
            may_log=lambda source: self._take_quota(self._quota, source, "key_not_fetched"),
        )
        self._subscriptions = Subscriptions(
            fetches,
            logger=logger,
            may_log=lambda source: self._take_quota(self._quota, source, "subscription_not_confirmed"),
        )
        self.tokens = PendingTokens(logger)
        self._quota = LogQuota()
        self._server_error_quota = LogQuota()
        """For 5xx responses to verified senders, and traces of bugs: refusals can't suppress their lines."""
        self._quota_timer: asyncio.TimerHandle | None = None
        self._cached_rules: Rules | None = None
        self._admissions: dict[str, Admission] = {}
        self._processes = 1
        self._endpoints: dict[str, SourceEndpoint] = {}
        self._sources: dict[str, Source] = {}
        self._proxies = Proxies()
        self._web: Server | None = None
        self._listener: Listener | None = None

    async def start(self, host: str, port: int, *, setup: ConnectionSetup, is_shared: bool = True) -> tuple[str, int]:
        """Listen, and return the bound address (with the actual port for port 0). Raises OSError if it is in use.

        Several processes may share a port (SO_REUSEPORT), and the kernel spreads the connections over them.
        """
        self._web = Server(
            self.handle,
            self._limits,
            logger=self._logger,
            metrics=self._metrics,
            may_log_traceback=lambda event: self._take_quota(self._server_error_quota, NO_SOURCE, event),
            refuse=self._refuse_connection,
        )
        self._listener = Listener(self._web, setup, logger=self._logger)
        return await self._listener.start(host, port, is_shared=is_shared, backlog=BACKLOG)

    async def stop(self, timeout: float) -> None:
        """Stop listening, and give requests in progress `timeout` seconds to finish.

        For a moment, requests on open connections are still served. Each gets `Connection: close`, so its sender
        reconnects; a connection closed in the middle of a request would give the sender no response at all.
        """
        self._is_draining = True
        if self._responses is not None:
            self._responses.stop()
        if self._listener is not None and self._web is not None:
            self._listener.close()
            for _ in range(50):
                if self._web.connections or self._listener.opening:
                    await asyncio.sleep(min(KEEPALIVE_GRACE, timeout / 2) / 50)
            await self._listener.abort()
            self._web.pre_shutdown()
            # aiohttp waits that long for the responses, and then once more for the connections.
            await self._web.shutdown(timeout / 2)
        await self.quarantine.flush(min(FLUSH_TIMEOUT, timeout / 2))
        if self._quota_timer is not None:
            self._quota_timer.cancel()
            self._log_suppressed()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Respond to a request, count it, and log it in one line.

        Of many similar refusals, handshakes or bugs, only the first ones have a line: anyone may send them.
        """
        began = perf_counter()
        path, _, query = request.raw_path.partition("?")
        if not path.startswith("/"):  # the absolute form, RFC 9112 §3.2.2
            path, query = request.rel_url.raw_path, request.rel_url.raw_query_string
        endpoint = self._endpoint(path)
        if endpoint is None and path == "/healthz":
            return self._health(request)
        fields: dict[str, Any] = {"source": endpoint.name if endpoint else NO_SOURCE, "status": 500}  # if we have a bug
        state = RequestState(fields)
        unread: Unread | None = None  # Not the RefusedError: its traceback would refer to this frame, a cycle.
        try:
            handshake = None
            if endpoint is not None and endpoint.has_head_checks:
                handshake = check_source(request, endpoint, path, query, fields, now=self._clock())
            if handshake is None:
                response = await self._receive(request, endpoint, path, query, state, began=began)
                if state.waits:
                    response = await self._writer.destination_response(response, state, request, began=began)
            else:
                response = handshake
            fields["status"] = response.status
        except RefusedError as refusal:
            fields["status"], fields["reason"] = refusal.status, refusal.reason
            response = refusal_response(request, refusal, allow=endpoint.allow if endpoint else "POST")
            unread = refusal.unread if isinstance(refusal, HeadRefusedError) else None
        except asyncio.CancelledError:
            fields["status"], fields["reason"] = 503, "draining"  # `stop` has given up on it; there is no response
            raise
        finally:
            self._record(endpoint, state, perf_counter() - began)
        if self._is_draining:
            response.force_close()
        if unread is not None:
            await self.quarantine.respond_and_keep(request, response, unread)
        return response

    async def _receive(
        self,
        request: web.BaseRequest,
        endpoint: SourceEndpoint | None,
        path: str,
        query: str,
        state: RequestState,
        *,
        began: float,
    ) -> web.StreamResponse:
        if endpoint is None:
            raise RefusedError(404, "unknown_source", "no source has this path")
        headers = request.raw_headers
        names = [name.lower() for name, _ in headers]
        head_bytes = check_head(request, query, names, self._limits.head_bytes)
        verifier, stream = endpoint.source.verifier, request.content
        limit = min(endpoint.body_limit, self._body_limit - head_bytes)
        if stream.is_eof() and stream.exception() is None:
            received = Request("POST", path, query, headers, stream.read_nowait(), names)
            state.fields["bytes"] = len(received.body)
            if len(received.body) > limit:
                raise too_large(limit)
            now = self._clock()
            try:
                verified = (
                    await self._verify(request, endpoint, received)
                    if endpoint.fetches_keys
                    else verifier.verify(received, now=now)
                )
            except RefusedError as refusal:
                self._keep(request, endpoint, refusal, received, at=now)
                raise
        else:
            head = Request("POST", path, query, headers, b"", names)
            received, verified = await self._read_and_verify(request, endpoint, head, limit, state.fields)
        state.is_verified = True
        body = received.body
        self._admit(endpoint, len(body))
        state.admission = endpoint.admission  # until there is a response
        try:
            if self._traces is not None:  # nothing of a request is traced before it is verified
                at = time.time() - (perf_counter() - began)
                state.span = self._traces.receive(
                    source=endpoint.name, path=endpoint.source.shown_path, headers=headers, began=at, size=len(body)
                )
            if verifier.respond_to_handshake is not None and (
                handshake := verifier.handshake(received, now=self._clock())
            ):
                return await self._respond_to_handshake(endpoint, handshake, state.fields)
            store = self._writer.store if endpoint.split is None else self._writer.store_batch
            return await store(endpoint, received, verified, state)
        except LogUnavailableError as error:
            raise RefusedError(503, "log_unavailable", "the event can't be stored at the moment") from error
        except RecordTooLargeError as error:
            raise RefusedError(413, "body_too_large", "the event is larger than the log allows") from error
        finally:
            self._memory.release(endpoint.share, len(body))

    def _admit(self, endpoint: SourceEndpoint, size: int) -> None:
        """Give a verified request its place and its memory. Raises RefusedError, having given neither."""
        now = perf_counter()
        if endpoint.admission is not None:
            endpoint.admission.enter(now)
        if not self._memory.reserve(endpoint.share, size, now=now):
            if endpoint.admission is not None:
                endpoint.admission.leave()
            raise no_room(self._memory)

    async def _respond_to_handshake(
        self, endpoint: SourceEndpoint, handshake: HandshakeResponse, fields: dict[str, Any]
    ) -> web.Response:
        fields["handshake"] = True
        if handshake.token:
            self.tokens.add(endpoint.name, handshake.token)
        if handshake.confirm_url:
            await self._subscriptions.confirm(endpoint.name, handshake.confirm_url)
        return handshake_response(handshake)

    async def _read_and_verify(
        self, request: web.BaseRequest, endpoint: SourceEndpoint, head: Request, limit: int, fields: dict[str, Any]
    ) -> tuple[Request, Verified]:
        """Check the head, then read and verify the body; return the request with its body, and how it is verified."""
        now, received = self._clock(), head
        try:
            verification = endpoint.source.verifier.check_head(head, now=now)
        except RefusedError as refusal:
            if not self.quarantine.wants(endpoint.source, refusal):
                raise
            raise HeadRefusedError(refusal, endpoint.source, head, at=now, sender=endpoint.sender_of(request)) from None
        if endpoint.admission is not None and (over_limit := endpoint.admission.refusal(perf_counter())) is not None:
            raise over_limit
        reader = BodyReader(request, self._memory, endpoint.share, limit)
        try:
            try:
                received = head._replace(body=await reader.read(self._limits.body_seconds))
                fields["bytes"] = len(received.body)
                with suppress(KeyNeededError):
                    return received, verification.verify(received, endpoint.keys)
            finally:
                self._memory.close(reader)
            return received, await self._verify(request, endpoint, received)
        except RefusedError as refusal:
            self._keep(request, endpoint, refusal, received, at=now)
            raise

    def _keep(
        self, request: web.BaseRequest, endpoint: SourceEndpoint, refusal: RefusedError, received: Request, *, at: float
    ) -> None:
        """Keep a request that was refused with its body, if its source keeps such requests."""
        if self.quarantine.wants(endpoint.source, refusal):
            self.quarantine.keep(endpoint.source, refusal.reason, received, at=at, sender=endpoint.sender_of(request))

    async def _verify(self, request: web.BaseRequest, endpoint: SourceEndpoint, received: Request) -> Verified:
        """Verify a request, fetching the key that it names if it isn't known; return the result."""

        def verify() -> Verified:
            return endpoint.source.verifier.verify(received, now=self._clock(), keys=endpoint.keys)

        try:
            return verify()
        except KeyNeededError:
            network = network_of(endpoint.sender_of(request))
            return await self._keys.verify(endpoint.name, endpoint.share, len(received.body), verify, network=network)

    def _endpoint(self, path: str) -> SourceEndpoint | None:
        rules = self._rules()
        if rules is not self._cached_rules:
            self._use(rules)
        # A path may be a secret. A dict finds it by a hash of the whole, of a key that only this process knows
        # (SipHash, https://peps.python.org/pep-0456/), and compares texts only if all 64 bits of their hashes are the
        # same. So the time doesn't depend on how much of a wrong path is right.
        return self._endpoints.get(path) or self._new_endpoint(path)

    def _new_endpoint(self, path: str) -> SourceEndpoint | None:
        """Make a source's endpoint for its first request under these rules: all of them at once would take seconds."""
        source = self._sources.get(path)
        if source is None:
            return None
        endpoint = self._endpoints[path] = SourceEndpoint(
            source,
            self._topics,
            self._metrics,
            share=self._memory.share(source.name),
            keys=self._keys.cache(source.name),
            admission=self._admissions.get(source.name),
            proxies=self._proxies,
        )
        return endpoint

    def share_rates(self, processes: int) -> None:
        """Take an equal share of the sources' rates: there are that many ingresses."""
        self._processes = processes
        if self._cached_rules is not None:
            self._set_source_limits(self._cached_rules)

    def _set_source_limits(self, rules: Rules) -> None:
        now = perf_counter()
        for name, admission in self._admissions.items():
            limits = rules.sources[name].limits
            rate = None if limits.rate is None else limits.rate / self._processes
            admission.set_limits(rate=rate, concurrent=limits.concurrent, now=now)

    def _use(self, rules: Rules) -> None:
        self._admissions = {
            name: self._admissions.get(name) or Admission()
            for name, source in rules.sources.items()
            if source.limits.rate is not None or source.limits.concurrent is not None
        }
        self._set_source_limits(rules)
        self._proxies = Proxies(rules.trusted_proxies, rules.certificate_header)
        for former in (self._endpoints, self._sources):
            _free(former)
        self._endpoints, self._sources = {}, {source.path: source for source in rules.sources.values()}
        self._keys.retain(rules.sources)
        self._subscriptions.retain(rules.sources)
        self.tokens.retain(rules.sources)
        self.quarantine.retain(rules.sources)
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

    def _record(self, endpoint: SourceEndpoint | None, state: RequestState, seconds: float) -> None:
        """Count and log a request that has its response, and end or give back what it had."""
        fields = state.fields
        if state.waiting is not None:
            state.waiting.close()
        if state.admission is not None:
            state.admission.leave()
        trace_id = None if state.span is None else _end_span(state.span, fields)
        if endpoint is not None and fields["status"] == endpoint.status and "handshake" not in fields:
            endpoint.accepted.inc()
            if trace_id is None:
                endpoint.seconds.observe(seconds)
            else:
                endpoint.seconds.observe_traced(seconds, trace_id)
        elif not self._count_other(endpoint, state, seconds):
            return
        fields["seconds"] = round(seconds, 6)
        self._logger.info("request_finished", **fields)

    def _count_other(self, endpoint: SourceEndpoint | None, state: RequestState, seconds: float) -> bool:
        """Count a request that isn't an accepted event; return whether it may have its line."""
        fields = state.fields
        source, status = fields["source"], fields["status"]
        self._metrics.requests.labels(source, str(status)).inc()
        self._metrics.request_duration.labels(source).observe(seconds)
        if "reason" in fields:
            self._metrics.rejected.labels(source, fields["reason"]).inc()
            if endpoint is not None:
                taken = self._metrics.events.labels(source).value
                self._metrics.refusal_runs.add(source, fields["reason"], at=self._log.now(), events=taken)
        is_bug = status == _SERVER_ERROR and not {"reason", "destination_response"} & fields.keys()
        is_server_error = status >= _SERVER_ERROR
        quota = self._server_error_quota if state.is_verified and is_server_error else self._quota
        is_handshake = "handshake" in fields and not is_server_error
        reason = fields.get("reason", "handshake" if is_handshake else "bug" if is_bug else "")
        return not reason or self._take_quota(quota, source, reason)

    def _refuse_connection(self, reason: str, address: str, detail: str) -> None:
        """Count a connection that is closed early, and log it, unless the other end was just gone."""
        self._metrics.connections_refused.labels(reason).inc()
        if detail and self._take_quota(self._quota, NO_SOURCE, reason):
            self._logger.info("connection_refused", reason=reason, address=address, detail=detail)

    def _take_quota(self, quota: LogQuota, source: str, reason: str) -> bool:
        if self._quota_timer is None:
            self._quota_timer = asyncio.get_running_loop().call_later(QUOTA_WINDOW, self._log_suppressed)
        return quota.take(source, reason)

    def _log_suppressed(self) -> None:
        self._quota_timer = None
        for source, reason, count in (*self._server_error_quota.next_window(), *self._quota.next_window()):
            self._logger.info("lines_suppressed", source=source, reason=reason, count=count)


def _free(former: dict[str, Any]) -> None:
    """Free endpoints or sources, some in each turn of the event loop: 10,000 at once take 30 ms."""
    for _ in range(min(FREED_AT_ONCE, len(former))):
        former.popitem()
    if former:
        asyncio.get_running_loop().call_soon(_free, former)


def _end_span(span: "Span", fields: dict[str, Any]) -> str | None:
    """End the span of a request, and add its trace's id to the log fields if it is recorded; return the id."""
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
