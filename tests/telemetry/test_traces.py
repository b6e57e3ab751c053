"""Traces: one from the request to the last attempt, of real processes, at a collector on loopback."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client import CollectorRegistry
from typing_extensions import override

from gateway.model import TraceContext
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.traces import MAX_WAITING, Traces
from tests.builders import a_delivery, an_event
from tests.engine.test_worker import QUIET
from tests.gateway_process import GatewayProcess
from tests.load import SECRET, post, signed_post
from tests.sink import Request, Sink
from tests.telemetry.openmetrics import families_of
from tests.telemetry.otlp_collector import Collector, Seen

pytestmark = pytest.mark.rotated(share=1 / 5, group="traces")

RULES = f"""
version: 1
sources:
  github: {{{{verify: {{{{scheme: github, secrets: ["{SECRET}"]}}}}}}}}
destinations:
  good: {{{{url: "{{good}}/secret-of-url?token=secret-of-query"}}}}
  bad: {{{{url: "{{bad}}"}}}}
routes:
  - {{{{name: first, from: github, to: [good]}}}}
  - {{{{name: second, from: github, to: [bad], retry: {{{{schedule: [100ms], jitter: 0, max_attempts: 2}}}}}}}}
"""
"""To be formatted with the destinations."""
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1,other=2"))


def fails_once(request: Request) -> int:
    return 503 if request.header("gateway-attempt") == "1" else 200


async def test_one_trace_leads_from_the_request_through_a_retry_and_a_dead_letter(tmp_path: Path) -> None:
    async with Collector() as collector, Sink(fails_once) as good, Sink(500) as bad:
        rules = RULES.format(good=good.url, bad=bad.url).replace(
            "to: [good]", "to: [good], retry: {schedule: [5s], jitter: 0}"
        )
        async with a_gateway(tmp_path, rules, collector.url) as gateway:
            status, event_id = await post(gateway.port, signed_post(b"{}", delivery="1", headers=SENT))
            assert status == 202
            await good.received(2, timeout=20)
            spans = await collector.received(lambda spans: kinds(spans)["client"] == 4)
            page = await a_page(gateway.admin_port)
            line = await gateway.line("delivery_finished")
            assert gateway.lines("request_finished")[0]["trace_id"] == TRACE
            assert line["trace_id"] == TRACE
            assert await gateway.stop() == 0
    spans = collector.spans

    assert {span.trace for span in spans} == {TRACE}
    assert {span.state for span in spans} == {"vendor=1,other=2"}
    tree = {span.id: span for span in spans}
    [server] = [span for span in spans if span.kind == "server"]
    [append] = [span for span in spans if span.name == "send gateway.events.github"]
    [routing] = [span for span in spans if span.kind == "consumer"]
    assert (server.name, server.parent) == ("POST /in/github", PARENT)
    assert tree[append.parent] is server
    assert tree[routing.parent] is append
    assert routing.attributes["gateway.routes"] == ["first", "second"]
    attempts = [span for span in spans if span.kind == "client"]
    assert {span.parent for span in attempts} == {routing.id}, "also that of the retry, which a tier carried"
    told = sorted(
        (span.name, span.attributes["gateway.attempt"], span.attributes["http.response.status_code"], span.is_error)
        for span in attempts
    )
    assert told == [
        ("POST bad", 1, 500, True),
        ("POST bad", 2, 500, True),
        ("POST good", 1, 503, True),
        ("POST good", 2, 200, False),
    ]
    [dead] = [span for span in spans if span.name == "send gateway.dead"]
    [tier] = [span for span in spans if span.name.startswith("send gateway.retry.")]
    assert (dead.parent, dead.attributes["gateway.reason"]) == (routing.id, "exhausted")
    assert tier.parent == routing.id
    # What a destination gets names our attempt as its parent, and what the sender's vendors said.
    for sink, name in ((good, "POST good"), (bad, "POST bad")):
        parents = {f"00-{TRACE}-{span.id}-01" for span in attempts if span.name == name}
        assert {request.header("traceparent") for request in sink.requests} == parents
        for request in sink.requests:
            assert request.header("tracestate") == "vendor=1,other=2"
            assert [key.lower() for key, _ in request.headers].count(b"traceparent") == 1
    assert server.attributes["gateway.event.id"] == event_id
    assert server.attributes["http.response.status_code"] == 202
    assert server.resource["service.name"] == "webhook-gateway"
    for secret in (b"secret-of-", SECRET.encode(), b"sha256="):
        assert secret not in collector.bodies
    exemplars = {sample.name for family in families_of(page) for sample in family.samples if sample.exemplar}
    assert exemplars == {
        f"gateway_{name}_duration_seconds_bucket" for name in ("request", "append", "attempt", "delivery")
    }


async def test_a_secret_path_is_in_no_line_metric_or_span(tmp_path: Path) -> None:
    secret = "secret-of-path-s3cret"
    await asyncio.to_thread((tmp_path / "hidden").write_text, secret)
    async with Collector() as collector, Sink(200) as good:
        rules = RULES.format(good=good.url, bad=good.url)
        rules = rules.replace("github: {verify", 'github: {path: "/in/${file:hidden}", verify')
        async with a_gateway(tmp_path, rules, collector.url) as gateway:
            for path, expected in ((f"/in/{secret}", 202), (f"/in/{secret}x", 404), ("/in/github", 404)):
                assert (await post(gateway.port, signed_post(b"{}", delivery="1", path=path)))[0] == expected
            forged = signed_post(b"{}", delivery="2", path=f"/in/{secret}").replace(b"sha256=", b"sha256=0")
            assert (await post(gateway.port, forged))[0] == 401
            spans = await collector.received(lambda spans: kinds(spans)["client"] == 2)
            pages = [await a_page(gateway.admin_port, path) for path in ("/metrics", "/status", "/readyz")]
            assert await gateway.stop() == 0
    [server] = [span for span in spans if span.kind == "server"]
    assert server.name == "POST /in/${file:hidden}"
    assert server.attributes["url.path"] == server.attributes["http.route"] == "/in/${file:hidden}"
    assert secret.encode() not in collector.bodies
    output = gateway.output.read_text()
    assert output.count('"request_finished"') == 4
    assert [page for page in [*pages, output] if secret in page or not page] == []


async def test_a_refused_request_is_not_traced(tmp_path: Path) -> None:
    async with Collector() as collector, Sink(200) as good:
        rules = RULES.format(good=good.url, bad=good.url)
        async with a_gateway(tmp_path, rules, collector.url) as gateway:
            forged = signed_post(b"{}", delivery="1", headers=SENT).replace(b"sha256=", b"sha256=0")
            assert (await post(gateway.port, forged))[0] == 401
            assert (await post(gateway.port, signed_post(b"{}", delivery="2")))[0] == 202
            await collector.received(lambda spans: kinds(spans)["client"] == 2)
            assert await gateway.stop() == 0
    assert kinds(collector.spans)["server"] == 1
    assert TRACE not in {span.trace for span in collector.spans}


async def test_a_senders_decision_against_recording_is_kept_and_passed_on(tmp_path: Path) -> None:
    async with Collector() as collector, Sink(200) as good:
        rules = RULES.format(good=good.url, bad=good.url)
        async with a_gateway(tmp_path, rules, collector.url, "--traces-ratio=1") as gateway:
            quiet = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
            assert (await post(gateway.port, signed_post(b"{}", delivery="1", headers=quiet)))[0] == 202
            await good.received(2)
            assert "trace_id" not in await gateway.line("request_finished")
            assert await gateway.stop() == 0
    assert collector.spans == []
    for request in good.requests:
        version, trace, parent, flags = (request.header("traceparent") or "").split("-")
        assert (version, trace, flags) == ("00", TRACE, "00")
        assert parent != PARENT


async def test_without_traces_a_senders_trace_is_forwarded(tmp_path: Path) -> None:
    async with Sink(200) as good:
        gateway = GatewayProcess(
            tmp_path, rules=RULES.format(good=good.url, bad=good.url), log=f"sqlite:///{tmp_path}/gateway.db"
        )
        async with gateway:
            assert (await post(gateway.port, signed_post(b"{}", delivery="1", headers=SENT)))[0] == 202
            await good.received(2)
            line = await gateway.line("request_finished")
    assert "trace_id" not in line
    for request in good.requests:
        assert (request.header("traceparent"), request.header("tracestate")) == (SENT[0][1], SENT[1][1])


async def test_a_collector_that_fails_is_one_line_and_a_count_and_in_nobodys_way(tmp_path: Path) -> None:
    async with Collector(status=400) as collector, Sink(200) as good:
        rules = RULES.format(good=good.url, bad=good.url)
        async with a_gateway(tmp_path, rules, collector.url) as gateway:
            for number in range(3):
                assert (await post(gateway.port, signed_post(b"{}", delivery=str(number))))[0] == 202
                await good.received(2 * (number + 1))
                await collector.refused(number + 1)
            await gateway.until("gateway_spans_total", 15, result="failed")
            assert len(gateway.lines("spans_not_exported")) == 1
            collector.status = 200
            assert (await post(gateway.port, signed_post(b"{}", delivery="4")))[0] == 202
            await gateway.line("spans_exported_again")
            await gateway.until("gateway_spans_total", 5, result="exported")
            assert b"opentelemetry" not in gateway.output.read_bytes()
            assert await gateway.stop() == 0


async def test_a_missing_collector_does_not_delay_the_stop(tmp_path: Path) -> None:
    async with Sink(200) as good:
        rules = RULES.format(good=good.url, bad=good.url)
        async with a_gateway(tmp_path, rules, "http://127.0.0.1:1") as gateway:
            assert (await post(gateway.port, signed_post(b"{}", delivery="1")))[0] == 202
            await good.received(2)
            began = time.monotonic()
            assert await gateway.stop() == 0
            assert time.monotonic() - began < 6


def test_a_span_has_the_type_that_people_may_see(some_traces: Callable[..., Traces]) -> None:
    traces = some_traces()
    traces.type_of = lambda event: f"[{event.source}]"
    span = traces.process(an_event(type="ann"), group="g", topic="t", partition=0, offset=1)
    assert isinstance(span._span, ReadableSpan)
    assert (span._span.attributes or {})["gateway.event.type"] == "[github]"


def test_spans_that_the_queue_drops_are_counted(some_traces: Callable[..., Traces]) -> None:
    registry = CollectorRegistry()
    traces = some_traces(metrics=Metrics(registry))
    for _ in range(MAX_WAITING + 3000):
        traces.attempt(a_delivery(), "POST", "https://hooks.example.com/secret").end_attempt(None)
    dropped = registry.get_sample_value("gateway_spans_total", {"result": "dropped"})
    assert dropped is not None
    assert 0 < dropped <= 3000


@pytest.mark.parametrize(
    "parents",
    [("00-0-0-01",), (SENT[0][1], SENT[0][1]), (f"00-{'0' * 32}-{PARENT}-01",), (f"ff-{TRACE}-{PARENT}-01",)],
)
def test_a_parent_that_is_none_begins_a_trace_of_our_own(
    some_traces: Callable[..., Traces], parents: Sequence[str]
) -> None:
    traces = some_traces()
    headers = tuple([(b"Traceparent", parent.encode()) for parent in parents])
    span = traces.receive(source="github", path="/in/github", headers=headers, began=time.time(), size=0)
    assert TRACE not in span.context.traceparent
    assert span.context.recorded_id is not None


def test_an_event_of_an_ingress_that_does_not_trace_is_continued_from_its_sender(
    some_traces: Callable[..., Traces],
) -> None:
    traces = some_traces()
    event = an_event(headers={"traceparent": SENT[0][1]})
    span = traces.process(event, group="g", topic="t", partition=0, offset=1)
    assert span.context.traceparent.startswith(f"00-{TRACE}-")


def test_of_the_rest_a_share_is_traced(some_traces: Callable[..., Traces]) -> None:
    traces = some_traces(ratio=0.25)
    recorded = [
        traces.receive(source="a", path="/", headers=(), began=0.0, size=0).context.recorded_id for _ in range(2000)
    ]
    assert 380 < sum(trace is not None for trace in recorded) < 620


def test_a_senders_decision_for_recording_counts_whatever_the_ratio(some_traces: Callable[..., Traces]) -> None:
    headers = tuple([(name.encode(), value.encode()) for name, value in SENT])
    span = some_traces(ratio=0.0).receive(source="a", path="/", headers=headers, began=0.0, size=0)
    assert span.context.recorded_id == TRACE


def test_a_context_knows_whether_it_was_recorded() -> None:
    assert TraceContext(f"00-{TRACE}-{PARENT}-01").recorded_id == TRACE
    assert TraceContext(f"00-{TRACE}-{PARENT}-03").recorded_id == TRACE
    assert TraceContext(f"00-{TRACE}-{PARENT}-02").recorded_id is None


def test_without_the_extra_the_gateway_says_so(tmp_path: Path) -> None:
    rules = tmp_path / "routes.yaml"
    rules.write_text(RULES.format(good="http://127.0.0.1:1", bad="http://127.0.0.1:1"))
    script = "import sys; sys.modules['opentelemetry'] = None; from gateway.cli import main; sys.exit(main())"
    ended = subprocess.run(
        [sys.executable, "-c", script, "run", f"--rules={rules}", f"--log=sqlite:///{tmp_path}/g.db"],
        env={**os.environ, "GATEWAY_TRACES": "http://127.0.0.1:4318"},
        capture_output=True,
        timeout=30,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert (
        "error: --traces: expected the extra: pip install 'durable-webhook-gateway[otel]', got no module"
        in ended.stderr
    )


class Slow(SpanExporter):
    """A collector that takes nothing before the test is over, and then nothing either."""

    def __init__(self) -> None:
        self.over = threading.Event()

    @override
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.over.wait()
        return SpanExportResult.FAILURE


@pytest.fixture
def some_traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Traces]]:
    """Make traces whose collector is slow. No thread of theirs outlives the test."""
    slow, made = Slow(), list[Traces]()
    monkeypatch.setattr("gateway.telemetry.traces.OTLPSpanExporter", lambda **_: slow)

    def make(*, ratio: float = 1.0, metrics: Metrics | None = None) -> Traces:
        metrics = metrics or Metrics(CollectorRegistry())
        address, system = "http://127.0.0.1:1", "kafka"
        made.append(
            Traces(address, ratio=ratio, version="1", instance="here", system=system, metrics=metrics, logger=QUIET)
        )
        return made[-1]

    yield make
    slow.over.set()
    for traces in made:
        traces.close()
    assert not [thread.name for thread in threading.enumerate() if "Span" in thread.name or "traces" in thread.name]


def a_gateway(folder: Path, rules: str, collector: str, *flags: str) -> GatewayProcess:
    environ = {"GATEWAY_TRACES": collector, **dict(_variable(flag) for flag in flags)}
    return GatewayProcess(folder, rules=rules, log=f"sqlite:///{folder}/gateway.db", environ=environ)


def _variable(flag: str) -> tuple[str, str]:
    name, _, value = flag.removeprefix("--").partition("=")
    return f"GATEWAY_{name.replace('-', '_').upper()}", value


def kinds(spans: Sequence[Seen]) -> Counter[str]:
    return Counter(span.kind for span in spans)


async def a_page(port: int, path: str = "/metrics") -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.0\r\nAccept: application/openmetrics-text\r\n\r\n".encode())
    page = await reader.read()
    writer.close()
    return page.partition(b"\r\n\r\n")[2].decode()
