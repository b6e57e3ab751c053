"""Metrics: their names, which series exist from the start, and which go when a name goes."""

import asyncio
import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from gateway.model import DeadReason, Result, SpillReason
from gateway.rules.destination_choice import DestinationChoice
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Destination, Egress, Route, Rules, Source
from gateway.rules.templates import Template
from gateway.telemetry.metrics import (
    QUARANTINE,
    REJECTIONS,
    REMOVED_KEPT,
    Metrics,
    content_type_for,
    exposition,
    process_registry,
)
from gateway.verify.request import Reason
from gateway.verify.schemes import build_verifier
from tests.machine_speed import as_usual
from tests.telemetry.openmetrics import families_of

# The interface to dashboards and alerts: a name that changes here breaks them.
INTERFACE = {
    "requests_total": ("counter", "source status"),
    "rejected_total": ("counter", "source reason"),
    "events_total": ("counter", "source"),
    "secret_events_total": ("counter", "source position"),
    "quarantined_total": ("counter", "source outcome"),
    "destination_responses_total": ("counter", "source outcome"),
    "duplicates_total": ("counter", "source"),
    "dedupe_conflicts_total": ("counter", "source"),
    "dedupe_undecided_total": ("counter", "source"),
    "unrouted_total": ("counter", "source"),
    "deliveries_total": ("counter", "route destination outcome"),
    "deliveries_late_total": ("counter", "route"),
    "attempts_total": ("counter", "destination result"),
    "retries_total": ("counter", "route reason"),
    "dead_letters_total": ("counter", "route destination reason"),
    "spills_total": ("counter", "destination reason"),
    "rules_reloads_total": ("counter", "result"),
    "records_lost_total": ("counter", "topic"),
    "records_undecodable_total": ("counter", "kind"),
    "records_newer": ("gauge", "kind"),
    "attempt_records_total": ("counter", ""),
    "attempt_records_dropped_total": ("counter", "reason"),
    "log_lines_dropped_total": ("counter", ""),
    "spans_total": ("counter", "result"),
    "request_duration_seconds": ("histogram", "source"),
    "append_duration_seconds": ("histogram", ""),
    "attempt_duration_seconds": ("histogram", "destination"),
    "delivery_duration_seconds": ("histogram", "route"),
    "event_loop_lag_seconds": ("histogram", ""),
    "last_event_timestamp_seconds": ("gauge", "source"),
    "deliveries_in_flight": ("gauge", "destination"),
    "deliveries_waiting": ("gauge", "destination"),
    "oldest_pending_seconds": ("gauge", "topic"),
    "log_lag_records": ("gauge", "topic"),
    "log_partition_unavailable_seconds": ("gauge", "topic partition"),
    "log_retention_left_seconds": ("gauge", "topic"),
    "retry_backlog": ("gauge", "tier"),
    "dead_letter_backlog": ("gauge", ""),
    "parked_backlog": ("gauge", ""),
    "breaker_open": ("gauge", "destination"),
    "destination_paused": ("gauge", "destination"),
    "route_paused": ("gauge", "route"),
    "destination_held_seconds": ("gauge", "destination"),
    "dedupe_identities": ("gauge", "topic"),
    "dedupe_rebuilding": ("gauge", "topic"),
    "ordered_blocked_keys": ("gauge", "route destination"),
    "ordered_halted_keys": ("gauge", "route destination"),
    "ordered_quiet_keys": ("gauge", "route destination"),
    "ordered_lag_records": ("gauge", "route destination"),
    "ordered_oldest_pending_seconds": ("gauge", "route destination"),
    "rules_loaded_timestamp_seconds": ("gauge", ""),
    "rules_refused": ("gauge", ""),
    "certificate_expiry_timestamp_seconds": ("gauge", "name"),
    "certificate_refused": ("gauge", ""),
    "connections_refused_total": ("counter", "reason"),
    "secret_expiry_timestamp_seconds": ("gauge", "source position"),
    "log_up": ("gauge", ""),
    "spooled_events_total": ("counter", ""),
    "spool_moved_events_total": ("counter", ""),
    "spool_found_events_total": ("counter", ""),
    "spool_lost_events_total": ("counter", ""),
    "spool_refused_events_total": ("counter", "reason"),
    "spool_events": ("gauge", ""),
    "spool_bytes": ("gauge", ""),
    "spool_oldest_seconds": ("gauge", ""),
    "spool_dropped_events_total": ("counter", ""),
    "spool_too_large_events": ("gauge", ""),
    "spool_used_ratio": ("gauge", ""),
    "spool_up": ("gauge", ""),
    "index_behind_seconds": ("gauge", "topic"),
    "index_lag_records": ("gauge", "topic"),
    "index_events": ("gauge", ""),
    "index_bytes": ("gauge", ""),
    "index_oldest_event_timestamp_seconds": ("gauge", ""),
    "index_interruptions_total": ("counter", "reason"),
    "index_records_left_out_total": ("counter", "reason"),
    "access_refused_total": ("counter", "reason"),
    "access_sign_ins_total": ("counter", "how"),
    "event_loop_tasks": ("gauge", ""),
    "build_info": ("gauge", "version role"),
    "owner_info": ("gauge", "kind name owner runbook"),
}

