"""The dashboards, described once: `python -m deploy.grafana.boards` writes dashboards/*.json from here.

A panel names its queries, its unit, what it shows, and the alert whose section of docs/runbooks.md says what to do.
Tests and deploy/grafana/plot.py run the same queries; `Query.at` replaces variables as Grafana does.
"""
# ruff: noqa: INP001, T201 - a script beside what it writes

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).parent / "dashboards"
RUNBOOKS = "docs/runbooks.md"
"""The target of links to the runbooks: the value of the constant `runbooks` in each dashboard."""
SCHEMA_VERSION = 39  # Grafana 10.3 and newer read it as it is.
COLUMNS = 24
WIDTH, HEIGHT = 8, 8
STAT_WIDTH, STAT_HEIGHT = 4, 4
NAMESPACE = 'namespace=~"$namespace"'
"""Distinguishes gateways, as in the alerts. Outside of Kubernetes series have no namespace, which also matches."""
JOB = 'job=~"$job"'
"""Tells the parts of a gateway from one another, or gateways where there are no namespaces."""
OF_INSTANCE = 'instance=~"$instance"'
WHERE = "{{job}} {{instance}} {{process}}"
"""Whose a series is; `process` is empty unless it is one of several."""
OLDEST_GENERATION = 'generation="2"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """PromQL with Grafana's `$__rate_interval` and the board's variables in it; `legend` names the series."""

    expr: str
    legend: str

    def at(self, *, rate_interval: str, variables: Mapping[str, str] | None = None) -> str:
        """Return the query for Prometheus; a missing variable matches any value."""
        expr = self.expr.replace("$__rate_interval", rate_interval)
        return re.sub(r"\$(\w+)", lambda found: (variables or {}).get(found[1], ".*"), expr)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A graph, or with `is_number` only the last value. `unit` is one of Grafana's; `alert` names its runbook."""

    title: str
    text: str
    unit: str
    alert: str
    queries: tuple[Query, ...]
    is_number: bool = False
    maximum: float | None = None

    @property
    def runbook(self) -> str:
        """The anchor of its runbook section."""
        return self.alert.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A dashboard. `variables` are label names, each with the metric that supplies its values.

    Each dashboard has `namespace` and `job` before them.
    """

    uid: str
    title: str
    text: str
    panels: tuple[Panel, ...]
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def file(self) -> Path:
        return DASHBOARDS / f"{self.uid.removeprefix('gateway-')}.json"


def graph(
    title: str, unit: str, alert: str, text: str, *queries: tuple[str, str], maximum: float | None = None
) -> Panel:
    each = tuple([Query(expr=expr, legend=legend) for expr, legend in queries])
    return Panel(title=title, text=text, unit=unit, alert=alert, queries=each, maximum=maximum)


def number(title: str, unit: str, alert: str, text: str, expr: str) -> Panel:
    query = Query(expr=expr, legend=title)
    return Panel(title=title, text=text, unit=unit, alert=alert, queries=(query,), is_number=True)


def of(metric: str, where: str = "") -> str:
    """Return the selector of a metric for what was chosen. A recorded series is of all jobs, and has none."""
    labels = [NAMESPACE, *([] if ":" in metric else [JOB]), *([where] if where else [])]
    return f"{metric}{{{', '.join(labels)}}}"


def of_several(metric: str, else_: str) -> str:
    """Return a metric of parents' children; of a process without a parent, this number."""
    others = f"{else_} * {of('gateway_build_info', OF_INSTANCE)}"
    return f"{of(metric, OF_INSTANCE)} or on (namespace, job, instance) {others}"


def of_process(expr: str) -> str:
    """Return our series of a metric that every exporter has: those with the labels of one of our own metrics."""
    return f"{expr} and on (namespace, job, instance) {of('gateway_build_info', OF_INSTANCE)}"


def per_second(metric: str, by: str, where: str = "") -> str:
    return f"sum by ({by}) (rate({of(metric, where)}[$__rate_interval]))"


