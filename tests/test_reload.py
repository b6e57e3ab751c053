"""What a process does with new rules: when it reads them, which it refuses, and which of those it looks at again."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import CapturedCall, CapturingLogger
from typing_extensions import override

from gateway.bodies.redaction import MAX_QUICK_BODY
from gateway.log.base import TopicSpec
from gateway.model import Event, GatewayError, LogUnavailableError, UsageError
from gateway.reload import MAX_NAMES, RELOAD_RETRY_INTERVAL, REMEMBERED, Reloader
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from gateway.settings import EmbeddedTarget, Settings
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.refusal_runs import PAUSE
from tests.builders import an_event
from tests.certificates import Authority
from tests.engine.test_worker import QUIET
from tests.memory_log import MemoryLog

SOURCE = "version: 1\nsources:\n  crm: {verify: {scheme: none}}\n"
NEW = "  shop: {verify: {scheme: none}}\n"


class Closed(MemoryLog):
    """A log in which no topic can be made."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    @override
    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        raise self.error


def a_reloader(file: Path, logger: Any, metrics: Metrics | None = None) -> Reloader:
    settings = Settings(rules=file, log=EmbeddedTarget(file.with_name("log.db")))
    return Reloader(settings, metrics or Metrics(CollectorRegistry()), logger, on_activated=lambda _: None)


def taken(folder: Path, text: str, log: MemoryLog) -> bool:
    """Let a gateway that runs with SOURCE find other rules; return whether it is done with them, taken or refused."""
    file = folder / "routes.yaml"
    file.write_text(SOURCE)
    reloader = a_reloader(file, QUIET)
    reloader.activate(load_rules(file), {})
    file.write_text(text)
    is_over = asyncio.run(reloader.read(log))
    in_force = reloader.rules.sources.keys()
    assert in_force == ({"crm", "shop"} if text == SOURCE + NEW and not isinstance(log, Closed) else {"crm"})
    return is_over


def test_rules_that_are_in_force_are_not_looked_at_again(tmp_path: Path) -> None:
    assert taken(tmp_path, SOURCE + NEW, MemoryLog())


@pytest.mark.parametrize(
    "text",
    [
        SOURCE + "destination: {}\n",
        SOURCE + "  shop: {verify: {scheme: none}, topic: gateway.dead}\n",
    ],
)
def test_rules_that_are_at_fault_themselves_are_not_looked_at_again(tmp_path: Path, text: str) -> None:
    assert taken(tmp_path, text, MemoryLog())


@pytest.mark.parametrize("error", [LogUnavailableError("no answer"), UsageError("TopicAuthorizationFailed")])
def test_rules_that_the_log_was_in_the_way_of_are_looked_at_again(tmp_path: Path, error: GatewayError) -> None:
    assert not taken(tmp_path, SOURCE + NEW, Closed(error))


# When files are read, by looks that the tests themselves take.


async def written(file: Path, text: str) -> None:
    await asyncio.to_thread(file.write_text, text)


class Running:
    """A gateway that runs with SOURCE, on a file that its test writes."""

    def __init__(self, folder: Path, log: MemoryLog) -> None:
        self.file = folder / "routes.yaml"
        self.told = CapturingLogger()
        self.metrics = Metrics(CollectorRegistry())
        self.reloader = a_reloader(self.file, self.told, self.metrics)
        self.log = log
        self.version = 0

    async def look(self, text: str | None = None, *, now: float = 0.0) -> set[str]:
        """Write the file, if there is a string, look, and return the sources in force."""
        if text is not None:
            self.version += 1
            await written(self.file, text + "#" * self.version)  # of another size, should the clock not have moved
        await self.reloader.poll(self.log, now=now)
        return set(self.reloader.rules.sources)

    @property
    def reloads(self) -> list[CapturedCall]:
        return [call for call in self.told.calls if call.args == ("rules_reloaded",)]


@pytest.fixture
def process(tmp_path: Path) -> Running:
    process = Running(tmp_path, MemoryLog())
    process.file.write_text(SOURCE)
    return process


