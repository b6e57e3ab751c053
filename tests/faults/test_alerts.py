"""Each alert, fired by its fault: a real Prometheus with the rules of deploy/, real gateways on a real Kafka.

The rules are those of deploy/prometheus/rules with every length of time in them divided by FASTER (`shortened`), so
that a window of six hours is two and a half minutes; the expressions stay as they are. What the gateway itself waits
for, such as the ten seconds between two looks at the log, can't be made shorter.
"""

import asyncio
import base64
import dataclasses
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest
import yaml
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from typing_extensions import override

from gateway.ingress.quarantine import MAX_BODY
from gateway.log.kafka.log import KafkaLog
from gateway.log.topics import Topics
from tests.acceptance.conftest import LogPlace, operators
from tests.certificates import Authority
from tests.conftest import start_broker
from tests.deploy.conftest import tool
from tests.faults.test_disk import Disk
from tests.gateway_process import GatewayProcess, free_ports
from tests.load import SECRET, Load, post, signed_post
from tests.sink import Answer, Request, Sink

if TYPE_CHECKING:
    from dev.kafka import Broker

__all__ = ["tool"]

ROOT = Path(__file__).parent.parent.parent
RULES = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
ALERTMANAGER = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"

FASTER = 150
LONGEST_FOR = 3.0
"""Seconds: a `for` of a day would still be ten minutes."""
EVERY = 0.5
"""Seconds between two scrapes, and between two evaluations: four of them in the shortest window."""
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION = re.compile(r"(?<=\[)(\d+)(ms|s|m|h|d)(?=:?\])|(?<=offset )(\d+)(ms|s|m|h|d)\b")
PRODUCT = re.compile(r"\b(\d+) \* (60|3600|86400)\b")

PATIENT = {"job_name": "patient", "scrape_interval": "2s", "scrape_timeout": "2s"}
"""A second look at the routers. One that has no time to spare takes longer for its metrics than EVERY, though far less
than the 10 s that it has outside of tests."""

SOON = 40.0
"""Seconds within which a fault is noticed, and that it is over."""
AT_LAST = 240.0
"""Seconds until the longest window that an alert has to clear, six hours, has forgotten a fault."""
RATE = 150.0
HISTORY = 60.0
"""Seconds for which it is known that `crm` sent as much a day ago."""
ROUTES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["SECRET"]}}
  crm: {verify: {scheme: github, secrets: ["SECRET"]}, key: body.account}
  billing: {verify: {scheme: github, secrets: ["SECRET"]}, quarantine: true}
  shop: {verify: {scheme: github, secrets: ["SECRET"]}, dedupe: 1h}
  ledger: {verify: {scheme: github, secrets: ["SECRET"]}}
destinations:
  healthy: {url: "URL/healthy"}
  failing: {url: "URL/failing", timeout: 2s}
  # Of their own, as the breaker of `failing` opens, and nothing is tried there any more.
  refusing: {url: "URL/failing"}
  rejecting: {url: "URL/failing"}
  denying: {url: "URL/denying"}
  idle:
    url: https://127.0.0.1:1/
    tls: {certificate: "${file:client.pem}", key: "${file:client.key}"}
routes:
  - {name: all, from: github, to: [healthy, failing], retry: {schedule: [5s], max_attempts: 100}}
  - {name: strict, from: github, match: {body.n: {lt: 0}}, to: idle}
  - {name: booked, from: ledger, to: healthy}
  - {name: sales, from: shop, match: {body.n: {gte: 0}}, to: healthy}
  - {name: denied, from: shop, match: {body.kind: denied}, to: denying, retry: {schedule: [1s], max_attempts: 1}}
  - {name: impatient, from: billing, to: refusing, retry: {schedule: [1s], max_attempts: 1}}
  - {name: mirror, from: crm, to: failing, order: key, retry: {schedule: [1s], max_attempts: 1000}}
  - {name: halting, from: crm, to: rejecting, order: key, on_exhausted: halt, retry: {schedule: [1s], max_attempts: 1}}