TRACE = "0af7651916cd43dd8448eb211c80319c"
OPEN = "application/openmetrics-text"


def some_rules(*, sources: tuple[str, ...] = ("github",), routes: Mapping[str, tuple[str, ...]]) -> Rules:
    verifier = build_verifier({"scheme": "none"})
    destinations = sorted({destination for each in routes.values() for destination in each})
    return Rules(
        sources={name: Source(name=name, path=f"/in/{name}", verifier=verifier) for name in sources},
        destinations={name: Destination(name=name, url="http://127.0.0.1/") for name in destinations},
        routes={
            name: Route(
                name=name,
                sources=sources,
                match=None,
                when=None,
                destinations=to,
                request=None,
                retry=RetryPolicy(),
            )
            for name, to in routes.items()
        },
        egress=Egress(),
        table=RouteTable([]),
        files=(),
    )


def sample(registry: CollectorRegistry, name: str, /, **labels: str) -> float | None:
    return registry.get_sample_value(f"gateway_{name}", labels)


def page(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """Return what a scraper gets, and its content type."""
    content_type = content_type_for(accept)
    return asyncio.run(written(registry, content_type)), content_type


async def written(registry: CollectorRegistry, content_type: str) -> bytes:
    return b"".join([piece async for piece in exposition(registry, content_type)])


def test_the_names_types_and_labels_are_the_interface() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    owners = {("route", "build"): ("team-a", "https://wiki.example/a")}
    metrics.prepare(some_rules(routes={"build": ("ci",)}), owners)
    for family in (metrics.oldest_pending, metrics.log_lag, metrics.retry_backlog):
        family.labels("x").set(1)
    metrics.build_info.labels("1.0.0", "all").set(1)
    metrics.records_lost.labels("x").inc()
    metrics.secret_events.labels("x", "1").inc()
    metrics.quarantined.labels("x", "kept").inc()
    metrics.destination_responses.labels("x", "sent").inc()
    metrics.secret_expiry_timestamp.labels("x", "1").set(1)
    metrics.partition_unread.labels("x", "0").set(1)
    metrics.retention_left.labels("x").set(1)
    metrics.set_certificate_expiries("destination", {"ci/ca": 1.0})
    for family in (metrics.dedupe_identities, metrics.dedupe_rebuilding):
        family.labels("x").set(1)
    for family in (metrics.ordered_blocked_keys, metrics.ordered_halted_keys):
        family.labels("build", "ci").set(1)
    for family in (metrics.ordered_quiet_keys, metrics.ordered_lag, metrics.ordered_oldest_pending):
        family.labels("build", "ci").set(1)
    for family in (metrics.index_behind, metrics.index_lag):
        family.labels("x").set(1)
    for family in (metrics.index_events, metrics.index_bytes, metrics.index_oldest_event):
        family.labels().set(1)
    for counters in (metrics.index_interruptions, metrics.index_left_out):
        counters.labels("x").inc()
    text, content_type = page(registry)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for metric in text_string_to_metric_families(text.decode()):
        name = metric.name.removeprefix("gateway_") + ("_total" if metric.type == "counter" else "")
        found[name] = (metric.type, {*metric.samples[0].labels} - {"le"})
    assert found == {name: (kind, {*labels.split()}) for name, (kind, labels) in INTERFACE.items()}


def test_only_sources_with_quarantine_have_series_of_it() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)

    def outcomes() -> list[str]:
        found = [family for family in registry.collect() if family.name == "gateway_quarantined"]
        return sorted({one.labels["outcome"] for family in found for one in family.samples})

    rules = some_rules(routes={"build": ("ci",)})
    metrics.prepare(rules)
    assert outcomes() == []
    sources = {name: replace(source, quarantine=True) for name, source in rules.sources.items()}
    metrics.prepare(replace(rules, sources=sources))
    assert outcomes() == sorted(QUARANTINE)
    metrics.prepare(rules)
    assert outcomes() == []


