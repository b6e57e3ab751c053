"""The gateway's metrics: one object that takes a registry. Names and labels are an interface to dashboards and alerts.

Label values are names from the rules or members of closed sets, never ids, types or URLs. A name is empty if there is
none: a request that belongs to no source, a record that can't be read.

The series are our own; `prometheus_client` provides the process's metrics, and the registry. With its locks an
increment takes 0.3 µs and an observation 0.7, ours take 0.03 and 0.12, of about fifty microseconds per event.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from math import isfinite
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from typing_extensions import override

from gateway.model import DeadReason, Event, Result, SpillReason
from gateway.telemetry.refusal_runs import RefusalRuns
from gateway.telemetry.route_matches import RouteMatches
from gateway.telemetry.secret_uses import SecretUses
from gateway.telemetry.skipped_events import SkippedEvents

NO_SOURCE = ""
RECORD_KINDS = ("events", "retry", "parked", "dead", "dedupe", "control", "responses")
"""Kinds of topics."""

# Closed sets. A reason or status that isn't here is counted, too, but its series appears with its first increment,
# which `increase()` misses.
STATUSES = (
    *("200", "201", "202", "204", "400", "401", "403", "404", "405", "408", "413", "415", "429", "431", "499"),
    *("500", "501", "503"),
)
REJECTIONS = (
    "address_refused",
    "bad_credentials",
    "bad_handshake",
    "bad_key",
    "bad_signature",
    "batch_too_large",
    "slow_bodies",
    "body_not_json",
    "body_slow",
    "body_too_large",
    "client_certificate_malformed",
    "client_certificate_missing",
    "client_certificate_refused",
    "concurrency_limited",
    "content_coding",
    "content_too_large",
    "evicted",
    "disconnected",
    "draining",
    "expression_error",
    "head_too_large",
    "key_unavailable",
    "log_unavailable",
    "malformed_batch",
    "malformed_body",
    "malformed_content",
    "malformed_request",
    "malformed_signature",
    "malformed_timestamp",
    "method_not_allowed",
    "missing_credentials",
    "missing_header",
    "missing_signature",
    "missing_timestamp",
    "overloaded",
    "rate_limited",
    "repeated_header",
    "stale_timestamp",
    "transfer_coding",
    "unconfirmed_subscription",
    "unknown_source",
    "unreadable_body",
    "wrong_recipient",
)
ACCESS_REFUSALS = (
    *("bad_id_token", "bad_identity", "bad_session", "bad_state", "bad_token", "expired_token", "foreign_page"),
    *("no_credentials", "not_local", "provider_refused", "provider_unavailable", "session_over"),
    *("too_many_guesses", "unknown_person", "untrusted_proxy"),
)
SIGN_INS = ("oidc", "token_session")
CONNECTION_REFUSALS = (
    "bug",
    "client_certificate_refused",
    "evicted",
    "disconnected",
    "idle",
    "proxy_header_malformed",
    "proxy_header_missing",
    "proxy_header_slow",
    "proxy_header_version_1",
    "proxy_untrusted",
    "tls_failed",
    "tls_slow",
    "unread",
)
OUTCOMES = ("delivered", "dead_lettered", "dropped")
QUARANTINE = ("kept", "too_large", "over_rate", "over_memory", "incomplete", "log_unavailable")
RESPONSE_OUTCOMES = ("sent", "timeout", "failed", "overloaded", "spooled", "gone")
RELOADS = ("ok", "error")
SPOOL_REFUSALS = ("bytes", "age", "disk", "unavailable")
FAILURES = tuple([result for result in Result if result is not Result.SUCCESS])
# An undecodable record has no route, and what names no declared destination has none.
OF_NO_PAIR = (DeadReason.UNDECODABLE, DeadReason.UNKNOWN_DESTINATION)
DEAD_REASONS = tuple([reason for reason in DeadReason if reason not in OF_NO_PAIR])
OF_NO_DESTINATION = (DeadReason.UNKNOWN_DESTINATION, DeadReason.EXPRESSION_ERROR)
NO_DESTINATION = ""
"""The destination of a delivery whose event names none that is declared."""
MAX_CHOSEN = 200
"""Most destinations of a route that chooses one for which all series are created; of others, with their first use."""
SPILLS = tuple([reason for reason in SpillReason if reason is not SpillReason.DELAYED])
DROPPED_ATTEMPT_RECORDS = ("append_failed", "bug", "no_room", "stopped")
SPANS = ("exported", "failed", "dropped")
REMOVED_KEPT = 2 * 86400.0
"""Seconds for which a route and a destination that it no longer has keep series: deliveries that wait for them end
later, after an hour as dead letters (`route_removed`) if a name is gone, and some wait for 20 hours before that."""

# A webhook is acknowledged in about a millisecond, and must be within seconds; destinations may take a minute.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# From a successful first attempt to the end of a three-day schedule.
DAYS = (*SECONDS[2:], 300.0, 1800.0, 7200.0, 43200.0, 86400.0, 259200.0)


SLICE = 0.0005
"""Maximum seconds of writing before other tasks on the event loop run."""
SERIES_PER_CHECK = 50
"""Series written between two checks of the time: half a millisecond if all of them are histograms."""

Labels = tuple[str, ...]


class To(Protocol):
    """A route, as far as labels go. With a `choice`, an event may name no destination that is declared."""

    @property
    def destinations(self) -> Collection[str]: ...
    @property
    def delay(self) -> float: ...
    @property
    def choice(self) -> object | None: ...
    @property
    def debounce(self) -> object | None: ...
    @property
    def fixed(self) -> Collection[str]: ...


Contacts = Mapping[tuple[str, str], tuple[str, str]]


PreparedNames = tuple[frozenset[str], frozenset[str], frozenset[tuple[str, str]]]


def _prepared_names(rules: "Names") -> Generator[None, None, PreparedNames]:
    """Return the names of rules that have series: sources, destinations, routes with each of their destinations."""
    pairs: list[tuple[str, str]] = []
    for route, each in rules.routes.items():
        pairs += [(route, to) for to in _prepared_targets(each)]
        yield
    return frozenset(rules.sources), frozenset(rules.destinations), frozenset(pairs)


def _prepared_targets(route: To) -> Collection[str]:
    """Return the destinations of a route whose series exist from the start: of very many that it may choose, none."""
    if route.choice is None:
        return route.destinations
    return (*(route.destinations if len(route.destinations) <= MAX_CHOSEN else route.fixed), NO_DESTINATION)


class From(Protocol):
    """The part of a source that labels depend on: when (Unix seconds) each of its secrets expires, if that is counted.

    With `quarantine`, requests that were refused are kept.
    """

    @property
    def secret_expiries(self) -> Sequence[float]: ...
    @property
    def quarantine(self) -> bool: ...
    @property
    def awaits_destination(self) -> bool: ...


class Names(Protocol):
    """The rules, as far as labels go."""

    @property
    def sources(self) -> Mapping[str, From]: ...
    @property
    def destinations(self) -> Collection[str]: ...
    @property
    def routes(self) -> Mapping[str, To]: ...


class Single:
    """A series with one value. Its text is cached, as most series don't change between two scrapes."""

    __slots__ = ("_text", "_written", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._written: float | None = None
        self._text = b""

    @staticmethod
    def template(name: str, labels: Labels) -> str:
        """Return a format string for the escaped label values and the value."""
        return f"{name}{_braced(labels)} %r\n"

    def write(self, template: str, values: Labels) -> bytes:
        value = self.value
        if value != self._written:
            self._text = (template % (*map(_escaped, values), value)).encode()
            self._written = value
        return self._text

    def write_with_exemplars(self, template: str, values: Labels) -> bytes:
        return self.write(template, values)


class Counter(Single):
    """A value that only grows."""

    __slots__ = ()
    KIND = "counter"

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Gauge(Single):
    """A value that goes up and down."""

    __slots__ = ()
    KIND = "gauge"

    def set(self, value: float) -> None:
        self.value = float(value)


class Histogram:
    """A distribution of values over buckets, each of which counts the values up to its bound.

    `observe_traced` keeps the value and its trace as the bucket's exemplar, until a newer one replaces it.
    """

    __slots__ = ("_bounds", "_counts", "_exemplars", "_sum", "_text", "_written")
    KIND = "histogram"

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: dict[int, bytes] = {}
        self._sum = 0.0
        self._written: int | None = None
        self._text = b""

    def observe(self, value: float) -> None:
        self._sum += value
        self._counts[bisect_left(self._bounds, value)] += 1  # last, as another thread detects changes by the counts

    def observe_traced(self, value: float, trace_id: str) -> None:
        self.observe(value)
        exemplar = f' # {{trace_id="{trace_id}"}} {value!r} {time.time():.3f}'
        self._exemplars[bisect_left(self._bounds, value)] = exemplar.encode()

    def template(self, name: str, labels: Labels) -> str:
        """Return a format string for the label values, then for the count of each bucket, the sum and the count."""
        inside = _braced(labels)
        start = f"{inside[:-1]}," if labels else "{"
        # Each line has all of the labels: they are filled in first, and the counts afterwards.
        lines = [f'{name}_bucket{start}le="{bound!r}"}} %%d\n' for bound in self._bounds]
        lines += [f'{name}_bucket{start}le="+Inf"}} %%d\n', f"{name}_sum{inside} %%r\n", f"{name}_count{inside} %%d\n"]
        return "".join(lines)

    def write(self, template: str, values: Labels) -> bytes:
        *counts, total = accumulate(self._counts)
        if total != self._written:
            escaped = tuple([_escaped(value).replace("%", "%%") for value in values])
            lines = template % (escaped * (len(counts) + 3))
            self._text = (lines % (*counts, total, self._sum, total)).encode()
            self._written = total
        return self._text

    def write_with_exemplars(self, template: str, values: Labels) -> bytes:
        text = self.write(template, values)
        if not self._exemplars:
            return text
        lines = text.split(b"\n")
        for index, exemplar in self._exemplars.copy().items():
            lines[index] += exemplar
        return b"\n".join(lines)


Series = TypeVar("Series", Counter, Gauge, Histogram)


class Family(dict[Labels, Series], Generic[Series]):
    """A metric with labels. `labels(…)` creates a series at its first use.

    A reference to a series remains usable, but the series isn't exposed any more once `Metrics.prepare` has dropped it.
    """

    def __init__(self, make: Callable[[], Series], name: str, text: str, labels: Labels) -> None:
        self._make: Callable[[], Series] = make
        self._name = name
        self._labels = labels
        one = make()
        self._template = one.template(name, labels)
        self._head = f"# HELP {name} {text}\n# TYPE {name} {one.KIND}\n".encode()
        family = name.removesuffix("_total")  # OpenMetrics names a counter without its samples' suffix
        unit = f"# UNIT {family} seconds\n" if family.endswith("_seconds") else ""
        self._open_head = f"# HELP {family} {text}\n# TYPE {family} {one.KIND}\n{unit}".encode()

    def labels(self, *values: str) -> Series:
        return self[values]

    def __missing__(self, values: Labels) -> Series:
        if len(values) != len(self._labels):
            raise ValueError(f"{self._name}: expected a value for each of {self._labels}, got {values}")
        series: Series = self._make()
        self[values] = series
        return series

    def retaining(self, names: Mapping[str, Collection[str]], kept: Collection[Labels] = ()) -> Iterator[None]:
        """Drop the series in which a label named in `names` has a value that isn't among its names, a few at a time.

        Those that are `kept` stay all the same.
        """
        checks = [(index, names[label]) for index, label in enumerate(self._labels) if label in names]
        for number, values in enumerate(list(self) if checks else ()):
            if any(values[index] not in known for index, known in checks) and values not in kept:
                self.pop(values, None)
            if number % SERIES_PER_CHECK == 0:
                yield

    def pieces(self, *, is_open: bool) -> Iterator[bytes]:
        """Write all series, in the text format or in OpenMetrics, a few at a time."""
        template = self._template
        yield self._open_head if is_open else self._head
        series = list(self.items())  # copied atomically
        for start in range(0, len(series), SERIES_PER_CHECK):
            some = series[start : start + SERIES_PER_CHECK]
            if is_open:
                yield b"".join([each.write_with_exemplars(template, values) for values, each in some])
            else:
                yield b"".join([each.write(template, values) for values, each in some])


class Metrics(Collector):
    """Every metric of one process, exposed through a registry. Only one thread may count, others may collect."""

    def __init__(  # noqa: PLR0915 - a statement for each metric
        self, registry: CollectorRegistry, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._families: list[Family[Counter] | Family[Gauge] | Family[Histogram]] = []
        self._names: PreparedNames = (frozenset(), frozenset(), frozenset())
        self._coming = self._names
        self._clock = clock
        self._removed: dict[tuple[str, str], float] = {}  # a route, and a destination that it had → kept until then

        def counter(name: str, text: str, *labels: str) -> Family[Counter]:
            self._families.append(family := Family(Counter, f"gateway_{name}_total", text, labels))
            return family

        def gauge(name: str, text: str, *labels: str) -> Family[Gauge]:
            self._families.append(family := Family(Gauge, f"gateway_{name}", text, labels))
            return family

        def histogram(name: str, text: str, *labels: str, bounds: tuple[float, ...] = SECONDS) -> Family[Histogram]:
            self._families.append(family := Family(lambda: Histogram(bounds), f"gateway_{name}_seconds", text, labels))
            return family

        self.requests = counter("requests", "Requests at the ingress, by the response's status.", "source", "status")
        self.refusal_runs = RefusalRuns()
        self.rejected = counter("rejected", "Requests that were refused, by reason.", "source", "reason")
        self.quarantined = counter(
            "quarantined",
            "Refused requests of sources with quarantine that another secret would have admitted, by what was kept.",
            "source",
            "outcome",
        )
        self.connections_refused = counter(
            "connections_refused",
            "Connections that were closed before they were open, while idle to let others in, or as nobody read.",
            "reason",
        )
        self.events = counter("events", "Events that were acknowledged.", "source")
        self.secret_events = counter(
            "secret_events",
            "Events that a secret verified, by its position in the source's list; of sources whose secrets change.",
            "source",
            "position",
        )
        self.secret_uses = SecretUses()
        self.destination_responses = counter(
            "destination_responses",
            "Requests whose senders waited for a destination's response, by what came of it.",
            "source",
            "outcome",
        )
        self.duplicates = counter(
            "duplicates",
            "Duplicates: events with the identity and content of an earlier one, not delivered again.",
            "source",
        )
        self.duplicate_events = SkippedEvents()
        self.dedupe_conflicts = counter(
            "dedupe_conflicts", "Events with the identity of an earlier one, but other content; delivered.", "source"
        )
        self.dedupe_undecided = counter(
            "dedupe_undecided", "Events delivered while earlier identities weren't known yet.", "source"
        )
        self.unrouted = counter("unrouted", "Events that no route matched.", "source")
        self.unrouted_events = SkippedEvents()
        self.route_matches = RouteMatches()
        self.deliveries = counter("deliveries", "Deliveries that ended.", "route", "destination", "outcome")
        self.attempts = counter("attempts", "Attempts, by result.", "destination", "result")
        self.deliveries_late = counter(
            "deliveries_late", "Deliveries known to end later than 30 s after their event's receipt.", "route"
        )
        self.retries = counter("retries", "Failed attempts that will be retried, by reason.", "route", "reason")
        self.dead_letters = counter("dead_letters", "Dead letters, by reason.", "route", "destination", "reason")
        self.spills = counter(
            "spills",
            "Deliveries written to a retry topic, or paused, without an attempt, by reason.",
            "destination",
            "reason",
        )
        self.records_lost = counter("records_lost", "Records that the log deleted before they were done.", "topic")
        self.records_undecodable = counter(
            "records_undecodable", "Records that no version of the gateway can have written, set aside.", "kind"
        )
        self.rules_reloads = counter("rules_reloads", "Reloads of the rules.", "result")
        self.attempt_records = counter("attempt_records", "Attempts that the log has a record of.").labels()
        self.attempt_records_dropped = counter(
            "attempt_records_dropped", "Attempts that should have been recorded and weren't, by reason.", "reason"
        )
        self.log_lines_dropped = counter(
            "log_lines_dropped", "Log lines that stdout didn't take: its reader stalled, or a write failed."
        ).labels()
        self.spans = counter("spans", "Spans of traces, by result of their export.", "result")

        self.request_duration = histogram("request_duration", "A request at the ingress, first to last byte.", "source")
        self.append_duration = histogram("append_duration", "An append to the log.").labels()
        self.attempt_duration = histogram("attempt_duration", "An attempt.", "destination")
        self.delivery_duration = histogram(
            "delivery_duration",
            "From the event's receipt, or the end of its route's delay, to its delivery.",
            "route",
            bounds=DAYS,
        )

        self.event_loop_lag = histogram("event_loop_lag", "How late the event loop was, four times a second.").labels()

        self.records_newer = gauge(
            "records_newer", "Records that a newer version of the gateway wrote, and that wait for it.", "kind"
        )
        self.last_event_timestamp = gauge(
            "last_event_timestamp_seconds", "When this process last accepted an event; 0 before the first.", "source"
        )
        self.deliveries_in_flight = gauge("deliveries_in_flight", "Attempts in flight.", "destination")
        self.deliveries_waiting = gauge("deliveries_waiting", "Deliveries queued in this process.", "destination")
        self.oldest_pending = gauge("oldest_pending_seconds", "Age of the oldest event that isn't done.", "topic")
        self.log_lag = gauge("log_lag_records", "Records that wait to be read; NaN while that is unknown.", "topic")
        self.retention_left = gauge(
            "log_retention_left_seconds", "How long until the log deletes the oldest record that isn't done.", "topic"
        )
        self.partition_unread = gauge(
            "log_partition_unavailable_seconds",
            "For how long a partition of this process could not be read, or took no appends; none while all is well.",
            "topic",
            "partition",
        )
        self.retry_backlog = gauge(
            "retry_backlog", "Records that wait in a tier; those that a kick has copied to the shortest, too.", "tier"
        )
        self.dead_letter_backlog = gauge(
            "dead_letter_backlog", "Dead letters that are open: neither replayed nor dropped."
        ).labels()
        self.parked_backlog = gauge("parked_backlog", "Deliveries that wait for what is paused to be resumed.").labels()
        self.breaker_open = gauge(
            "breaker_open", "1 from the failures that open it until three probes in a row succeed.", "destination"
        )
        self.destination_paused = gauge("destination_paused", "1 while an operator has paused it.", "destination")
        self.route_paused = gauge("route_paused", "1 while an operator has paused it.", "route")
        self.destination_held = gauge(
            "destination_held_seconds",
            "Total duration of the current hold that a destination requested by Retry-After; 0 while there is none.",
            "destination",
        )
        where = ("route", "destination")
        self.ordered_blocked_keys = gauge("ordered_blocked_keys", "Keys whose first delivery has failed.", *where)
        self.ordered_halted_keys = gauge("ordered_halted_keys", "Keys that wait for an operator's kick.", *where)
        self.ordered_quiet_keys = gauge(
            "ordered_quiet_keys", "Keys of a debounced route whose last delivery waits until they were quiet.", *where
        )
        self.ordered_lag = gauge("ordered_lag_records", "Records that an ordered route hasn't read.", *where)
        self.ordered_oldest_pending = gauge(
            "ordered_oldest_pending_seconds", "Age of the oldest event that an ordered route hasn't done.", *where
        )
        self.dedupe_identities = gauge("dedupe_identities", "Identities remembered by this process.", "topic")
        self.dedupe_rebuilding = gauge(
            "dedupe_rebuilding", "Partitions whose earlier identities this process doesn't know yet.", "topic"
        )
        self.rules_loaded_timestamp = gauge(
            "rules_loaded_timestamp_seconds", "When the active rules were loaded."
        ).labels()
        self.rules_refused = gauge(
            "rules_refused", "1 while the rules on disk are refused, and older ones are active."
        ).labels()
        self.certificate_refused = gauge(
            "certificate_refused", "1 while the ingress's certificate files can't be used, and older ones are in use."
        ).labels()
        self.certificate_expiry_timestamp = gauge(
            "certificate_expiry_timestamp_seconds", "When the first certificate of a file or text expires.", "name"
        )
        self.secret_expiry_timestamp = gauge(
            "secret_expiry_timestamp_seconds",
            "When a secret with an `until` expires; from then on it verifies nothing.",
            "source",
            "position",
        )
        # Only where an index is kept: `IndexKeeper` makes their series.
        self.index_behind = gauge(
            "index_behind_seconds",
            "For how long the index may lack what a topic has got; of no topic while none is known.",
            "topic",
        )
        self.index_lag = gauge("index_lag_records", "Records of a topic that the index hasn't read.", "topic")
        self.index_events = gauge("index_events", "Events in the index.")
        self.index_bytes = gauge("index_bytes", "Size of the index's file, without pages that will be used again.")
        self.index_oldest_event = gauge(
            "index_oldest_event_timestamp_seconds", "When the oldest event in the index was stored; 0 without one."
        )
        self.index_interruptions = counter(
            "index_interruptions", "Rounds of reading that failed, and are tried again, by reason.", "reason"
        )
        self.index_left_out = counter(
            "index_records_left_out", "Records that the index hasn't taken, by reason.", "reason"
        )
        self.access_refused = counter(
            "access_refused", "Requests at the admin address of nobody who may ask, by reason.", "reason"
        )
        self.spooled = counter("spooled_events", "Events that were stored in the spool: the log took none.").labels()
        self.spool_moved = counter("spool_moved_events", "Events that were moved from the spool to the log.").labels()
        self.spool_found = counter(
            "spool_found_events", "Events of the spool that an append without an answer had stored in the log."
        ).labels()
        self.spool_lost = counter("spool_lost_events", "Events of the spool whose pages are damaged.").labels()
        self.spool_dropped = counter(
            "spool_dropped_events", "Events of the spool that an operator has dropped."
        ).labels()
        self.spool_refused = counter("spool_refused_events", "Events that the spool didn't take.", "reason")
        _each(self.spool_refused, (), SPOOL_REFUSALS)
        self.spool_events = gauge("spool_events", "Events in the spool.").labels()
        self.spool_too_large = gauge(
            "spool_too_large_events", "Events in the spool that are too large for their topic by now."
        ).labels()
        self.spool_bytes = gauge("spool_bytes", "Bytes of the events in the spool.").labels()
        self.spool_oldest = gauge("spool_oldest_seconds", "Age of the oldest event in the spool.").labels()
        self.spool_used = gauge(
            "spool_used_ratio",
            "Share of the spool's nearest limit (bytes, age, disk) that is used; 1 if it or a topic is full.",
        ).labels()
        self.spool_up = gauge("spool_up", "1 while there is a spool that takes events, of one topic at least.").labels()
        self.access_sign_ins = counter(
            "access_sign_ins", "People who have signed in to the console, by how they did.", "how"
        )
        self.event_loop_tasks = gauge("event_loop_tasks", "Tasks of the event loop.").labels()
        self.log_up = gauge("log_up", "1 while the log responds and accepts all appends.").labels()
        self.build_info = gauge("build_info", "1, with the version and the role that run.", "version", "role")
        self.owner_info = gauge(
            "owner_info",
            "1, with who answers for a source, a route or a destination, and the runbook.",
            "kind",
            "name",
            "owner",
            "runbook",
        )

        _each(self.requests, (NO_SOURCE,), STATUSES)
        _each(self.rejected, (NO_SOURCE,), ("head_slow", "head_too_large", "malformed_request", "unknown_source"))
        _each(self.access_refused, (), ACCESS_REFUSALS)
        _each(self.access_sign_ins, (), SIGN_INS)
        for reason in CONNECTION_REFUSALS:
            self.connections_refused.labels(reason)
        for result in RELOADS:
            self.rules_reloads.labels(result)
        for kind in RECORD_KINDS:
            self.records_undecodable.labels(kind)
            self.records_newer.labels(kind)
        for reason in (DeadReason.UNDECODABLE, DeadReason.ROUTE_REMOVED):  # the latter: events of a removed source
            self.dead_letters.labels(NO_SOURCE, NO_SOURCE, reason)
        for reason in DROPPED_ATTEMPT_RECORDS:
            self.attempt_records_dropped.labels(reason)
        for result in SPANS:
            self.spans.labels(result)
        registry.register(self)

    def count_routed(self, event: Event, routes: Collection[str]) -> None:
        """Count an event that was matched, with the routes that it goes to."""
        self.route_matches.add(event, routes)
        if not routes:
            self.unrouted.labels(event.source).inc()
            self.unrouted_events.add(event)

    def count_unknown_name(self, route: str, destination: str) -> None:
        """Count a delivery that waits since the rules don't have its names; it may become a dead letter for that.

        The series of that exists from here on, in a process that has never had the names, too.
        """
        self.spills.labels(destination, SpillReason.UNKNOWN_NAME).inc()
        self.dead_letters.labels(route, destination, DeadReason.ROUTE_REMOVED)

    def prepare(self, rules: Names, contacts: Contacts = MappingProxyType({})) -> None:
        """Create every series of the rules' names, at 0, and drop those of names that are gone.

        A counter that appears with its first increment hides it from `rate()` and `increase()`. Cheap if the names are
        those of the last call.
        """
        for _ in chain(self.creating(rules), self.dropping(rules, contacts)):
            pass

    def creating(self, rules: Names) -> Iterator[None]:
        """Create the series of the names that are new, a few at a time: before the rules are in force."""
        self._coming = yield from _prepared_names(rules)
        sources, destinations, pairs = self._coming
        old_sources, old_destinations, old_pairs = self._names
        for source in sources - old_sources:
            self._prepare_source(source)
            yield
        for destination in destinations - old_destinations:
            self._prepare_destination(destination)
            yield
        for route, destination in pairs - old_pairs:
            if destination == NO_DESTINATION:
                self.deliveries.labels(route, NO_DESTINATION, "dead_lettered")
                _each(self.dead_letters, (route, NO_DESTINATION), OF_NO_DESTINATION)
            else:
                self._prepare_pair(route, destination)
            yield
        for route, to in pairs:
            if to != NO_DESTINATION and rules.routes[route].delay:
                self.spills.labels(to, SpillReason.DELAYED)
            if to != NO_DESTINATION and rules.routes[route].debounce:
                self.deliveries.labels(route, to, "superseded")
            yield

    def dropping(self, rules: Names, contacts: Contacts) -> Iterator[None]:
        """Drop the series of names that are gone, a few at a time: after `creating`, and once the rules are in force.

        Set who answers for what: `contacts` are (kind, name) → (owner, runbook).
        """
        self._prepare_secrets(rules.sources)
        self._prepare_quarantine({name for name, source in rules.sources.items() if source.quarantine})
        self._prepare_destination_responses(rules.sources)
        before, self._names = self._names, self._coming
        yield
        expired = self._age_removed(before[2], rules)
        self.refusal_runs.keep(self._names[0])
        self.secret_uses.keep(self._names[0])
        yield
        if expired or any(old - new for old, new in zip(before, self._names, strict=True)):
            names: Mapping[str, Collection[str]] = {
                "source": self._names[0] | {NO_SOURCE},
                "destination": self._names[1] | {NO_SOURCE},
                "route": rules.routes.keys() | {NO_SOURCE},
            }
            kept = {(*pair, DeadReason.ROUTE_REMOVED.value) for pair in self._removed}
            for family in self._families:
                yield from family.retaining(names, kept)
            yield from self._drop_pairs(expired)
        wanted = {(*what, *who) for what, who in contacts.items()}
        for labels in set(self.owner_info) - wanted:
            del self.owner_info[labels]
        yield
        for each in wanted:
            self.owner_info.labels(*each).set(1)
            yield

    def _age_removed(self, before: frozenset[tuple[str, str]], rules: Names) -> list[tuple[str, str]]:
        """Note since when routes don't have a destination any more; return those that have been so for long enough.

        A dead letter that a removal causes is counted long after it. If its series appeared only then, `increase()`
        wouldn't see it, nor would the alert.
        """
        now, pairs = self._clock(), self._names[2]
        removed = dict.fromkeys(before - pairs, now + REMOVED_KEPT) | self._removed
        removed = {
            pair: until
            for pair, until in removed.items()
            if pair not in pairs and (pair[0] not in rules.routes or pair[1] not in rules.routes[pair[0]].destinations)
        }
        expired = [pair for pair, until in removed.items() if now >= until]
        self._removed = {pair: until for pair, until in removed.items() if now < until}
        return expired

    def _drop_pairs(self, pairs: Collection[tuple[str, str]]) -> Iterator[None]:
        """Drop the series of routes with destinations that they haven't had for long; both names may be in use."""
        for pair in pairs:
            for outcome in (*OUTCOMES, "superseded"):
                self.deliveries.pop((*pair, outcome), None)
            for reason in DeadReason:
                self.dead_letters.pop((*pair, reason), None)
            yield

    def events_by_secret(self, name: str, source: From) -> Sequence[Counter]:
        """Return the counters of a source's secrets, in their order; none if they aren't told apart."""
        return [self.secret_events.labels(name, str(position)) for position, _ in enumerate(source.secret_expiries, 1)]

    def set_certificate_expiries(self, owner: str, expiries: Mapping[str, float]) -> None:
        """Replace the expiry times of an owner's ("destination", "ingress", "kafka") certificates."""
        family = self.certificate_expiry_timestamp
        escaped = {f"{owner}/{name}": at for name, at in expiries.items()}
        for labels in [labels for labels in family if labels[0].startswith(f"{owner}/") and labels[0] not in escaped]:
            del family[labels]
        for name, at in escaped.items():
            family.labels(name).set(at)

    def _prepare_source(self, source: str) -> None:
        deduped = (self.duplicates, self.dedupe_conflicts, self.dedupe_undecided)
        for counters in (self.events, self.unrouted, *deduped):
            counters.labels(source)
        self.last_event_timestamp.labels(source)
        self.request_duration.labels(source)
        _each(self.requests, (source,), STATUSES)
        _each(self.rejected, (source,), REJECTIONS)

    def _prepare_destination_responses(self, sources: Mapping[str, From]) -> None:
        awaiting = {name for name, source in sources.items() if source.awaits_destination}
        for labels in list(self.destination_responses.keys()):
            if labels[0] not in awaiting:
                del self.destination_responses[labels]
        for name in awaiting:
            _each(self.destination_responses, (name,), RESPONSE_OUTCOMES)

    def _prepare_secrets(self, sources: Mapping[str, From]) -> None:
        expiries = {
            (name, str(position)): at
            for name, source in sources.items()
            for position, at in enumerate(source.secret_expiries, 1)
        }
        finite = {labels: at for labels, at in expiries.items() if isfinite(at)}
        for labels in self.secret_events.keys() - expiries.keys():
            del self.secret_events[labels]
        for labels in self.secret_expiry_timestamp.keys() - finite.keys():
            del self.secret_expiry_timestamp[labels]
        for labels in expiries:
            self.secret_events.labels(*labels)
        for labels, at in finite.items():
            self.secret_expiry_timestamp.labels(*labels).set(at)

    def _prepare_quarantine(self, sources: Collection[str]) -> None:
        for labels in [labels for labels in self.quarantined if labels[0] not in sources]:
            del self.quarantined[labels]
        for source in sources:
            _each(self.quarantined, (source,), QUARANTINE)

    def _prepare_destination(self, destination: str) -> None:
        for gauges in (
            self.deliveries_in_flight,
            self.deliveries_waiting,
            self.breaker_open,
            self.destination_paused,
            self.destination_held,
        ):
            gauges.labels(destination)
        self.attempt_duration.labels(destination)
        _each(self.attempts, (destination,), tuple(Result))
        _each(self.spills, (destination,), SPILLS)

    def _prepare_pair(self, route: str, destination: str) -> None:
        self.route_paused.labels(route)
        self.delivery_duration.labels(route)
        self.deliveries_late.labels(route)
        _each(self.retries, (route,), FAILURES)
        _each(self.deliveries, (route, destination), OUTCOMES)
        _each(self.dead_letters, (route, destination), DEAD_REASONS)

    def pieces(self, *, is_open: bool) -> Iterator[bytes]:
        """Write every series, in the text format, or in OpenMetrics (without its `# EOF`) with exemplars.

        https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
        https://prometheus.io/docs/specs/om/open_metrics_spec/
        """
        for family in self._families:
            yield from family.pieces(is_open=is_open)

    @override
    def collect(self) -> Iterator[Metric]:
        """Serve other users of the registry, in any thread."""
        return iter(text_string_to_metric_families(b"".join(self.pieces(is_open=False)).decode()))


def process_registry() -> CollectorRegistry:
    """Create a registry that includes metrics of this process, its garbage collector and its Python."""
    registry = CollectorRegistry(auto_describe=True)
    prometheus_client.ProcessCollector(registry=registry)
    prometheus_client.PlatformCollector(registry=registry)
    prometheus_client.GCCollector(registry=registry)
    return registry


def content_type_for(accept: str) -> str:
    """Return the content type for a scraper's `Accept` header: OpenMetrics, which has exemplars, only on request."""
    _, content_type = choose_encoder(accept)
    return content_type if content_type.startswith(OPEN_METRICS) else CONTENT_TYPE_PLAIN_0_0_4


async def exposition(registry: CollectorRegistry, content_type: str) -> AsyncIterator[bytes]:
    """Yield every metric as text of this content type, in pieces of one time slice each.

    The client library takes 6 µs a line for the same text, and creates so many objects that, with some thousands of
    routes, the garbage collector stops every thread for tenths of a second.

    Ours is written on the event loop, where other tasks run between two slices, and is sent piece by piece. With a
    writing thread, the event loop would have to reacquire the interpreter after each of its system calls, about 10 ms
    each, for as long as the page takes; and assembling a whole page of some megabytes takes as long.
    """
    is_open = content_type.startswith(OPEN_METRICS)
    collectors = list(registry._collector_to_names)  # noqa: SLF001 - the library has no public list of collectors
    for collector in collectors:
        if isinstance(collector, Metrics):
            parts: list[bytes] = []
            since = time.perf_counter()
            for piece in collector.pieces(is_open=is_open):
                parts.append(piece)
                if time.perf_counter() - since > SLICE:
                    yield b"".join(parts)
                    parts.clear()
                    await asyncio.sleep(0)
                    since = time.perf_counter()
            yield b"".join(parts)
        else:
            yield await asyncio.to_thread(_rendered, collector, is_open=is_open)
    if is_open:
        yield END


OPEN_METRICS, END = "application/openmetrics-text", b"# EOF\n"


def _rendered(collector: Collector, *, is_open: bool) -> bytes:
    if is_open:
        text: bytes = openmetrics.generate_latest(collector)  # type: ignore[no-untyped-call]
        return text.removesuffix(END)
    return generate_latest(collector)


def _braced(labels: Labels) -> str:
    """Return the labels in braces, as a format string for their values."""
    escaped = ",".join([f'{label}="%s"' for label in labels])
    return f"{{{escaped}}}" if labels else ""


@lru_cache(maxsize=1 << 16)
def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _each(family: Family[Counter], prefix: tuple[str, ...], values: Iterable[str]) -> None:
    for value in values:
        labels = (*prefix, value)
        if labels not in family:
            family[labels] = Counter()