@pytest.fixture
async def running(process: Running) -> Running:
    await process.reloader.load()
    return process


async def test_a_file_that_is_being_written_is_not_read(running: Running) -> None:
    """Cut short it is still valid, with fewer sources: its senders would get 404."""
    assert await running.look(SOURCE + NEW) == {"crm"}
    assert await running.look("version: 1\nsources:\n  shop: {verify: {scheme: none}}\n") == {"crm"}
    assert await running.look(SOURCE + NEW) == {"crm"}
    assert running.reloads == []
    assert await running.look() == {"crm", "shop"}
    assert await running.look() == {"crm", "shop"}
    assert len(running.reloads) == 1


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ("egress: {private: refuse}\n", "egress: private"),
        ("ingress: {trusted_proxies: [10.0.0.1]}\n", "ingress: trusted_proxies"),
    ],
)
async def test_what_belongs_to_no_source_is_reloaded_as_well(running: Running, more: str, changed: str) -> None:
    running.metrics.refusal_runs.add("crm", "address_refused", at=0.0, events=0.0)
    await running.look(SOURCE + more)
    await running.look()
    assert [call.kwargs["changed"] for call in running.reloads] == [[changed]]
    assert bool(running.metrics.refusal_runs.of("crm", 0.0)) == (changed == "egress: private")


async def test_a_signal_takes_the_files_as_they_are(running: Running) -> None:
    running.reloader.reload_requested.set()
    assert await running.look(SOURCE + NEW) == {"crm", "shop"}
    assert not running.reloader.reload_requested.is_set()
    assert await running.look() == {"crm", "shop"}
    assert len(running.reloads) == 1


async def test_an_included_file_and_a_secret_are_waited_for_as_well(running: Running, tmp_path: Path) -> None:
    await written(tmp_path / "team.yaml", "sources: {}\n")
    await written(tmp_path / "secret", "a" * 16)
    secret = "  safe: {verify: {scheme: github, secrets: ['${file:secret}']}}\n"
    await running.look(SOURCE + secret + "include: team.yaml\n")
    assert await running.look() == {"crm", "safe"}
    await written(tmp_path / "team.yaml", "sources: {shop: {verify: {scheme: none}}}\n")
    assert await running.look() == {"crm", "safe"}
    await written(tmp_path / "secret", "b" * 17)
    assert await running.look() == {"crm", "safe"}
    assert await running.look() == {"crm", "safe", "shop"}
    assert running.reloads[-1].kwargs["changed"] == ["source safe: verify"]


async def test_an_edit_while_the_log_is_being_opened_is_a_change(running: Running) -> None:
    await written(running.file, SOURCE + NEW)
    assert await running.look() == {"crm"}
    assert await running.look() == {"crm", "shop"}


async def test_rules_that_the_log_was_in_the_way_of_are_read_once_it_may_be_back(running: Running) -> None:
    log, running.log = running.log, Closed(LogUnavailableError("no answer"))
    await running.look(SOURCE + NEW)
    assert await running.look(now=1.0) == {"crm"}
    (refused,) = [call.kwargs for call in running.told.calls if call.args == ("rules_refused",)]
    (problem,) = refused["problems"]
    assert problem.startswith("expected the log, for the new topics gateway.events.shop, got: no answer; ")
    assert problem.endswith("no part of these rules is in force until they are there")
    running.log = log
    assert await running.look(now=1.0 + RELOAD_RETRY_INTERVAL - 0.1) == {"crm"}
    assert await running.look(now=1.0 + RELOAD_RETRY_INTERVAL) == {"crm", "shop"}
    assert running.reloader.retry_at == math.inf


