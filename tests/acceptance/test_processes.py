"""Several processes of one `gateway run`, on Kafka: they share the work, and end and are replaced as one."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import pytest

from gateway.log.records import encode_event
from gateway.log.topics import Topics
from gateway.processes.front import HEALTH_TIMEOUT
from gateway.settings import SpoolSettings
from gateway.spool.store import FileStore
from tests.acceptance.conftest import RULES, LogPlace
from tests.builders import an_event
from tests.gateway_process import GatewayProcess, Metrics
from tests.load import NO_ANSWER, Ledger, Load, all_delivered, post, report, signed_post
from tests.sink import Sink

NAMES = ("0", "1")


async def test_a_child_killed_under_load_is_started_again_and_no_acknowledged_event_is_lost(
    kafka_place: LogPlace, folder: Path
) -> None:
    async with Sink() as first, Sink() as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with _several(folder, kafka_place, rules) as gateway:
            load = Load(gateway.port, rate=400, connections=16)
            await _until_each_has_worked(gateway, load)
            first_round = load.acknowledged_count
            sending = asyncio.create_task(load.send(3000))
            await _until(lambda: load.acknowledged_count >= first_round + 1000)
            before = await gateway.metrics()
            os.kill(_children(gateway)[1], signal.SIGKILL)
            ended = await gateway.line("process_ended")
            await sending
            assert (ended["process"], ended["code"]) == (1, -signal.SIGKILL), ended
            await gateway.until("gateway_process_up", 2)
            await gateway.ready()
            after = await gateway.metrics()
            for sink in (first, second):
                await all_delivered(load.acknowledged, sink, timeout=30)
            assert await gateway.stop() == 0, gateway.story()
        assert after.sum("gateway_process_restarts_total", process="1") == 1
        taken = [before.sum("gateway_events_total", process=name) for name in NAMES]
        taken[0] = after.sum("gateway_events_total", process="0")
        assert min(taken) > 0, f"expected both to accept events, got {taken}"
        for sink in (first, second):
            ledger = Ledger.of(sink, load.acknowledged)
            report(ledger, f"accepted by each: {taken}")
            assert ledger.lost == 0, f"{ledger}\n{gateway.story()}"
        assert _alive(gateway) == []


async def test_the_metrics_of_all_are_on_one_page_and_add_up(kafka_place: LogPlace, folder: Path) -> None:
    async with Sink() as first, Sink() as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with _several(folder, kafka_place, rules) as gateway:
            load = Load(gateway.port, rate=300, connections=16)
            page = await _until_each_has_worked(gateway, load)
            assert page.sum("gateway_events_total", source="github") == len(load.acknowledged)
            assert page.sum("gateway_process_up") == 2
            text = await gateway.scrape()
            assert text.count("# TYPE gateway_events_total ") == 1

            os.kill(_children(gateway)[1], signal.SIGSTOP)
            try:
                assert (await gateway.metrics()).sum("gateway_process_up", process="1") == 0
                found = await gateway.readiness()
                assert found["reasons"] == [f"process 1: no answer within {HEALTH_TIMEOUT:g} s"], found
            finally:
                os.kill(_children(gateway)[1], signal.SIGCONT)
            await gateway.ready()


async def test_a_child_that_hangs_holds_no_new_connection(kafka_place: LogPlace, folder: Path) -> None:
    async with Sink() as first, Sink() as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with _several(folder, kafka_place, rules) as gateway:
            hanging = _children(gateway)[0]
            os.kill(hanging, signal.SIGSTOP)
            try:
                began = time.monotonic()
                posts = [post(gateway.port, signed_post(b"{}", delivery=str(n))) for n in range(60)]
                answers = await asyncio.wait_for(asyncio.gather(*posts), 10)
                report(f"60 connections while one of two hangs: the last answer after {time.monotonic() - began:.2f} s")
            finally:
                os.kill(hanging, signal.SIGCONT)
            assert [status for status, _ in answers] == [202] * 60


async def test_no_child_outlives_a_parent_that_is_killed(kafka_place: LogPlace, folder: Path) -> None:
    with TemporaryDirectory(prefix="gw-") as runtime:  # short: a unix socket's path has a hundred bytes
        async with Sink() as first:
            rules, environ = RULES.format(first=first.url, second=first.url), {"RUNTIME_DIRECTORY": runtime}
            async with _several(folder, kafka_place, rules, environ) as gateway:
                children = _children(gateway)
                assert len(_running(children)) == len(NAMES)
                assert _names_in(runtime)
                gateway.kill()
                await _until(lambda: not _running(children), timeout=5)
        assert _names_in(runtime) == []


async def test_a_reload_and_a_status_reach_all_and_the_first_has_the_pages(kafka_place: LogPlace, folder: Path) -> None:
    async with Sink() as first, Sink() as second:
        rules = RULES.format(first=first.url, second=second.url)
        environ = {"GATEWAY_INDEX": str(folder / "index.db")}
        async with _several(folder, kafka_place, rules, environ) as gateway:
            gateway.rules.write_text(rules.replace("to: [first, second]", "to: [first]"))
            gateway.signal(signal.SIGHUP)
            await _until(lambda: {line.get("process") for line in gateway.lines("rules_reloaded")} == {0, 1})
            status = await gateway.status()
            assert [each["process"] for each in status["processes"]] == [0, 1]
            assert {each["pid"] for each in status["processes"]} == set(_children(gateway))
            assert {each["role"] for each in status["processes"]} == {"all"}
            assert [each["index"] is not None for each in status["processes"]] == [True, False]
            assert not (folder / "index.process-1.db").exists()
            url = f"http://127.0.0.1:{gateway.admin_port}"
            async with aiohttp.ClientSession() as session:
                async with session.get(f"{url}/api/v1/routes") as response:
                    assert response.status == 200, await response.text()
                    assert [route["name"] for route in (await response.json())["items"]] == ["all"]
                async with session.get(f"{url}/ui/") as response:
                    assert response.status == 200
                    assert "<html" in await response.text()


async def test_a_new_gateway_takes_over_the_port_of_an_old_one(kafka_place: LogPlace, folder: Path) -> None:
    """Of four processes that share it two end, as one of two does in `test_rollout.py`: with no more refusals."""
    (folder / "new").mkdir()
    async with Sink() as first:
        rules = RULES.format(first=first.url, second=first.url)
        async with (
            _several(folder, kafka_place, rules) as old,
            _several(folder / "new", kafka_place, rules, beside=old) as new,
        ):
            load, is_over = Load(old.port, rate=100, connections=8), asyncio.Event()
            sending = asyncio.create_task(load.send_until(is_over))
            await _until(lambda: load.acknowledged_count > 100)
            assert await old.stop() == 0, old.story()
            await _until(lambda: load.acknowledged_count > 300)
            is_over.set()
            await sending
            refused = [sent for sent in load.answers if sent.status != 202]
            assert all(sent.status == NO_ANSWER or b"\r\nRetry-After: " in sent.head for sent in refused), old.story()
            assert len(refused) <= 8, f"at most one for each connection, got {load.statuses()}"
            await all_delivered(load.acknowledged, first, timeout=30)
            assert Ledger.of(first, load.acknowledged).lost == 0, new.story()


async def test_a_spool_that_a_process_has_left_is_moved_by_the_first_one(kafka_place: LogPlace, folder: Path) -> None:
    spool = SpoolSettings(file=folder / "spool.db")
    store = await FileStore.open(spool.of_process(3).file or folder, owner=True)
    topics = Topics(kafka_place.prefix)
    for number in range(20):
        event = an_event(id=f"evt_{number:064x}", body=b'{"n":%d}' % number)
        await store.append(topics.events("github"), key=b"k", value=event.body, headers=encode_event(event))
    await store.close()
    async with Sink() as first:
        environ = {"GATEWAY_SPOOL": f"sqlite:///{spool.file}"}
        rules = RULES.format(first=first.url, second=first.url)
        async with _several(folder, kafka_place, rules, environ) as gateway:
            drained = await gateway.line("spool_drained", timeout=30)
            assert (drained["process"], drained["events"]) == (0, 20), drained
            await gateway.until("gateway_spool_events", 0)
            await first.received(40)
    assert {request.body for request in first.requests} == {b'{"n":%d}' % number for number in range(20)}


async def test_what_keeps_all_from_starting_is_said_once(kafka_place: LogPlace, folder: Path) -> None:
    gateway = _gateway(folder, kafka_place, "version: 1\nsources: {github: {verify: {scheme: nonsense}}}\n")
    gateway.spawn()
    assert await gateway.ended(timeout=20) == 2
    assert gateway.story().count("nonsense") == 1, gateway.story()
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", gateway.port)
    async with taken:
        gateway.rules.write_text(RULES.format(first="http://127.0.0.1:1", second="http://127.0.0.1:2"))
        gateway.spawn()
        assert await gateway.ended(timeout=20) == 1
    assert gateway.story().count("expected an address that is free") == 1, gateway.story()
    assert gateway.lines("process_started") == []


def _gateway(
    folder: Path,
    place: LogPlace,
    rules: str,
    environ: Mapping[str, str] | None = None,
    beside: GatewayProcess | None = None,
) -> GatewayProcess:
    environ = {"GATEWAY_PROCESSES": "2", **(environ or {})}
    return GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix, environ=environ, beside=beside)


@asynccontextmanager
async def _several(
    folder: Path,
    place: LogPlace,
    rules: str,
    environ: Mapping[str, str] | None = None,
    beside: GatewayProcess | None = None,
) -> AsyncIterator[GatewayProcess]:
    """Run a gateway of two processes, which both serve."""
    async with _gateway(folder, place, rules, environ, beside) as gateway:
        await gateway.line("processes_started", timeout=30)
        yield gateway


async def _until_each_has_worked(gateway: GatewayProcess, load: Load) -> Metrics:
    """Send in rounds until each process has accepted and delivered some, and all is delivered; return the metrics.

    A process serves before the group has given it partitions, and the kernel decides which takes a connection.
    """
    async with asyncio.timeout(60):
        while True:
            await load.send(300)
            await gateway.until("gateway_deliveries_total", 2 * load.acknowledged_count, outcome="delivered")
            page = await gateway.metrics()
            names = ("gateway_events_total", "gateway_deliveries_total", "process_resident_memory_bytes")
            if all(page.sum(name, process=process) > 0 for name in names for process in NAMES):
                return page


async def _until(is_so: Callable[[], bool], *, timeout: float = 20) -> None:
    until = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < until, "expected it in time"
        await asyncio.sleep(0.02)


def _children(gateway: GatewayProcess) -> Sequence[int]:
    """Return the pids of the children that were started last, by number."""
    return [
        pid for _, pid in sorted({line["process"]: line["pid"] for line in gateway.lines("process_started")}.items())
    ]


def _alive(gateway: GatewayProcess) -> Sequence[int]:
    return _running([line["pid"] for line in gateway.lines("process_started")])


def _names_in(folder: str) -> Sequence[str]:
    return [each.name for each in Path(folder).iterdir()]


def _running(pids: Sequence[int]) -> Sequence[int]:
    """Return those that run, and aren't only waited for."""
    found = []
    for pid in pids:
        try:
            if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
        except OSError:
            continue
    return found


pytestmark = [pytest.mark.timeout(120), pytest.mark.rotated(share=1 / 10, group="acceptance")]
