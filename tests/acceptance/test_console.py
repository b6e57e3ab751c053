"""The process that keeps the index, as operators run it: killed, starved, misled, and beside a gateway under load.

what crosses                          what has to come of it
────────────────────────────────────  ──────────────────────────────────────────────────────────────
SIGKILL while it reads                every record once, as if it had never been killed
rules that are reloaded               a new source is searched; a console goes on with either rules
retention that overtakes it           what is gone is counted, what is left is there
a topic that grows                    all of it is read, and the index is complete
a partition without a leader          the index says to what time it is complete (tests/index/test_reading.py)
a second process with its file        ends at once with 2, and says why
no disk                               said once, counted, goes on by itself; deliveries don't notice
a file of another version, or damage  said, made anew
records that nobody can read          counted, in nobody's way
a stop in the middle of much          in time, and nothing is lost
a log that is another one             what was in the former isn't found any more
an index in the process that serves   deliveries are on time
what waits in other processes         is told by the console, by the log alone
"""

import asyncio
import json
import os
import resource
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, RecordsToDelete
from aiokafka.structs import TopicPartition

from gateway.index.file import VERSION
from gateway.index.query import parse_query
from gateway.index.reading import index_to_read
from gateway.index.results import IndexedEvent
from gateway.log.base import Partition
from gateway.log.records import decode_event
from gateway.log.topics import Topics
from gateway.model import GatewayError, UnreadableRecordError
from gateway.open_log import open_log
from gateway.settings import from_sources
from tests.acceptance.conftest import RULES, LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import SECRET, Load, post, signed_post
from tests.sink import Sink

SOON = 30.0
"""Seconds within which an index has what was stored."""
TRIES = 3
"""Of a comparison of times, of which one has to be good: it is disturbed by what else runs."""
pytestmark = [pytest.mark.timeout(180), pytest.mark.rotated(share=1 / 10, group="acceptance")]


@asynccontextmanager
async def serving(place: LogPlace, folder: Path, **environ: str) -> AsyncIterator[GatewayProcess]:
    """Run a gateway with two destinations that take everything."""
    async with Sink() as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix, environ=environ) as gateway:
            yield gateway


def a_console(place: LogPlace, folder: Path, gateway: GatewayProcess, **environ: str) -> GatewayProcess:
    """Return a console beside a gateway, not started yet, with its index in `folder`/index.db."""
    home = folder / "console"
    home.mkdir()
    rules = gateway.rules.read_text()
    environ = {"GATEWAY_ROLE": "console", "GATEWAY_INDEX": str(folder / "index.db"), **environ}
    return GatewayProcess(home, rules=rules, log=place.url, prefix=place.prefix, environ=environ, is_dev=False)


async def searched(path: Path, text: str = "") -> list[IndexedEvent]:
    def search() -> list[IndexedEvent]:
        with index_to_read(path) as index:
            return list(index.search(parse_query(text, now=time.time()), 100_000))

    return await asyncio.to_thread(search)


async def complete_to(path: Path) -> float:
    def look() -> float:
        with index_to_read(path) as index:
            return index.currency.complete_to

    return await asyncio.to_thread(look)


async def until(path: Path, holds: Callable[[list[IndexedEvent]], bool], text: str = "") -> list[IndexedEvent]:
    """Search until it holds of what is found."""
    end, found, problem = time.monotonic() + SOON, list[IndexedEvent](), ""
    while time.monotonic() < end:
        try:
            found = await searched(path, text)
        except GatewayError as error:  # it is being made
            found, problem = [], str(error)
        if holds(found):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"{text!r}: expected something else within {SOON:g} s than {len(found)} events, {problem}")


async def until_complete(path: Path) -> list[IndexedEvent]:
    """Return all events once the index has everything that is there now."""
    now, end = time.time(), time.monotonic() + SOON
    while await complete_to(path) < now:
        assert time.monotonic() < end, f"expected an index that is complete within {SOON:g} s"
        await asyncio.sleep(0.1)
    return await searched(path)


