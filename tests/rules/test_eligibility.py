"""`enabled`, `sample` and `expires`: what a route takes at all, whoever asks, and whenever."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.rules.eligibility import Eligibility, read
from gateway.rules.event_view import EventView
from gateway.rules.load import check_rules, load_rules
from gateway.rules.route_table import RouteTable
from gateway.rules.routing_revision import past_route, routing_revision
from gateway.rules.rules import Route
from gateway.rules.watch import changes
from tests import run_seeds
from tests.builders import a_route, an_event

RULES = """
version: 1
sources: {{github: {{verify: {{scheme: none}}}}}}
destinations: {{ci: {{url: "http://127.0.0.1:1/"}}}}
routes:
  - {{name: build, from: github, to: ci, {keys}}}
"""
NOON = 1_798_804_800.0  # 2027-01-01T12:00:00Z


def matched(table: RouteTable[Route], event_id: str = "evt_1", at: float = NOON) -> bool:
    view = EventView.of(an_event(id=event_id, received_at=at))
    (explanation,) = table.explain(view, table.match(view))
    assert explanation.matched == bool(table.match(view))
    return explanation.matched


def table_of(eligibility: Eligibility | None) -> RouteTable[Route]:
    return RouteTable([replace(a_route(), eligibility=eligibility)])


def reason(eligibility: Eligibility, at: float = NOON) -> str:
    view = EventView.of(an_event(id="evt_1", received_at=at))
    (explanation,) = table_of(eligibility).explain(view, [])
    return explanation.reason


def test_a_disabled_route_matches_nothing() -> None:
    assert not matched(table_of(Eligibility(enabled=False)))
    assert reason(Eligibility(enabled=False)) == "enabled: false"


def test_a_route_that_expires_matches_what_was_received_before() -> None:
    table = table_of(Eligibility(expires=NOON))
    assert matched(table, at=NOON - 0.001)
    assert not matched(table, at=NOON)
    assert reason(Eligibility(expires=NOON), at=NOON + 60) == (
        "expires: at 2027-01-01T12:00:00Z, got an event received at 2027-01-01T12:01:00Z"
    )


def test_a_sample_has_its_share_of_the_events() -> None:
    drawn = random.Random(run_seeds.drawn())
    ids = [f"evt_{drawn.getrandbits(64):x}" for _ in range(20_000)]
    for share in (0.001, 0.1, 0.5, 0.999):
        table = table_of(Eligibility(sample=share))
        taken = sum(matched(table, each) for each in ids)
        spread = 6 * (len(ids) * share * (1 - share)) ** 0.5  # six sigma
        assert abs(taken - len(ids) * share) < spread, (share, taken)


def test_an_event_of_a_sample_is_in_each_larger_one() -> None:
    drawn = random.Random(run_seeds.drawn())
    tables = [table_of(Eligibility(sample=share)) for share in (0.05, 0.3, 0.8)]
    sizes: Counter[int] = Counter()
    for _ in range(2000):
        event_id = f"evt_{drawn.getrandbits(64):x}"
        taken = [matched(table, event_id) for table in tables]
        assert taken == sorted(taken)
        sizes[sum(taken)] += 1
    assert set(sizes) == {0, 1, 2, 3}


def test_a_sample_takes_ids_that_are_no_utf_8() -> None:
    assert not matched(table_of(Eligibility(sample=1e-9)), "evt_\udcff")


def test_why_an_event_is_not_in_a_sample() -> None:
    assert reason(Eligibility(sample=1e-9)) == "sample: 1e-07%, and this event isn't in it"


@pytest.mark.parametrize(
    ("keys", "eligibility"),
    [
        ("enabled: true", None),
        ("sample: 100%", None),
        ("enabled: false", Eligibility(enabled=False)),
        ("sample: 0.5%", Eligibility(sample=0.005)),
        ("expires: 2027-01-01T12:00:00Z", Eligibility(expires=NOON)),
        ("expires: 2027-01-01", Eligibility(expires=NOON + 43_200)),
    ],
)
def test_the_keys_of_a_route(keys: str, eligibility: Eligibility | None, tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(RULES.format(keys=keys))
    assert load_rules(file).routes["build"].eligibility == eligibility


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("sample: 0%", "expected a share such as 10% or 0.5%, got '0%'"),
        ("sample: 101%", "expected a share such as 10% or 0.5%, got '101%'"),
        ("sample: 0.1", "expected a share such as 10% or 0.5%, got 0.1"),
        ("sample: ten%", "expected a share such as 10% or 0.5%, got 'ten%'"),
        ("enabled: 0", "expected true or false, got 0"),
        ("expires: soon", "expected a date such as 2027-01-31 or a time such as 2027-01-31T12:00:00Z, got 'soon'"),
        ("expires: 5", "expected a date such as 2027-01-31 or a time such as 2027-01-31T12:00:00Z, got 5"),
    ],
)
def test_mistakes(keys: str, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(RULES.format(keys=keys))
    rules, problems = check_rules(file)
    assert rules is None
    assert [problem.message for problem in problems if problem.severity == "error"] == [message]


def test_a_route_that_has_expired_is_warned_of(tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(RULES.format(keys="expires: 2027-01-01T12:00:00Z"))
    for now, codes in ((NOON - 1, ["unverified"]), (NOON, ["unverified", "expiring"])):
        _, problems = check_rules(file, now=now)
        assert [problem.code for problem in problems] == codes


@pytest.mark.parametrize(
    "eligibility", [Eligibility(enabled=False), Eligibility(sample=0.25), Eligibility(expires=NOON), None]
)
def test_a_routing_revision_knows_what_a_route_took(eligibility: Eligibility | None, tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(RULES.format(keys="retry: {max_attempts: 2}"))
    rules = load_rules(file)
    route = replace(rules.routes["build"], eligibility=eligibility)
    revision = routing_revision(replace(rules, routes={"build": route}, routing_revision=None))
    then = past_route("build", revision.routes["build"])
    assert then is not None
    assert then.route is not None
    assert then.route.eligibility == eligibility


@pytest.mark.parametrize("document", ['"enabled": 1', '"sample": "all"', '"expires": null', '"expires": [1]'])
def test_a_routing_revision_with_anything_else_is_of_an_unknown_route(document: str) -> None:
    then = past_route("build", f'{{"from": ["github"], "to": ["ci"], {document}}}')
    assert then is not None
    assert then.route is None


def test_nothing_written_is_no_eligibility() -> None:
    assert read({"from": ["github"]}) is None
    assert Eligibility().written() == {}


@pytest.mark.parametrize(
    ("keys", "named"),
    [("enabled: false", "enabled"), ("sample: 10%, expires: 2099-01-01", "sample, expires"), ("enabled: true", "")],
)
def test_a_reload_says_which_keys_have_changed(keys: str, named: str, tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(RULES.format(keys="enabled: true"))
    old = load_rules(file)
    file.write_text(RULES.format(keys=keys))
    found = changes(old, load_rules(file))
    assert found.changed == ((f"route build: {named}",) if named else ())
    assert found.conditions == frozenset({"build"} if named else ())
    assert found.touched == ({"github": frozenset({"build"})} if named else {})
