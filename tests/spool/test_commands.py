"""`gateway spool`, as an operator calls it: what it says, and what is left."""

import asyncio
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from gateway.cli import main
from gateway.spool.store import FileStore
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


async def _fill() -> None:
    store = await FileStore.open(Path("spool.db"), owner=True)
    await fill(store, 3)
    await fill(store, 2, topic=GONE)
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
    assert "all that a new one has is in its spool.db-wal at first; bring that back beside it" in err
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