async def test_a_reload_logs_additions_changes_and_removals(running: Running) -> None:
    many = "".join(f"  s{number:02}: {{verify: {{scheme: none}}}}\n" for number in range(MAX_NAMES + 3))
    await running.look(SOURCE + many)
    await running.look()
    (added,) = running.reloads
    names = [f"source s{number:02}" for number in range(MAX_NAMES)]
    assert added.method_name == "info"
    assert added.kwargs["added"] == [*names, "and 3 more"]
    assert (added.kwargs["changed"], added.kwargs["removed"], added.kwargs["sources"]) == ([], [], MAX_NAMES + 4)

    await running.look(SOURCE.replace("none", "github, secrets: [aaaaaaaaaaaaaaaa]"))
    await running.look()
    removed = running.reloads[-1]
    assert removed.method_name == "warning"
    assert removed.kwargs["removed"] == [*names, "and 3 more"]
    assert (removed.kwargs["added"], removed.kwargs["changed"]) == ([], ["source crm: verify"])


async def test_the_status_of_a_source_has_its_secrets_that_end(running: Running, tmp_path: Path) -> None:
    await written(tmp_path / "secret", "a" * 16)
    until = "9000-01-01T00:00:00Z"
    secrets = f"['${{file:secret}}', {{secret: bbbbbbbbbbbbbbbb, until: {until}}}]"
    await running.look(SOURCE.replace("none", f"github, secrets: {secrets}"))
    await running.look()
    now = running.log.now()
    running.metrics.secret_uses.add("crm", 1, at=now)
    ((secret,),) = [each["secrets"] for each in running.reloader.source_statuses(now)]
    assert (secret["secret"], secret["events"], secret["is_last"]) == ("secret 2", 1, False)
    assert secret["until"] == 221845392000
    await written(tmp_path / "secret", "b" * 17)
    await running.look()
    await running.look()
    ((secret,),) = [each["secrets"] for each in running.reloader.source_statuses(now)]
    assert secret["events"] == 0, "another secret may be in its place"


def _routed(*names: str) -> str:
    routes = [f"  - {{name: {name}, from: crm, to: [ci]}}\n" for name in names]
    return SOURCE + 'destinations: {ci: {url: "http://ci"}}\nroutes:\n' + "".join(routes or ["  []\n"])


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [
        ("abcd", "ab", "error"),
        ("abcd", "", "error"),
        ("abcd", "efgh", "error"),
        ("abcd", "abc", "warning"),
        ("abcde", "abc", "warning"),
        ("a", "", "warning"),
        ("abcd", "abcde", "info"),
    ],
)
async def test_losing_half_of_the_routes_at_once_is_an_error(
    running: Running, before: str, after: str, level: str
) -> None:
    running.log = MemoryLog(now=lambda: 1000.0)
    await running.look(_routed(*before))
    await running.look()
    await running.look(_routed(*after))
    await running.look()
    assert running.reloads[-1].method_name == level
    assert (running.reloader.status()["loss"] is not None) == (level == "error")


async def test_routes_removed_at_once_are_reported_for_an_hour_with_the_missing_number(running: Running) -> None:
    now = 1000.0
    running.log = MemoryLog(now=lambda: now)
    await running.look(_routed(*"abcdef"))
    await running.look()
    await running.look()
    now = 1010.0
    await running.look(_routed("a", "b", "c"))
    await running.look()
    told = {"since": 1000.0, "of": 6, "reloads": 1, "routes": ("d", "e", "f"), "count": 3, "missing": 3}
    assert running.reloader.status()["loss"] == told
    await running.look(_routed("c", "d"))
    await running.look()
    both = {"routes": ("d", "e", "f", "a", "b"), "count": 5, "missing": 4, "reloads": 2}
    assert running.reloader.status()["loss"] == told | both
    await running.look(_routed(*"abcdef"))
    await running.look()
    assert running.reloader.status()["loss"]["missing"] == 0
    running.reloader.loss_at -= REMEMBERED + 1
    assert running.reloader.status()["loss"] is None


async def test_of_routes_that_went_in_several_reloads_all_are_counted_that_there_were(running: Running) -> None:
    running.log = MemoryLog(now=lambda: 1000.0)
    for names in ("abcd", "cd", "cdefgh", "gh"):
        await running.look(_routed(*names))
        await running.look()
    told = running.reloader.status()["loss"]
    assert (told["count"], told["of"], told["reloads"]) == (6, 8, 2)
    assert told["routes"] == tuple("abcdef")


