"""Starting, stopping, reloading, and standing beside another one, all under load."""

import asyncio
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.acceptance.conftest import RULES, SOURCES, LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import Ledger, Load, all_delivered, deliveries, post, report, signed_post
from tests.sink import Answer, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

ONE = (
    SOURCES
    + """
destinations:
  first: {{url: "{first}"}}
  second: {{url: "{second}"}}
routes:
  - {{name: all, from: github, to: [first]}}
"""
)
"""Both name both destinations: a delivery that waits for one that is gone waits for a minute, and then again."""
OTHER = (
    SOURCES
    + """
  shop: {{verify: {{scheme: none}}}}
destinations:
  first: {{url: "{first}"}}
  second: {{url: "{second}"}}
routes:
  - {{name: all, from: [github, shop], to: [second]}}
"""
)
DRAIN = 25.0
QUICK_STOP = 10.0
MANY_ROUTES = 2000
"""Their page of metrics is more than the buffers of two sockets take."""
QUIET = 6.0
"""Seconds after the last event in which a second copy of one would come: the shortest tier, and a moment."""
SLOW = Answer(delay=0.2)
"""So that there is always much under way."""


async def test_sigterm_under_load_ends_in_time_without_loss_and_without_a_duplicate(
    long_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    rate = 1000.0 if is_full else 300.0
    async with Sink(SLOW, path="/first") as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with GatewayProcess(folder, rules=rules, log=long_place.url, prefix=long_place.prefix) as gateway:
            load = Load(gateway.port, rate=rate)
            sending = asyncio.create_task(load.send_for(5))
            acknowledged = 0
            for _ in range(2):
                await asyncio.sleep(1)
                assert len(load.acknowledged) > acknowledged or sending.done()
                acknowledged = len(load.acknowledged)
                began = time.monotonic()
                code = await gateway.stop()
                seconds = time.monotonic() - began
                report(f"SIGTERM under {rate:g}/s, {long_place.kind}: exit {code} after {seconds:.1f} s")
                assert code == 0, gateway.story()
                assert seconds < DRAIN
                assert not gateway.lines("drain_cut_short")
                await gateway.start()
            await sending
            await all_delivered(load.acknowledged, first, second, timeout=30)
            if is_full:
                await asyncio.sleep(QUIET)
            ledgers = [Ledger.of(sink, load.acknowledged) for sink in (first, second)]
            report(dict(load.statuses()), *ledgers)
            assert [(ledger.lost, ledger.duplicated) for ledger in ledgers] == [(0, 0)] * 2, gateway.story()
            assert load.statuses().keys() <= {202, 503, 0}
            assert len(load.acknowledged) > rate, "more than in one of the five seconds"


async def test_rules_are_reloaded_under_load_and_bad_ones_are_refused(long_place: LogPlace, folder: Path) -> None:
    async with Sink(path="/first") as first, Sink(path="/second") as second:
        one, other = [text.format(first=first.url, second=second.url) for text in (ONE, OTHER)]
        async with GatewayProcess(folder, rules=one, log=long_place.url, prefix=long_place.prefix) as gateway:
            load = Load(gateway.port, rate=300)
            sending = asyncio.create_task(load.send_for(10))
            await first.received(50)

            gateway.rules.write_text(other)  # seen by itself
            await gateway.until("gateway_rules_reloads_total", 1, result="ok")
            await second.received(50)
            answer = await post(gateway.port, signed_post(b"of a new source", delivery="1", path="/in/shop"))
            assert answer[0] == 202

            gateway.rules.write_text(other + "  - {nonsense: 1}\n")
            await gateway.until("gateway_rules_reloads_total", 1, result="error")
            so_far = len(second.requests)
            await second.received(so_far + 50)

            gateway.rules.write_text(one)
            gateway.signal(signal.SIGHUP)
            await gateway.until("gateway_rules_reloads_total", 2, result="ok")
            so_far = len(first.requests)
            await first.received(so_far + 50)

            await sending
            await first.received(load.acknowledged_count + 1 - len(second.requests), timeout=15)
            await asyncio.sleep(0.5)  # for a duplicate to show itself
            counts = deliveries(first) + deliveries(second)
            lost = load.acknowledged.keys() - counts.keys()
            report(
                f"reloaded twice, {long_place.kind}: {load.acknowledged_count} acknowledged, {len(lost)} lost, "
                f"{sum(counts.values()) - len(counts)} duplicated; {dict(load.statuses())}"
            )
            assert not lost, gateway.story()
            assert sum(counts.values()) == len(counts)
            assert load.statuses().keys() == {202}
            assert any(request.body == b"of a new source" for request in second.requests)


@pytest.mark.timeout(180)
async def test_one_of_two_gateways_on_a_port_is_killed_and_the_other_takes_over(
    kafka_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    place, rate = kafka_place, 600.0 if is_full else 300.0
    beside = folder / "beside"
    beside.mkdir()
    async with Sink(path="/first") as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with (
            GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix) as gateway,
            GatewayProcess(beside, rules=rules, log=place.url, prefix=place.prefix, beside=gateway) as victim,
        ):
            load = Load(gateway.port, rate=rate)
            sending = asyncio.create_task(load.send_for(12 if is_full else 8))
            await asyncio.sleep(5)  # a member that comes is balanced with the next heartbeat, and has begun by then
            owned = [(await each.metrics()).sum("gateway_attempts_total") for each in (gateway, victim)]
            await asyncio.to_thread(victim.kill)
            if not is_full:
                # One that comes back in its place takes the dead one out of the group; else its session ends first.
                await victim.start()
            await sending
            await all_delivered(load.acknowledged, first, second, timeout=100)
            ledgers = [Ledger.of(sink, load.acknowledged) for sink in (first, second)]
            report(
                f"two gateways under {rate:g}/s, one killed: attempts before {owned}", dict(load.statuses()), *ledgers
            )
            assert all(owned), "expected both to have partitions"
            assert [ledger.lost for ledger in ledgers] == [0, 0], gateway.story()


async def test_a_scraper_that_reads_nothing_holds_no_stop_up(embedded_place: LogPlace, folder: Path) -> None:
    rules = [SOURCES.format(), "destinations:", '  ci: {url: "http://127.0.0.1:1/"}', "routes:"]
    rules += [f"  - {{name: route-{number}, from: github, to: ci}}" for number in range(MANY_ROUTES)]
    async with GatewayProcess(folder, rules="\n".join(rules), log=embedded_place.url) as gateway:
        with socket.socket() as scraper:
            scraper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            scraper.connect(("127.0.0.1", gateway.admin_port))
            scraper.sendall(b"GET /metrics HTTP/1.1\r\nHost: gateway\r\n\r\n")
            assert scraper.recv(1)
            began = time.monotonic()
            assert await gateway.stop() == 0, gateway.story()
            assert time.monotonic() - began < QUICK_STOP


@pytest.mark.parametrize("address", ["listen", "admin"])
async def test_a_gateway_whose_address_is_taken_may_be_started_again(
    embedded_place: LogPlace, folder: Path, address: str
) -> None:
    """It ends with 1, after which systemd does so, and not with 2: what is there may go."""
    gateway = GatewayProcess(
        folder, rules=ONE.format(first="http://127.0.0.1:1/", second="http://127.0.0.1:1/"), log=embedded_place.url
    )
    port = gateway.port if address == "listen" else gateway.admin_port
    with socket.create_server(("127.0.0.1", port)):
        gateway.spawn()
        assert await gateway.ended(timeout=10) == 1
    assert (
        f"--{address} 127.0.0.1:{port}: expected an address that is free, got address already in use" in gateway.story()
    )


async def test_a_second_gateway_on_the_same_embedded_log_is_refused(embedded_place: LogPlace, folder: Path) -> None:
    async with Sink() as sink:
        rules = ONE.format(first=sink.url, second=sink.url)
        async with GatewayProcess(folder, rules=rules, log=embedded_place.url) as gateway:
            second = GatewayProcess(folder, rules=rules, log=embedded_place.url)
            second.spawn()
            assert await second.ended(timeout=10) == 1
            assert f"is in use by another gateway (pid {gateway.pid})" in second.story()
            await Load(gateway.port, rate=100).send(5)
            await sink.received(5)