def share_of(metric: str, where: str) -> str:
    return f"sum(rate({of(metric, where)}[$__rate_interval])) / sum(rate({of(metric)}[$__rate_interval]))"


def quantile(share: float, metric: str, by: str = "", where: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {per_second(f'{metric}_bucket', labels, where)})"


OVERVIEW = Board(
    uid="gateway-overview",
    title="Gateway: overview",
    text="What comes in, what goes out, and what doesn't. The first place to look at.",
    panels=(
        number(
            "Acknowledged within 1 s, last hour",
            "percentunit",
            "GatewayAcknowledgementBudgetBurnsFast",
            "The share of events that were acknowledged after an append of at most a second. The objective is 99.9 %.",
            f"1 - max({of('gateway:acknowledgement_errors:ratio_rate1h')})",
        ),
        number(
            "Delivered within 30 s, last hour",
            "percentunit",
            "GatewayDeliveryBudgetBurnsFast",
            "The share of deliveries that reached their destination within 30 s of the receipt. The objective is 99 %.",
            f"1 - max({of('gateway:delivery_errors:ratio_rate1h')})",
        ),
        number(
            "Processes",
            "none",
            "GatewayAllDown",
            "Processes that Prometheus reaches.",
            f"count({of('gateway_build_info')}) or vector(0)",
        ),
        number(
            "Log",
            "none",
            "GatewayLogDown",
            "1 while the event log responds to every process.",
            f"min({of('gateway_log_up')})",
        ),
        number(
            "Breakers open",
            "none",
            "GatewayBreakerOpenLong",
            "Destinations whose breaker is open: they fail or don't respond.",
            f"sum(max by (destination) ({of('gateway_breaker_open')}))",
        ),
        number(
            "Open dead letters",
            "none",
            "GatewayDeadLettersGrow",
            "Open dead letters: neither replayed nor dropped since.",
            f"max({of('gateway_dead_letter_backlog')})",
        ),
        graph(
            "Accepted",
            "reqps",
            "GatewaySourceSilent",
            "Events that were stored and answered with 202, by source.",
            (per_second("gateway_events_total", "source"), "{{source}}"),
        ),
        graph(
            "Rejected",
            "reqps",
            "GatewaySignaturesRefused",
            "Refused requests, by reason. Those that begin with `bad_` or `missing_` are about a signature or a token.",
            (f"{per_second('gateway_rejected_total', 'reason')} > 0", "{{reason}}"),
        ),
        graph(
            "Quarantine",
            "reqps",
            "GatewayQuarantineOverflows",
            "Refused requests of sources with `quarantine`, by what was kept of them.",
            (f"{per_second('gateway_quarantined_total', 'source, outcome')} > 0", "{{source}} {{outcome}}"),
        ),
        graph(
            "Connections refused",
            "ops",
            "GatewayCertificateExpires",
            "Connections that were closed before they were open, or while idle to let others in, by reason.",
            (per_second("gateway_connections_refused_total", "reason"), "{{reason}}"),
        ),
        graph(
            "Admin requests refused",
            "ops",
            "GatewaySignaturesRefused",
            "Requests at the admin address of nobody who may ask, by reason; and people who sign in, by how they do.",
            (per_second("gateway_access_refused_total", "reason"), "{{reason}}"),
            (per_second("gateway_access_sign_ins_total", "how"), "signed in: {{how}}"),
        ),
        graph(
            "Ended deliveries",
            "reqps",
            "GatewayDeadLettersGrow",
            "Deliveries that ended, by outcome. An event has one for each destination of each route that it matches.",
            (per_second("gateway_deliveries_total", "outcome"), "{{outcome}}"),
        ),
        graph(
            "Success",
            "percentunit",
            "GatewayDeadLettersGrow",
            "The share of ended deliveries that were delivered; and of attempts that got a 2xx.",
            (
                share_of("gateway_deliveries_total", 'outcome="delivered"'),
                "deliveries",
            ),
            (
                share_of("gateway_attempts_total", 'result="2xx"'),
                "attempts",
            ),
            maximum=1,
        ),
        graph(
            "Acknowledgement",
            "s",
            "GatewayAcknowledgementBudgetBurnsFast",
            "The duration of a request, from its head to its response, and of the append in it.",
            (quantile(0.99, "gateway_request_duration_seconds"), "request p99"),
            (quantile(0.5, "gateway_request_duration_seconds"), "request p50"),
            (quantile(0.99, "gateway_append_duration_seconds"), "append p99"),
        ),
        graph(
            "End to end",
            "s",
            "GatewayDeliveryBudgetBurnsFast",
            "From the receipt of an event to its delivery, including retries. Unfinished deliveries aren't included.",
            (quantile(0.99, "gateway_delivery_duration_seconds"), "p99"),
            (quantile(0.5, "gateway_delivery_duration_seconds"), "p50"),
        ),
        graph(
            "Oldest pending",
            "s",
            "GatewayEventPendingTooLong",
            "The age of the lowest unfinished record of each topic. No destination can delay it.",
            (f"max by (topic) ({of('gateway_oldest_pending_seconds')})", "{{topic}}"),
        ),
        graph(
            "Dead letters",
            "reqps",
            "GatewayDeadLettersGrow",
            "Dead letters, by reason.",
            (f"{per_second('gateway_dead_letters_total', 'reason')} > 0", "{{reason}}"),
        ),
        graph(
            "Burn rates",
            "none",
            "GatewayDeliveryBudgetBurnsSlowly",
            "How many times faster than allowed the error budget was used in the last hour. At 1 it lasts a month. "
            "The worst of several gateways (namespaces).",
            (f"max({of('gateway:acknowledgement_errors:ratio_rate1h')}) / 0.001", "acknowledgement"),
            (f"max({of('gateway:delivery_errors:ratio_rate1h')}) / 0.01", "delivery"),
        ),
        graph(
            "Unmatched and repeated",
            "reqps",
            "GatewaySourceSilent",
            "Events that matched no route, and duplicates that were not delivered again.",
            (per_second("gateway_unrouted_total", "source"), "no route, {{source}}"),
            (per_second("gateway_duplicates_total", "source"), "repeated, {{source}}"),
        ),
        graph(
            "Last event",
            "s",
            "GatewaySourceSilent",
            "How long ago the last event of each source was accepted.",
            (f"time() - (max by (source) ({of('gateway_last_event_timestamp_seconds')}) > 0)", "{{source}}"),
        ),
        graph(
            "Rules",
            "none",
            "GatewayRulesRefused",
            "1 for a process that refuses the rules on its disk; the previous ones stay active.",
            (of("gateway_rules_refused"), WHERE),
        ),
    ),
)

