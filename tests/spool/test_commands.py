"""`gateway spool`, as an operator calls it: what it says, what it drops, and which files it refuses."""

import asyncio
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
import structlog
from prometheus_client import CollectorRegistry

from gateway.cli import main
from gateway.log.base import Commit, TopicSpec
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.topics import Topics
from gateway.model import UsageError
from gateway.open_log import open_log
from gateway.ops.output import Output
from gateway.settings import EmbeddedTarget, Settings, SpoolSettings
from gateway.spool.spool import open_spool
from gateway.spool.store import FOREVER, GROUP, FileStore
from gateway.telemetry.metrics import Metrics
from tests.memory_log import MemoryLog
from tests.spool.test_store import TOPIC, fill

GONE = "gateway.events.gone"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    handlers, level = logging.root.handlers[:], logging.root.level
    asyncio.run(_fill())
    yield
    logging.root.handlers[:], logging.root.level = handlers, level
    structlog.reset_defaults()


async def _fill(*, mine: int = 3, gone: int = 2) -> None:
    store = await FileStore.open(Path("spool.db"), owner=True)
    await fill(store, mine)
    await fill(store, gone, topic=GONE)
    await store.close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["spool", *words, "--spool=sqlite:///spool.db"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def left(run: Run) -> dict[str, int]:
    _, out, _ = run("list", "--json")
    return {each["topic"]: each["events"] for each in map(json.loads, out.splitlines())}


@pytest.mark.parametrize("words", ["move --log=sqlite:///none.db", "verify", "list"])
def test_a_file_whose_events_are_all_in_the_wal_that_was_left_behind_is_not_taken_for_an_empty_spool(
    run: Run, words: str
) -> None:
    async def fill_and_take_away() -> None:
        store = await FileStore.open(Path("young.db"), owner=True)
        await fill(store, 3)
        shutil.copy("young.db", "spool.db")
        await store.close()

    Path("spool.db").unlink()
    asyncio.run(fill_and_take_away())
    before = Path("spool.db").read_bytes()
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert (
        "until its first checkpoint, all of a new one is in spool.db-wal; "
        "if that was moved or deleted, put it back next to it" in err
    )
    assert Path("spool.db").read_bytes() == before


def test_a_dry_run_says_what_it_would_drop_and_drops_nothing(run: Run) -> None:
    code, out, _ = run("drop", f"--topic={GONE}", "--dry-run")
    assert code == 0
    assert out.startswith(f"2 events for {GONE}, the oldest of 20")
    assert out.endswith("would be dropped\n")
    assert left(run) == {TOPIC: 3, GONE: 2}


def test_what_is_dropped_is_of_one_topic(run: Run) -> None:
    code, out, _ = run("drop", f"--topic={GONE}", "--yes", "--json")
    dropped = json.loads(out)
    assert (code, dropped["topic"], dropped["events"], dropped["dry_run"]) == (0, GONE, 2, False)
    assert dropped["oldest"].startswith("20")
    assert left(run) == {TOPIC: 3}


def test_acknowledged_events_are_not_dropped_by_mistake(run: Run) -> None:
    code, _, err = run("drop", f"--topic={GONE}")
    assert code == 2
    assert f"expected --yes, since it can't ask; it would drop 2 events for {GONE}" in err
    code, _, err = run("drop", "--topic=gateway.events.other", "--yes")
    assert code == 2
    assert f"expected one with events in the spool ({TOPIC}, {GONE}), got gateway.events.other" in err.replace(
        f"{GONE}, {TOPIC}", f"{TOPIC}, {GONE}"
    )
    assert left(run) == {TOPIC: 3, GONE: 2}


def test_what_is_acknowledged_while_it_asks_is_not_dropped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def confirm(_: Output, question: str) -> bool:
        asked.append(question)
        ingress = Thread(target=asyncio.run, args=[_fill(mine=0, gone=5)])
        ingress.start()
        ingress.join()
        return True

    monkeypatch.setattr(Output, "is_interactive", True)
    monkeypatch.setattr(Output, "confirm", confirm)
    code, out, err = run("drop", f"--topic={GONE}")
    assert asked[0].startswith(f"drop 2 events for {GONE}")
    assert (code, out[:9]) == (0, "2 events ")
    assert "5 events left that came meanwhile" in err
    assert left(run) == {TOPIC: 3, GONE: 5}


LOG_OF_A_PREFIX = Topics("team-a.")
TOPIC_IN_LOG = "team-a.events.github"


@pytest.fixture
def log_file() -> Path:
    async def create() -> None:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=True, sweep_interval=None)
        await log.create(LOG_OF_A_PREFIX.specs([TOPIC_IN_LOG]))
        await log.append(TOPIC_IN_LOG, key=b"k", value=b"acknowledged", headers=[])
        await log.close()

    asyncio.run(create())
    return Path("gateway.db")


