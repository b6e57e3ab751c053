"""Traces: one from a request to the last attempt of each of its deliveries, even hours later. Needs the extra `otel`.

    POST /in/github                    server: a verified request
      └─ send gateway.events.github    producer: its append, whose context is in the record
           └─ process gateway.events.github     consumer: which routes match; the same context goes on in tiers
                ├─ POST ci             client: each attempt, whose context the destination gets as `traceparent`
                └─ send gateway.dead   producer: a successor record or a dead letter

The only user of opentelemetry. Spans are sent in a thread (OTLP over HTTP), from a bounded queue: if the collector is
slow or unavailable, spans are dropped and counted, and one line is logged. Unverified requests aren't traced.
Attributes are names from the rules, ids, and results of HTTP and the log: no body, header, query string, or URL of a
destination.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from structlog.typing import FilteringBoundLogger
from typing_extensions import override

from gateway.model import Attempt, Delivery, Event, Headers, Result, TraceContext
from gateway.telemetry.metrics import Counter, Metrics

PATH = "/v1/traces"
MAX_WAITING = 8192
"""Spans queued for the collector, about 10 MB; beyond that, the oldest are dropped."""
BATCH_SIZE, EXPORT_INTERVAL = 512, 1.0
"""Maximum spans per export, and seconds between exports."""
EXPORT_TIMEOUT = 5.0
CLOSE_TIMEOUT = 2.0
"""Seconds to send the queued spans at the end; the collector must not delay the process's exit."""
MAX_VALUE_LENGTH = 256
"""Maximum characters of an attribute's value, as a sender chooses its event's type."""
ROOT = Context()
"""A context without a span, used instead of the task's own."""

Value = str | int | float | Sequence[str]


class Traces:
    """Creates spans, and sends them to a collector in the background. `close` blocks for up to 2 s."""

    def __init__(
        self,
        endpoint: str,
        *,
        ratio: float,
        version: str,
        instance: str,
        system: str,
        metrics: Metrics,
        logger: FilteringBoundLogger,
    ) -> None:
        """Trace a `ratio` of the requests without a sampling decision; the flag in `traceparent` is such a decision.

        `endpoint` is a collector's base URL. `system` is the kind of log (`messaging.system`).
        """
        # It logs each failed attempt. We log the first.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self.type_of: Callable[[Event], str] = lambda event: event.type
        """Returns the type that a span has: one that people may see."""
        endpoint = endpoint.rstrip("/")
        endpoint = endpoint if endpoint.endswith(PATH) else endpoint + PATH
        self._system = system
        resource = Resource.create(
            {"service.name": "webhook-gateway", "service.version": version, "service.instance.id": instance}
        )
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=resource,
            shutdown_on_exit=False,
            span_limits=SpanLimits(max_span_attribute_length=MAX_VALUE_LENGTH),
        )
        exporter = _Exporter(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT), metrics, logger)
        self._provider.add_span_processor(_Processor(exporter, metrics.spans.labels("dropped")))
        self._tracer = self._provider.get_tracer("gateway", version)

    def close(self) -> None:
        """Send the queued spans, within the timeout, and stop."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        thread.start()
        thread.join(CLOSE_TIMEOUT)

    def receive(self, *, source: str, path: str, headers: Headers, began: float, size: int) -> "Span":
        """Begin a request's span, at a Unix time, below the sender's if its headers name one."""
        attributes: dict[str, Value] = {
            "http.request.method": "POST",
            "http.request.body.size": size,
            "http.route": path,
            "url.path": path,
            "url.scheme": "http",
            "gateway.source": source,
        }
        return self._start(f"POST {path}", _sent(headers), SpanKind.SERVER, attributes, began)

    def send(self, event: Event, topic: str, *, delivery: Delivery | None = None) -> "Span":
        """Begin the span of an append."""
        attributes: dict[str, Value] = {
            "messaging.system": self._system,
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": topic,
            "messaging.message.id": event.id,
            "messaging.message.body.size": len(event.body),
        }
        if delivery is not None:
            attributes |= _names(delivery)
        return self._start(f"send {topic}", _parent(event), SpanKind.PRODUCER, attributes)

    def process(self, event: Event, *, group: str, topic: str, partition: int, offset: int) -> "Span":
        """Begin the span of an event's routing."""
        attributes: dict[str, Value] = {
            "messaging.system": self._system,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": topic,
            "messaging.destination.partition.id": str(partition),
            "messaging.consumer.group.name": group,
            "messaging.message.id": event.id,
            "messaging.kafka.offset": offset,
            "gateway.source": event.source,
            "gateway.event.type": self.type_of(event),
        }
        return self._start(f"process {topic}", _parent(event), SpanKind.CONSUMER, attributes)

    def attempt(self, delivery: Delivery, method: str, url: str) -> "Span":
        """Begin the span of a delivery's next attempt."""
        host, port = _place(url)
        number = delivery.next_number
        attributes: dict[str, Value] = {
            "http.request.method": method,
            "server.address": host,
            "server.port": port,
            "messaging.message.id": delivery.event.id,
            "gateway.attempt": number,
            **_names(delivery),
        }
        if number > 1:
            attributes["http.request.resend_count"] = number - 1
        return self._start(f"{method} {delivery.destination}", _parent(delivery.event), SpanKind.CLIENT, attributes)

    def _start(
        self,
        name: str,
        parent: Context,
        kind: SpanKind,
        attributes: Mapping[str, Value],
        began: float | None = None,
    ) -> "Span":
        start = None if began is None else int(began * 1e9)
        return Span(self._tracer.start_span(name, parent, kind, attributes, start_time=start))


