"""`gateway events search` and `events show --deliveries`, as an operator calls them: on a log and its index."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway.cli import main
from gateway.index.index import open_index
from gateway.log.attempt_records import Decision
from gateway.log.embedded.log import EmbeddedLog
from gateway.model import Event, Result
from tests.index.company import Company

RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["${SECRET}"]}}
destinations:
  ci: {url: "http://127.0.0.1:1/"}
routes:
  - {name: build, from: github, to: ci}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    Path("routes.yaml").write_text(RULES)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield tmp_path
    logging.root.handlers[:], logging.root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["events", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def events() -> list[Event]:
    """Store some events, of which the first has a dead letter and the second is retried, and index them."""

    async def store() -> list[Event]:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
        company = await Company.found(log)
        first, *_ = await company.event(key="a", body={"order": {"id": 42}})
        second, *_ = await company.event(key="b", type="release\x1b[31m\u202eevil", body={"order": {"id": 43}})
        third, partition, last = await company.event(key="c")
        await company.die(first)
        await company.retry(second)
        await company.commit(partition, last + 1)
        async with open_index(Path("index.db"), log, company.topics) as index:
            await index.refresh()
        await company.close()
        await log.close()
        return [first, second, third]

    return asyncio.run(store())


def test_bytes_that_are_no_text_are_no_query(run: Run, events: list[Event]) -> None:
    assert events
    code, _, err = run("search", "id:\udcff")
    assert (code, "expected text in UTF-8" in err) == (2, True)
    assert run("show", "\udcff")[0] == 1


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_what_is_found_is_shown_newest_first_with_what_has_become_of_it(run: Run, events: list[Event]) -> None:
    code, out, err = run("search", "")
    assert code == 0
    assert [out.index(event.id) for event in reversed(events)] == sorted([out.index(event.id) for event in events])
    assert "build → ci: dead" in out
    assert "build → ci: retrying" in out
    assert err.startswith("the index is complete to ")
    *found, last = lines(run("search", "status:dead", "--json")[1])
    assert [(each["id"], each["status"], each["key"]) for each in found] == [(events[0].id, "dead", "a")]
    assert found[0]["deliveries"] == [{"route": "build", "destination": "ci", "status": "dead"}]
    assert found[0]["deliveries_left_out"] == 0
    assert found[0]["position"].startswith("gateway.events.github/0@")
    assert last.keys() == {"index"}


def test_a_search_has_limits(run: Run, events: list[Event]) -> None:
    *found, _ = lines(run("search", "", "--limit", "2", "--json")[1])
    assert [each["id"] for each in found] == [events[2].id, events[1].id]
    assert len(lines(run("search", "", "--since", "1h", "--json")[1])) == 4
    assert len(lines(run("search", "since:1h", "--since", "1ms", "--json")[1])) == 1


@pytest.mark.usefixtures("events")
def test_nothing_found_is_an_answer(run: Run) -> None:
    code, out, err = run("search", "body.order.id:44")
    assert (code, out) == (0, "no events\n")
    assert err.startswith("the index is complete to ")


@pytest.mark.usefixtures("events")
def test_a_wrong_query_is_told_with_its_place(run: Run) -> None:
    code, out, err = run("search", "sorce:github status:delivred")
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert first.startswith("error: query:1: expected one of source, type, key, id, identity, route, destination, ")
    assert first.endswith(", got 'sorce', did you mean 'source'?")
    assert second.startswith("error: query:14: status: expected one of dead, parked, retrying, ")
    assert second.endswith(", got 'delivred', did you mean 'delivered'?")


@pytest.mark.usefixtures("events")
def test_a_query_that_begins_with_a_minus_has_a_blank_before_it(run: Run) -> None:
    assert [each["status"] for each in lines(run("search", " -status:dead,done", "--json")[1])[:-1]] == ["retrying"]


def test_what_would_move_the_readers_cursor_is_escaped(run: Run, events: list[Event]) -> None:
    for words in (("search", "key:b"), ("search", "key:b", "--json"), ("show", events[1].id, "--deliveries")):
        code, out, _ = run(*words)
        assert code == 0
        assert events[1].id in out
        assert not {"\x1b", "\u202e"} & set(out)


def test_without_an_index_it_says_how_to_get_one(run: Run) -> None:
    for words in (("search", ""), ("show", "evt_0", "--deliveries")):
        code, out, err = run(*words, "--index", "none.db")
        assert (code, out) == (2, "")
        assert "none.db: expected an index, got no file; `gateway run --role console --index none.db` keeps one" in err
    assert not Path("none.db").exists()


def test_an_event_is_shown_with_its_deliveries(run: Run, events: list[Event]) -> None:
    code, out, err = run("show", events[0].id, "--deliveries")
    assert code == 0
    assert '{"order":{"id":42}}' in out.replace(" ", "")
    assert "build → ci" in out
    assert "exhausted" in out
    assert err.startswith("the index is complete to ")
    [shown] = lines(run("show", events[1].id, "--deliveries", "--json")[1])
    assert shown["status"] == "retrying"
    [delivery] = shown["deliveries"]
    assert [attempt["result"] for attempt in delivery["attempts"]] == ["503"]
    code, out, _ = run("show", events[2].id, "--deliveries")
    assert "none is recorded; status done" in out
    [shown] = lines(run("show", events[1].id, "--json")[1])
    assert "deliveries" not in shown


def test_a_delivery_that_a_kick_has_begun_again_isnt_called_replayed(run: Run) -> None:
    async def store() -> Event:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
        company = await Company.found(log)
        event, *_ = await company.event()
        kick = log.now()
        failed: dict[str, Any] = {"result": Result.CLIENT_ERROR, "status": 404, "decision": Decision.HALTED}
        await company.attempt(event, **failed)
        await company.attempt(event, replayed_at=kick, **failed)
        async with open_index(Path("index.db"), log, company.topics) as index:
            await index.refresh()
        await company.close()
        await log.close()
        return event

    code, out, _ = run("show", asyncio.run(store()).id, "--deliveries")
    assert (code, "begun again 20" in out, "replayed" in out) == (0, True, False)


def test_an_event_that_the_index_lacks_is_shown_all_the_same(run: Run, events: list[Event]) -> None:
    async def store() -> Event:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
        company = await Company.found(log)
        newest, *_ = await company.event(key="d", id=f"evt_{'7' * 32}")
        await company.close()
        await log.close()
        return newest

    newest = asyncio.run(store())
    code, out, err = run("show", newest.id, "--deliveries")
    assert code == 0
    assert newest.id in out
    assert "the index doesn't have it" in err
    [shown] = lines(run("show", newest.id, "--deliveries", "--json")[1])
    assert (shown["status"], shown["deliveries"]) == (None, [])
    assert len(events) == 3
