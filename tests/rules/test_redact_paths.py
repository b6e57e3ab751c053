"""How `redact:` is written."""

from pathlib import Path

import pytest

from gateway.bodies.redaction import HIDDEN
from gateway.model import RulesError
from gateway.rules.load import check_rules, load_rules
from gateway.rules.redact_paths import parse_redact_path
from tests.builders import an_event

RULES = """
version: 1
sources:
  shop:
    verify: {scheme: none}
    redact: [%s]
destinations:
  ci: {url: "https://ci.example/"}
routes:
  - {name: build, from: shop, to: ci}
"""


def test_a_source_hides_what_its_rules_name(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text(RULES % "body.card.number, headers.x-api-key, query.token")
    source = load_rules(tmp_path / "routes.yaml").sources["shop"]
    assert source.redaction is not None
    event = an_event(source="shop", headers={"X-API-Key": "k"}, query="token=1", body={"card": {"number": 1}})
    seen = source.redaction.event(event)
    assert (seen.headers, seen.query) == (((b"X-API-Key", HIDDEN.encode()),), f"token={HIDDEN}")
    assert seen.body == b'{"card":{"number":"[redacted]"}}'


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("card.number", "expected a path such as body.card.number"),
        ("boddy.card", "did you mean 'body'?"),
        ("type", "expected a path such as"),
        ("body.", "expected body.a.b, got 'body.'"),
        ("body..a", "expected body.a.b"),
        ("body.a[0]", "a list's items are body.a.0"),
        ("headers", "expected headers.<name>, or headers.* for all of them"),
        ("query", "expected query.<name>"),
        ("body.${SECRET}", "got one with a reference"),
    ],
)
def test_what_is_no_path_is_refused(tmp_path: Path, path: str, problem: str) -> None:
    (tmp_path / "routes.yaml").write_text(RULES % f"'{path}'")
    for resolve in (True, False):  # else a path whose reference isn't known would hide nothing
        with pytest.raises(RulesError) as caught:
            load_rules(tmp_path / "routes.yaml", resolve=resolve)
        assert "sources.shop.redact[0]" in str(caught.value)
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("id: body.card.number", "id"),
        ("id: sha256(body.card.number)", "id"),
        ("key: sha256(body.card.number)", "key"),
        ("type: \"'a ' + body.card.number\"", "type"),
        ("key: body.card.number", None),  # it is hidden itself
        ("id: body.id", None),
        ("id: body.card[0].number", "id"),
    ],
)
def test_what_is_made_of_a_hidden_value_is_warned_of(tmp_path: Path, key: str, problem: str | None) -> None:
    text = RULES % "body.card.number"
    (tmp_path / "routes.yaml").write_text(text.replace("    redact:", f"    {key}\n    redact:"))
    _, found = check_rules(tmp_path / "routes.yaml")
    weak = [each for each in found if each.code == "weak"]
    assert [each.path for each in weak] == ([] if problem is None else [f"sources.shop.{problem}"])


def test_a_quoted_key_is_that_key_alone() -> None:
    assert parse_redact_path('body."a.b*".c').pattern[0].pieces == ("a.b*",)
    assert parse_redact_path("body.a*.c").pattern[0].pieces == ("a", "")
