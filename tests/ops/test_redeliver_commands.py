"""`gateway events redeliver`, as an operator calls it: on a log, whose jobs a gateway carries out in between."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from time import time
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry

from gateway.cli import main
from gateway.engine.control.follower import Follower
from gateway.engine.control.records import ControlRecord
from gateway.engine.control.redelivery_records import Redelivery
from gateway.engine.control.state import Control
from gateway.engine.jobs.runner import Jobs
from gateway.index.index import open_index
from gateway.log.base import Log, Partition
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import decode_delivery, encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import UsageError
from gateway.ops import redeliveries
from gateway.ops.audit import who
from gateway.ops.control_client import ControlClient
from gateway.ops.log_search import find_event
from gateway.rules.load import load_rules
from gateway.telemetry.metrics import Metrics
from tests.builders import an_event
from tests.engine.test_worker import QUIET

RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["${SECRET}"]}}
destinations:
  ci: {url: "http://127.0.0.1:1/"}
  chat: {url: "http://127.0.0.1:1/"}
routes:
  - {name: build, from: github, match: {type: push}, to: ci}
  - {name: all, from: github, to: [ci, chat]}
"""
TOPICS = Topics()
EVENTS = TOPICS.events("github")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    Path("routes.yaml").write_text(RULES)
    handlers, level = logging.root.handlers[:], logging.root.level
    on_log(lambda log: log.create(TOPICS.specs([EVENTS], ())))
    on_log(_put)
    yield tmp_path
    logging.root.handlers[:], logging.root.level = handlers, level
    structlog.reset_defaults()


async def _put(log: Log) -> None:
    for number in range(3):
        event = an_event(id=f"evt_{number}", type="push" if number else "issues")
        await log.append(EVENTS, key=event_key(event), value=event.body, headers=encode_event(event))


def on_log(work: Callable[[EmbeddedLog], Any]) -> Any:
    async def opened() -> Any:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
        try:
            return await work(log)
        finally:
            await log.close()

    return asyncio.run(opened())