""".replace("SECRET", SECRET)
NUMBERS = f"[{','.join(map(str, range(13)))}]"
SPOOL_BYTES = 64 << 20
"""The smallest spool that there is."""
LARGE = 900_000
PAGE = 8192
EXPENSIVE = f"{NUMBERS}.exists(a, {NUMBERS}.exists(b, {NUMBERS}.exists(c, a + b + c + body.n < 0)))"
"""Takes 1.5 ms for each event, so that a router matches some 500 a second."""


def shortened(text: str) -> str:
    """Return a file of rules with every length of time in it divided by FASTER."""

    def duration(found: re.Match[str]) -> str:
        number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
        return f"{round(int(number) * UNITS[unit] * 1000 / FASTER)}ms"

    document = yaml.safe_load(text)
    for group in document["groups"]:
        for rule in group["rules"]:
            expr = DURATION.sub(duration, rule["expr"])
            rule["expr"] = PRODUCT.sub(lambda found: f"{int(found[1]) * int(found[2]) / FASTER:g}", expr)
            if "for" in rule:
                seconds = min(LONGEST_FOR, int(rule["for"][:-1]) * UNITS[rule["for"][-1]] / FASTER)
                rule["for"] = f"{round(seconds * 1000)}ms"
    return yaml.safe_dump(document, sort_keys=False, width=1000)


class Row(NamedTuple):
    """What became of one alert: seconds from its fault until it fired, and from the fixing until it had cleared.

    None for what hasn't come to pass. One that had ceased before the fixing cleared early: its window is 150 times
    shorter than outside of tests, but a destination that is down is asked as seldom as there, and dies only once.
    """

    alert: str
    fault: str
    fired: float | None
    cleared: float | None
    was_early: bool

    @property
    def told(self) -> str:
        fired, cleared = ["-" if each is None else f"{each:.1f} s" for each in (self.fired, self.cleared)]
        return f"{self.alert:42} {self.fault:48} {fired:>11} {'before' if self.was_early else cleared:>13}"


@dataclasses.dataclass(slots=True, kw_only=True)
class Fault:
    """A fault, from when on it was there, and from when on it wasn't. `time.monotonic()`."""

    name: str
    alerts: tuple[str, ...]
    began: float
    fixed: float | None = None


