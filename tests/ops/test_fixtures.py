"""Fixtures: whole, made up, and made current."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from gateway.model import UsageError
from gateway.ops.fixtures import Fixture, fixture, fixtures, names
from gateway.ops.fixtures.renewal import another, renewed, with_identity
from gateway.verify.presets import PRESETS

FIXTURES = fixtures()
NOW = 1_830_000_000.25
EMAIL = re.compile(r"[\w.+-]+@([\w-]+(?:\.[\w-]+)+)")
ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")
OF_TIMES = re.compile(r".*(?:[tT]ime|[tT]imestamp|_ts|date|created|_at|At|start|end|_since|anchor|attempt)")


def name_of(found: Fixture) -> str:
    return f"{found.provider}-{found.name}"


def values(of: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a body with the name of its field."""
    match of:
        case dict():
            for key, value in of.items():
                yield from values(value, key)
        case list():
            for value in of:
                yield from values(value, name)
        case _:
            yield name, of


def test_there_are_the_most_used_types_of_the_most_used_providers() -> None:
    assert len(FIXTURES) >= 50
    assert {"push", "pull_request", "issues", "workflow_run"} <= {*names()["github"]}
    assert "invoice.payment_failed" in names()["stripe"]
    assert names().keys() <= PRESETS.keys()


@pytest.mark.parametrize("found", FIXTURES, ids=name_of)
def test_a_fixture_says_what_it_is_and_what_it_was_made_from(found: Fixture) -> None:
    assert re.fullmatch(r"[A-Z].{8,80}\.", found.about)
    assert found.made_from
    assert all(urlsplit(address).scheme == "https" for address in found.made_from)
    assert "Content-Type" in found.headers
    assert bool(found.identity) == (PRESETS[found.provider].id is not None)


@pytest.mark.parametrize("found", FIXTURES, ids=name_of)
def test_what_is_not_confirmed_is_a_phrase_and_a_source_is_one_version_of_a_file(found: Fixture) -> None:
    assert not found.unconfirmed or re.fullmatch(r"\S.{5,240}[^.\s]", found.unconfirmed)
    assert len({*found.made_from}) == len(found.made_from)
    files = [address for address in found.made_from if "/blob/" in address]
    assert all(re.search(r"/blob/[0-9a-f]{40}/", address) for address in files)


@pytest.mark.parametrize("found", FIXTURES, ids=name_of)
def test_a_fixture_is_of_nobody(found: Fixture) -> None:
    """Addresses are those reserved for documentation: RFC 2606, RFC 5737."""
    for _, value in values([found.headers, found.body]):
        text = str(value)
        hosts = [host for host in EMAIL.findall(text) if not host.endswith(("example.com", "github.com", "ismtpd-8"))]
        assert not hosts
        assert all(address.startswith("192.0.2.") for address in ADDRESS.findall(text) if "." in address)


@pytest.mark.parametrize("found", FIXTURES, ids=name_of)
def test_what_is_drawn_anew_is_in_the_fixture_and_hard_to_draw_twice(found: Fixture) -> None:
    text = repr([found.headers, found.body])
    for value in (*found.identity, *found.ids):
        assert str(value) in text
    for value in found.identity:
        drawn = [str(another(value, random.Random(n))) for n in range(200)]
        assert len({*drawn}) == 200
        assert sum(len({*characters}) > 5 for characters in zip(*drawn, strict=True)) >= 6


@pytest.mark.parametrize("found", FIXTURES, ids=name_of)
def test_a_renewed_fixture_has_other_ids_everywhere_and_times_of_now(found: Fixture) -> None:
    new = renewed(found, now=NOW, draw=random.Random(7))
    text = repr([new.headers, new.body])
    for old, value in zip((*found.identity, *found.ids), (*new.identity, *new.ids), strict=True):
        assert type(old) is type(value)
        assert len(str(old)) == len(str(value))
        assert old != value
        assert str(value) in text
        assert str(old) not in text
    assert not re.search(r"2026-0[12]-\d\d", text)
    moved = int(NOW) - found.at
    for (name, old), (_, value) in zip(values(found.body), values(new.body), strict=True):
        if isinstance(old, int | float) and old != value and old not in found.ids:
            assert OF_TIMES.fullmatch(name), name
            assert value - old in (moved, moved * 1000)


@pytest.mark.parametrize("found", FIXTURES, ids=name_of)
def test_no_two_requests_are_of_the_same_event(found: Fixture) -> None:
    draw = random.Random(1)
    bodies = [renewed(found, now=NOW, draw=draw) for _ in range(2)]
    assert bodies[0].body != bodies[1].body or bodies[0].identity != bodies[1].identity