class Span:
    """A span in progress. As a context manager it ends with its block; an exception makes it an error."""

    __slots__ = ("_span", "context")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        found = span.get_span_context()
        self.context = TraceContext(
            f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}", found.trace_state.to_header()
        )
        """The context for records and destinations."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        self._span.end()

    def set_attributes(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes."""
        self._span.set_attributes(attributes)

    def fail(self, kind: str) -> None:
        """Mark it as an error, of a kind from a closed set."""
        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR))

    def end_request(self, status: int, reason: str | None) -> None:
        """End a request's span with the response; a 4xx is no error of the server."""
        self._span.set_attribute("http.response.status_code", status)
        if reason is not None:
            self._span.set_attribute("gateway.reason", reason)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self.fail(reason or str(status))
        self._span.end()

    def end_attempt(self, attempt: Attempt | None) -> None:
        """End an attempt's span with its result; None if it wasn't made."""
        if attempt is None:
            self.fail("not_made")
        else:
            self._span.set_attribute("gateway.result", attempt.result)
            if attempt.status is not None:
                self._span.set_attribute("http.response.status_code", attempt.status)
            if attempt.result is not Result.SUCCESS:
                self.fail(str(attempt.result if attempt.status is None else attempt.status))
        self._span.end()


class _Exporter(SpanExporter):
    """Counts exported and failed spans; logs once that they can't be sent, and once that they can be again.

    Only the processor's thread updates it.
    """

    def __init__(self, inner: SpanExporter, metrics: Metrics, logger: FilteringBoundLogger) -> None:
        self.exported_count = 0
        self._inner = inner
        self._exported = metrics.spans.labels("exported")
        self._failed = metrics.spans.labels("failed")
        self._logger = logger
        self._is_failing = False

    @override
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.exported_count += len(spans)
        try:
            result = self._inner.export(spans)
        except Exception as error:  # noqa: BLE001 - whatever the network does must not end the thread
            result, why = SpanExportResult.FAILURE, type(error).__name__
        else:
            why = "the collector took none of them"
        has_failed = result is not SpanExportResult.SUCCESS
        (self._failed if has_failed else self._exported).inc(len(spans))
        if has_failed and not self._is_failing:
            self._logger.warning("spans_not_exported", count=len(spans), error=why)
        elif self._is_failing and not has_failed:
            self._logger.info("spans_exported_again")
        self._is_failing = has_failed
        return result

    @override
    def shutdown(self) -> None:
        self._inner.shutdown()


class _Processor(BatchSpanProcessor):
    """Counts the spans that the queue drops silently. Only the event loop's thread updates it."""

    def __init__(self, exporter: _Exporter, dropped: Counter) -> None:
        super().__init__(
            exporter,
            max_queue_size=MAX_WAITING,
            schedule_delay_millis=EXPORT_INTERVAL * 1000,
            max_export_batch_size=BATCH_SIZE,
        )
        self._counting = exporter
        self._dropped = dropped
        self._ended = 0

    @override
    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            if self._ended - self._counting.exported_count - self._dropped.value >= MAX_WAITING:
                self._dropped.inc()
            self._ended += 1
        super().on_end(span)


def _sent(headers: Headers) -> Context:
    """Return a sender's context, if it sent exactly one (Trace Context, section 3.2.2.5)."""
    parents = [value for name, value in headers if name.lower() == b"traceparent"]
    if len(parents) != 1:
        return ROOT
    states = [value for name, value in headers if name.lower() == b"tracestate"]
    return _context(parents[0].decode("latin-1"), b",".join(states).decode("latin-1"))


def _parent(event: Event) -> Context:
    """Return the context in an event's record, or its sender's if its ingress didn't trace it."""
    return _sent(event.headers) if event.trace is None else _context(*event.trace)


def _context(traceparent: str, tracestate: str) -> Context:
    return _PROPAGATOR.extract({"traceparent": [traceparent], "tracestate": [tracestate]}, ROOT)


_PROPAGATOR = TraceContextTextMapPropagator()


def _names(delivery: Delivery) -> dict[str, Value]:
    return {
        "gateway.delivery.id": delivery.id,
        "gateway.route": delivery.route,
        "gateway.destination": delivery.destination,
    }


@lru_cache(maxsize=4096)
def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
