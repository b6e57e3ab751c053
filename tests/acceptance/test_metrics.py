"""What /metrics says adds up: no delivery is forgotten by the books."""

import asyncio
from pathlib import Path

from tests.acceptance.conftest import SOURCES, LogPlace
from tests.gateway_process import GatewayProcess, Metrics
from tests.load import Load, report
from tests.sink import Sink

RULES = (
    SOURCES
    + """
destinations:
  good: {{url: "{good}"}}
  gone: {{url: "{gone}"}}
  soon: {{url: "{soon}"}}
  later: {{url: "{later}"}}
routes:
  - {{name: ended, from: github, to: [good, gone]}}
  - {{name: soon, from: github, match: {{body.n: {{lt: 50}}}}, to: [soon], retry: {{schedule: [4s], max_attempts: 99}}}}
  - {{name: later, from: github, match: {{type: push}}, to: [later], retry: {{schedule: [1h]}}}}
  - {{name: never, from: github, match: {{type: nothing}}, to: [good]}}
"""
)
MATCHED = 3
"""Deliveries of each event: two of `ended` and one of `later`."""
SOON = 50
"""Those of `soon`: as many as its lane takes, so that they stay in memory, where no record stands for them."""


async def test_events_times_matched_destinations_are_deliveries_finished_and_pending(
    place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    events = 5000 if is_full else 300
    async with Sink(200) as good, Sink(410) as gone, Sink(425) as soon, Sink(425) as later:
        rules = RULES.format(good=good.url, gone=gone.url, soon=soon.url, later=later.url)
        async with GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix) as gateway:
            load = Load(gateway.port, rate=500)
            await load.send(events)
            await good.received(events, timeout=30)
            metrics = await gateway.metrics()
            for _ in range(40):  # gauges are a second old at most
                if sum(_books(metrics).values()) == events * MATCHED + SOON:
                    break
                await asyncio.sleep(0.25)
                metrics = await gateway.metrics()
            books = _books(metrics)
            report(f"{events} events, {MATCHED} deliveries each and {SOON} more, {place.kind}: {books}")
            assert metrics.sum("gateway_events_total") == events
            assert sum(books.values()) == events * MATCHED + SOON, gateway.story()
            assert (books["delivered"], books["dead_lettered"]) == (events, events)
            assert metrics.sum("gateway_dead_letters_total", reason="gone") == events
            assert metrics.sum("gateway_unrouted_total") == 0


def _books(metrics: Metrics) -> dict[str, float]:
    finished = {
        outcome: metrics.sum("gateway_deliveries_total", outcome=outcome)
        for outcome in ("delivered", "dead_lettered", "dropped")
    }
    pending = {
        name: metrics.sum(f"gateway_{name}") for name in ("deliveries_in_flight", "deliveries_waiting", "retry_backlog")
    }
    return finished | pending