async def test_a_refusal_and_its_end_say_since_when(running: Running) -> None:
    """What was missed was missed since the last look at which the files were as they had been read."""
    now = 1000.0
    running.log = MemoryLog(now=lambda: now)
    rules = running.reloader.status()
    assert (rules["refusal"], rules["since"], rules["file"]) == (None, None, str(running.file))
    await running.look()
    now = 1001.0
    await running.look(SOURCE + "destination: {}\n")
    now = 1002.0
    await running.look()
    now = 1003.0
    await running.look(SOURCE + "routes: 5\n")
    await running.look()
    told = [call.kwargs for call in running.told.calls if call.args == ("rules_refused",)]
    assert [(one["file"], one["since"]) for one in told] == [(str(running.file), "1970-01-01T00:16:40Z")] * 2
    refusal = running.reloader.status()["refusal"]
    assert (refusal["since"], refusal["until"], refusal["file"], refusal["count"]) == (
        1000.0,
        None,
        str(running.file),
        1,
    )
    assert refusal["problems"] == tuple(told[-1]["problems"])
    assert refusal["changed_at"] == (await asyncio.to_thread(running.file.stat)).st_mtime_ns / 1e9
    now = 1060.0
    await running.look(SOURCE + NEW)
    assert await running.look() == {"crm", "shop"}
    assert running.reloads[-1].kwargs["refused_since"] == "1970-01-01T00:16:40Z"
    rules = running.reloader.status()
    assert (rules["refusal"]["since"], rules["refusal"]["until"]) == (1000.0, 1060.0)
    assert (rules["changed"], rules["since"]) == (("source shop added",), 1000.0)
    running.reloader.refusal_ended -= REMEMBERED + 1
    assert running.reloader.status()["refusal"] is None
    now = 1070.0
    await running.look()
    await running.look(SOURCE)
    await running.look()
    assert "refused_since" not in running.reloads[-1].kwargs
    assert running.reloader.status()["since"] == 1070.0


async def test_unrouted_events_are_reported_by_their_rules(running: Running) -> None:
    metrics = running.metrics
    metrics.events.labels("crm").inc(10)
    for number in range(10):
        metrics.count_routed(an_event(source="crm"), ["build"] if number < 6 else [])
    await running.look()
    for at in (10.0, 20.0):
        metrics.refusal_runs.add("crm", "bad_signature", at=at, events=8.0)
    (source,) = running.reloader.source_statuses(0.0)
    refused = {"bad_signature": {"count": 2, "of": 4, "since": 10.0, "last": 20.0}}
    told = {"source": "crm", "events": 10, "unrouted": 4}
    assert source.items() >= (told | {"refused": refused}).items()
    await running.look(SOURCE + "# the same\n")
    await running.look()
    assert running.reloader.source_statuses(0.0) == [source]
    await running.look(SOURCE + NEW)
    await running.look()
    metrics.events.labels("crm").inc(3)
    for _ in range(3):
        metrics.count_routed(an_event(source="crm"), [])
    crm, shop = running.reloader.source_statuses(0.0)
    assert crm.items() >= (told | {"events": 13, "unrouted": 7}).items(), "nothing of its rules has changed"
    assert crm["refused"]["bad_signature"]["of"] == 7
    assert running.reloader.source_statuses(20.0 + PAUSE)[0]["refused"]
    assert running.reloader.source_statuses(21.0 + PAUSE)[0]["refused"] == {}, "it is over"
    metrics.refusal_runs.add("crm", "bad_signature", at=22.0 + PAUSE, events=13.0)
    (crm, _) = running.reloader.source_statuses(22.0 + PAUSE)
    assert crm["refused"]["bad_signature"] == {"count": 1, "of": 1, "since": 22.0 + PAUSE, "last": 22.0 + PAUSE}
    await running.look((SOURCE + NEW).replace("{scheme: none}", "{scheme: bearer, secrets: [abcdefghijklmnop]}", 1))
    await running.look()
    assert running.reloader.source_statuses(23.0 + PAUSE)[0]["refused"] == {}, "the new secret has fixed it"
    assert (shop["events"], shop["unrouted"]) == (0, 0)