ROUTE, DESTINATION = 'route=~"$route"', 'destination=~"$destination"'
BOTH = f"{ROUTE}, {DESTINATION}"
ROUTES = Board(
    uid="gateway-routes",
    title="Gateway: route and destination",
    text="How deliveries of some routes, or to some destinations, fare.",
    variables=(("route", "gateway_deliveries_total"), ("destination", "gateway_deliveries_total")),
    panels=(
        graph(
            "Outcomes",
            "reqps",
            "GatewayDeadLettersGrow",
            "Deliveries that ended, by outcome.",
            (
                per_second("gateway_deliveries_total", "route, destination, outcome", BOTH),
                "{{route}} → {{destination}} {{outcome}}",
            ),
        ),
        graph(
            "Retries",
            "reqps",
            "GatewayDeliveryBudgetBurnsFast",
            "Failed attempts that will be retried, by result.",
            (f"{per_second('gateway_retries_total', 'route, reason', ROUTE)} > 0", "{{route}} {{reason}}"),
        ),
        graph(
            "Attempts",
            "reqps",
            "GatewayBreakerOpenLong",
            "Attempts, by result.",
            (
                f"{per_second('gateway_attempts_total', 'destination, result', DESTINATION)} > 0",
                "{{destination}} {{result}}",
            ),
        ),
        graph(
            "Attempt, p99",
            "s",
            "GatewayDeliveryBudgetBurnsFast",
            "The duration of an attempt, until the response or the failure.",
            (quantile(0.99, "gateway_attempt_duration_seconds", "destination", DESTINATION), "{{destination}}"),
        ),
        graph(
            "Delivery, p99",
            "s",
            "GatewayDeliveryBudgetBurnsFast",
            "From the receipt of an event to its delivery.",
            (quantile(0.99, "gateway_delivery_duration_seconds", "route", ROUTE), "{{route}}"),
        ),
        graph(
            "Late",
            "reqps",
            "GatewayDeliveryBudgetBurnsFast",
            "Deliveries that ended, or will be attempted next, more than 30 s after the receipt.",
            (per_second("gateway_deliveries_late_total", "route", ROUTE), "{{route}}"),
        ),
        graph(
            "Breaker",
            "none",
            "GatewayBreakerOpenLong",
            "The number of processes whose breaker for it is open.",
            (f"sum by (destination) ({of('gateway_breaker_open', DESTINATION)})", "{{destination}}"),
        ),
        graph(
            "Paused",
            "none",
            "GatewayPaused",
            "1 while an operator, or a 410, has paused the destination, or an operator the route.",
            (f"max by (destination) ({of('gateway_destination_paused', DESTINATION)})", "{{destination}}"),
            (f"max by (route) ({of('gateway_route_paused', ROUTE)})", "{{route}}"),
            maximum=1,
        ),
        graph(
            "Held",
            "s",
            "GatewayDestinationHeld",
            "The total length of the silence that the destination has requested by Retry-After.",
            (f"max by (destination) ({of('gateway_destination_held_seconds', DESTINATION)})", "{{destination}}"),
        ),
        graph(
            "In flight",
            "none",
            "GatewayBreakerOpenLong",
            "Attempts in flight. A destination gets at most 50 at a time, unless its rules say otherwise.",
            (f"sum by (destination) ({of('gateway_deliveries_in_flight', DESTINATION)})", "{{destination}}"),
        ),
        graph(
            "Waiting",
            "none",
            "GatewayBreakerOpenLong",
            "Deliveries that wait for their turn in memory: for a second at most, beyond that in a retry topic.",
            (f"sum by (destination) ({of('gateway_deliveries_waiting', DESTINATION)})", "{{destination}}"),
        ),
        graph(
            "Put off",
            "reqps",
            "GatewayDeliveryBudgetBurnsFast",
            "Deliveries that were written to a retry topic without an attempt, by reason.",
            (
                f"{per_second('gateway_spills_total', 'destination, reason', DESTINATION)} > 0",
                "{{destination}} {{reason}}",
            ),
        ),
        graph(
            "Dead letters",
            "reqps",
            "GatewayDeadLettersGrow",
            "Dead letters, by reason.",
            (
                f"{per_second('gateway_dead_letters_total', 'route, destination, reason', BOTH)} > 0",
                "{{route}} → {{destination}} {{reason}}",
            ),
        ),
        graph(
            "Ordered routes: keys",
            "none",
            "GatewayOrderedKeysHalted",
            "Keys whose first delivery waits for a retry (blocked), for a kick (halted), or until the key was quiet.",
            (
                f"sum by (route, destination) ({of('gateway_ordered_blocked_keys', BOTH)})",
                "{{route}} → {{destination}} blocked",
            ),
            (
                f"sum by (route, destination) ({of('gateway_ordered_halted_keys', BOTH)})",
                "{{route}} → {{destination}} halted",
            ),
            (
                f"sum by (route, destination) ({of('gateway_ordered_quiet_keys', BOTH)})",
                "{{route}} → {{destination}} quiet",
            ),
        ),
        graph(
            "Ordered routes: oldest pending",
            "s",
            "GatewayOrderedRouteBehind",
            "The age of the oldest unfinished event of an ordered route.",
            (
                f"max by (route, destination) ({of('gateway_ordered_oldest_pending_seconds', BOTH)})",
                "{{route}} → {{destination}}",
            ),
        ),
        graph(
            "Ordered routes: lag",
            "none",
            "GatewayOrderedRouteBehind",
            "Unread records of an ordered route.",
            (f"sum by (route, destination) ({of('gateway_ordered_lag_records', BOTH)})", "{{route}} → {{destination}}"),
        ),
    ),
)

