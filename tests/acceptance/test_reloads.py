"""New rules under load: each event follows one version of them, none is lost, and none waits for a reload."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from statistics import quantiles

import pytest

from tests.acceptance.conftest import SOURCES, LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import Load, report
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RATE, LIGHT = 1000.0, 200.0
"""Events a second: with `--full`, and beside other tests."""
OTHERS = 200
"""Routes beside the one that matches."""
PAUSE = 0.7
"""Seconds between two reloads."""
SPIKE = 0.02
"""Seconds by which reloads in a row may make acknowledgements late, at the 99th percentile."""


def rules(to: str, sinks: dict[str, str]) -> str:
    """Return the version that delivers to one of the sinks: each event by one route, a fifth by another as well."""
    others = [f"  - {{name: r{n}, from: github, match: {{type: other-{n}}}, to: [{to}]}}" for n in range(OTHERS)]
    lines = [
        SOURCES.format(),
        "destinations:",
        *[f'  {name}: {{url: "{url}"}}' for name, url in sinks.items()],
        "routes:",
        f"  - {{name: one, from: github, to: {to}}}",
        f"  - {{name: other, from: github, to: {to}, sample: 20%}}",
        *others,
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.timeout(240)
async def test_each_event_follows_one_version_and_none_is_lost_or_late(
    embedded_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    reloads, rate = (100, RATE) if is_full else (8, LIGHT)
    async with Sink(path="") as old, Sink(path="") as new:
        sinks = {"old": old.url, "new": new.url}
        versions = [rules(name, sinks) for name in sinks]
        async with GatewayProcess(folder, rules=versions[0], log=embedded_place.url) as gateway:
            load, quiet = Load(gateway.port, rate=rate), Load(gateway.port, rate=rate, first=10**6)
            await quiet.send_for(10.0 if is_full else 3.0)
            stopped = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(load.send_until(stopped))
                for number in range(1, reloads + 1):
                    await asyncio.sleep(PAUSE)
                    gateway.rules.write_text(versions[number % 2])
                    gateway.signal(signal.SIGHUP)
                await asyncio.sleep(PAUSE)
                stopped.set()
            # On a busy machine one reload may be for two writes.
            assert len(gateway.lines("rules_reloaded")) > reloads / 2
            acknowledged = load.acknowledged
            assert load.statuses().keys() == {202}
            await arrived({*acknowledged, *quiet.acknowledged}, old, new)
        came = {
            name: Counter(
                (request.header("gateway-event-id"), request.header("gateway-route")) for request in sink.requests
            )
            for name, sink in (("old", old), ("new", new))
        }
        for event in acknowledged:
            counts = [(by[event, "one"], by[event, "other"]) for by in came.values()]
            assert counts in ([(1, 0), (0, 0)], [(0, 0), (1, 0)], [(1, 1), (0, 0)], [(0, 0), (1, 1)]), counts
        assert all(sum(by[event, "other"] for event in acknowledged) > 0 for by in came.values())
        usual, late = (
            quantiles([each.answered_at - each.at for each in sender.answers], n=100)[98] for sender in (quiet, load)
        )
        report(f"acknowledged within {1000 * usual:.1f} ms (p99), and {1000 * late:.1f} ms amid {reloads} reloads")
        if is_full:  # beside other tests, it says how busy the machine is
            assert late < usual + SPIKE


async def arrived(events: Collection[str], *sinks: Sink, timeout: float = 60.0) -> None:
    """Wait until each event has come to one of the sinks, and nothing more comes."""
    until, before = time.monotonic() + timeout, -1
    while time.monotonic() < until:
        came = [request.header("gateway-event-id") or "" for sink in sinks for request in sink.requests]
        if set(events) <= set(came) and len(came) == before:
            return
        before = len(came)
        await asyncio.sleep(0.5)