async def test_types_that_are_hidden_are_counted_without_their_names(running: Running) -> None:
    metrics, hidden = running.metrics, an_event(source="crm", type="ill", body={"kind": "ill", "n": 1})
    hiding = SOURCE.replace("{scheme: none}", "{scheme: none}, redact: [body.kind]")

    def count(event: Event) -> None:
        metrics.count_routed(event, [])
        metrics.duplicates.labels("crm").inc()
        metrics.duplicate_events.add(event)

    def types() -> list[Any]:
        (source,) = running.reloader.source_statuses(0.0)
        return [each and each["types"] for each in (source["missed"], source, source["identity"])]

    await running.look()
    count(hidden)
    assert types() == [None, [("ill", 1)], [("ill", 1)]]
    await running.look(hiding)
    await running.look()
    before = [("[redacted]", 1)]
    assert types() == [before, [], before], "also what was counted before"
    count(hidden)
    count(replace(hidden, type="push"))
    assert types() == [before, [("[redacted]", 1), ("push", 1)], [("[redacted]", 2), ("push", 1)]]
    count(replace(hidden, type="push", body=b" " * MAX_QUICK_BODY + hidden.body))
    assert types()[1] == [("[redacted]", 2), ("push", 1)], "a large body isn't read for a count"


async def test_types_that_were_missed_are_told_without_their_names_once_they_are_hidden(running: Running) -> None:
    rules = ROUTED.format(build="push", both="pull", rest="1s")
    await running.look(rules)
    await running.look()
    running.metrics.count_routed(an_event(source="crm", type="ill", body={"kind": "ill"}), [])
    fixed = rules.replace("type: push", "type: ill")
    await running.look(fixed)
    await running.look()
    (crm, _) = running.reloader.source_statuses(0.0)
    assert crm["missed"]["types"] == [("ill", 1)]
    await running.look(fixed.replace("type: body.kind", "type: body.kind, redact: [body]"))
    await running.look()
    (crm, _) = running.reloader.source_statuses(0.0)
    assert crm["missed"]["types"] == [("[redacted]", 1)]


ROUTED = """
version: 1
sources: {{crm: {{verify: {{scheme: none}}, type: body.kind}}, shop: {{verify: {{scheme: none}}}}}}
destinations: {{ci: {{url: "http://ci"}}, erp: {{url: "http://erp"}}}}
routes:
  - {{name: build, from: crm, match: {{type: {build}}}, to: [ci]}}
  - {{name: both, from: crm, match: {{type: {both}}}, to: [ci, erp]}}
  - {{name: rest, from: shop, to: [ci], retry: {{schedule: [{rest}]}}}}
"""


def _forget(account: Any, name: str) -> None:
    """Let an hour pass since the rules were changed."""
    kept = account._missed[name]
    account._missed[name] = replace(kept, ended=kept.ended - REMEMBERED - 1)