def carry_out() -> list[tuple[str, str, str]]:
    """Be the gateway, until no redelivery waits. Return what is queued: events, routes and destinations."""
    rules = load_rules(Path("routes.yaml"), resolve=False)

    async def work(log: EmbeddedLog) -> list[tuple[str, str, str]]:
        metrics = Metrics(CollectorRegistry())
        follower = Follower(log, TOPICS, metrics, QUIET)
        jobs = Jobs(log=log, topics=TOPICS, rules=lambda: rules, follower=follower, metrics=metrics, logger=QUIET)
        caught_up = asyncio.Event()
        tasks = [asyncio.create_task(follower.follow(caught_up)), asyncio.create_task(jobs.run())]
        await caught_up.wait()
        async with asyncio.timeout(20):
            while follower.control.pending("redeliver") or follower.control.unacknowledged_cancellations():  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        stored = [
            decode_delivery(record).delivery
            async for records in log.scan(Partition(TOPICS.retry("5s"), 0), 0, 1000)
            for record in records
        ]
        return [(each.event.id, each.route, each.destination) for each in stored]

    found: list[tuple[str, str, str]] = on_log(work)
    return found


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["events", "redeliver", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def asked_for(run: Run, *words: str) -> str:
    (told,) = lines(run(*words, "--no-wait", "--json")[1])
    name: str = told["redelivery"]
    return name


def test_an_event_is_delivered_again_and_told_where(run: Run) -> None:
    code, out, _ = run("evt_1", "--why", "lost its disk", "--no-wait")
    assert (code, out.split()[0], out.split()[2:4]) == (0, "redelivery", ["is", "stored;"])
    name = out.split()[1]
    assert carry_out() == [("evt_1", "build", "ci"), ("evt_1", "all", "ci"), ("evt_1", "all", "chat")]
    code, out, _ = run("--follow", name)
    assert code == 0
    *table, last = out.splitlines()
    assert [line.split() for line in table[1:] if "queued" in line] == [
        ["build", "ci", "queued"],
        ["all", "ci", "queued"],
        ["all", "chat", "queued"],
    ]
    assert last == "queued 3 deliveries of evt_1: due within 5 seconds, then at their destinations' own pace"
    (told,) = lines(run("--follow", name, "--json")[1])
    assert (told["state"], told["is_final"], told["reason"]) == ("done", True, "lost its disk")
    assert (told["position"], len(told["deliveries"])) == (f"{EVENTS}/0@1", 3)
    assert told["by"] == who()


@pytest.mark.parametrize(
    ("paused", "told"),
    [
        (("route/all",), ": due within 5 seconds, then at their destinations' own pace; 2 paused"),
        (("route/all", "route/build"), ", which will be stored until what is paused is resumed"),
    ],
)
def test_what_is_paused_is_not_told_to_be_due(run: Run, paused: tuple[str, ...], told: str) -> None:
    async def pause(log: EmbeddedLog) -> None:
        for name in paused:
            await ControlClient(log, TOPICS).pause(name)

    on_log(pause)
    name = asked_for(run, "evt_1")
    carry_out()
    *table, last = run("--follow", name)[1].splitlines()
    assert last == f"queued 3 deliveries of evt_1{told}"
    assert sum("paused: it will be stored until `gateway route resume" in row for row in table) == len(paused) + 1


def test_a_position_a_route_and_a_destination_say_exactly_what(run: Run) -> None:
    asked_for(run, f"{EVENTS}/0@0", "--route", "all", "--destination", "chat")
    assert carry_out() == [("evt_0", "all", "chat")]


def test_what_the_running_rules_do_not_do_is_refused_with_the_reason(run: Run) -> None:
    name = asked_for(run, "evt_0", "--route", "build")
    assert carry_out() == []
    code, out, err = run("--follow", name)
    assert (code, out) == (1, "")
    reason = "expected route build to take evt_0, got all, by the active rules"
    assert err == f"error: redelivery {name} was cancelled after 0 deliveries of evt_0: {reason}\n"


def test_a_name_that_only_the_running_rules_may_have_is_told_and_asked_for(run: Run) -> None:
    code, _, err = run("evt_0", "--route", "al", "--no-wait")
    assert (code, err) == (0, "--route: 'al' isn't in the local rules, did you mean 'all'?\n")


def test_without_a_gateway_it_waits_and_says_so(run: Run) -> None:
    code, _, err = run("evt_1", "--timeout", "1ms")
    assert code == 1
    assert "hasn't ended, with 0 deliveries of evt_1 queued by now: is a gateway of this version running" in err
    assert len(carry_out()) == 3


def test_those_of_the_last_days_are_listed(run: Run) -> None:
    assert run("--list")[:2] == (0, "no event was redelivered within 7 days\n")
    first = asked_for(run, "evt_1", "--why", "lost\x1b[31m")
    carry_out()
    second = asked_for(run, "evt_0", "--route", "build")
    out = run("--list")[1]
    assert out.index(second) < out.index(first)
    assert "waits" in out
    assert "\x1b" not in out
    assert [each["state"] for each in lines(run("--list", "--json")[1])] == ["requested", "done"]


def test_one_that_waits_is_cancelled(run: Run) -> None:
    name = asked_for(run, "evt_1")
    code, out, _ = run("--cancel", name, "--timeout", "1ms")
    assert code == 0
    told = "cancelled after 0 deliveries or more: no gateway reported where it stopped"
    assert out == f"redelivery {name} is {told}\n"
    assert carry_out() == []
    assert run("--cancel", name)[0] == 2
    code, _, err = run("--follow", name)
    assert (code, f"cancelled after 0 deliveries of evt_1: by {who()}" in err) == (1, True)


@pytest.mark.parametrize(
    "words",
    [(), ("evt_1", "--list"), ("--list", "--follow", "x"), ("--list", "--route", "all"), ("--cancel", "x", "evt_1")],
)
def test_what_cannot_be_meant_is_refused(run: Run, words: tuple[str, ...]) -> None:
    assert run(*words)[0] == 2


def test_what_is_unknown_is_told(run: Run) -> None:
    nowhere = "expected the id of an event in the log, or its position, got neither"
    for name in ("evt_9", f"{EVENTS}/0@9"):
        assert run(name) == (1, "", f"error: {name}: {nowhere}\n")
    assert run("--follow", "x")[0] == run("--cancel", "x")[0] == 2


def test_an_id_is_found_by_the_index_and_without_it_in_the_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def indexed(log: EmbeddedLog) -> None:
        async with open_index(Path("index.db"), log, TOPICS) as index:
            await index.refresh()

    on_log(indexed)
    looked_for: list[str] = []

    async def noted(log: Log, topics: Any, name: str) -> Any:
        looked_for.append(name)
        return await find_event(log, topics, name)

    monkeypatch.setattr(redeliveries, "find_event", noted)
    asked_for(run, "evt_1")
    assert looked_for == [f"{EVENTS}/0@1"]
    asked_for(run, "evt_1", "--index", "none.db")
    assert looked_for[1:] == ["evt_1"]


def test_an_index_of_another_log_is_not_believed(run: Run) -> None:
    async def indexed(log: EmbeddedLog) -> None:
        async with open_index(Path("index.db"), log, TOPICS) as index:
            await index.refresh()

    on_log(indexed)
    Path("gateway.db").rename("other.db")
    for path in Path().glob("gateway.db*"):
        path.unlink()
    on_log(lambda log: log.create(TOPICS.specs([EVENTS], ())))

    async def put(log: Log) -> None:
        for name in ("evt_5", "evt_6", "evt_1"):
            event = an_event(id=name)
            await log.append(EVENTS, key=event_key(event), value=event.body, headers=encode_event(event))

    on_log(put)
    (told,) = lines(run("evt_1", "--no-wait", "--json")[1])
    assert told["position"] == f"{EVENTS}/0@2"


def _asked(control: Control, **fields: Any) -> redeliveries.Asked:
    async def work(log: EmbeddedLog) -> redeliveries.Asked:
        found = await find_event(log, [EVENTS], "evt_1")
        assert found is not None
        return await redeliveries.redeliver(log, TOPICS, control, found, **fields)

    asked: redeliveries.Asked = on_log(work)
    return asked


def _control() -> Control:
    control: Control = on_log(lambda log: ControlClient(log, TOPICS).control())
    return control


def test_a_name_is_one_redelivery_and_never_another() -> None:
    first = _asked(_control(), name="key-1", route="all")
    again = _asked(_control(), name="key-1", route="all")
    assert (first.is_new, again.is_new, again.command) == (True, False, first.command)
    with pytest.raises(UsageError, match="redelivery key-1: it was of another event or of other targets"):
        _asked(_control(), name="key-1", route="build")
    for name in ("x" * 201, "a b", "a\n", "é"):
        with pytest.raises(UsageError, match="a name of at most 200 visible ASCII characters, got "):
            _asked(_control(), name=name)
    with pytest.raises(UsageError, match="a reason of at most 500 characters, got 501"):
        _asked(_control(), reason="x" * 501)


def test_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Redelivery(event="evt_1", partition=f"{EVENTS}/0", offset=1)
    waits = [
        ControlRecord(kind="redeliver", name=f"r{number}", state="requested", at=time(), redelivery=asked)
        for number in range(3)
    ]
    monkeypatch.setattr(redeliveries, "MAX_PENDING", 3)
    with pytest.raises(UsageError, match="`gateway replay` delivers many events again"):
        _asked(Control(waits))
    ended = Control([each.with_state("done") for each in waits])
    assert _asked(ended).is_new
    monkeypatch.setattr(redeliveries, "MAX_KNOWN", 3)
    with pytest.raises(UsageError, match="`gateway replay` delivers many events again"):
        _asked(ended)
