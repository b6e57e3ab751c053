"""What a team waits for before a merge, with the rules of a company of 200 routes that is made up."""

import asyncio
import os
import pty
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import orjson
import pytest

from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import encode_event
from gateway.log.topics import Topics
from gateway.required_topics import specs_of
from gateway.rules.load import load_rules
from tests.builders import an_event
from tests.company import ROUTES, TEAMS, events, write
from tests.gateway_process import ROOT
from tests.machine_speed import slowness

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

SECRETS = ("PEPPER", "GITHUB_SECRET", "STRIPE_SECRET", "SHOP_SECRET", "CMS_SECRET")
ENVIRON = os.environ | dict.fromkeys(SECRETS, "only-for-this-test-0123456789")
EVENTS = 100_000


def gateway(*arguments: str, folder: Path, code: int = 0) -> tuple[str, float]:
    """Run a command, and return its output, and the seconds of processor time as on a usual machine."""
    slow, before = slowness(), _children()
    found = subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        cwd=folder,
        env=ENVIRON | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    seconds = (_children() - before) / max(slow, slowness())
    assert found.returncode == code, found.stdout[-2000:] + found.stderr[-2000:]
    return found.stdout + found.stderr, seconds


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture
def company(tmp_path: Path) -> Path:
    return write(tmp_path / "company")


def test_the_rules_are_checked_in_a_second(company: Path) -> None:
    runs = [gateway("check", "--strict", "routes.yaml", folder=company.parent) for _ in range(3)]
    assert runs[0][0] == f"routes.yaml: 4 sources, {3 * TEAMS} destinations, {TEAMS * ROUTES} routes: ok\n"
    assert min([seconds for _, seconds in runs]) < 1.0


def test_four_hundred_cases_are_tested_in_three_seconds(company: Path) -> None:
    runs = [gateway("test", "routes.yaml", folder=company.parent) for _ in range(2)]
    assert runs[0][0] == f"routes.yaml: {2 * TEAMS * ROUTES} tests: ok\n"
    assert min([seconds for _, seconds in runs]) < 3.0


def test_a_test_that_fails_says_where_and_what(company: Path) -> None:
    file = company.parent / "teams" / "team-07.yaml"
    file.write_text(file.read_text().replace("sku: ${{ i.sku }}", "sku: ${{ i.count }}"))
    said, _ = gateway("test", "routes.yaml", folder=company.parent, code=1)
    assert "team-07-stock: takes it" in said
    assert 'requests[0].body[0].sku: expected "tea", got 2' in said
    assert said.endswith("400 tests: 1 failed\n")


async def fill(file: Path, rules: Path, count: int) -> None:
    """Write so many events of the company into a log."""
    topics = Topics("gateway.")
    log = await EmbeddedLog.open(file, owner=True)
    await log.create(specs_of(load_rules(rules, environ=ENVIRON), topics))

    async def append(number: int, source: str, kind: str, body: Mapping[str, object]) -> None:
        event = an_event(id=f"evt_{number}", source=source, type=kind, body=dict(body), received_at=log.now())
        await log.append(topics.events(source), key=b"%d" % number, value=event.body, headers=encode_event(event))

    given = enumerate(islice(events(), count))
    while batch := list(islice(given, 500)):
        await asyncio.gather(*[append(number, *each) for number, each in batch])
    await log.close()


def on_a_terminal(*arguments: str, folder: Path) -> tuple[int, str]:
    """Run a command whose errors go to a terminal; return its exit code, and what that shows."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "gateway", *arguments],
        cwd=folder,
        env=ENVIRON | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = bytearray()
        while True:
            try:
                content = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            shown += content
            if not content:
                break
        os.close(ours)
        return process.wait(), shown.decode(errors="replace")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("count", [2_000, pytest.param(EVENTS, marks=pytest.mark.full)])
def test_a_change_is_compared_on_the_events_of_the_log(company: Path, count: int) -> None:
    changed = company.parent.with_name("changed")
    shutil.copytree(company.parent, changed)
    file = changed / "teams" / "team-03.yaml"
    text = file.read_text()
    assert text.count("/mails") == 1
    file.write_text(text.replace("/mails", "/letters"))
    log = company.parent / "gateway.db"
    asyncio.run(fill(log, company, count))
    arguments = ("diff", str(company), str(changed / "routes.yaml"), "--since", "1h", "--log", f"sqlite:///{log}")
    said, seconds = gateway(*arguments, "--json", folder=company.parent, code=1)
    routes = {line["route"]: line for line in map(orjson.loads, said.splitlines()) if "route" in line}
    assert routes["team-03-mail"]["changed"] == count // 4 // TEAMS
    assert {name for name, line in routes.items() if line["changed"] or line["gained"] or line["lost"]} == {
        "team-03-mail"
    }
    if count == EVENTS:
        assert seconds < 60
    code, shown = on_a_terminal(*arguments, folder=company.parent)
    assert code == 1
    assert f"{count:,}".replace(",", "") in shown.replace(",", ""), "the bar says how many there are"