def content_of(file: Path) -> tuple[dict[str, int], bool]:
    """Return where each topic of a log ends, and whether something says that a spool has moved some of it."""

    async def read() -> tuple[dict[str, int], bool]:
        log = await EmbeddedLog.open(file, owner=False)
        ends = {topic: (await log.bounds(topic))[0] for topic in await log.topics()}
        has_commits = bool(await log.topics_of(GROUP))
        records = sum([end - start for start, end in ends.values()])
        await log.close()
        return {topic: end for topic, (_, end) in ends.items()} | {"records": records}, has_commits

    return asyncio.run(read())


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["verify"],
        ["drop", f"--topic={TOPIC_IN_LOG}", "--yes"],
        ["drop", f"--topic={TOPIC_IN_LOG}", "--dry-run"],
        ["move", "--log=kafka://127.0.0.1:1"],
    ],
)
def test_a_log_is_no_spool(log_file: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    before = content_of(log_file)
    assert main(["spool", *words, f"--spool=sqlite:///{log_file}"]) == 2
    assert f"--spool: {log_file}: expected a spool, got a gateway's log: team-a.control is in it" in (
        capsys.readouterr().err
    )
    assert content_of(log_file) == before


async def test_an_ingress_does_not_begin_with_a_log_as_its_spool(log_file: Path) -> None:
    settings = SpoolSettings(file=log_file)
    metrics, logger = Metrics(CollectorRegistry()), structlog.get_logger("gateway")
    with pytest.raises(UsageError, match=r"--spool: .*expected a spool, got a gateway's log"):
        await open_spool(settings, log=MemoryLog(), topics=list, metrics=metrics, logger=logger)
    log = await EmbeddedLog.open(log_file, owner=True)  # what was refused has let go of it
    await log.close()


async def test_a_log_that_keeps_a_topic_for_a_hundred_years_is_a_log_and_no_spool(log_file: Path) -> None:
    log = await EmbeddedLog.open(log_file, owner=True, sweep_interval=None)
    await log.create([TopicSpec(name="team-a.events.kept", partitions=1, retention=FOREVER)])
    await log.close()
    await (await open_log(Settings(log=EmbeddedTarget(log_file)), owner=True)).close()
    with pytest.raises(UsageError, match="expected a spool, got a gateway's log"):
        await FileStore.open(log_file, owner=True)


@pytest.mark.parametrize("words", [["events", "list"], ["topics", "create"], ["topics", "check"], ["status"]])
def test_a_spool_is_no_log(run: Run, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    Path("routes.yaml").write_text("version: 1\nsources: {}\n")
    assert main([*words, "--log=sqlite:///spool.db"]) == 2
    assert "spool.db: expected a gateway's log, got a spool" in capsys.readouterr().err
    assert left(run) == {TOPIC: 3, GONE: 2}


async def test_a_gateway_does_not_begin_on_a_spool() -> None:
    with pytest.raises(UsageError, match="expected a gateway's log, got a spool"):
        await open_log(Settings(log=EmbeddedTarget(Path("spool.db"))), owner=True)
    store = await FileStore.open(Path("spool.db"), owner=True)  # what was refused has let go of it
    await store.commit({TOPIC: Commit(1)})
    await store.close()
