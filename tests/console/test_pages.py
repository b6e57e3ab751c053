"""The pages of names, dead letters and rules, and the overview, whatever is the matter with the gateway."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from gateway.access.principal import AccessRole, Principal
from gateway.engine.control.records import ControlRecord
from gateway.engine.delivery.holds import Hold
from gateway.model import LogUnavailableError
from tests.console.conftest import Console, console_of
from tests.console.furnished import HOLDS, NOW, RULES, furnished
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog

LISTS = ("", "/events", "/destinations", "/routes", "/dead-letters", "/sources", "/rules")
SOURCE = """
sources:
  github:
    path: /github
    verify: {scheme: token, header: X-Token, secrets: ["${TOKEN}"]}
"""
HOSTILE = "<script>alert(1)</script>\u202e"


async def test_every_link_of_every_page_leads_to_a_page(tmp_path: Path) -> None:
    company, _, _ = await furnished()
    async with console_of(company, tmp_path, RULES, HOLDS) as console:
        await console.refresh()
        seen, kinds, waiting = set[str](), Counter[tuple[str, ...]](), ["/ui"]
        while waiting:
            path = waiting.pop(0)
            if path in seen or path.startswith("#") or path.endswith(("/body", "/test/files")):
                continue
            seen.add(path)
            parts = urlsplit(path)
            _, _, *segments = parts.path.split("/")
            kind = (*segments[:1], str(len(segments)), *segments[2:], *sorted(parse_qs(parts.query)))
            kinds[kind] += 1
            if kinds[kind] > 3:
                continue  # others of the kind: of other events, with other filters, without end
            waiting += [each for each in (await console.at(path)).links if each not in seen]
        shapes = {kind[0] for kind in kinds if kind[0] != "0"}
        assert shapes == {"events", "destinations", "routes", "dead-letters", "sources", "rules", "attempts"}


async def test_what_is_wrong_comes_first_with_its_next_step(tmp_path: Path) -> None:
    company, _, _ = await furnished()
    async with console_of(company, tmp_path, RULES, HOLDS) as console:
        await console.refresh()
        page = await console.page()
        order = [page.text.index(each) for each in ("crm", "chat", "Destination warehouse", "dead letters for ledger")]
        assert order == sorted(order)
        assert "Ask sales" in page.text
        assert "until 14:20:00" in page.text
        assert "paused by anna" in page.text
        assert "/ui/dead-letters?destination=ledger&reason=exhausted" in page.links


async def test_an_empty_gateway_is_well(console: Console) -> None:
    await console.refresh()
    assert "Nothing that this process knows of" in (await console.page()).text
    assert "None is open: any that there were" in (await console.page("dead-letters")).text


async def test_rules_that_are_refused_are_told_first(console: Console) -> None:
    status = dict(console.backend.rules_status())
    refusal = {"since": NOW, "file": "routes.yaml", "problems": [f"routes.yaml:1:2: {HOSTILE}", "another"]}
    console.backend.rules_status = lambda: {**status, "refused": True, "refusal": refusal, "changed": [HOSTILE]}
    for page in (await console.page(), await console.page("rules")):
        assert "routes.yaml:1:2" in page.text
        assert "<script>alert" not in page.source
        assert "\u202e" not in page.source


async def test_who_has_limits_isnt_told_on_these_pages_what_is_others(console: Console) -> None:
    await console.company.event()
    await console.refresh()
    assert "Events in the index" in (await console.page()).text
    status = dict(console.backend.rules_status())
    refusal = {"since": NOW, "file": "theirs.yaml", "problems": ["theirs.yaml:1:2: expected a project, got another"]}
    changed = ["route build: match", "route book: when"]
    console.backend.rules_status = lambda: {**status, "refused": True, "refusal": refusal, "changed": changed}
    console.become(AccessRole.VIEWER, owners=frozenset({"payments"}))
    page, rules = await console.page(), await console.page("rules")
    for told in (page, rules):
        assert "theirs.yaml" not in told.text
        assert "1 problem" in told.text
        assert "1 source" in told.text
    assert "Events in the index" not in page.text
    assert "route book: when" in rules.text
    assert "1 other change" in rules.text
    assert "route build" not in rules.text


async def test_a_destination_says_what_waits_until_when_and_why(tmp_path: Path) -> None:
    company, _, _ = await furnished()
    async with console_of(company, tmp_path, RULES, HOLDS) as console:
        await console.refresh()
        page = await console.page("destinations", "chat")
        assert "Retry-After until 2026-12-01 14:20:00.000 UTC" in page.text
        assert "rate" in page.text.lower()
        crm = await console.page("destinations", "crm")
        assert "breaker is open" in crm.text
        assert "/ui/routes/pack-orders" in crm.links
        assert any(each.startswith("/ui/events/gateway.events.shopify") for each in crm.links)
        paused = await console.page("destinations", "warehouse")
        assert "Paused by anna since 2026-12-01 13:30:00.000 UTC" in paused.text
        stopped = await console.page("destinations", stopped="1")
        assert [
            each for each in ("chat", "ci", "crm", "ledger", "warehouse") if f"/ui/destinations/{each}" in stopped.links
        ] == [
            "chat",
            "crm",
            "warehouse",
        ]


async def test_a_probe_that_is_due_has_no_time(console: Console) -> None:
    hold = Hold(reason="breaker_open", since=NOW, until=NOW, is_probe_due=True)
    console.backend.holds = lambda: {"ci": hold}
    assert "the next delivery is the probe" in (await console.page("destinations", "ci")).text


async def test_dead_letters_are_chosen_by_reason(console: Console) -> None:
    event, *_ = await console.company.event(type=HOSTILE)
    await console.company.die(event)
    await console.refresh()
    page = await console.page("dead-letters", destination="ci", reason="exhausted")
    letter = next(each for each in page.links if each.startswith("/ui/dead-letters/"))
    shown = await console.at(letter)
    assert "All attempts failed" in shown.text
    assert f"/ui/events/{event.id}" in shown.links
    assert "None is all of that" in (await console.page("dead-letters", reason="gone")).text
    await console.company.command(
        ControlRecord(
            kind="dead",
            name="x",
            state="done",
            action="drop",
            at=console.company.log.now(),
            checkpoint=await console.company.end_of(console.company.topics.dead),
        )
    )
    page = await console.page("dead-letters")
    assert "No dead letters" in page.text
    assert "have been replayed or dropped, or the log has deleted them by age" in page.text
    assert "/ui/dead-letters?all=1" in page.links
    assert "succeeded" not in page.text, "it was dropped"
    filtered = await console.page("dead-letters", destination="ci")
    assert "None is all of that, or it has been replayed or dropped." in filtered.text
    assert "dropped" in (await console.page("dead-letters", all="1")).text


async def test_a_record_that_cant_be_read_is_shown_as_such(console: Console) -> None:
    await console.company.log.append(
        console.company.topics.dead, key=b"x", value=b"?", headers=[("gw_reason", b"undecodable")]
    )
    page = await console.page("dead-letters")
    letter = next(each for each in page.links if each.startswith("/ui/dead-letters/"))
    assert "can't be read" in (await console.at(letter)).text


async def test_ten_thousand_destinations_are_found_by_name(tmp_path: Path) -> None:
    names = "".join([f'  d{number:05}: {{url: "https://d{number:05}.example/"}}\n' for number in range(10_000)])
    routes = "".join(
        [
            f"  - {{name: r{number:05}, from: github, match: {{type: t{number}}}, to: d{number:05}}}\n"
            for number in range(10_000)
        ]
    )
    text = f"version: 1\n{SOURCE}destinations:\n{names}routes:\n{routes}"
    company = await Company.found(MemoryLog(now=Ticking()))
    async with console_of(company, tmp_path, text) as console:
        await console.refresh()
        for path in LISTS:
            page = await console.at(f"/ui{path}")
            assert len(page.source) < 200_000
        found = await console.page("destinations", name="d0999")
        assert len([each for each in found.links if each.startswith("/ui/destinations/d0999")]) == 10
        older = next(each for each in (await console.page("routes")).links if "cursor=" in each)
        assert "/ui/routes/r00100" in (await console.at(older)).links


@pytest.mark.parametrize("is_hanging", [False, True], ids=["fails", "hangs"])
async def test_a_broken_log_breaks_no_page(
    console: Console, monkeypatch: pytest.MonkeyPatch, *, is_hanging: bool
) -> None:
    event, *_ = await console.company.event()
    await console.refresh()
    monkeypatch.setattr("gateway.api.backend.PATIENCE", 1.0)

    async def fail(*_: Any, **__: Any) -> Any:
        if is_hanging:
            await asyncio.Event().wait()
        raise LogUnavailableError("no broker responds")

    for name in ("bounds", "readable", "scan", "committed"):
        monkeypatch.setattr(console.company.log, name, fail)
    said = "no answer within" if is_hanging else "isn't available"
    assert said in (await console.page("destinations", expect=503)).text
    overview = await console.page()
    assert "no answer within" in overview.text if is_hanging else "no broker responds" in overview.text
    assert "Nothing that this process knows of" not in overview.text
    await console.page("dead-letters", expect=503)
    await console.page("sources")
    assert event.source in (await console.page("events")).text


async def test_without_an_index_only_what_needs_it_is_missing(console: Console) -> None:
    console.index = None
    for path in ("/destinations/ci", "/routes/build", "/sources/github", "/destinations", "/rules", ""):
        page = await console.at(f"/ui{path}")
        assert ("index isn't available" in page.text) == (path not in ("/destinations", "/rules")), path


async def test_one_who_asks_for_many_pages_leaves_room_for_others(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.console.application.EACH", 1)
    going_on, control = asyncio.Event(), console.backend.control

    async def wait() -> Any:
        await going_on.wait()
        return await control()

    monkeypatch.setattr(type(console.backend), "control", lambda _: wait())
    console.become(AccessRole.VIEWER)
    first = asyncio.create_task(console.page("routes", "build"))
    await asyncio.sleep(0.05)
    assert "of one principal" in (await console.page("rules", "try", expect=503)).text
    console.access.principal = Principal(name="bob", role=AccessRole.VIEWER, via="test")
    await console.page("rules", "try")
    going_on.set()
    await first


async def test_what_isnt_theirs_isnt_shown(console: Console) -> None:
    console.become(AccessRole.READER, owners=frozenset({"payments"}))
    await console.refresh()
    assert "github" not in (await console.page("sources")).text
    await console.page("sources", "github", expect=404)
    await console.page("routes", "build", expect=404)
    await console.page("destinations", "ci", expect=404)
    await console.page("sources", "stripe")
