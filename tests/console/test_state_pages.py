"""Pages that show what other processes do, what was refused, the rule file, and an event as a test."""

import asyncio
import re
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pytest

from gateway.access.principal import AccessRole
from gateway.log.base import Partition
from gateway.ops.rule_tests import read_snapshots, run_test
from gateway.rules.load import load_rules
from gateway.rules.rule_tests import read_tests
from tests.api.test_findings import refuse
from tests.api.test_quarantine_acts import QUARANTINED, keep
from tests.api.test_spools import SPOOL
from tests.console.conftest import Console, console_of
from tests.console.furnished import HOLDS, NOW, RULES, furnished
from tests.console.markup import Document
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog

LARGE = 10_000


async def test_the_overview_tells_what_waits_in_all_processes_with_the_next_step(tmp_path: Path) -> None:
    company, clock, _ = await furnished()
    async with console_of(company, tmp_path, RULES) as console:  # which delivers nothing itself
        await console.refresh()
        page = await console.page()
        assert "pack-orders → crm" in page.text
        assert "wait (breaker open after 503)" in page.text
        assert "crm responds with 503: ask its owners first" in page.text
        assert 'data-copy="gateway destination kick crm"' in page.source
        assert "/ui/destinations/crm" in page.links
        assert "as the log shows it at 14:00:0" in page.text
        assert clock.now >= NOW


async def test_the_overview_tells_what_nobody_reads(console: Console) -> None:
    assert isinstance(console.company.log, MemoryLog)
    console.company.log.lose_leader(Partition(console.company.topics.retry("5h"), 1))
    page = await console.page()
    assert "gateway.retry.5h/1not read: no leader" in page.text
    assert "Nothing that this process knows of" not in page.text


async def test_the_overview_tells_what_is_in_the_spool(console: Console) -> None:
    assert "Not in the log yet" not in (await console.page()).text
    console.backend.process, console.backend.spool = "ingress-0:9090", lambda: SPOOL
    page = await console.page()
    assert "Spool of ingress-0:9090: 5 events on its disk alone" in page.text
    assert "not moved: gateway.events.github: gateway.events.github/3: no leader" in page.text
    assert "accepts no more" not in page.text
    assert "25% of its nearest limit" in page.text
    assert "being moved" in page.text
    full = {**SPOOL, "refuses": "the disk is full", "used": 1.0, "waits": {"": "no broker responds"}}
    console.backend.spool = lambda: full
    page = await console.page()
    assert "accepts no more: the disk is full; not moved: no broker responds" in page.text
    assert "never delete it" in page.text
    console.backend.spool = lambda: {**SPOOL, "waits": None}
    page = await console.page()
    assert "Nothing that this process knows of" in page.text
    assert "being moved" in page.text


async def test_a_source_has_its_url_its_secrets_and_what_was_refused(tmp_path: Path) -> None:
    secrets = '[{secret: "${TOKEN}", until: 2020-01-31}, "${TOKEN}2"]'
    company = await Company.found(MemoryLog(now=Ticking()))
    text = RULES.replace('secrets: ["${TOKEN}"]', f"secrets: {secrets}", 1).replace(
        "    owner: platform\n", "    quarantine: true\n", 1
    )
    async with console_of(company, tmp_path, text) as console:
        await console.refresh()
        console.backend.public_url = "https://hooks.example.com"
        page = await console.page("sources", "github")
        assert 'data-copy="https://hooks.example.com/github"' in page.source
        assert "None is in quarantine" in page.text
        assert "Secret 1 expired" in page.text
        assert "Secret 2 for ever" in page.text
        assert 'gateway_rejected_total{source="github"}' in page.text
        assert "https://hooks.example.com/shopify" in (await console.page("sources")).text
        specs = company.topics.specs([], has_quarantine=True)
        await company.log.create([each for each in specs if each.name == company.topics.rejected])
        for _ in range(3):
            await refuse(company)
        console.backend.log_reader = type(console.backend.log_reader)()
        page = await console.page("sources", "github")
        assert "bad_signature 3" in page.text
        assert 'data-copy="gateway rejected retry github"' in page.source
        assert "/ui/sources/github" in (await console.page()).links


async def test_a_source_whose_url_isnt_known_has_its_path(console: Console) -> None:
    page = await console.page("sources", "github")
    assert 'data-copy="/github"' in page.source
    assert "--public-url" in page.text
    assert "quarantine isn't set" in page.text


async def test_the_rule_file_leads_to_each_route_and_back(tmp_path: Path) -> None:
    company, *_ = await furnished()
    async with console_of(company, tmp_path, RULES, HOLDS) as console:
        await console.refresh()
        page = await console.page("rules")
        for name in ("build-on-push", "tell-the-team", "book-charges", "pack-orders"):
            assert f"/ui/routes/{name}" in page.links
        assert "hooks/secret" not in page.source
        route = await console.page("routes", "book-charges")
        back = next(each for each in route.links if each.startswith("/ui/rules?"))
        assert back.endswith("#found")
        found = await console.at(back.removesuffix("#found"))
        row = re.search(r'<tr id="found".*?</tr>', found.source, re.DOTALL)
        assert row is not None
        assert "book-charges" in row[0]
        await console.page("rules", file="9")
        await console.page("rules", file="-1", line="x")