def test_the_backlog_of_dead_letters_says_that_it_counts_open_ones() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    told = {metric.name: metric.documentation for metric in text_string_to_metric_families(page(registry)[0].decode())}
    assert told["gateway_dead_letter_backlog"] == "Dead letters that are open: neither replayed nor dropped."


def test_every_series_of_the_rules_exists_from_the_start() -> None:
    registry = CollectorRegistry()
    Metrics(registry).prepare(some_rules(routes={"build": ("ci", "mirror")}))
    assert sample(registry, "events_total", source="github") == 0
    assert sample(registry, "requests_total", source="github", status="202") == 0
    assert sample(registry, "rules_reloads_total", result="error") == 0
    assert sample(registry, "delivery_duration_seconds_count", route="build") == 0
    assert sample(registry, "breaker_open", destination="mirror") == 0
    assert {sample(registry, "rejected_total", source="github", reason=reason) for reason in Reason} == {0}
    assert {sample(registry, "attempts_total", destination="ci", result=result) for result in Result} == {0}
    spills = set(SpillReason) - {SpillReason.DELAYED}
    assert {sample(registry, "spills_total", destination="ci", reason=reason) for reason in spills} == {0}
    dead = {"route": "build", "destination": "mirror"}
    reasons = set(DeadReason) - {DeadReason.UNDECODABLE, DeadReason.UNKNOWN_DESTINATION}
    assert {sample(registry, "dead_letters_total", **dead, reason=reason) for reason in reasons} == {0}
    assert sample(registry, "dead_letters_total", route="", destination="", reason="undecodable") == 0

    assert sample(registry, "dead_letters_total", **dead, reason="undecodable") is None  # it has no route
    assert sample(registry, "last_event_timestamp_seconds", source="github") == 0
    assert sample(registry, "deliveries_late_total", route="build") == 0
    assert sample(registry, "retries_total", route="build", reason="2xx") is None


def test_series_of_what_only_some_routes_have_exist_from_the_start_where_they_do() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    rules = some_rules(routes={"build": ("ci", "mirror")})
    metrics.prepare(rules)
    none = {"route": "build", "destination": "", "reason": "unknown_destination"}
    delayed = {"destination": "mirror", "reason": "delayed"}
    assert sample(registry, "dead_letters_total", **none) is None
    assert sample(registry, "spills_total", **delayed) is None
    choice = DestinationChoice(name=Template("${{ body.to }}"), candidates=frozenset(("ci", "mirror")))
    route = replace(rules.routes["build"], choice=choice, delay=60.0)
    metrics.prepare(replace(rules, routes={"build": route}))
    assert sample(registry, "dead_letters_total", **none) == 0
    assert sample(registry, "spills_total", **delayed) == 0


def test_a_reload_keeps_counts_and_drops_removed_names() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.prepare(some_rules(sources=("github", "crm"), routes={"build": ("ci",), "old": ("gone",)}))
    held = metrics.deliveries.labels("old", "gone", "delivered")
    metrics.events.labels("github").inc(3)
    metrics.requests.labels("", "404").inc()
    metrics.prepare(some_rules(sources=("github",), routes={"build": ("ci",), "new": ("ci",)}))
    assert sample(registry, "events_total", source="github") == 3
    assert sample(registry, "requests_total", source="", status="404") == 1
    assert sample(registry, "events_total", source="crm") is None
    assert sample(registry, "deliveries_total", route="new", destination="ci", outcome="delivered") == 0
    held.inc()
    text = page(registry)[0].decode()
    kept = 'gateway_dead_letters_total{route="old",destination="gone",reason="route_removed"} 0.0\n'
    assert kept in text, "deliveries that wait for them may end so"
    text = text.replace(kept, "")
    for gone in ('route="old"', 'destination="gone"', 'source="crm"'):
        assert gone not in text