async def test_unrouted_events_are_reported_for_an_hour_after_the_fix(running: Running) -> None:
    metrics, now = running.metrics, 1000.0
    running.log = MemoryLog(now=lambda: now)

    def leave_unrouted(count: int) -> None:
        for number in range(count):
            metrics.count_routed(an_event(id=f"evt_{number}", source="crm", type="order", received_at=now), [])

    async def reload(at: float, **values: str) -> dict[str, Any]:
        nonlocal now
        now = at
        await running.look()  # at which nothing has changed
        await running.look(ROUTED.format(**{"build": "order", "both": "ping", "rest": "1s"} | values))
        await running.look()
        crm, _ = running.reloader.source_statuses(0.0)
        return dict(crm)

    await reload(1000.0)
    metrics.count_routed(an_event(source="crm", type="order"), ["build"])
    crm = await reload(1010.0, build="ordre")
    assert (crm["since"], crm["changed"], crm["missed"]) == (1010.0, ("route build: match",), None)
    (quiet,) = running.reloader.route_statuses()["changed"]
    assert (quiet["route"], quiet["since"], quiet["changed"]) == ("build", 1010.0, ("route build: match",))
    leave_unrouted(7)
    crm = await reload(1020.0, build="ordre", rest="2s")
    assert (crm["unrouted"], crm["since"], crm["missed"]) == (7, 1010.0, None), "another's rules"
    assert (crm["missed_since"], crm["types"], crm["newest"]) == (1009.0, [("order", 7)], "evt_6")
    now = 1025.0
    leave_unrouted(2)
    crm = await reload(1030.0, build="odrer")
    assert (crm["unrouted"], crm["types"], crm["missed_since"]) == (0, [], 1030.0)
    missed = {"count": 9, "events": 9, "since": 1009.0, "until": 1030.0, "routes": ["build"], "fan_out": {}}
    assert crm["missed"] == missed | {"types": [("order", 9)]}
    leave_unrouted(3)
    crm = await reload(1040.0)
    missed = {"count": 12, "events": 12, "since": 1009.0, "until": 1040.0, "routes": ["build"], "fan_out": {}}
    assert crm["missed"] == missed | {"types": [("order", 12)]}, "what was fixed by halves isn't half forgotten"
    crm = await reload(1045.0, both="order")
    missed |= {"routes": ["both", "build"], "fan_out": {"both": 2}}
    assert crm["missed"] == missed | {"types": [("order", 12)]}, "this one may take it, too"
    (quiet,) = running.reloader.route_statuses()["missed"]
    assert (quiet["events"], quiet["since"], quiet["until"]) == (12, 1010.0, 1040.0)
    _forget(running.reloader.source_counts._unrouted, "crm")
    assert running.reloader.source_statuses(0.0)[0]["missed"] is None
    crm = await reload(1050.0, build="ordre")
    assert crm["missed"] is None


async def test_a_source_that_is_removed_and_added_again_begins_at_0(running: Running) -> None:
    """Its counters do, too: with what was counted before, -50 events would be unrouted."""
    metrics = running.metrics

    async def reload(text: str) -> None:
        await running.look(text)
        await running.look()

    def count(source: str) -> None:
        for number in range(50):
            event = an_event(id=f"evt_{number}", source=source, type="order", received_at=1000.0)
            metrics.count_routed(event, [])
            metrics.events.labels(source).inc()
            metrics.duplicates.labels(source).inc()
            metrics.duplicate_events.add(event)

    await reload(SOURCE + NEW)
    count("shop")
    await reload((SOURCE + NEW).replace("shop: {", "shop: {type: body.kind, id: body.id, "))
    _, shop = running.reloader.source_statuses(0.0)
    assert shop["missed"]["count"] == shop["identity"]["missed"]["count"] == 50
    count("shop")
    for kinds in ("", ", type: body.kind"):
        await reload(SOURCE)
        await reload(SOURCE + NEW.replace("}}", f"}}{kinds}}}"))
        _, shop = running.reloader.source_statuses(0.0)
        assert (shop["events"], shop["unrouted"], shop["types"], shop["missed"]) == (0, 0, [], None)
        identity = shop["identity"]
        assert (identity["events"], identity["duplicates"], identity["missed"]) == (0, 0, None)
    await reload(SOURCE)
    for account in (running.reloader.source_counts._unrouted, running.reloader.source_counts._suppressed):
        assert "shop" not in {**account._before, **account._in_force, **account._missed, **account._left_out._found}


IDENTIFIED = """
version: 1
sources: {{crm: {{verify: {{scheme: none}}, id: {id}, dedupe: {dedupe}}}}}
destinations: {{ci: {{url: "http://ci"}}}}
routes:
  - {{name: build, from: crm, match: {{type: {build}}}, to: [ci]}}
"""