async def until_counted(process: GatewayProcess, name: str, least: float, **labels: str) -> None:
    end = time.monotonic() + SOON
    while (found := (await process.metrics()).sum(name, **labels)) < least:
        assert time.monotonic() < end, f"expected {name} {labels} of at least {least}, got {found}"
        await asyncio.sleep(0.2)


async def stored(place: LogPlace) -> Counter[str]:
    """Return how often the log has each event of `github`."""
    log = await open_log(from_sources({"log": place.url}, {}), owner=False)
    found, topic = Counter[str](), Topics(place.prefix).events("github")
    try:
        bounds, _ = await log.readable(topic)
        for number, (start, end) in bounds.items():
            async for records in log.scan(Partition(topic, number), start, end):
                for record in records:
                    try:
                        found[decode_event(record).id] += 1
                    except UnreadableRecordError:
                        continue
    finally:
        await log.close()
    return found


def ids_of(events: list[IndexedEvent]) -> Counter[str]:
    return Counter([event.id for event in events])


async def run_command(*words: str, **environ: str) -> tuple[int, str, str]:
    """Run a command as operators do; return its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        *words,
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_console_that_is_killed_again_and_again_has_every_event_once(place: LogPlace, folder: Path) -> None:
    path = folder / "index.db"
    async with serving(place, folder) as gateway:
        console = a_console(place, folder, gateway)
        load = Load(gateway.port, rate=400)
        stopped = asyncio.Event()
        async with console, asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(load.send_until(stopped))
            for wait in (0.3, 1.1, 0.7, 0.2):
                await asyncio.sleep(wait)
                console.kill()
                await console.start()
            stopped.set()
            await sending
            there = await stored(place)
            found = await until(path, lambda found: len(found) >= there.total(), "status:done -status:pending")
            assert ids_of(found) == there
            assert load.acknowledged.keys() <= ids_of(found).keys()
            assert await console.stop() == 0
    assert ids_of(await searched(path)) == ids_of(found)  # nobody has it open


async def test_a_search_beside_a_console_says_what_has_become_of_events(place: LogPlace, folder: Path) -> None:
    """By commands alone, as operators run them."""
    async with Sink(503) as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        rules = rules.replace("to: [first, second]", "to: [first, second], retry: {max_attempts: 1}")
        gateway = GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)
        async with gateway, a_console(place, folder, gateway):
            _, id_ = await post(
                gateway.port, signed_post(b'{"order":{"id":42},"n":"\xe2\x80\xae\\u001b[31mred"}', delivery="1")
            )
            await until(folder / "index.db", lambda found: len(found) == 1, "status:dead")
            index = {"GATEWAY_INDEX": str(folder / "index.db"), "COLUMNS": "120"}
            code, out, err = await run_command("events", "search", "status:dead body.order.id:42 since:1h", **index)
            assert code == 0
            assert id_ in out
            assert "all → first: dead" in out
            assert err.startswith("the index is complete to 2")
            search = ("events", "search", "identity:1", "--json", "--since", "1h")
            code, out, _ = await run_command(*search, **index)
            [event, last] = map(json.loads, out.splitlines())
            async with asyncio.timeout(10):  # what has it may be a round that began before it was stored
                while last["index"]["complete_to"] <= event["stored_at"]:
                    code, out, _ = await run_command(*search, **index)
                    [event, last] = map(json.loads, out.splitlines())
            assert (code, event["id"], event["status"]) == (0, id_, "dead")
            assert event["deliveries"] == [{"route": "all", "destination": "first", "status": "dead"}]
            log = {"GATEWAY_LOG": place.url, "GATEWAY_TOPIC_PREFIX": place.prefix, "GATEWAY_RULES": str(gateway.rules)}
            code, out, _ = await run_command("events", "show", id_, "--deliveries", "--json", **index, **log)
            shown = json.loads(out)
            assert (code, shown["id"], shown["status"]) == (0, id_, "dead")
            dead = next(each for each in shown["deliveries"] if each["destination"] == "first")
            assert [attempt["result"] for attempt in dead["attempts"]] == ["503"]
            code, out, err = await run_command("events", "show", id_, "--deliveries", **index, **log)
            assert code == 0
            assert "all → first" in out
            assert "503" in out
            assert "the index is complete to" in err


async def test_a_second_process_with_the_same_file_ends_and_says_why(
    embedded_place: LogPlace, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place, index = embedded_place, str(folder / "index.db")
    async with serving(place, folder) as gateway:
        async with a_console(place, folder, gateway) as console:
            other = {"GATEWAY_LOG": place.url, "GATEWAY_RULES": str(gateway.rules), "GATEWAY_INDEX": index}
            words = ("run", "--role=console", "--admin=127.0.0.1:0", f"--log={place.url}")
            code, _, err = await run_command(*words, **other)
            assert code == 2
            assert "expected an index of this process alone, got one that another has open" in err
            assert (await console.readiness())["ready"]
            # One that delivers goes on without.
            another = tmp_path_factory.mktemp("another")
            own = place.another("other")
            async with serving(own, another, GATEWAY_INDEX=index) as serving_too:
                assert "another has open" in (await serving_too.line("index_interrupted"))["error"]
                told = await serving_too.readiness()
                assert (told["ready"], len(told["notes"])) == (True, 1)
                log = {"GATEWAY_LOG": own.url, "GATEWAY_RULES": str(serving_too.rules)}
                admin = f"--admin=127.0.0.1:{serving_too.admin_port}"
                code, out, _ = await run_command("status", admin, "--json", **log)
                [row] = [each for each in map(json.loads, out.splitlines()) if each["what"].startswith("index ")]
                assert (code, row["needs_attention"]) == (1, True)
                assert "another has open" in row["why"]
                assert (await post(serving_too.port, signed_post(b"{}", delivery="1")))[0] == 202
        assert await searched(folder / "index.db") == []


async def test_rules_are_reloaded_beside_an_index(place: LogPlace, folder: Path) -> None:
    index = folder / "own.db"
    async with (
        serving(place, folder, GATEWAY_INDEX=str(index)) as gateway,
        a_console(place, folder, gateway) as console,
    ):
        rules = gateway.rules.read_text()
        more = rules.replace("sources:\n", f'sources:\n  shop: {{verify: {{scheme: github, secrets: ["{SECRET}"]}}}}\n')
        for each in (gateway, console):
            each.rules.write_text(more)
            each.signal(signal.SIGHUP)
            assert "source shop" in (await each.line("rules_reloaded"))["added"]
        status, id_ = await post(gateway.port, signed_post(b"{}", delivery="1", path="/in/shop"))
        assert status == 202
        for path in (index, folder / "index.db"):
            await until(path, lambda found: [each.id for each in found] == [id_], "source:shop")
        console.rules.write_text("version: 1\nnonsense: true\n")
        console.signal(signal.SIGHUP)
        await console.line("rules_refused")
        _, id_ = await post(gateway.port, signed_post(b"{}", delivery="2"))
        await until(folder / "index.db", lambda found: [each.id for each in found] == [id_], "source:github")


async def test_a_console_needs_no_secret_and_makes_no_topic(embedded_place: LogPlace, folder: Path) -> None:
    async with serving(embedded_place, folder) as gateway:
        console = a_console(embedded_place, folder, gateway)
        secrets = '["${NOBODY_KNOWS}", "${file:/nowhere}"]'
        other = f"sources:\n  new: {{verify: {{scheme: github, secrets: {secrets}}}}}\n"
        console.rules.write_text(gateway.rules.read_text().replace("sources:\n", other))
        async with console:
            await until_complete(folder / "index.db")
            assert (await console.readiness())["ready"]
            assert not console.lines("topic_created")
            assert not console.lines("rules_warning")
            log = await open_log(from_sources({"log": embedded_place.url}, {}), owner=False)
            try:
                assert Topics(embedded_place.prefix).events("new") not in await log.topics()
            finally:
                await log.close()


async def test_what_nobody_can_read_is_counted_and_in_nobodys_way(place: LogPlace, folder: Path) -> None:
    topics = Topics(place.prefix)
    async with serving(place, folder) as gateway, a_console(place, folder, gateway) as console:
        log = await open_log(from_sources({"log": place.url}, {}), owner=False)
        try:
            for topic in (topics.events("github"), topics.dead, topics.retry("5s"), topics.dedupe, topics.attempts):
                await log.append(topic, key=b"a/b", value=b"\xff" * 100, headers=[])
                await log.append(topic, key=b"a/b", value=b"", headers=[("gw_v", b"999"), ("ce_id", b"x")])
        finally:
            await log.close()
        load = Load(gateway.port, rate=200)
        await load.send(50)
        found = await until(folder / "index.db", lambda found: len(found) >= 50)
        assert ids_of(found) == Counter(load.acknowledged.keys())
        await until_counted(console, "gateway_index_records_left_out_total", 10)
        assert (await console.metrics()).sum("gateway_index_interruptions_total") == 0


async def test_a_file_of_another_version_or_damaged_is_made_anew_and_said(place: LogPlace, folder: Path) -> None:
    path = folder / "index.db"
    async with serving(place, folder) as gateway:
        load = Load(gateway.port, rate=200)
        await load.send(50)
        console = a_console(place, folder, gateway)
        async with console:
            before = await until(path, lambda found: len(found) == 50)
            assert await console.stop() == 0
            await asyncio.to_thread(made_older, path)
            await console.start()
            told = await console.line("index_rebuilt")
            assert told["reason"] == f"expected an index of version {VERSION}, got {VERSION - 1}"
            assert ids_of(await until(path, lambda found: len(found) == 50)) == ids_of(before)
            assert await console.stop() == 0
            await asyncio.to_thread(damage, path)
            await console.start()
            await console.line("index_rebuilt")
            assert ids_of(await until(path, lambda found: len(found) == 50)) == ids_of(before)
            assert path.with_name("index.db.damaged").exists()
            path.unlink()  # as operators do to have it made anew
            await console.line("index_interrupted")
            assert ids_of(await until(path, lambda found: len(found) == 50)) == ids_of(before)
            await until_counted(console, "gateway_index_interruptions_total", 1, reason="file_lost")


def made_older(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION - 1}")


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100] + os.urandom(20_000))


async def test_a_disk_that_is_full_is_said_once_and_deliveries_dont_notice(place: LogPlace, folder: Path) -> None:
    """The disk of the index, which is the console's own. By a limit on the size of the process's files."""
    path = folder / "index.db"
    async with Sink() as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        gateway = GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)
        async with gateway, a_console(place, folder, gateway) as console:
            load = Load(gateway.port, rate=200)
            await load.send(20)
            await until(path, lambda found: len(found) == 20)
            largest = max(each.stat().st_size for each in (path, path.with_name("index.db-wal"), console.output))
            before = resource.prlimit(console.pid, resource.RLIMIT_FSIZE, (largest + 1000, resource.RLIM_INFINITY))
            await load.send(200)
            told = await console.line("index_interrupted", timeout=SOON)
            assert "index.db" in told["error"]
            await first.received(220)
            await second.received(220)
            await until_counted(console, "gateway_index_interruptions_total", 2, reason="file_unavailable")
            assert len(console.lines("index_interrupted")) == 1
            readiness = await console.readiness()
            assert readiness["ready"]
            assert readiness["notes"][0].startswith("index: ")
            assert (await console.metrics()).sum("gateway_index_behind_seconds", topic=Topics(place.prefix).dead) > 4
            resource.prlimit(console.pid, resource.RLIMIT_FSIZE, before)
            found = await until(path, lambda found: len(found) == 220)
            assert ids_of(found) == Counter(load.acknowledged.keys())
            assert (await console.line("index_resumed"))["seconds"] > 4
            assert "notes" not in await console.readiness()


async def test_a_console_stops_in_time_in_the_middle_of_much(place: LogPlace, folder: Path) -> None:
    path = folder / "index.db"
    async with serving(place, folder) as gateway:
        load = Load(gateway.port, rate=1000, size=4000)
        await load.send(3000)
        is_enough = asyncio.Event()
        async with a_console(place, folder, gateway) as console:
            sending = asyncio.create_task(load.send_until(is_enough))  # so that there is more to read all the time
            await until(path, lambda found: len(found) > 0)
            began = time.monotonic()
            assert await console.stop() == 0
            assert time.monotonic() - began < 5
            assert console.lines("index_stopped")
            is_enough.set()
            await sending
            everything = await stored(place)
            assert 0 < len(await searched(path)) < everything.total()
            await console.start()
            found = await until(path, lambda found: len(found) >= everything.total())
            assert ids_of(found) == everything


async def test_what_the_log_deletes_before_it_is_read_is_counted(kafka_place: LogPlace, folder: Path) -> None:
    place, path, topic = kafka_place, folder / "index.db", Topics(kafka_place.prefix).events("github")
    async with serving(place, folder) as gateway:
        load = Load(gateway.port, rate=200)
        console = a_console(place, folder, gateway)
        async with console:
            await load.send(20)
            before = ids_of(await until(path, lambda found: len(found) == 20))
            assert await console.stop() == 0
            await load.send(50)
            async with admin_of(place) as admin:
                [described] = await admin.describe_topics([topic])
                partitions = [TopicPartition(topic, each["partition"]) for each in described["partitions"]]
                await admin.delete_records({each: RecordsToDelete(before_offset=-1) for each in partitions})
            after = Load(gateway.port, rate=200, first=1000)
            await after.send(10)
            await console.start()
            found = await until(path, lambda found: after.acknowledged.keys() <= ids_of(found).keys())
            assert ids_of(found) == before + Counter(after.acknowledged.keys())
            await until_counted(console, "gateway_index_records_left_out_total", 50, reason="deleted")


async def test_a_topic_that_grows_is_read(kafka_place: LogPlace, folder: Path) -> None:
    place, path, topic = kafka_place, folder / "index.db", Topics(kafka_place.prefix).events("github")
    async with serving(place, folder) as gateway:
        load = Load(gateway.port, rate=200)
        async with a_console(place, folder, gateway):
            await load.send(20)
            await until(path, lambda found: len(found) == 20)
            async with admin_of(place) as admin:
                [described] = await admin.describe_topics([topic])
                await admin.create_partitions({topic: NewPartitions(total_count=len(described["partitions"]) + 6)})
            end = time.monotonic() + SOON
            while await partitions_with_events(place, topic) <= len(described["partitions"]):
                assert time.monotonic() < end, "expected events in the new partitions"
                await load.send(20)
            found = await until(path, lambda found: len(found) >= len(load.acknowledged))
            assert ids_of(found) == await stored(place)
            assert ids_of(await until_complete(path)) == ids_of(found)


async def partitions_with_events(place: LogPlace, topic: str) -> int:
    log = await open_log(from_sources({"log": place.url}, {}), owner=False)
    try:
        bounds, _ = await log.readable(topic)
        return sum(end > start for start, end in bounds.values())
    finally:
        await log.close()


@asynccontextmanager
async def admin_of(place: LogPlace) -> AsyncIterator[Any]:
    admin = AIOKafkaAdminClient(bootstrap_servers=place.servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def test_a_log_that_is_another_one_has_no_events_of_the_former(embedded_place: LogPlace, folder: Path) -> None:
    """A backup is restored: what came after it is in no log any more, and so in no index."""
    place, path, copy = embedded_place, folder / "index.db", folder / "copy.db"
    async with serving(place, folder) as gateway:
        load = Load(gateway.port, rate=200)
        await load.send(20)
        kept = set(load.acknowledged)
        console = a_console(place, folder, gateway)
        async with console:
            assert (await run_command("backup", f"--log={place.url}", str(copy)))[0] == 0
            await load.send(30)
            await until(path, lambda found: len(found) == 50)
            assert await gateway.stop() == 0
            assert (await run_command("restore", f"--log={place.url}", str(copy)))[0] == 0
            assert await console.ended(timeout=SOON) == 1
            assert console.lines("log_lost")
            await gateway.start()
            after = Load(gateway.port, rate=200, first=5000)
            await after.send(40)  # more than it lacks: its end is beyond that of the former
            await console.start()
            found = await until(path, lambda found: after.acknowledged.keys() <= ids_of(found).keys())
            assert ids_of(found) == Counter([*kept, *after.acknowledged])
            assert ids_of(await until_complete(path)) == await stored(place)


async def test_an_index_in_the_process_that_delivers_survives_its_kills(place: LogPlace, folder: Path) -> None:
    path = folder / "own.db"
    async with Sink() as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        environ = {"GATEWAY_INDEX": str(path)}
        async with GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix, environ=environ) as gateway:
            load = Load(gateway.port, rate=300)
            stopped = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(load.send_until(stopped))
                for wait in (1.0, 0.6):
                    await asyncio.sleep(wait)
                    gateway.kill()
                    await gateway.start()
                await asyncio.sleep(0.5)
                stopped.set()
                await sending
            there = await stored(place)
            found = await until(path, lambda found: len(found) >= there.total(), "status:done -status:pending")
            assert ids_of(found) == there
            for sink in (first, second):
                received = {request.header("gateway-event-id") for request in sink.requests}
                assert load.acknowledged.keys() <= received
            began = time.monotonic()
            assert await gateway.stop() == 0
            assert time.monotonic() - began < 10
            assert gateway.lines("index_stopped")


async def latency(place: LogPlace, folder: Path, environ: Mapping[str, str]) -> tuple[float, float]:
    """Return how long acknowledgements take (p99), and how late the event loop is (mean), beside much to index."""
    async with serving(place, folder, **environ) as gateway:
        load = Load(gateway.port, rate=300, size=2000)
        await load.send_for(1.0)
        before = await gateway.metrics()
        load = Load(gateway.port, rate=300, size=2000, first=100_000)
        await load.send_for(6.0)
        after = await gateway.metrics()
        names = ("gateway_event_loop_lag_seconds_sum", "gateway_event_loop_lag_seconds_count")
        total, count = [after.sum(name) - before.sum(name) for name in names]
        times = sorted(sent.answered_at - sent.at for sent in load.answers)
        return times[int(len(times) * 0.99)], total / count


@pytest.mark.full
async def test_an_index_doesnt_hold_the_event_loop_that_delivers(
    place: LogPlace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Beside the same load without one. A turn that the index doesn't give back shows as tens of milliseconds."""
    told = []
    for number in range(TRIES):  # whatever else runs only makes it worse
        folders = [tmp_path_factory.mktemp(f"{name}-{number}") for name in ("without", "kept")]
        without = await latency(place.another(f"without{number}"), folders[0], {})
        kept = await latency(place.another(f"kept{number}"), folders[1], {"GATEWAY_INDEX": str(folders[1] / "own.db")})
        told.append(f"p99 of acknowledgements, mean lag of the loop: {without} without, {kept} with an index")
        if kept[0] < 1.5 * without[0] + 0.02 and kept[1] < without[1] + 0.003:
            return
    raise AssertionError("\n".join(told))


async def test_a_console_tells_what_waits_in_another_process(place: LogPlace, folder: Path) -> None:
    rules = RULES.format(first="http://127.0.0.1:1/", second="http://127.0.0.1:1/hunter2")
    async with (
        GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix) as gateway,
        a_console(place, folder, gateway) as console,
        aiohttp.ClientSession() as client,
    ):
        for number in range(3):
            assert (await post(gateway.port, signed_post(b"{}", delivery=str(number))))[0] == 202
        base, end, found = f"http://127.0.0.1:{console.admin_port}", time.monotonic() + SOON, dict[str, Any]()
        while not (told := [each for each in found.get("items", ()) if each["count"] == 3]):
            assert time.monotonic() < end, f"expected three that wait within {SOON:g} s, got {found}"
            await asyncio.sleep(0.5)
            async with client.get(f"{base}/api/v1/findings") as response:
                found = await response.json()
        assert {each["route"] for each in told} == {"all"}
        assert not [each for each in found["items"] if each["kind"] == "not_read"]
        async with client.get(f"{base}/ui/rules?kind=route&name=all") as response:
            page = await response.text()
        assert 'id="found"' in page
        assert "hunter2" not in page
        assert console.lines("api_failed") + console.lines("page_failed") == []