class Watch:
    """What Prometheus says of its alerts, asked all the time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._times: dict[str, list[list[float]]] = {}
        """When each alert began to fire, and ceased to, as far as it has."""
        self.faults: list[Fault] = []

    async def look(self) -> None:
        """Note when alerts fire and clear, until it is cancelled."""
        while True:
            answer = await asyncio.to_thread(_get, f"{self._url}/api/v1/alerts")
            firing = {each["labels"]["alertname"] for each in answer["data"]["alerts"] if each["state"] == "firing"}
            now = time.monotonic()
            for name in firing - self.firing:
                self._times.setdefault(name, []).append([now])
            for name in self.firing - firing:
                self._times[name][-1].append(now)
            await asyncio.sleep(EVERY / 2)

    @property
    def firing(self) -> set[str]:
        return {name for name, times in self._times.items() if len(times[-1]) == 1}

    def fired(self, alert: str, since: float) -> float | None:
        """Return when an alert fired for the first time since then, if it has."""
        return next((times[0] for times in self._times.get(alert, []) if times[0] >= since), None)

    @asynccontextmanager
    async def fault(self, name: str, *alerts: str) -> AsyncIterator[None]:
        """Hold that none of the alerts fires before the fault that begins here; at its end all of them do.

        What comes after it, up to `fixed`, fixes it.
        """
        assert not self.firing & set(alerts), f"{name}: {self.firing & set(alerts)} fire without it"
        self.faults.append(Fault(name=name, alerts=alerts, began=time.monotonic()))
        yield
        await self.until_fired()

    async def until_fired(self) -> None:
        """Wait until all the alerts of the last fault have fired."""
        fault, until = self.faults[-1], time.monotonic() + SOON
        while missing := [alert for alert in fault.alerts if self.fired(alert, fault.began) is None]:
            assert time.monotonic() < until, f"{fault.name}: expected {missing} to fire, got {self.firing}"
            await asyncio.sleep(EVERY)

    def fixed(self) -> None:
        """Note that the last fault is over."""
        self.faults[-1].fixed = time.monotonic()

    async def clear(self, *but: str, timeout: float = SOON) -> None:
        """Wait until no alert fires any more, but for those that have long windows."""
        until = time.monotonic() + timeout
        while firing := self.firing - set(but):
            assert time.monotonic() < until, f"{self.faults[-1].name} is over: expected no alert, got {firing}"
            await asyncio.sleep(EVERY)

    def rows(self) -> Iterator[Row]:
        """Return what is known by now."""
        for fault in self.faults:
            for alert in fault.alerts:
                yield self._row(fault, alert)

    def _row(self, fault: Fault, alert: str) -> Row:
        since = [times for times in self._times.get(alert, []) if times[0] >= fault.began]
        fired = since[0][0] - fault.began if since else None
        if fault.fixed is None or not since:
            return Row(alert, fault.name, fired, None, was_early=False)
        after = [[*times, math.inf][1] for times in since]
        after = [end for end in after if end > fault.fixed]
        cleared = after[0] - fault.fixed if after and after[0] < math.inf else None
        return Row(alert, fault.name, fired, cleared, was_early=not after)


LOG_DOWN = "GatewayLogDown"
SLOW_TO_CLEAR = ("GatewayAcknowledgementBudgetBurnsSlowly", "GatewayDeliveryBudgetBurnsSlowly")


@pytest.mark.full
@pytest.mark.timeout(900)
async def test_each_alert_fires_at_its_fault_and_clears_after_it(
    tmp_path: Path, tool: Callable[[str], Path], watches: list[Watch]
) -> None:
    async with Scenery(tmp_path, tool) as scenery:
        watch = scenery.watch
        watches.append(watch)
        await _sources(scenery)
        await watch.clear()
        await _configuration(scenery)
        await watch.clear()
        await _log(scenery)
        await watch.clear(*SLOW_TO_CLEAR)
        await _spool(scenery)
        await watch.clear(*SLOW_TO_CLEAR)
        await _records(scenery)
        await watch.clear(*SLOW_TO_CLEAR)
        await _index(scenery)
        await watch.clear(*SLOW_TO_CLEAR)
        await _destinations(scenery)
        await watch.clear(*SLOW_TO_CLEAR)
        await _overload(scenery)
        await watch.clear(*SLOW_TO_CLEAR)
        await _throttling(scenery)
        await watch.clear(*SLOW_TO_CLEAR)
        await _lines(scenery)
        await watch.clear(*SLOW_TO_CLEAR)
        await _processes(scenery)
        await watch.clear(timeout=AT_LAST)
        rows = list(watch.rows())
    assert {row.alert for row in rows} == set(re.findall(r"alert: (\w+)", "".join(_texts())))
    assert all(row.fired is not None and (row.cleared is not None or row.was_early) for row in rows)


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_a_full_disk_fires_the_alert_whose_runbook_names_it_and_clears_when_there_is_room(
    tmp_path: Path, tool: Callable[[str], Path], watches: list[Watch]
) -> None:
    async with SmallScenery(tmp_path, tool) as scenery:
        watch, [gateway] = scenery.watch, scenery.routers
        watches.append(watch)
        await asyncio.sleep(5)
        await watch.clear()  # of what nobody had scraped before
        with ExitStack() as full:
            async with watch.fault("the disk of the embedded log is full", LOG_DOWN), scenery.flood(4 * RATE):
                full.enter_context(scenery.disk.full(gateway))
                await gateway.line("log_unavailable", timeout=SOON)
            [told] = [each for each in await scenery.told(LOG_DOWN) if each["labels"]["alertname"] == LOG_DOWN]
            assert told["receivers"] == [{"name": "page"}]
            reason = re.search(r"gateway\.db: (.+) \(SQLITE_", (await gateway.line("log_unavailable"))["error"])
            assert reason is not None
            runbook, _, anchor = told["annotations"]["runbook_url"].partition("#")
            sections = re.split(r"^### ", (ROOT / runbook).read_text(), flags=re.MULTILINE)
            [section] = [each for each in sections if each.partition("\n")[0].lower() == anchor]
            text = re.sub(r"\d+", "…", reason[1])
            assert all(part in " ".join(section.split()) for part in text.split(": ")), text
            assert (await gateway.metrics()).sum("gateway_log_up") == 0
            with pytest.raises(AssertionError, match=r"503 Service Unavailable.*log: .*SQLITE_"):
                await gateway.ready(timeout=0)
        watch.fixed()
        await gateway.ready(timeout=SOON)
        assert (await gateway.metrics()).sum("gateway_log_up") == 1
        await gateway.line("log_available")
        await watch.clear(*SLOW_TO_CLEAR)
        rows = {row.alert: row for row in watch.rows()}
    assert rows.keys() == {LOG_DOWN}
    assert rows[LOG_DOWN].cleared is not None


def test_the_rules_are_shortened_and_otherwise_unchanged() -> None:
    expr = "sum(rate(a[5m])) > 14.4 * 0.01 and b - time() < 14 * 86400 and c > c offset 1d and max_over_time((d)[10m:])"
    rule = {"alert": "A", "expr": expr, "for": "1d", "labels": {"severity": "page"}}
    [group] = yaml.safe_load(shortened(yaml.safe_dump({"groups": [{"name": "g", "rules": [rule]}]})))["groups"]
    shorter = "sum(rate(a[2000ms])) > 14.4 * 0.01 and b - time() < 8064 and c > c offset 576000ms"
    shorter += " and max_over_time((d)[4000ms:])"
    assert group["rules"] == [rule | {"expr": shorter, "for": "3000ms"}]


# ---- Scenes ----


async def _configuration(scenery: "Scenery") -> None:
    router, _ = scenery.routers
    rules = router.rules.read_text()
    async with scenery.watch.fault("a misspelt key in one router's rules", "GatewayRulesRefused"):
        router.rules.write_text(rules.replace("destinations:", "destination:"))
    router.rules.write_text(rules)
    scenery.watch.fixed()
    await scenery.watch.clear()
    names = ("GatewayCertificateExpires", "GatewayCertificateExpiresSoon")
    async with scenery.watch.fault("a client certificate with minutes left", *names):
        scenery.issue(timedelta(days=1) / FASTER)
    scenery.issue(timedelta(days=30))
    scenery.watch.fixed()


async def _sources(scenery: "Scenery") -> None:
    """`crm` sent events a day and a week ago (`_write_history`), and sends none now. All of `billing`'s are forged."""
    watch = scenery.watch
    async with watch.fault("what sent yesterday and a week ago is silent", "GatewaySourceSilent", "GatewayRouteQuiet"):
        pass
    async with (
        watch.fault(
            "each request of a source is forged, and too large",
            "GatewaySignaturesRefused",
            "GatewayQuarantineOverflows",
        ),
        scenery.forging("/in/billing", size=MAX_BODY + 1),
    ):
        await watch.until_fired()
    watch.fixed()
    watch.faults[0].fixed = time.monotonic()
    while time.monotonic() < scenery.began + HISTORY:
        await scenery.send("/in/crm", 1)
        await scenery.send("/in/shop", 1)
        await asyncio.sleep(0.5)
    await watch.clear()
    async with watch.fault("no route takes what a source sends", "GatewaySourceUnrouted"):
        await scenery.send("/in/shop", 40, n=-1)
    watch.fixed()
    await watch.clear()
    async with watch.fault("a source sends one event again and again", "GatewayDuplicatesMany"):
        await scenery.send("/in/shop", 80, n=1, delivery="again")
    watch.fixed()
    await watch.clear()
    async with (
        watch.fault("a secret that expires within the hour is used", "GatewaySecretExpires"),
        scenery.secret_that_ends("shop", timedelta(minutes=20)),
    ):
        for _ in range(30):
            await scenery.send("/in/shop", 1)
            await asyncio.sleep(0.5)
        await watch.until_fired()
    watch.fixed()