LOG = Board(
    uid="gateway-log",
    title="Gateway: log",
    text="Kafka or the embedded log, as the gateway sees it: what waits in it, and how it answers.",
    panels=(
        graph(
            "Lag",
            "none",
            "GatewayLagGrows",
            "Unread records, by topic. Those of the retry tiers wait on purpose.",
            (f"sum by (topic) ({of('gateway_log_lag_records')})", "{{topic}}"),
        ),
        graph(
            "Retention left",
            "s",
            "GatewayRetentionNear",
            "How long until the event log deletes the oldest unfinished record, by topic.",
            (f"min by (topic) ({of('gateway_log_retention_left_seconds')})", "{{topic}}"),
        ),
        graph(
            "Unread",
            "s",
            "GatewayPartitionUnavailable",
            "For how long partitions could not be read. Empty while all can be.",
            (
                f"max by (topic, partition) ({of('gateway_log_partition_unavailable_seconds')}) or vector(0)",
                "{{topic}} {{partition}}",
            ),
        ),
        graph(
            "Append",
            "s",
            "GatewayAcknowledgementBudgetBurnsFast",
            "How long the event log takes to store an event durably.",
            (quantile(0.99, "gateway_append_duration_seconds"), "p99"),
            (quantile(0.5, "gateway_append_duration_seconds"), "p50"),
        ),
        graph(
            "Log answers",
            "none",
            "GatewayLogDown",
            "1 while the event log responds to the process.",
            (of("gateway_log_up"), WHERE),
            maximum=1,
        ),
        graph(
            "Retry tiers",
            "none",
            "GatewayBreakerOpenLong",
            "Deliveries that wait for their next attempt, by the delay of the tier.",
            (f"sum by (tier) ({of('gateway_retry_backlog')})", "{{tier}}"),
        ),
        graph(
            "In the spool",
            "none",
            "GatewaySpoolWaits",
            "Events that the log hasn't taken yet, on the ingress's own disk; those of them that are too large for it.",
            (of("gateway_spool_events"), WHERE),
            (of("gateway_spool_too_large_events"), f"{WHERE}: too large"),
        ),
        graph(
            "Oldest in the spool",
            "s",
            "GatewaySpoolWaits",
            "The age of the oldest event in a spool.",
            (of("gateway_spool_oldest_seconds"), WHERE),
        ),
        graph(
            "Spooled",
            "reqps",
            "GatewayEventsSpooled",
            "Events that spools took, those moved to the log or found there, and those refused, lost or given up.",
            (f"sum(rate({of('gateway_spooled_events_total')}[$__rate_interval]))", "spooled"),
            (f"sum(rate({of('gateway_spool_moved_events_total')}[$__rate_interval]))", "moved"),
            (f"sum(rate({of('gateway_spool_found_events_total')}[$__rate_interval]))", "in the log already"),
            (per_second("gateway_spool_refused_events_total", "reason"), "refused: {{reason}}"),
            (f"sum(rate({of('gateway_spool_lost_events_total')}[$__rate_interval]))", "lost"),
            (f"sum(rate({of('gateway_spool_dropped_events_total')}[$__rate_interval]))", "given up"),
        ),
        graph(
            "Spool used",
            "percentunit",
            "GatewaySpoolFull",
            "How much of a spool's nearest limit is used: bytes, age or disk. At 100 % it accepts no more.",
            (of("gateway_spool_used_ratio"), WHERE),
            maximum=1,
        ),
        graph(
            "Spool size",
            "bytes",
            "GatewaySpoolFull",
            "Bytes of the events in a spool.",
            (of("gateway_spool_bytes"), WHERE),
        ),
        graph(
            "Spool takes events",
            "none",
            "GatewaySpoolFull",
            "1 while a process has a spool that takes events.",
            (of("gateway_spool_up"), WHERE),
            maximum=1,
        ),
        graph(
            "Dead-letter backlog",
            "none",
            "GatewayDeadLettersGrow",
            "Open dead letters: neither replayed nor dropped.",
            (f"max({of('gateway_dead_letter_backlog')})", "open"),
        ),
        graph(
            "Paused deliveries",
            "none",
            "GatewayParkedTooLong",
            "Deliveries that wait for a paused route or destination to be resumed.",
            (f"max({of('gateway_parked_backlog')})", "paused"),
        ),
        graph(
            "Oldest pending",
            "s",
            "GatewayEventPendingTooLong",
            "The age of the lowest unfinished record, by topic; for a retry tier since it was due.",
            (f"max by (topic) ({of('gateway_oldest_pending_seconds')})", "{{topic}}"),
        ),
        graph(
            "Records lost",
            "none",
            "GatewayRecordsLost",
            "Records that retention deleted before they were completed. It has to be 0.",
            (f"sum by (topic) ({of('gateway_records_lost_total')})", "{{topic}}"),
        ),
        graph(
            "Undecodable records",
            "none",
            "GatewayRecordsUndecodable",
            "Records that no version of the gateway wrote, by the purpose of their topic. They are set aside.",
            (f"sum by (kind) (increase({of('gateway_records_undecodable_total')}[$__rate_interval]))", "{{kind}}"),
        ),
        graph(
            "Attempt records",
            "reqps",
            "GatewayAttemptsUnrecorded",
            "Attempts that were recorded in `gateway.attempts`, and those that should have been and were dropped.",
            (f"sum(rate({of('gateway_attempt_records_total')}[$__rate_interval]))", "recorded"),
            (per_second("gateway_attempt_records_dropped_total", "reason"), "dropped: {{reason}}"),
        ),
        graph(
            "Left to a newer version",
            "none",
            "GatewayRecordsNewer",
            "Records that a newer version of the gateway wrote, and that wait for it.",
            (f"sum by (kind) ({of('gateway_records_newer')})", "{{kind}}"),
        ),
        graph(
            "Identities remembered",
            "none",
            "GatewayLagGrows",
            "Identities that dedupe remembers (about 50 bytes each), and partitions whose earlier ones it is reading.",
            (f"sum by (topic) ({of('gateway_dedupe_identities')})", "{{topic}}"),
            (f"sum by (topic) ({of('gateway_dedupe_rebuilding')})", "{{topic}} being rebuilt"),
        ),
        graph(
            "Index behind",
            "s",
            "GatewayIndexBehind",
            "For how long the index may lack what a topic has got.",
            (f"max by (topic) ({of('gateway_index_behind_seconds')})", "{{topic}}"),
        ),
        graph(
            "Index records to read",
            "none",
            "GatewayIndexBehind",
            "Records that the index hasn't read, by topic.",
            (f"sum by (topic) ({of('gateway_index_lag_records')})", "{{topic}}"),
        ),
        graph(
            "Index failures",
            "none",
            "GatewayIndexBehind",
            "What held the index up, and records that it hasn't taken, by reason.",
            (f"sum by (reason) (increase({of('gateway_index_interruptions_total')}[$__rate_interval]))", "{{reason}}"),
            (
                f"sum by (reason) (increase({of('gateway_index_records_left_out_total')}[$__rate_interval]))",
                "left out: {{reason}}",
            ),
        ),
        graph(
            "Index events",
            "none",
            "GatewayIndexBehind",
            "Events in the index.",
            (of("gateway_index_events"), WHERE),
        ),
        graph(
            "Index size",
            "bytes",
            "GatewayIndexBehind",
            "Size of the index's file. At its bound, the oldest events are dropped.",
            (of("gateway_index_bytes"), WHERE),
        ),
        graph(
            "Index age",
            "s",
            "GatewayIndexBehind",
            "How old the oldest event in the index is.",
            (f"time() - {of('gateway_index_oldest_event_timestamp_seconds')}", WHERE),
        ),
    ),
)

