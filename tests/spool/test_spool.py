"""Whether an event goes to the log or to the spool, and when the spool accepts no more."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gateway.engine.control.state import Control
from gateway.log.base import Partition, Position, TopicSpec, partition_of
from gateway.log.deferred import DeferredLog
from gateway.log.records import encode_event
from gateway.model import LogLostError, LogUnavailableError, RecordTooLargeError, UsageError
from gateway.ops.process_status import process_findings
from gateway.settings import SpoolSettings
from gateway.spool.spool import Spool, open_spool
from gateway.spool.topic_move import TopicMove
from gateway.telemetry.metrics import Metrics
from tests.builders import an_event
from tests.memory_log import MemoryLog

TOPIC = "gateway.events.github"
EVENT = an_event()


@pytest.fixture
async def log() -> MemoryLog:
    log = MemoryLog()
    await log.create([TopicSpec(name=TOPIC, partitions=1, retention=None)])
    return log


async def opened(
    log: MemoryLog | DeferredLog,
    folder: Path,
    *,
    topics: Sequence[str] = (TOPIC,),
    size: int = 1 << 20,
    days: float = 1.0,
) -> Spool:
    settings = SpoolSettings(file=folder / "spool.db", bytes=size, days=days)
    metrics, logger = Metrics(CollectorRegistry()), structlog.get_logger()
    return await open_spool(settings, log=log, topics=lambda: topics, metrics=metrics, logger=logger)


@pytest.fixture
async def spool(log: MemoryLog, tmp_path: Path) -> AsyncIterator[Spool]:
    spool = await opened(log, tmp_path)
    yield spool
    await spool.close()


async def put(spool: Spool, body: bytes = b"{}", key: bytes = b"k") -> Position | None:
    return await spool.append(TOPIC, key=key, value=body, headers=encode_event(EVENT))


async def test_an_event_goes_to_the_log_while_that_takes_it(spool: Spool, log: MemoryLog) -> None:
    assert await put(spool) == Position(0, 0, log.records(TOPIC)[0].appended_at)
    assert spool.notes() == ()
    assert spool.status() == {"events": 0, "bytes": 0, "oldest": None, "used": 0.0, "refuses": None, "waits": None}


@pytest.mark.rotated(share=1 / 4, group="spool")
async def test_what_the_log_refuses_is_stored_and_moved_once_it_is_back(spool: Spool, log: MemoryLog) -> None:
    log.refuse_appends(Partition(TOPIC, 0))
    with capture_logs() as lines:
        assert await put(spool) is None
        assert await put(spool, key=b"another") is None
        running = asyncio.create_task(spool.run())
        assert [line["event"] for line in lines] == ["spool_began"]
        assert "within 1 s" in lines[0]["error"]
        assert spool.notes() == ["spool: 2 events wait for the log, the oldest for 0 s"]
        log.accept_appends()
        async with asyncio.timeout(30):
            while spool.waiting.records:  # noqa: ASYNC110 - what it waits for is up to the mover
                await asyncio.sleep(0.05)
        assert [record.value for record in log.records(TOPIC)] == [b"{}", b"{}"]
        assert all(record.headers == tuple(encode_event(EVENT)) for record in log.records(TOPIC))
        async with asyncio.timeout(5):
            while lines[-1]["event"] != "spool_drained":  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
        assert lines[-1]["events"] == 2
        running.cancel()
        await asyncio.wait({running})


@pytest.mark.rotated(share=1 / 4, group="spool")
async def test_what_an_earlier_process_has_left_is_told_and_that_it_is_moved(log: MemoryLog, tmp_path: Path) -> None:
    log.lose_leader(Partition(TOPIC, 0))
    spool = await opened(log, tmp_path)
    for key in (b"one", b"another"):
        await put(spool, key=key)
    await spool.close()
    with capture_logs() as lines:
        spool = await opened(log, tmp_path)
        assert (lines[0]["event"], lines[0]["events"]) == ("spool_found", 2)
        assert await put(spool, key=b"one") is None
        log.find_leader(Partition(TOPIC, 0))
        running = asyncio.create_task(spool.run())
        async with asyncio.timeout(30):
            while not (drained := [line for line in lines if line["event"] == "spool_drained"]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert drained[0]["events"] == 3
        running.cancel()
        await asyncio.wait({running})
    assert len(log.records(TOPIC)) == 3
    await spool.close()


async def test_the_oldest_is_told_also_while_its_partition_rests(tmp_path: Path) -> None:
    """Or its age would be that of an event of another partition every few seconds, and the limit with it."""
    log = MemoryLog()
    await log.create([TopicSpec(name=TOPIC, partitions=2, retention=None)])
    spool = await opened(log, tmp_path)
    keys = {partition_of(b"%d" % number, 2): b"%d" % number for number in range(20)}
    for number in (0, 1):
        log.lose_leader(Partition(TOPIC, number))
    await put(spool, key=keys[0])
    oldest = spool.waiting.oldest
    await asyncio.sleep(1.0)
    await put(spool, key=keys[1])
    move = TopicMove.after(TOPIC, await spool._store.moved(TOPIC))
    move.set_partitions(2, now=0.0)
    move.partitions[0].failed("no leader", now=asyncio.get_running_loop().time())
    assert not await spool.mover._move_some(move, [move.partitions[1]])
    assert spool.waiting.oldest == pytest.approx(oldest, abs=0.5)
    await spool.close()


async def test_gateway_status_reads_what_it_says(spool: Spool, log: MemoryLog) -> None:
    assert process_findings({"spool": spool.status()}, "a:9090", Control()) == []
    log.lose_leader(Partition(TOPIC, 0))
    assert await put(spool) is None
    [found] = process_findings({"spool": spool.status()}, "a:9090", Control())
    assert (found.what, found.count, found.since) == ("spool", 1, spool.waiting.oldest)
    told = spool.status_by_topic()
    assert told == {**spool.status(), "topics": told["topics"]}
    [topic] = told["topics"]
    assert (topic["topic"], topic["events"], topic["oldest"]) == (TOPIC, 1, spool.waiting.oldest)
    assert topic["bytes"] == spool.waiting.bytes > 0
    spool._disk_problem = "expected 50 free bytes on its disk, got 49"
    full, _ = process_findings({"spool": spool.status()}, "a:9090", Control())
    assert spool._disk_problem in full.why


async def test_what_comes_while_an_earlier_event_of_its_key_is_being_stored_follows_it(
    spool: Spool, log: MemoryLog
) -> None:
    log.lose_leader(Partition(TOPIC, 0))
    first = asyncio.create_task(put(spool))
    while not spool._storing:  # noqa: ASYNC110 - it is a matter of milliseconds
        await asyncio.sleep(0)
    assert not first.done()
    log.find_leader(Partition(TOPIC, 0))
    assert await put(spool) is None
    assert await first is None


async def test_an_event_that_is_too_large_for_the_log_is_not_spooled(spool: Spool) -> None:
    with pytest.raises(RecordTooLargeError):
        await put(spool, bytes(2 << 20))
    assert not spool.waiting.records


async def test_a_log_that_is_not_open_has_got_nothing(tmp_path: Path, log: MemoryLog) -> None:
    async def away() -> MemoryLog:
        raise LogUnavailableError("kafka://a:1: expected a broker, got: connection refused")

    late = DeferredLog(away, max_record_bytes=log.max_record_bytes)
    spool = await opened(late, tmp_path)
    with pytest.raises(LogUnavailableError):
        await late.open()
    with capture_logs() as lines:
        assert await put(spool) is None
    assert lines[0]["error"] == "kafka://a:1: expected a broker, got: connection refused"
    [records] = [found for found, _, _ in [await spool._store.read(TOPIC, 0, 10)]]
    assert [name for name, _ in records[0].headers] == [name for name, _ in encode_event(EVENT)]
    await spool.close()


@pytest.mark.parametrize(
    ("limits", "reason", "problem"),
    [
        ({"size": 400}, "bytes", "expected at most 400 bytes in it, got"),
        ({"days": 1e-6}, "age", f"{TOPIC}: expected nothing older than 0.0864 s in it, got 0 s"),
    ],
)
async def test_a_full_spool_refuses_until_there_is_room(
    log: MemoryLog, tmp_path: Path, limits: dict[str, float], reason: str, problem: str
) -> None:
    spool = await opened(log, tmp_path, **limits)  # type: ignore[arg-type]
    log.lose_leader(Partition(TOPIC, 0))
    assert await put(spool) is None
    await asyncio.sleep(0.1)
    with capture_logs() as lines, pytest.raises(LogUnavailableError, match=problem):
        await put(spool, bytes(300))
    assert (lines[0]["event"], lines[0]["reason"]) == ("spool_refuses", reason)
    assert spool._metrics.spool_refused.labels(reason).value == 1
    assert problem.split(",", maxsplit=1)[0] in spool.status()["refuses"]
    assert (spool.takes_events, spool.used) == (False, 1.0)
    await spool.close()


async def test_a_topic_that_has_waited_for_too_long_takes_nothing_from_the_others(
    log: MemoryLog, tmp_path: Path
) -> None:
    """Nor does the process say that it takes none: `/readyz` would keep the events of other topics away."""
    await log.create([TopicSpec(name="gateway.events.crm", partitions=1, retention=None)])
    spool = await opened(log, tmp_path, topics=(TOPIC, "gateway.events.crm"), days=1e-6)
    for topic in (TOPIC, "gateway.events.crm"):
        log.lose_leader(Partition(topic, 0))
    assert await put(spool) is None
    await asyncio.sleep(0.1)
    assert (spool.takes_events, spool.used, spool.status()["refuses"]) == (True, 1.0, None)
    assert await spool.append("gateway.events.crm", key=b"k", value=b"{}", headers=encode_event(EVENT)) is None
    with pytest.raises(LogUnavailableError, match=f"{TOPIC}: expected nothing older"):
        await put(spool)
    await asyncio.sleep(0.1)
    assert not spool.takes_events, "every topic of the rules has waited for too long"
    assert "gateway.events.crm: expected nothing older" in str(spool.status()["refuses"])
    await spool.close()


async def test_what_waits_for_a_topic_that_no_source_has_any_more_keeps_no_event_out(
    log: MemoryLog, tmp_path: Path
) -> None:
    spool = await opened(log, tmp_path, topics=("gateway.events.crm",), days=1e-6)
    log.lose_leader(Partition(TOPIC, 0))
    assert await put(spool) is None
    await asyncio.sleep(0.1)
    assert spool.takes_events
    await spool.close()


async def test_how_full_it_is_is_that_of_its_nearest_limit(
    log: MemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await opened(log, tmp_path, size=1000)
    log.lose_leader(Partition(TOPIC, 0))
    assert await put(spool) is None
    held = spool.waiting.bytes
    assert spool.used == held / 1000
    with pytest.raises(LogUnavailableError, match="expected at most 1000 bytes in it"):
        await put(spool, bytes(1000 - held))
    assert spool.used == 1.0, "nobody is told that it takes events while it refuses them"
    spool.waiting.remove(TOPIC, b"k", held)
    assert (spool.takes_events, spool.used) == (True, 0.0)
    spool.waiting.add(TOPIC, b"k", 100, at=spool._store.now() - 43200.0)
    assert spool.used == pytest.approx(0.5, abs=0.01)
    free = [1000 + 25]

    async def free_bytes() -> tuple[int, int]:
        return free[0], 20_000

    monkeypatch.setattr(spool._store, "free_bytes", free_bytes)
    await spool.watch_disk()
    assert spool.used == 100 / 125
    await spool.close()


async def test_a_disk_that_is_nearly_full_is_left_alone(
    spool: Spool, log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.lose_leader(Partition(TOPIC, 0))
    free = [49]

    async def free_bytes() -> tuple[int, int]:
        return free[0], 1000

    monkeypatch.setattr(spool._store, "free_bytes", free_bytes)
    await spool.watch_disk()
    assert (spool.takes_events, spool.used) == (False, 1.0)
    with pytest.raises(LogUnavailableError, match="expected 50 free bytes on its disk, got 49"):
        await put(spool)
    free[0] = 50
    await spool.watch_disk()
    assert await put(spool) is None


async def test_a_disk_that_has_failed_takes_events_again_without_one_that_is_sent(
    spool: Spool, log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.lose_leader(Partition(TOPIC, 0))

    async def fail(*_: object, **__: object) -> None:
        raise LogUnavailableError("spool.db: database or disk is full (SQLITE_FULL)")

    with monkeypatch.context() as failing:
        failing.setattr(spool._store, "append", fail)
        failing.setattr(spool._store, "ping", fail)
        with pytest.raises(LogUnavailableError, match="disk is full"):
            await put(spool)
        await spool.watch_disk()
        assert "disk is full" in spool.status()["refuses"]
        assert not spool.takes_events
    await spool.watch_disk()
    assert (spool.takes_events, spool.used, spool.status()["refuses"]) == (True, 0.0, None)
    assert await put(spool) is None, "it is spooled"


async def test_a_file_that_is_gone_takes_no_more_and_keeps_nothing_from_the_log(
    spool: Spool, log: MemoryLog, tmp_path: Path
) -> None:
    log.lose_leader(Partition(TOPIC, 0))
    assert await put(spool) is None
    (tmp_path / "spool.db").rename(tmp_path / "away.db")
    for _ in range(2):
        with pytest.raises(LogUnavailableError) as refused:
            await put(spool)
        assert not isinstance(refused.value, LogLostError)  # the process goes on
    assert spool._metrics.spool_refused.labels("unavailable").value == 2
    assert not spool.takes_events
    log.find_leader(Partition(TOPIC, 0))
    assert await put(spool) is not None


async def test_a_file_that_is_gone_is_told_of_at_the_first_event_that_it_refuses(
    spool: Spool, log: MemoryLog, tmp_path: Path
) -> None:
    log.lose_leader(Partition(TOPIC, 0))
    assert await put(spool) is None
    (tmp_path / "spool.db").rename(tmp_path / "away.db")
    with capture_logs() as lines, pytest.raises(LogUnavailableError):
        await put(spool)
    assert (lines[0]["event"], lines[0]["events"]) == ("spool_lost", 1)


async def test_a_file_that_is_gone_is_told_of_without_an_event(spool: Spool, log: MemoryLog, tmp_path: Path) -> None:
    log.lose_leader(Partition(TOPIC, 0))
    assert await put(spool) is None
    with capture_logs() as lines:
        running = asyncio.create_task(spool.run())
        await asyncio.sleep(0)
        (tmp_path / "spool.db").rename(tmp_path / "away.db")
        async with asyncio.timeout(10):
            while spool.takes_events:  # noqa: ASYNC110 - what it waits for is up to the watch
                await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.wait({running})
    assert [line["events"] for line in lines if line["event"] == "spool_lost"] == [1]
    assert "moved or deleted" in str(spool.status()["refuses"])


@pytest.mark.usefixtures("spool")
async def test_a_file_in_use_and_one_of_something_else_are_refused(log: MemoryLog, tmp_path: Path) -> None:
    with pytest.raises(LogUnavailableError, match=r"--spool: .*spool\.db is in use"):
        await opened(log, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "spool.db").write_bytes(b"text" * 5000)
    with pytest.raises(UsageError, match=r"--spool: .*expected an embedded log"):
        await opened(log, other)