async def _log(scenery: "Scenery") -> None:
    """Kafka hangs while deliveries fail, which would have to become records of a retry topic."""
    names = (
        "GatewayLogDown",
        "GatewayEventPendingTooLong",
        "GatewayAcknowledgementBudgetBurnsFast",
        "GatewayAcknowledgementBudgetBurnsSlowly",
    )
    async with scenery.watch.fault("kafka hangs", *names):
        scenery.is_failing = True
        await asyncio.sleep(1)  # the first of them have failed
        scenery.broker.pause()
    told = {each["labels"]["alertname"]: each for each in await scenery.told(*names)}
    assert told["GatewayLogDown"]["receivers"] == [{"name": "page"}]
    assert [name for name in names if not told[name]["status"]["inhibitedBy"]] == ["GatewayLogDown"]
    scenery.is_failing = False
    scenery.broker.resume()
    scenery.watch.fixed()
    await scenery.watch.clear(*SLOW_TO_CLEAR)
    async with scenery.watch.fault("a retry topic is deleted", "GatewayPartitionUnavailable"):
        await scenery.delete_topic("gateway.retry.20h")
    await scenery.create_topics()
    scenery.watch.fixed()
    await scenery.watch.clear(*SLOW_TO_CLEAR)
    async with scenery.watch.fault("what waits will be deleted within two days", "GatewayRetentionNear"):
        await scenery.keep("gateway.events.crm", 86400 / FASTER)
    await scenery.keep("gateway.events.crm", 7 * 86400)
    scenery.watch.fixed()