PROCESS = Board(
    uid="gateway-process",
    title="Gateway: process",
    text="What each process uses, and whether anything holds it up.",
    variables=(("instance", "gateway_build_info"),),
    panels=(
        graph(
            "CPU",
            "percentunit",
            "GatewayEventLoopLags",
            "CPU time. A process uses at most one core, and a little for its threads.",
            (of_process(f"rate({of('process_cpu_seconds_total')}[$__rate_interval])"), WHERE),
        ),
        graph(
            "Memory",
            "bytes",
            "GatewayProcessDown",
            "Resident memory.",
            (of_process(of("process_resident_memory_bytes")), WHERE),
        ),
        graph(
            "Event loop lag",
            "s",
            "GatewayEventLoopLags",
            "How late the event loop was, checked four times a second.",
            (
                quantile(0.99, "gateway_event_loop_lag_seconds", "job, instance, process", OF_INSTANCE),
                f"{WHERE} p99",
            ),
        ),
        graph(
            "Open files",
            "none",
            "GatewayProcessDown",
            "Open file descriptors, and their limit. Each attempt and each sender has one.",
            (of_process(of("process_open_fds")), WHERE),
            (of_process(of("process_max_fds")), f"{WHERE} limit"),
        ),
        graph(
            "Tasks",
            "none",
            "GatewayEventLoopLags",
            "Tasks of the event loop.",
            (of("gateway_event_loop_tasks", OF_INSTANCE), WHERE),
        ),
        graph(
            "Garbage collections",
            "ops",
            "GatewayEventLoopLags",
            "Collections of Python's oldest generation, during which nothing else runs.",
            (
                of_process(f"rate({of('python_gc_collections_total', OLDEST_GENERATION)}[$__rate_interval])"),
                WHERE,
            ),
        ),
        graph(
            "Log lines dropped",
            "none",
            "GatewayLogLinesDropped",
            "Log lines that stdout didn't take: its reader stalled, or its disk was full. Nothing waits for it.",
            (of_process(f"increase({of('gateway_log_lines_dropped_total')}[$__rate_interval])"), WHERE),
        ),
        graph(
            "Uptime",
            "s",
            "GatewayProcessDown",
            "How long ago the process started.",
            (of_process(f"time() - {of('process_start_time_seconds')}"), WHERE),
        ),
        graph(
            "Processes of one command",
            "none",
            "GatewayProcessDown",
            "With --processes: 1 for a process that answers its parent; and how often each has ended by itself.",
            (of_several("gateway_process_up", "1"), WHERE),
            (of_several("gateway_process_restarts_total", "0"), f"{WHERE} restarts"),
        ),
        graph(
            "Version",
            "none",
            "GatewayProcessDown",
            "Processes of each version: two while a new one is rolled out.",
            (f"count by (version) ({of('gateway_build_info')})", "{{version}}"),
        ),
        graph(
            "Certificates",
            "s",
            "GatewayCertificateExpires",
            "How long the certificates named in the rules, and those of the ingress, are still valid.",
            (f"min by (name) ({of('gateway_certificate_expiry_timestamp_seconds')}) - time()", "{{name}}"),
        ),
        graph(
            "Certificates refused",
            "none",
            "GatewayCertificateExpires",
            "1 for a process that can't use the ingress's new certificate files; the previous ones stay in use.",
            (of("gateway_certificate_refused"), WHERE),
        ),
        graph(
            "Secret expiry",
            "s",
            "GatewaySecretExpires",
            "How long the secrets of sources that have an `until` still verify.",
            (
                f"min by (source, position) ({of('gateway_secret_expiry_timestamp_seconds')}) - time()",
                "{{source}} {{position}}",
            ),
        ),
        graph(
            "Events by secret",
            "reqps",
            "GatewaySecretExpires",
            "Events that each secret verified, by its position in the source's list, where secrets are being rotated.",
            (per_second("gateway_secret_events_total", "source, position"), "{{source}} {{position}}"),
        ),
        graph(
            "Senders that wait for a destination",
            "reqps",
            "GatewayDestinationHeld",
            "What came of waiting for a destination's response, of sources with `after_delivery`.",
            (per_second("gateway_destination_responses_total", "source, outcome"), "{{source}} {{outcome}}"),
        ),
    ),
)