@dataclass
class Reloads:
    """Reloads of rules whose routes change, on a clock."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.registry, clock=lambda: self.now)

    def reload(self, **routes: tuple[str, ...]) -> None:
        self.metrics.prepare(some_rules(routes=routes))

    def dead(self, route: str, destination: str, reason: str = "route_removed") -> float | None:
        labels = {"route": route, "destination": destination, "reason": reason}
        return sample(self.registry, "dead_letters_total", **labels)


def test_dead_letters_that_a_removal_causes_are_counted_from_0() -> None:
    """A series that appears with its first dead letters, an hour after the removal, doesn't fire the alert."""
    reloads = Reloads()
    assert reloads.dead("", "") == 0, "events of a removed source"
    reloads.reload(build=("ci", "mirror"), old=("gone",), renamed=("ci",))
    reloads.reload(build=("ci",))
    removed = [("old", "gone"), ("build", "mirror"), ("renamed", "ci")]
    assert [reloads.dead(*pair) for pair in removed] == [0, 0, 0]
    reloads.metrics.dead_letters.labels("old", "gone", "route_removed").inc(7)
    reloads.now += REMOVED_KEPT - 1
    reloads.reload(build=("other",))
    assert [reloads.dead(*pair) for pair in removed] == [7, 0, 0]
    assert reloads.dead("", "") == 0


def test_series_of_removed_routes_go_with_a_reload_after_two_days() -> None:
    reloads = Reloads()
    reloads.reload(build=("ci",), old=("gone",))
    reloads.reload(build=("ci",))
    reloads.now += REMOVED_KEPT
    assert reloads.dead("old", "gone") == 0
    reloads.reload(build=("ci",))
    assert reloads.dead("old", "gone") is None
    assert 'destination="gone"' not in page(reloads.registry)[0].decode()


def test_a_route_that_comes_back_has_its_series_for_good() -> None:
    reloads = Reloads()
    for old in (("gone",), (), ("gone",)):
        reloads.reload(build=("ci",), **({"old": old} if old else {}))
        reloads.metrics.dead_letters.labels("old", "gone", "route_removed").inc()
    reloads.now += REMOVED_KEPT
    reloads.reload(build=("ci",), old=("gone",))
    assert (reloads.dead("old", "gone"), reloads.dead("old", "gone", "exhausted")) == (3, 0)


def test_series_of_a_destination_that_a_route_has_left_go_although_both_names_stay() -> None:
    """But what waits for it is still delivered, and counted meanwhile."""
    reloads = Reloads()
    ended = {"route": "build", "destination": "mirror", "outcome": "delivered"}
    reloads.reload(build=("ci", "mirror"), other=("mirror",))
    reloads.reload(build=("ci",), other=("mirror",))
    assert sample(reloads.registry, "deliveries_total", **ended) == 0
    assert reloads.dead("build", "mirror", "exhausted") == 0
    reloads.now += REMOVED_KEPT
    reloads.reload(build=("ci",), other=("mirror",))
    assert sample(reloads.registry, "deliveries_total", **ended) is None
    assert reloads.dead("build", "mirror", "exhausted") is None
    assert reloads.dead("other", "mirror", "exhausted") == 0


def test_what_is_known_of_refusals_and_secrets_goes_with_their_source() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.prepare(some_rules(sources=("github", "crm"), routes={}))
    for source in ("github", "crm"):
        metrics.refusal_runs.add(source, "bad_signature", at=1.0, events=5.0)
        metrics.secret_uses.add(source, 0, at=1.0)
    metrics.prepare(some_rules(sources=("github",), routes={}))
    for source, count in (("github", 1), ("crm", 0)):
        assert len(metrics.refusal_runs.of(source, 2.0)) == count
        assert metrics.secret_uses.of(source, 0, 2.0) == count