async def test_what_dedupe_dropped_is_counted_until_the_fix_and_reported_for_an_hour_after(
    running: Running,
) -> None:
    metrics, now = running.metrics, 1000.0
    running.log = MemoryLog(now=lambda: now)

    def let_go(count: int) -> None:
        metrics.events.labels("crm").inc(count)
        metrics.duplicates.labels("crm").inc(count)
        for _ in range(count):
            metrics.duplicate_events.add(an_event(source="crm", type="order", received_at=now))

    async def reload(at: float, **values: str) -> dict[str, Any]:
        nonlocal now
        now = at
        await running.look()  # at which nothing has changed
        rules = {"id": "body.customer", "dedupe": "1h", "build": "order"}
        await running.look(IDENTIFIED.format(**rules | values))
        await running.look()
        (crm,) = running.reloader.source_statuses(0.0)
        return dict(crm)

    crm = await reload(1000.0)
    now = 1005.0
    let_go(7)
    crm = await reload(1010.0, build="ordre")
    identity = crm["identity"]
    assert (crm["since"], crm["events"]) == (1010.0, 0)
    assert (identity["since"], identity["duplicates"], identity["missed"]) == (1000.0, 7, None), "another change"
    let_go(2)
    crm = await reload(1020.0, id="body.id")
    identity = crm["identity"]
    assert (identity["duplicates"], identity["types"], identity["changed"][0]) == (0, [], "source crm: id")
    missed = {"count": 9, "events": 9, "since": 1000.0, "until": 1020.0, "routes": ["build"], "fan_out": {}}
    assert identity["missed"] == missed | {"types": [("order", 9)]}
    let_go(1)
    crm = await reload(1030.0, id="body.id", dedupe="off")
    missed = {"count": 10, "events": 10, "since": 1000.0, "until": 1030.0, "routes": ["build"], "fan_out": {}}
    assert crm["identity"]["missed"] == missed | {"types": [("order", 10)]}
    _forget(running.reloader.source_counts._suppressed, "crm")
    assert running.reloader.source_statuses(0.0)[0]["identity"]["missed"] is None


async def test_unrouted_events_of_a_processs_first_rules_are_dated_by_the_first(running: Running) -> None:
    metrics = running.metrics
    metrics.unrouted.labels("crm").inc()
    metrics.unrouted_events.add(an_event(source="crm", type="order", received_at=990.0))
    (crm,) = running.reloader.source_statuses(0.0)
    assert (crm["since"], crm["missed_since"]) == (None, 989.0)


# What nobody foresaw, and what isn't wrong.