@pytest.mark.parametrize("found", [found for found in FIXTURES if found.identity], ids=name_of)
def test_an_identity_is_replaced_wherever_it_is(found: Fixture) -> None:
    new = with_identity(found, "mine")
    assert new.identity == ["mine", *[f"mine-{n}" for n in range(2, len(found.identity) + 1)]]
    text = repr([new.headers, new.body])
    assert all(value in text for value in new.identity)
    assert not any(value in text for value in found.identity)
    assert [value for _, value in values(new.body) if value not in new.identity] == [
        value for _, value in values(found.body) if value not in found.identity
    ]


def a_fixture(body: Any, **changes: Any) -> Fixture:
    given = {"headers": {}, "identity": [], "ids": [], **changes}
    return Fixture(provider="p", name="t", type="t", about="", made_from=[], at=1_768_478_400, body=body, **given)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (1_768_478_400, 1_830_000_000),
        (1_768_478_400_213, 1_830_000_000_213),
        (1_768_478_399.5, 1_829_999_999.5),
        ("1768478400", "1830000000"),
        ("1768478400.482119", "1830000000.482119"),
        ("2026-01-15T12:00:00Z", "2027-12-28T13:20:00Z"),
        ("2026-01-15T12:00:00.120Z", "2027-12-28T13:20:00.120Z"),
        ("2026-01-15T13:00:00+01:00", "2027-12-28T14:20:00+01:00"),
        ("2026-01-15T13:00:00.000+0100", "2027-12-28T14:20:00.000+0100"),
        ("2026-01-15 12:00:00 UTC", "2027-12-28 13:20:00 UTC"),
        ("2026-01-15T13:00:00", "2027-12-28T14:20:00"),
        ("2026-01-15", "2027-12-28"),
    ],
)
def test_times_are_moved_in_the_form_that_they_have(old: Any, new: Any) -> None:
    assert renewed(a_fixture([old]), now=1_830_000_000.9, draw=random.Random(0)).body == [new]


@pytest.mark.parametrize(
    "value",
    [
        *(42, 4_900, 1_600_000_000, 1_600_000_000_000, -410.5, True, None, "", "5550001234", "2026-02-30"),
        *("at 2026-01-15T12:00:00Z", "0001-01-01T00:00:00Z", "2021-03-01T10:00:00Z", "2021-03-01"),
    ],
)
def test_what_is_no_time_of_the_event_stays(value: Any) -> None:
    assert renewed(a_fixture({"v": value}), now=NOW, draw=random.Random(0)).body == {"v": value}


def test_an_id_is_the_same_one_in_each_place() -> None:
    found = a_fixture({"id": 70, "url": "https://example.com/70/evt_1ab", "n": 7}, identity=["evt_1ab"], ids=[70])
    new = renewed(found, now=NOW, draw=random.Random(3))
    assert new.body["url"] == f"https://example.com/{new.body['id']}/{new.identity[0]}"
    assert new.body["n"] == 7


def test_a_drawn_value_keeps_its_shape() -> None:
    draw = random.Random(5)
    for value, form in [
        ("evt_1SpqR2Kx", r"evt_[1-9][A-Z][a-z]{2}[A-Z]\d[A-Z][a-z]"),
        ("01KF0T7Q2M", r"0[1-9][A-Z]{2}\d[A-Z]\d[A-Z]\d[A-Z]"),
        ("3f1c9a5be2d84760b1fa", r"[0-9a-f]{20}"),
        (
            "0b9c7a52-f1c4-4d0e-9d1b-3f0c5a7e2b61",
            r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
        ),
    ]:
        assert re.fullmatch(form, str(another(value, draw)))
    assert Counter(len(str(another(1000, draw))) for _ in range(50)) == {4: 50}


@pytest.mark.parametrize(
    ("provider", "name", "expected"),
    [
        ("github", "pushed", "expected a fixture of github, got 'pushed', did you mean 'push'?"),
        ("github", "zzz", "expected a fixture of github, got 'zzz'; `gateway trigger github` lists them"),
        ("githib", "push", "expected a provider that has fixtures, got 'githib', did you mean 'github'?"),
        ("notion", "x", "expected a provider that has fixtures, got 'notion'; `gateway send` sends a body of yours"),
        ("../presets", "github", "expected a provider that has fixtures, got '../presets'; `gateway trigger` lists"),
    ],
)
def test_an_unknown_one_is_reported(provider: str, name: str, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        fixture(provider, name)
    assert str(error.value).startswith(expected)