def test_a_histogram_counts_what_is_at_most_its_bound() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for seconds in (0.0, 0.001, 0.0011, 60.0, 61.0):
        metrics.append_duration.observe(seconds)
    buckets = {
        bound: sample(registry, "append_duration_seconds_bucket", le=bound) for bound in ("0.001", "60.0", "+Inf")
    }
    assert buckets == {"0.001": 2, "60.0": 4, "+Inf": 5}
    assert sample(registry, "append_duration_seconds_count") == 5
    assert sample(registry, "append_duration_seconds_sum") == pytest.approx(121.0021)


def test_openmetrics_is_sent_on_request_and_can_be_parsed() -> None:
    registry = process_registry()
    metrics = Metrics(registry)
    metrics.prepare(some_rules(routes={"build": ("ci",)}))
    metrics.events.labels("github").inc(3)
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    text, content_type = page(registry, accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert text.endswith(b"\n# EOF\n")
    assert text.count(b"# EOF") == 1
    families = {family.name: family for family in families_of(text.decode())}
    assert families.keys() > {f"gateway_{name.removesuffix('_total')}" for name in ("events_total", "log_up")}
    assert families["gateway_events"].samples[0].value == 3
    assert families["gateway_request_duration_seconds"].unit == "seconds"
    assert families["process_cpu_seconds"].type == "counter"
    for other in ("", "*/*", "text/plain", "text/html"):
        assert page(registry, other)[1] == "text/plain; version=0.0.4; charset=utf-8"


def test_both_formats_have_the_same_series() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.prepare(some_rules(routes={"build": ("ci",)}))
    metrics.attempt_duration.labels("ci").observe_traced(0.3, TRACE)
    plain = {
        (each.name, *each.labels.items()): each.value
        for family in text_string_to_metric_families(page(registry)[0].decode())
        for each in family.samples
    }
    opened = {
        (each.name, *each.labels.items()): each.value
        for family in families_of(page(registry, OPEN)[0].decode())
        for each in family.samples
    }
    assert plain == opened


def test_a_traced_value_is_the_exemplar_of_its_bucket() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    duration = metrics.attempt_duration.labels("ci")
    duration.observe(0.02)
    duration.observe_traced(0.3, TRACE[::-1])
    duration.observe_traced(0.4, TRACE)
    duration.observe_traced(61.0, TRACE)
    before = time.time()
    exemplars = {
        sample.labels["le"]: sample.exemplar
        for family in families_of(page(registry, OPEN)[0].decode())
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert exemplars.keys() == {"0.5", "+Inf"}
    newest = exemplars["0.5"]
    assert (newest.labels, newest.value) == ({"trace_id": TRACE}, 0.4)
    assert newest.timestamp is not None
    assert before - 5 < float(newest.timestamp) < before + 5
    assert TRACE.encode() not in page(registry)[0]


def test_a_changed_metric_is_rendered_again() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for times in (1, 2):
        metrics.events.labels("github").inc()
        metrics.append_duration.observe(1.0)
        assert sample(registry, "events_total", source="github") == times
        assert sample(registry, "append_duration_seconds_count") == times
        assert sample(registry, "append_duration_seconds_sum") == times


def test_certificates_are_those_that_an_owner_named_last() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.set_certificate_expiries("kafka", {"ca": 3.0})
    metrics.set_certificate_expiries("destination", {"ci/ca": 1.0, "old/certificate": 2.0})
    metrics.set_certificate_expiries("destination", {"ci/ca": 4.0})
    expiry = "certificate_expiry_timestamp_seconds"
    assert sample(registry, expiry, name="destination/ci/ca") == 4
    assert sample(registry, expiry, name="destination/old/certificate") is None
    assert sample(registry, expiry, name="kafka/ca") == 3


@pytest.mark.parametrize("accept", ["", OPEN])
def test_a_page_of_ten_thousand_routes_is_written_in_a_second_of_processor_time(accept: str) -> None:
    """The first page, of which nothing is kept yet; `tests/acceptance/test_metrics.py` asks a process, by the clock."""
    rules = some_rules(routes={f"route-{number}": (f"destination-{number % 1000}",) for number in range(10_000)})
    pages: list[bytes] = []

    def seconds() -> float:
        registry = CollectorRegistry()
        Metrics(registry).prepare(rules)
        gc.disable()  # as in a process, where what there is at the start is of no concern to it
        try:
            began = time.thread_time()
            pages.append(page(registry, accept)[0])
            return time.thread_time() - began
        finally:
            gc.enable()

    assert as_usual(seconds, tries=5, enough=1.0) < 1.0
    assert pages[0].count(b"\n") > 480_000


async def test_a_long_page_gives_everything_else_its_turns() -> None:
    registry = CollectorRegistry()
    names = {f"route-{number}": (f"destination-{number % 1000}",) for number in range(2_000)}
    Metrics(registry).prepare(some_rules(routes=names))
    turns = 0
    writing = asyncio.create_task(written(registry, content_type_for("")))
    began = time.thread_time()
    while not writing.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 200 * (time.thread_time() - began)  # one in 5 ms at least, where a slice takes half of one


def test_labels_must_fit() -> None:
    metrics = Metrics(CollectorRegistry())
    with pytest.raises(
        ValueError, match=r"gateway_requests_total: expected a value for each of \('source', 'status'\)"
    ):
        metrics.requests.labels("github")


def test_any_name_is_escaped() -> None:
    registry = CollectorRegistry()
    Metrics(registry).build_info.labels('1\\"\n', "all").set(1)
    assert sample(registry, "build_info", version='1\\"\n', role="all") == 1


def test_each_verifiers_refusals_have_series() -> None:
    assert set(Reason) <= set(REJECTIONS)


def test_the_process_is_measured_too() -> None:
    text = page(process_registry())[0].decode()
    for name in ("process_cpu_seconds_total", "python_gc_collections_total", "python_info"):
        assert f"\n{name}" in text
    assert "_created" not in text


def a_rotating_source(*secrets: object) -> Source:
    return Source(name="shop", path="/in/shop", verifier=build_verifier({"scheme": "github", "secrets": [*secrets]}))


def positions(registry: CollectorRegistry, name: str) -> list[str]:
    lines = [line for line in page(registry)[0].decode().splitlines() if line.startswith(f"gateway_{name}{{")]
    return [line.partition('position="')[2].partition('"')[0] for line in lines]


def test_secrets_have_series_only_where_there_are_several_or_one_that_ends() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    rules = some_rules(routes={})

    def prepare(*secrets: object) -> tuple[list[str], list[str]]:
        metrics.prepare(replace(rules, sources={"shop": a_rotating_source(*secrets)}))
        return positions(registry, "secret_events_total"), positions(registry, "secret_expiry_timestamp_seconds")

    ending = {"secret": "old", "until": "2027-01-31T12:00:00Z"}
    assert prepare("only") == ([], [])
    assert prepare("new", "old") == (["1", "2"], [])
    assert sample(registry, "secret_events_total", source="shop", position="2") == 0
    metrics.secret_events.labels("shop", "2").inc()
    assert prepare("new", ending) == (["1", "2"], ["2"])
    assert sample(registry, "secret_events_total", source="shop", position="2") == 1
    assert sample(registry, "secret_expiry_timestamp_seconds", source="shop", position="2") == 1801396800
    assert prepare(ending) == (["1"], ["1"])
    assert prepare("only") == ([], [])
    assert prepare("new", ending) == (["1", "2"], ["2"])
    metrics.prepare(rules)
    assert (positions(registry, "secret_events_total"), positions(registry, "secret_expiry_timestamp_seconds")) == (
        [],
        [],
    )


def test_owners_are_replaced_as_a_whole() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    rules = some_rules(routes={"a": ("ci",)})
    metrics.prepare(rules, {("route", "a"): ("x", ""), ("source", "b"): ("y", "https://wiki.example/y")})
    metrics.prepare(rules, {("route", "a"): ("z", "")})
    assert sample(registry, "owner_info", kind="route", name="a", owner="z", runbook="") == 1
    assert sample(registry, "owner_info", kind="route", name="a", owner="x", runbook="") is None
    assert sample(registry, "owner_info", kind="source", name="b", owner="y", runbook="https://wiki.example/y") is None