async def test_ten_thousand_routes_are_shown_in_pieces(tmp_path: Path) -> None:
    routes = "".join(
        [f"  - {{name: r{number:05}, from: github, match: {{type: t{number}}}, to: ci}}\n" for number in range(LARGE)]
    )
    text = (
        "version: 1\nsources:\n  github: {path: /github, verify: {scheme: token, header: X-Token, "
        'secrets: ["${TOKEN}"]}}\n'
        f'destinations:\n  ci: {{url: "https://ci.example/"}}\nroutes:\n{routes}'
    )
    company = await Company.found(MemoryLog(now=Ticking()))
    async with console_of(company, tmp_path, text) as console:
        await console.refresh()
        page = await console.page("rules")
        assert len(page.source) < 200_000
        assert "/ui/routes/r00001" in page.links
        further = next(each for each in page.links if "line=" in each)
        assert "/ui/routes/r00300" in (await console.at(further.removesuffix("#file"))).links
        last = await console.page("rules", kind="route", name="r09999")
        assert "/ui/routes/r09999" in last.links
        assert len(last.source) < 200_000


async def test_who_has_limits_sees_their_part_of_the_file(console: Console) -> None:
    console.become(AccessRole.VIEWER, owners=frozenset({"payments"}))
    page = await console.page("rules")
    assert "/ui/routes/book" in page.links
    assert "not yours" in page.text
    assert "build" not in page.text


async def test_an_event_is_saved_as_a_test_that_passes(console: Console, tmp_path: Path) -> None:
    event, *_ = await console.company.event(headers={"Content-Type": "application/json", "X-Token": "a-secret-token"})
    await console.refresh()
    routes = await console.page("events", event.id, tab="routes")
    page = await console.at(next(each for each in routes.links if each.endswith("/test")))
    assert "1 route takes it: audit." in page.text
    assert "header x-token" in page.text
    path = next(each for each in page.links if each.endswith("/test/files"))
    async with console.client.get(path) as response:
        assert response.headers["Content-Disposition"].endswith('.zip"')
        content = await response.read()
    name, differences = await asyncio.to_thread(unpacked, content, tmp_path)
    assert f'data-copy="gateway test routes.yaml --tests {name}/tests.yaml"' in page.source
    assert differences == [()]


def unpacked(content: bytes, folder: Path) -> tuple[str, list[tuple[str, ...]]]:
    """Unpack a saved test beside the rules; return the name of its folder, and how each of its tests differs."""
    with ZipFile(BytesIO(content)) as archive:
        archive.extractall(folder)
        (name,) = {each.partition("/")[0] for each in archive.namelist()}
    rules = load_rules(folder / "routes.yaml", environ={}, resolve=False, reads_secrets=False)
    file = folder / name / "tests.yaml"
    tests, problems = read_tests([], [file])
    assert problems == []
    return name, [run_test(rules, each, read_snapshots(file), now=0.0).differences for each in tests]


@pytest.mark.parametrize("path", ["test", "test/files"])
async def test_a_viewer_saves_nothing(console: Console, path: str) -> None:
    event, *_ = await console.company.event()
    await console.refresh()
    console.become(AccessRole.VIEWER)
    page = await console.at(f"/ui/events/{event.id}/{path}", expect=403)
    assert "reader" in page.text


async def test_an_operator_has_what_was_refused_verified_again(tmp_path: Path) -> None:
    company = await Company.found(MemoryLog(now=Ticking()))
    specs = company.topics.specs([], has_quarantine=True)
    await company.log.create([each for each in specs if each.name == company.topics.rejected])
    async with console_of(company, tmp_path, QUARANTINED) as console:
        await keep(company, console.rules)
        path = "/ui/sources/github/refused/retry"
        form = (await console.page("sources", "github")).forms[path]
        dry = await console.post(path, {**form, "dry": "1"}, expect=200)
        assert "Nothing was done" in dry
        assert "would be admitted" in dry
        done = Document(await console.post(path, {**form, "reason": "rotated"}, expect=200))
        assert done.problems == []
        assert "admitted1" in done.text
        again = Document(await console.post(path, {**form, "reason": "rotated"}, expect=200))
        assert "admitted1" in again.text, "the first answer: a form that is sent twice is one retry"
        console.backend.log_reader = type(console.backend.log_reader)()
        assert path not in (await console.page("sources", "github")).forms
        await console.post(path, {"reason": "x"}, expect=403)
        await keep(company, console.rules, number=2)
        console.backend.log_reader = type(console.backend.log_reader)()
        for role in (AccessRole.VIEWER, AccessRole.READER):
            console.become(role)
            assert path not in (await console.page("sources", "github")).forms
        console.become(AccessRole.OPERATOR)
        assert path in (await console.page("sources", "github")).forms
        console.backend.are_rules_bare = True
        assert path not in (await console.page("sources", "github")).forms