async def test_a_load_that_fails_as_nobody_foresaw_is_a_refusal(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process goes on with the rules that it has."""

    def fail(_: Path) -> None:
        raise RecursionError("with a s3cret in it")

    with monkeypatch.context() as patched:
        patched.setattr("gateway.reload.load_rules", fail)
        await running.look(SOURCE + NEW)
        assert await running.look() == {"crm"}
    (refused,) = [call.kwargs for call in running.told.calls if call.args == ("rules_refused",)]
    (problem,) = refused["problems"]
    assert "expected rules that can be read, got RecursionError in test_reload.py, line " in problem
    assert "s3cret" not in problem
    await running.look(SOURCE + NEW)
    assert await running.look() == {"crm", "shop"}


async def test_an_error_of_the_log_that_nobody_foresaw_ends_the_process(running: Running) -> None:
    running.log = Closed(ZeroDivisionError())
    await running.look(SOURCE + NEW)
    with pytest.raises(ZeroDivisionError):
        await running.look()


async def test_after_a_reload_what_is_newly_doubtful_is_logged(running: Running) -> None:
    def told() -> list[str]:
        found = [call.kwargs["problem"] for call in running.told.calls if call.args == ("rules_warning",)]
        running.told.calls.clear()
        return [each.removeprefix(f"{running.file}:") for each in found]

    running.reloader.warn()
    first = told()
    assert len(first) == 2  # it is open, and unused
    await running.look("# a line above\n" + SOURCE + NEW.replace("none", "token, header: X-T, secrets: [short]"))
    await running.look()
    found = told()
    assert [each.split(": ")[:2] for each in found] == [
        ["5:3", "sources.shop"],
        ["5:57", "sources.shop.verify.secrets[0]"],
    ]
    await running.look(SOURCE)
    await running.look()
    assert told() == []


async def test_after_a_reload_a_demand_that_nobody_can_meet_is_logged(running: Running, tmp_path: Path) -> None:
    (ca := tmp_path / "ca.pem").write_text(Authority().pem)
    demand = f"  bank: {{verify: {{scheme: none}}, client_certificate: {{ca: '${{file:{ca}}}'}}}}\n"
    await running.look(SOURCE + demand)
    await running.look()
    told = [call.kwargs["problem"] for call in running.told.calls if call.args == ("rules_warning",)]
    assert any(each.startswith("sources.bank.client_certificate: expected TLS") for each in told)


# Changes that are noticed, wherever they are.


async def test_a_file_that_is_written_while_the_first_rules_are_read_is_a_change(
    process: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret that is written in that moment may be the first one that its sender uses."""
    (secret := tmp_path / "secret").write_text("a" * 16)
    read = "  safe: {verify: {scheme: github, secrets: ['${file:secret}']}}\n"
    process.file.write_text(SOURCE + read)

    def then_written(path: Path) -> Rules:
        rules = load_rules(path)
        secret.write_text("b" * 17)
        return rules

    with monkeypatch.context() as patched:
        patched.setattr("gateway.reload.load_rules", then_written)
        await process.reloader.load()
    await process.look()
    await process.look()
    assert [call.kwargs["changed"] for call in process.reloads] == [["source safe: verify"]]


async def test_a_file_that_is_new_and_written_while_it_is_read_is_a_change(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = tmp_path / "team.yaml"
    await written(team, "sources: {}\n")

    def then_written(path: Path) -> Rules:
        rules = load_rules(path)
        team.write_text("sources: {shop: {verify: {scheme: none}}}\n")
        return rules

    await running.look(SOURCE + "include: team.yaml\n")
    with monkeypatch.context() as patched:
        patched.setattr("gateway.reload.load_rules", then_written)
        assert await running.look() == {"crm"}
    await running.look()
    assert await running.look() == {"crm", "shop"}


@pytest.mark.parametrize("name", ["routes.d/a.yaml", "teams/a/routes.yaml", "teams/new/routes.yaml"])
async def test_a_file_in_a_folder_that_comes_later_is_noticed(running: Running, tmp_path: Path, name: str) -> None:
    (tmp_path / "teams" / "a").mkdir(parents=True)
    await running.look(SOURCE + "include: [routes.d/*.yaml, teams/*/routes.yaml]\n")
    assert await running.look() == {"crm"}
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    await written(tmp_path / name, "sources: {shop: {verify: {scheme: none}}}\n")
    await running.look()
    assert await running.look() == {"crm", "shop"}


async def test_the_fix_of_a_refusal_in_a_new_file_is_noticed(running: Running, tmp_path: Path) -> None:
    """Also of one that isn't about what can be read, such as a topic of the gateway's own."""
    team = tmp_path / "team.yaml"
    await written(team, "sources: {shop: {verify: {scheme: none}, topic: gateway.dead}}\n")
    await running.look(SOURCE + "include: team.yaml\n")
    assert await running.look() == {"crm"}
    await written(team, "sources: {shop: {verify: {scheme: none}, topic: shop}}\n")
    await running.look()
    assert await running.look() == {"crm", "shop"}


async def test_refused_rules_are_not_read_again_while_they_stay_as_they_are(running: Running, tmp_path: Path) -> None:
    """Also if a file of the active ones has changed that they no longer include."""
    await written(tmp_path / "team.yaml", "sources: {}\n")
    await running.look(SOURCE + "include: team.yaml\n")
    await running.look()
    await written(tmp_path / "team.yaml", "sources: {}  # another\n")
    await running.look(SOURCE + "typo: 1\n")
    for _ in range(6):
        await running.look()
    assert len([call for call in running.told.calls if call.args == ("rules_refused",)]) == 1