async def _spool(scenery: "Scenery") -> None:
    """What belongs to a missing topic is spooled; more comes than there is room for; its process is killed."""
    watch, process, path = scenery.watch, scenery.spooling, "/in/ledger"
    async with watch.fault("a topic of events is deleted", "GatewayEventsSpooled", "GatewaySpoolWaits"):
        await scenery.delete_topic("gateway.events.ledger")
        until = time.monotonic() + SOON
        while "GatewayEventsSpooled" not in watch.firing and time.monotonic() < until:
            await scenery.send(path, 10, process=process)
            await asyncio.sleep(0.2)
    async with watch.fault("more comes than a spool has room for", "GatewaySpoolFull"):
        filler = base64.b64encode(os.urandom(LARGE * 3 // 4)).decode()  # a topic's limit is of what is compressed
        await scenery.send(path, round(0.85 * SPOOL_BYTES / LARGE), process=process, filler=filler)
    async with watch.fault("the process of a spool is killed", "GatewaySpoolOrphaned"):
        process.kill()
    names = ("GatewaySpoolEventsLost", "GatewaySpoolEventTooLarge")
    async with watch.fault("a damaged page of a spool, and a smaller topic", *names):
        with scenery.spool.open("r+b") as file:
            file.seek(PAGE * 300)  # in the middle of a large event
            file.write(os.urandom(PAGE))
        await scenery.create_small_topic("gateway.events.ledger", LARGE // 2)  # it would make a missing one itself
        await process.start()
    process.kill()  # it would try again within five minutes
    await scenery.take("gateway.events.ledger", 2 * LARGE)
    await process.start()
    for fault in watch.faults[-4:]:
        fault.fixed = time.monotonic()
    await process.until("gateway_spool_events", 0, timeout=SOON)


async def _records(scenery: "Scenery") -> None:
    """Others write to the gateway's topics: a program that has nothing to do there, and a version of tomorrow."""
    names = ("GatewayRecordsUndecodable", "GatewayDeadLettersGrow")
    async with scenery.watch.fault("another program writes to a topic of events", *names):
        await scenery.write("events.github", b"k", b"not ours")
    scenery.watch.fixed()
    async with scenery.watch.fault("a newer version gives a command", "GatewayRecordsNewer"):
        await scenery.write("control", b"throttle/destination/idle", b'{"v": 2}')
    await scenery.write("control", b"throttle/destination/idle", b"")
    scenery.watch.fixed()


async def _index(scenery: "Scenery") -> None:
    """Something else is where the file of the index was."""
    file = scenery.index
    async with scenery.watch.fault("a folder in the place of the index", "GatewayIndexBehind"):
        file.unlink()
        file.mkdir()
    file.rmdir()
    scenery.watch.fixed()


async def _destinations(scenery: "Scenery") -> None:
    """A destination answers 503 for more than the 30 s within which its deliveries have to be there."""
    names = (
        "GatewayBreakerOpenLong",
        "GatewayDeadLettersGrow",
        "GatewayOrderedKeysHalted",
        "GatewayOrderedRouteBehind",
        "GatewayDeliveryBudgetBurnsFast",
        "GatewayDeliveryBudgetBurnsSlowly",
    )
    async with scenery.watch.fault("the topic of attempts is deleted", "GatewayAttemptsUnrecorded"):
        await scenery.delete_topic("gateway.attempts")
        until = time.monotonic() + SOON
        while "GatewayAttemptsUnrecorded" not in scenery.watch.firing and time.monotonic() < until:
            await scenery.send("/in/shop", 5, n=1, kind="denied")
            await asyncio.sleep(0.5)
    await scenery.create_topics()
    scenery.watch.fixed()
    await scenery.watch.clear(*SLOW_TO_CLEAR)
    async with scenery.watch.fault("a destination answers 401", "GatewayCredentialsRefused"):
        await scenery.send("/in/shop", 10, n=1, kind="denied")
    scenery.watch.fixed()
    await scenery.watch.clear(*SLOW_TO_CLEAR)
    async with scenery.watch.fault("a destination answers 503", *names):
        scenery.is_failing = True
        await scenery.send("/in/crm", 2)
        await scenery.send("/in/billing", 2)
    scenery.is_failing = False
    scenery.watch.fixed()
    async with scenery.commands() as commands:
        for destination in ("failing", "rejecting"):
            placed = await commands.kick(f"destination/{destination}")
            assert await commands.finished(placed, timeout=SOON)
    await scenery.watch.clear(*SLOW_TO_CLEAR)
    async with (
        scenery.watch.fault("a destination is paused, and nobody resumes it", "GatewayParkedTooLong", "GatewayPaused"),
        scenery.commands() as commands,
    ):
        await commands.pause("destination/failing")
    async with scenery.commands() as commands:
        assert await commands.resume("destination/failing") is not None
    scenery.watch.fixed()
    scenery.is_busy = True
    async with scenery.watch.fault("a destination asks for an hour of silence", "GatewayDestinationHeld"):
        await scenery.send("/in/github", 2)
    scenery.is_busy = False
    scenery.watch.fixed()
    async with scenery.commands() as commands:
        assert await commands.finished(await commands.kick("destination/failing"), timeout=SOON)


async def _overload(scenery: "Scenery") -> None:
    """One router is left, an expensive expression comes with a reload, and six times as many events."""
    first, second = scenery.routers
    rules = first.rules.read_text()
    async with scenery.watch.fault("more events than a router can match", "GatewayLagGrows"), scenery.flood(5 * RATE):
        await second.stop()
        first.rules.write_text(rules + f'  - {{name: expensive, from: github, when: "{EXPENSIVE}", to: healthy}}\n')
        await scenery.watch.until_fired()
    scenery.watch.fixed()
    first.rules.write_text(rules)
    await second.start()


async def _throttling(scenery: "Scenery") -> None:
    """A process is given the processor for a part of the time only, as one beyond its quota is.

    It looks four times a second how late it is, so it sees up to 0.25 s less than a standstill: more than the alert's
    0.25 s of each. And the shortest window, of four scrapes, has one of them between any two that succeeded.
    """
    router, _ = scenery.routers
    async with scenery.watch.fault("a router stands still for 0.6 s in every 0.9", "GatewayEventLoopLags"):
        until = time.monotonic() + SOON
        while "GatewayEventLoopLags" not in scenery.watch.firing and time.monotonic() < until:
            router.signal(signal.SIGSTOP)
            await asyncio.sleep(0.6)
            router.signal(signal.SIGCONT)
            await asyncio.sleep(0.3)
    scenery.watch.fixed()


async def _lines(scenery: "Scenery") -> None:
    """The disk that a process's lines go to takes no more: no file of this process may grow."""
    pid = scenery.ingress.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    async with scenery.watch.fault("no more of a process's lines can be written", "GatewayLogLinesDropped"):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    scenery.watch.fixed()
    await scenery.ingress.line("log_lines_dropped", timeout=SOON)


async def _processes(scenery: "Scenery") -> None:
    first, second = scenery.routers
    async with scenery.watch.fault("one of two routers is killed", "GatewayProcessDown"):
        first.kill()
    async with scenery.watch.fault("the other one is killed, too", "GatewayAllDown"):
        second.kill()
    await scenery.stop_sending()
    async with scenery.watch.fault("what no router has read is deleted", "GatewayRecordsLost"):
        await scenery.delete_records()
        for router in scenery.routers:
            await router.start()
        for fault in scenery.watch.faults[-3:]:
            fault.fixed = time.monotonic()


class Scenery:
    """Kafka, three kinds of gateways, Prometheus and Alertmanager, and a sender that goes on. A context manager."""

    def __init__(self, folder: Path, tool: Callable[[str], Path]) -> None:
        self.is_failing = False
        self.is_busy = False
        self.began = 0.0
        self.broker: Broker
        self.routers: list[GatewayProcess] = []
        self.watch: Watch
        self._folder = folder
        self._tool = tool
        self._sink = Sink(self._answer, path="")
        self._place: LogPlace
        self._authority = Authority()
        self._stack = AsyncExitStack()
        self._stopped = asyncio.Event()
        self.ingress: GatewayProcess
        self.spooling: GatewayProcess
        self._alertmanager = ""
        self._sending: asyncio.Task[None]
        self._count = 0

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _begin(self) -> None:
        for name in ("prometheus", "promtool", "alertmanager"):
            self._tool(name)
        await self._stack.enter_async_context(self._sink)
        jobs = await self._start_gateways()
        self._alertmanager = await self._stack.enter_async_context(self._start_alertmanager())
        url = await self._stack.enter_async_context(self._start_prometheus(jobs))
        self.watch = Watch(url)
        self.began = time.monotonic()
        tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
        looking = tasks.create_task(self.watch.look())
        load = Load(self.ingress.port, rate=RATE, connections=1000)
        self._sending = tasks.create_task(load.send_until(self._stopped))
        self._stack.callback(looking.cancel)
        self._stack.callback(self._stopped.set)

    async def _start_gateways(self) -> Mapping[str, list[GatewayProcess]]:
        """Start the log and the gateways, and return these by their jobs."""
        self.broker = await asyncio.to_thread(start_broker)
        self._stack.callback(self.broker.stop)
        self._place = LogPlace(url=f"kafka://{self.broker.address}", prefix="gateway.")
        self.ingress = await self._gateway("ingress", "ingress")
        self.routers = [await self._gateway(name, "router") for name in ("first", "second")]
        spool = {"GATEWAY_SPOOL": f"sqlite:///{self.spool}", "GATEWAY_SPOOL_BYTES": f"{SPOOL_BYTES}B"}
        self.spooling = await self._gateway("spooling", "ingress", **spool)
        console = await self._gateway("console", "console", GATEWAY_INDEX=str(self.index))
        ingresses = [self.ingress, self.spooling]
        return {"gateway-ingress": ingresses, "gateway-router": self.routers, "gateway-console": [console]}

    @property
    def index(self) -> Path:
        """The file of the console's index."""
        return self._folder / "console" / "index.db"

    @property
    def spool(self) -> Path:
        """The file of the spool."""
        return self._folder / "spool.db"

    async def _gateway(self, name: str, role: str, **environ: str) -> GatewayProcess:
        folder = self._folder / name
        folder.mkdir()
        self._issue(folder, timedelta(days=30))
        rules = ROUTES.replace("URL", f"http://127.0.0.1:{self._sink.port}")
        environ = {"GATEWAY_ROLE": role, **environ}
        gateway = GatewayProcess(folder, rules=rules, log=self._place.url, environ=environ)
        return await self._stack.enter_async_context(gateway)

    def _answer(self, request: Request) -> int | Answer:
        if self.is_busy and request.target == "/failing":
            return Answer(status=429, headers=(("Retry-After", "3600"),))
        if request.target == "/denying":
            return 401
        return 503 if self.is_failing and request.target == "/failing" else 200

    # What can be done in it.

    def issue(self, life: timedelta) -> None:
        """Renew the certificate that the routers show to a destination."""
        for router in self.routers:
            self._issue(router.rules.parent, life)

    def _issue(self, folder: Path, life: timedelta) -> None:
        certificate, key = self._authority.issue("gateway.test", life=life)
        (folder / "client.key").write_text(key)
        (folder / "client.pem").write_text(certificate)

    async def send(
        self,
        path: str,
        count: int,
        *,
        delivery: str | None = None,
        process: GatewayProcess | None = None,
        **fields: object,
    ) -> None:
        """Send events to another source than the one that is under load, and perhaps to another process."""
        for _ in range(count):
            self._count += 1
            body = json.dumps({"n": self._count, "account": f"a{self._count}", **fields}).encode()
            if delivery is not None:
                body = json.dumps({**fields}).encode()
            request = signed_post(body, delivery=delivery or f"other-{self._count}", path=path)
            status, _ = await post((process or self.ingress).port, request)
            assert status == 202

    @asynccontextmanager
    async def secret_that_ends(self, source: str, after: timedelta) -> AsyncIterator[None]:
        """Let the only secret of a source have an end, meanwhile."""
        rules = self.ingress.rules.read_text()
        until = (datetime.now(UTC) + after).isoformat(timespec="seconds")
        ending = json.dumps([{"secret": SECRET, "until": until}])
        changed = re.sub(rf'({source}: .*secrets: )\["[^]]*"\]', lambda found: found[1] + ending, rules)
        assert changed != rules
        self.ingress.rules.write_text(changed)
        await asyncio.sleep(4)  # until it is read
        yield
        self.ingress.rules.write_text(rules)

    @asynccontextmanager
    async def flood(self, rate: float) -> AsyncIterator[None]:
        """Send more events, meanwhile."""
        stopped = asyncio.Event()
        load = Load(self.ingress.port, rate=rate, connections=200, path="/in/github?more")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.send_until(stopped))
            yield
            stopped.set()

    @asynccontextmanager
    async def forging(self, path: str, *, size: int = 2) -> AsyncIterator[None]:
        """Send requests with a wrong signature, meanwhile."""

        async def forge() -> None:
            while True:
                request = signed_post(b"{".ljust(size, b"}"), delivery="forged", path=path)[:-1] + b"]"
                assert (await post(self.ingress.port, request))[0] == 401
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(forge())
            yield
            task.cancel()

    async def stop_sending(self) -> None:
        self._stopped.set()
        await self._sending

    async def delete_records(self) -> None:
        """Do what retention would: delete what nobody has read."""
        topic = f"{self._place.prefix}events.github"
        async with self._admin() as admin:
            [described] = await admin.describe_topics([topic])
            partitions = [TopicPartition(topic, each["partition"]) for each in described["partitions"]]
            await admin.delete_records({each: RecordsToDelete(before_offset=-1) for each in partitions})

    async def write(self, topic: str, key: bytes, value: bytes) -> None:
        log = await KafkaLog.open(self.broker.address)
        try:
            await log.append(f"{self._place.prefix}{topic}", key=key, value=value, headers=[])
        finally:
            await log.close()

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.broker.address)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()

    async def delete_topic(self, topic: str) -> None:
        async with self._admin() as admin:
            await admin.delete_topics([topic])

    async def keep(self, topic: str, seconds: float) -> None:
        """Change how long a topic keeps its records."""
        await self._configure(topic, "retention.ms", 1000 * seconds)

    async def take(self, topic: str, size: int) -> None:
        """Change how large a topic's records may be."""
        await self._configure(topic, "max.message.bytes", size)

    async def _configure(self, topic: str, name: str, value: float) -> None:
        settings = {name: str(round(value)), "message.timestamp.type": "LogAppendTime"}
        async with self._admin() as admin:
            await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, settings)])

    async def create_topics(self, *events: str) -> None:
        """Make what is missing, as `gateway topics create` does."""
        log = await KafkaLog.open(self.broker.address)
        try:
            await log.create(Topics(self._place.prefix).specs(events))
        finally:
            await log.close()

    async def create_small_topic(self, topic: str, size: int) -> None:
        """Make a topic of events that takes no record of more than a size."""
        [partitions] = [each.partitions for each in Topics(self._place.prefix).specs([topic]) if each.name == topic]
        settings = {"max.message.bytes": str(size), "message.timestamp.type": "LogAppendTime"}
        async with self._admin() as admin:
            await admin.create_topics([NewTopic(topic, partitions, 1, topic_configs=settings)])

    @asynccontextmanager
    async def commands(self) -> AsyncIterator[Any]:
        async with operators(self._place) as commands:
            yield commands

    async def told(self, *names: str) -> list[dict[str, Any]]:
        """Return what Alertmanager knows of the gateway as a whole, once it knows of these alerts."""
        until = time.monotonic() + SOON
        while True:
            known = await asyncio.to_thread(_get, f"{self._alertmanager}/api/v2/alerts")
            found: list[dict[str, Any]] = [each for each in known if "instance" not in each["labels"]]
            if {each["labels"]["alertname"] for each in found} >= set(names):
                return found
            assert time.monotonic() < until, f"expected Alertmanager to be told of {names}, got {found}"
            await asyncio.sleep(EVERY)

    # Prometheus and Alertmanager.

    @asynccontextmanager
    async def _start_alertmanager(self) -> AsyncIterator[str]:
        [port] = free_ports(1)
        command = [
            str(self._tool("alertmanager")),
            f"--config.file={ALERTMANAGER}",
            f"--storage.path={self._folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ]
        with _running(command, self._folder / "alertmanager.log"):
            url = f"http://127.0.0.1:{port}"
            await _until_ready(url, self._folder / "alertmanager.log")
            yield url

    @asynccontextmanager
    async def _start_prometheus(self, jobs: Mapping[str, list[GatewayProcess]]) -> AsyncIterator[str]:
        folder = self._folder / "prometheus"
        (folder / "rules").mkdir(parents=True)
        for file in RULES:
            (folder / "rules" / file.name).write_text(shortened(file.read_text()))
        every = f"{round(EVERY * 1000)}ms"
        config = {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": ["rules/*.yml"],
            "alerting": {
                "alertmanagers": [{"static_configs": [{"targets": [self._alertmanager.removeprefix("http://")]}]}]
            },
            "scrape_configs": [
                {
                    "job_name": job,
                    "static_configs": [{"targets": [f"127.0.0.1:{each.admin_port}" for each in processes]}],
                }
                for job, processes in jobs.items()
            ]
            + [PATIENT | {"static_configs": [{"targets": [f"127.0.0.1:{each.admin_port}" for each in self.routers]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        await asyncio.to_thread(self._write_history, folder)
        [port] = free_ports(1)
        command = [
            str(self._tool("prometheus")),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--query.lookback-delta=3s",
            "--rules.alert.resend-delay=1s",
        ]
        with _running(command, self._folder / "prometheus.log"):
            url = f"http://127.0.0.1:{port}"
            await _until_ready(url, self._folder / "prometheus.log")
            yield url

    def _write_history(self, folder: Path) -> None:
        """Let Prometheus know of what `crm` sent and `sales` delivered a day and a week ago, by its shortened rules."""
        now = time.time()
        lines = []
        for name, labels in (
            ("gateway_events", 'source="crm",instance="before",job="gateway-ingress"'),
            ("gateway_deliveries", 'route="sales",destination="healthy",instance="before",job="gateway-router"'),
        ):
            lines.append(f"# TYPE {name} counter")
            for ago in (7 * 86400 / FASTER, 86400 / FASTER):
                seconds = range(-60, int(HISTORY) - 30)  # what is a window's length ago is still looked at
                lines += [f"{name}_total{{{labels}}} {second + 60} {now - ago + second:.3f}" for second in seconds]
        file = folder / "history.txt"
        file.write_text("\n".join([*lines, "# EOF\n"]))
        command = (self._tool("promtool"), "tsdb", "create-blocks-from", "openmetrics", file, folder / "data")
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, result.stderr


class SmallScenery(Scenery):
    """One gateway on the embedded log, beside the same Prometheus, which knows of nothing before it."""

    def __init__(self, folder: Path, tool: Callable[[str], Path]) -> None:
        super().__init__(folder, tool)
        self.disk = Disk(folder / "disk")

    @override
    async def _start_gateways(self) -> Mapping[str, list[GatewayProcess]]:
        self.disk.folder.mkdir()
        self._place = LogPlace(url=f"sqlite:///{self.disk.folder / 'gateway.db'}", prefix="gateway.")
        self.ingress = await self._gateway("gateway", "all")
        self.routers = [self.ingress]
        return {"gateway-all": self.routers}

    @override
    def _write_history(self, folder: Path) -> None:
        """Tell nothing."""


@contextmanager
def _running(command: list[str], output: Path) -> Iterator[None]:
    with output.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


async def _until_ready(url: str, output: Path) -> None:
    until = time.monotonic() + 30
    while not await asyncio.to_thread(_is_ready, url):
        assert time.monotonic() < until, await asyncio.to_thread(output.read_text)
        await asyncio.sleep(0.1)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2):
            return True
    except OSError:
        return False


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def _texts() -> Iterator[str]:
    for file in RULES:
        yield file.read_text()


@pytest.fixture
def watches(pytestconfig: pytest.Config) -> Iterator[list[Watch]]:
    """Return what a watch goes into; its rows are shown when the test is over, however it ended."""
    watches: list[Watch] = []
    yield watches
    if not watches:
        return
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        lines = [f"{'alert':42} {'fault':48} {'fired after':>11} {'cleared after':>13}"]
        lines += [row.told for watch in watches for row in watch.rows()]
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