BOARDS = (OVERVIEW, ROUTES, LOG, PROCESS)
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(board: Board) -> dict[str, Any]:
    """Return the JSON model for Grafana.

    https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
    """
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.text,
        "tags": ["gateway"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "links": [
            {
                "type": "dashboards",
                "tags": ["gateway"],
                "title": "Gateway",
                "asDropdown": False,
                "keepTime": True,
                "includeVars": True,
            }
        ],
        "templating": {"list": list(_variables(board))},
        "annotations": {
            "list": [
                {
                    "name": "Alerts",
                    "datasource": SOURCE,
                    "enable": True,
                    "iconColor": "red",
                    "expr": 'ALERTS{alertname=~"Gateway.+", alertstate="firing", namespace=~"$namespace"}',
                    "titleFormat": "{{alertname}}",
                }
            ]
        },
        "panels": list(_panels(board)),
    }


def _variables(board: Board) -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    yield {"name": "runbooks", "type": "constant", "query": RUNBOOKS, "hide": 2}
    yield _choice("namespace", "gateway_build_info")
    yield _choice("job", f"gateway_build_info{{{NAMESPACE}}}")
    for label, metric in board.variables:
        yield _choice(label, of(metric))


def _choice(label: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {label})"
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panels(board: Board) -> Iterator[dict[str, Any]]:
    x = y = 0
    before = None
    for number_, panel in enumerate(board.panels, 1):
        width, height = (STAT_WIDTH, STAT_HEIGHT) if panel.is_number else (WIDTH, HEIGHT)
        if x + width > COLUMNS or (before is not None and before.is_number is not panel.is_number):
            x = 0
            y += STAT_HEIGHT if before is not None and before.is_number else HEIGHT
        defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
        if panel.maximum is not None:
            defaults["max"] = panel.maximum
        if not panel.is_number:
            defaults["custom"] = {"fillOpacity": 10, "showPoints": "never"}
        yield {
            "id": number_,
            "type": "stat" if panel.is_number else "timeseries",
            "title": panel.title,
            "description": panel.text,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": width, "h": height},
            "links": [
                {"title": f"Runbook: {panel.alert}", "url": f"${{runbooks}}#{panel.runbook}", "targetBlank": True}
            ],
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": _number_options() if panel.is_number else _graph_options(),
            "targets": [
                {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query.expr, "legendFormat": query.legend}
                for index, query in enumerate(panel.queries)
            ],
        }
        x += width
        before = panel


def _number_options() -> dict[str, Any]:
    return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}


def _graph_options() -> dict[str, Any]:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def text_of(board: Board) -> str:
    """Return the content of a dashboard's file."""
    return json.dumps(dashboard(board), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    for board in BOARDS:
        board.file.write_text(text_of(board))
        print(board.file)


if __name__ == "__main__":
    main()
