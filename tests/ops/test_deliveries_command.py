"""`gateway deliveries list`, as an operator calls it while a destination is down."""

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
from gateway.model import Event, ResponseExcerpt, Result
from gateway.ops import responses_in_log
from tests.index.company import Company

Run = Callable[..., tuple[int, str, str]]
RULES = """
version: 1
sources:
  github: {verify: {scheme: none}}
  stripe: {verify: {scheme: none}}
destinations:
  ci: {url: "http://127.0.0.1:1/"}
routes:
  - {name: build, from: [github, stripe], to: ci}
"""
FAILED: dict[str, Any] = {"result": Result.SERVER_ERROR, "status": 503, "decision": Decision.RETRY}


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
        code = main(["deliveries", "list", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def events() -> list[Event]:
    """Store events of which the first waits for ci, whose response is recorded, and the second is parked."""

    async def store() -> list[Event]:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
        company = await Company.found(log)
        first, *_ = await company.event(key="a")
        second, *_ = await company.event(type="release\x1b[31m")
        third, *_ = await company.event(source="stripe")
        await company.retry(first, due=log.now() + 60.0)
        body = b"down for \x1b[31mmaintenance\n until noon " + 60 * b"x"
        await company.attempt(first, **FAILED, response=ResponseExcerpt(body=body))
        await company.park(second)
        await company.die(third, destination="chat")
        async with open_index(Path("index.db"), log, company.topics) as index:
            await index.refresh()
        await company.close()
        await log.close()
        return [first, second, third]

    return asyncio.run(store())


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_what_waits_for_a_destination_is_listed_with_what_it_has_answered(run: Run, events: list[Event]) -> None:
    code, out, err = run("--destination", "ci", "--waiting")
    assert code == 0
    assert out.index(events[1].id) < out.index(events[0].id)
    assert events[2].id not in out
    assert "build → ci" in out
    assert "503" in out
    assert "maintenance until noon xxx" in out
    assert "destination/ci" in out
    assert "\x1b" not in out
    assert err.startswith("the index is complete to ")
    assert "what waits for its first attempt to end has no record yet, and isn't listed" in err
    parked, retried, last = lines(run("--destination", "ci", "--waiting", "--json")[1])
    assert (parked["event"]["id"], parked["status"], parked["reason"]) == (events[1].id, "parked", "destination/ci")
    assert (parked["due"], parked["response"], parked["attempts"]) == (None, None, [])
    assert (retried["event"]["id"], retried["event"]["key"], retried["tried"]) == (events[0].id, "a", 1)
    assert retried["attempts"][0]["result"] == "503"
    assert retried["response"].startswith("down for \x1b[31mmaintenance\n until noon")
    assert retried["due"] is not None
    assert retried["since"] == retried["event"]["received_at"]
    assert last.keys() == {"index", "unrecorded_since"}
    assert last["unrecorded_since"] is not None


def test_a_route_a_source_a_status_and_a_limit_narrow_it(run: Run, events: list[Event]) -> None:
    def found(*words: str) -> list[str]:
        return [each["event"]["id"] for each in lines(run(*words, "--json")[1])[:-1]]

    first, second, third = [event.id for event in events]
    assert sorted(found()) == sorted([third, second, first])
    assert found("--route", "build", "--source", "stripe") == [third]
    assert sorted(found("--status", "dead, parked")) == sorted([third, second])
    assert found("--source", "github", "--limit", "1") == [second]
    assert found("--destination", "nobody") == []


@pytest.mark.usefixtures("events")
def test_nothing_found_is_an_answer_and_what_cannot_wait_unrecorded_is_not_mentioned(run: Run) -> None:
    code, out, err = run("--status", "dropped")
    assert (code, out) == (0, "no deliveries\n")
    assert "has no record yet" not in err


@pytest.mark.usefixtures("events")
def test_a_wrong_status_is_told(run: Run) -> None:
    code, out, err = run("--status", "dead,retryng")
    assert (code, out) == (2, "")
    assert err.startswith("error: --status: expected one of dead, parked, retrying, ")
    assert err.endswith(", got 'retryng', did you mean 'retrying'?\n")
    assert run("--status", "dead", "--waiting")[0] == 2


async def store_echo() -> None:
    """Store an event, and an attempt whose response repeats a word of its body."""
    log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
    company = await Company.found(log)
    event, *_ = await company.event(body={"word": "maintenance"})
    await company.attempt(event, **FAILED, response=ResponseExcerpt(body=b"maintenance is over"))
    async with open_index(Path("index.db"), log, company.topics) as index:
        await index.refresh()
    await company.close()
    await log.close()


def test_a_response_is_shown_without_what_its_events_source_hides(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(store_echo())

    def response() -> object:
        return lines(run("--json")[1])[0]["response"]

    assert response() == "maintenance is over"
    Path("routes.yaml").write_text(RULES.replace("github: {", "github: {redact: [body.word], "))
    assert response() == "*** is over"

    async def gone(*_: object) -> None:
        return None

    monkeypatch.setattr(responses_in_log, "_event", gone)
    assert response() == "[redacted]"  # nobody knows what it would have to hide


async def store_namesakes(*, is_one_request: bool) -> None:
    """Store two events with one id and a card each, and an attempt of each whose response has both cards."""
    log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
    company = await Company.found(log)
    response = ResponseExcerpt(body=b"4111111111111111, 5500000000000004")
    first, *_ = await company.event(body={"card": "4111111111111111"})
    its = {"received_at": first.received_at} if is_one_request else {}
    second, *_ = await company.event(id=first.id, body={"card": "5500000000000004"}, **its)
    for number, event in enumerate((first, second), 1):
        await company.attempt(event, number=number, **FAILED, response=response)
    async with open_index(Path("index.db"), log, company.topics) as index:
        await index.refresh()
    await company.close()
    await log.close()


@pytest.mark.parametrize("is_one_request", [False, True])
def test_a_response_hides_what_its_own_event_hides(
    run: Run, capsys: pytest.CaptureFixture[str], *, is_one_request: bool
) -> None:
    """Of two with one id, in one request, nobody knows whose it is."""
    asyncio.run(store_namesakes(is_one_request=is_one_request))
    Path("routes.yaml").write_text(RULES.replace("github: {", "github: {redact: [body.card], "))
    found = lines(run("--json")[1])[:-1]
    expected = {"[redacted]"} if is_one_request else {"4111111111111111, ***", "***, 5500000000000004"}
    assert {each["response"] for each in found} == expected
    assert main(["events", "show", found[0]["event"]["id"], "--all", "--deliveries", "--json"]) == 0
    shown = lines(capsys.readouterr().out)
    assert {one["response"] for each in shown if "deliveries" in each for one in each["deliveries"]} == expected


def test_without_the_log_everything_else_is_shown(run: Run, events: list[Event]) -> None:
    Path("gateway.db").rename("elsewhere.db")
    code, out, err = run("--destination", "ci", "--waiting")
    assert code == 0
    assert events[0].id in out
    assert "503" in out
    assert "what was responded isn't shown, as it can't be read: " in err


def test_without_an_index_it_says_how_to_get_one(run: Run) -> None:
    code, out, err = run("--waiting")
    assert (code, out) == (2, "")
    assert "`gateway run --role console --index index.db` keeps one" in err


@pytest.mark.usefixtures("events")
def test_a_name_that_the_rules_lack_is_told_where_nothing_was_found(run: Run) -> None:
    assert "local rules" not in run("--destination", "chat")[2], "it has one"
    code, out, err = run("--route", "biuld")
    assert (code, out.splitlines()[0]) == (0, "no deliveries")
    assert "--route: 'biuld' isn't in the local rules, did you mean 'build'?" in err
    Path("routes.yaml").unlink()
    assert "local rules" not in run("--route", "biuld")[2]
