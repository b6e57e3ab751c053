"""What commands show of events whose source hides some of it, and of the texts that repeat it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from gateway.bodies.redaction import HIDDEN
from gateway.engine.control.records import DeadLetterProperties
from gateway.log.base import Partition, Record
from gateway.log.records import StoredDelivery
from gateway.model import NO_METADATA, DeadReason, Event, ResponseExcerpt
from gateway.ops.dead_letters import DeadLetter
from gateway.ops.explain import explain_event
from gateway.ops.presentation import explained_fields
from gateway.ops.redaction import Redactions
from gateway.ops.rejected import Rejected
from gateway.quarantine.records import RejectedRequest
from gateway.rules.conditions import parse_condition
from gateway.rules.event_view import EventView
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from tests.builders import a_delivery, an_attempt, an_event

RULES = """
version: 1
sources:
  shop:
    verify: {scheme: none}
    redact: [body.card, headers.x-api-key, query.token]
  batches:
    verify: {scheme: none}
    split: body.events
    redact: [body.card]
  open:
    verify: {scheme: none}
destinations:
  ci: {url: "https://ci.example/"}
routes:
  - name: exact
    from: [shop, open]
    match: {body.card.number: "4000"}
    to: ci
  - name: raw
    from: [shop, open, batches]
    to: ci
  - name: own
    from: [shop, open]
    to: ci
    request:
      path: /cards/${{ body.card.number }}
      query: {cvc: "${{ body.card.cvc }}"}
      headers: {X-Card: "card ${{ body.card.number }}"}
      body: {card: "${{ body.card }}", id: "${{ body.id }}"}
"""
CARD = {"number": "4242424242424242", "cvc": "987"}
SECRETS = ("4242424242424242", "987", "key-of-the-shop", "t0ken")


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    (tmp_path / "routes.yaml").write_text(RULES)
    return load_rules(tmp_path / "routes.yaml")


def shop_event(source: str = "shop", **fields: object) -> Event:
    values: dict[str, object] = {
        "headers": {"Content-Type": "application/json", "X-API-Key": "key-of-the-shop"},
        "query": "token=t0ken&id=1",
        "body": {"card": CARD, "id": 7},
    }
    return an_event(source=source, **(values | fields))  # type: ignore[arg-type] # an event's fields


def leaked(text: str, secrets: Sequence[str] = SECRETS) -> list[str]:
    return [secret for secret in secrets if secret in text]


def test_an_event_is_shown_without_what_its_source_hides(rules: Rules) -> None:
    event = shop_event(key="4242424242424242")
    seen = Redactions(rules).event(event)
    assert leaked(repr(seen)) == []
    assert orjson.loads(seen.body) == {"card": HIDDEN, "id": 7}
    named = Redactions(rules).names(event)
    assert (named.key, named.body) == (HIDDEN, event.body)


def test_nothing_is_hidden_of_other_sources_or_without_rules(rules: Rules) -> None:
    for source, redactions in (("open", Redactions(rules)), ("gone", Redactions(rules)), ("shop", Redactions(None))):
        event = shop_event(source)
        assert redactions.event(event) is event
        assert redactions.echoes(event).text("card 4242424242424242, 987") == "card 4242424242424242, 987"


def test_what_repeats_a_hidden_value_is_shown_without_it(rules: Rules) -> None:
    echoes = Redactions(rules).echoes(shop_event())
    assert echoes.text("no such card: 4242424242424242 (987)") == "no such card: *** (***)"
    assert echoes.text("id 1987, 9870 and 987a") == "id 1987, 9870 and 987a"  # a short value counts by itself
    assert echoes.text('{"cvc": "9\\u00387", "n": "\\u0034242424242424242", "id": 19\\u0038\\u0037}') == (
        '{"***": "***", "n": "***", "id": 19\\u0038\\u0037}'
    )
    excerpt = ResponseExcerpt(
        headers=((b"X-Echo", b"key-of-the-shop"),),
        body=b'{"got": "NDI0MjQyNDI0MjQyNDI0Mg==", "again": "42424242',
        is_body_cut=True,
    )
    seen = echoes.excerpt(excerpt)
    assert seen.headers == ((b"X-Echo", b"***"),)
    assert b"42424242" not in seen.body
    assert b"NDI0MjQyNDI0MjQyNDI0M" not in seen.body


def test_a_text_of_which_half_a_character_is_hidden_is_a_text_still(rules: Rules) -> None:
    headers = ((b"X-API-Key", b"\xa9key-of-the-shop"),)
    echoes = Redactions(rules).echoes(replace(shop_event(body={"id": 7}), headers=headers))
    shown = echoes.text("got \u00e9key-of-the-shop")  # whose é ends with that byte
    assert shown == "got \ufffd***"
    assert orjson.loads(orjson.dumps(shown)) == shown
    assert echoes.text("got \udca9") == "got \udca9"


def test_if_not_all_values_are_known_the_whole_text_is_hidden(rules: Rules) -> None:
    echoes = Redactions(rules).echoes(shop_event(body=b'{"card": 4242'))
    assert echoes.text("got 4242") == HIDDEN
    assert echoes.text("") == ""


def a_letter(event: Event | None, *, detail: str = "") -> DeadLetter:
    record = Record(0, 0.0, b"k", b'{"card": 4242424242424242}', (("gw_headers", b"X-API-Key: key-of-the-shop"),))
    decoded = None
    if event is not None:
        attempts = (replace(an_attempt(), detail=detail),)
        delivery = a_delivery(event=event, attempts=attempts)
        decoded = StoredDelivery(delivery=delivery, metadata=replace(NO_METADATA, detail=detail), at=0.0)
    properties = DeadLetterProperties(id="dlv_1", route="raw", destination="ci", reason=DeadReason.EXHAUSTED, at=0.0)
    return DeadLetter(
        partition=Partition("gateway.dead", 0),
        record=record,
        properties=properties,
        decoded=decoded,
        problem="" if decoded else "can't be read",
        resolved_by=None,
    )


def test_a_dead_letter_is_shown_without_it_and_so_are_its_reasons(rules: Rules) -> None:
    seen = Redactions(rules).letter(a_letter(shop_event(), detail="expected a card, got '4242424242424242'"))
    assert leaked(repr(seen.decoded)) == []
    assert seen.decoded is not None
    assert seen.decoded.metadata.detail == "expected a card, got '***'"
    letter = a_letter(shop_event("open"))
    assert Redactions(rules).letter(letter) is letter


def test_of_one_that_cant_be_decoded_nothing_is_shown_if_any_source_hides_something(rules: Rules) -> None:
    seen = Redactions(rules).letter(a_letter(None))
    assert leaked(repr(seen)) == []
    assert seen.record.headers == (("gw_headers", HIDDEN.encode()),)
    letter = a_letter(None)
    assert Redactions(None).letter(letter) is letter


def a_refused(source: str, body: bytes) -> Rejected:
    request = RejectedRequest(
        source=source,
        reason="bad_signature",
        at=0.0,
        address="192.0.2.1",
        method="POST",
        path=f"/{source}",
        query="token=t0ken",
        headers=((b"X-API-Key", b"key-of-the-shop"),),
        body=body,
        size=len(body),
        salt=b"",
    )
    record = Record(0, 0.0, source.encode(), b"", ())
    return Rejected(
        partition=Partition("gateway.rejected", 0), record=record, request=request, problem="", outcome=None
    )


@pytest.mark.parametrize(
    ("source", "body", "expected"),
    [
        ("shop", b'{"card": {"number": "4242424242424242"}, "id": 7}', {"card": HIDDEN, "id": 7}),
        ("batches", b'{"events": [{"card": "4242"}, {"id": 7}]}', {"events": [{"card": HIDDEN}, {"id": 7}]}),
    ],
)
def test_a_refused_request_is_shown_without_it_a_list_of_events_too(
    rules: Rules, source: str, body: bytes, expected: object
) -> None:
    seen = Redactions(rules).rejected(a_refused(source, body)).request
    assert seen is not None
    assert orjson.loads(seen.body) == expected
    cut = Redactions(rules).rejected(a_refused(source, body[:30])).request  # too large to keep whole
    assert cut is not None
    assert cut.body == HIDDEN.encode()


def test_what_isnt_hidden_of_a_refused_request_stays(rules: Rules) -> None:
    rejected = a_refused("open", b"{}")
    assert Redactions(rules).rejected(rejected) is rejected


def test_explain_shows_no_hidden_value_in_reasons_or_requests(rules: Rules) -> None:
    fields = orjson.dumps(explained_fields(explain_event(rules, shop_event(), now=0.0))).decode()
    assert leaked(fields) == []
    assert '"id":7' in fields.replace("\\", "")  # the rest is shown
    shown = explain_event(rules, shop_event(), now=0.0, is_secret_shown=True)
    assert leaked(orjson.dumps(explained_fields(shown)).decode()) != []
    form = shop_event(
        headers={"Content-Type": "application/x-www-form-urlencoded"}, body=b"card=4242424242424242&id=7", query=""
    )
    explained = explain_event(rules, form, now=0.0)
    assert explained.body_as_read == '{"card":"[redacted]","id":"7"}'
    assert leaked(orjson.dumps(explained_fields(explained)).decode()) == []


LONG_RULES = """
version: 1
sources:
  shop:
    verify: {scheme: none}
    redact: [body.note, body.people]
destinations:
  t-a: {url: "https://a.example/"}
  t-b: {url: "https://b.example/"}
routes:
  - {name: condition, from: shop, match: {body.note: "*zzz*"}, to: t-a}
  - {name: branches, from: shop, match: {any_of: [{body.note: "*zzz*"}, {body.note: {gt: 1}}]}, to: t-a}
  - {name: quiet, from: shop, debounce: {key: body.note, quiet: 30s}, to: t-a}
  - {name: chosen, from: shop, to: "t-${{ body.note }}"}
"""


@pytest.mark.parametrize(
    "note",
    [
        "John Smith, SSN 123-45-6789, card 4111111111111111, lives at 12 Main Street, third floor",
        'it\'s "John Smith"\nof\x07\\Main Street\u2028',
        "John 'n' \u00fc\u0301\U0001f600 Smith \x00",
    ],
)
def test_a_hidden_text_is_looked_for_before_it_is_cut_or_quoted(tmp_path: Path, note: str) -> None:
    (tmp_path / "routes.yaml").write_text(LONG_RULES)
    rules = load_rules(tmp_path / "routes.yaml")
    event = shop_event(headers={"Content-Type": "application/json"}, query="", body={"note": note})
    explained = explain_event(rules, event, now=0.0)
    told = {route.name: f"{route.reason} {route.wait} {route.requests}" for route in explained.routes}
    assert told["condition"].startswith("body.note: expected *zzz*, got *** ")
    assert "once '***' was quiet" in told["quiet"]
    assert "another name, 't-***'" in told["chosen"]
    assert leaked(repr(told), ["John", "Smith", "Main"]) == []
    shown = repr(explain_event(rules, event, now=0.0, is_secret_shown=True).routes)
    assert shown.count("John") >= 4


def test_of_a_long_list_no_more_is_looked_through_than_is_told() -> None:
    looked = list[str]()

    def seen(text: str) -> str:
        looked.append(text)
        return text

    condition = parse_condition({"type": [*[f"v{number}" for number in range(9)], "g*"]})
    told = condition.why_not(EventView.of(an_event(type="push")), seen)
    assert told == "type: expected v0 or v1 or v2 or v3 or v4 or 5 more, got push"
    assert looked == ["v0", "v1", "v2", "v3", "v4", "push"]
    told = parse_condition({"type": ["v0", "g*"]}).why_not(EventView.of(an_event(type="push")), str)
    assert told == "type: expected v0 or g*, got push"


NUMBER_RULES = """
version: 1
sources:
  shop:
    verify: {scheme: none}
    redact: [body.items.*.card, body.number]
    key: body.number
destinations:
  ci: {url: "https://ci.example/"}
routes:
  - {name: items, from: shop, split: body.items, request: {body: "${{ item }}"}, to: ci}
  - {name: compared, from: shop, match: {body.number: 1}, to: ci}
"""
NUMBERS = ("49927398716000000000123", "1.10", "1E3", "12345678901234567890.5", "0.000015", "1.5e-6", "-2E-9", "1e22")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_hidden_number_is_hidden_as_it_came_with_all_its_digits(tmp_path: Path, number: str) -> None:
    (tmp_path / "routes.yaml").write_text(NUMBER_RULES)
    rules = load_rules(tmp_path / "routes.yaml")
    body = f'{{"items": [{{"card": {number}, "n": 1}}], "number": {number}}}'.encode()
    event = shop_event(headers={"Content-Type": "application/json"}, query="", body=body, key=number)
    explained = explain_event(rules, event, now=0.0)
    [planned] = explained.routes[0].requests
    assert planned.request is not None
    assert planned.request.body in (b'{"card": ***, "n": 1}', b'{"card":***,"n":1}')
    assert explained.routes[1].reason == "body.number: expected 1, got ***"
    assert explained.event.key == HIDDEN
    assert Redactions(rules).echoes(event).bytes(b"got " + body) == (
        b'got {"items": [{"card": ***, "n": 1}], "number": ***}'
    )


HEAD_RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: [0123456789abcdef]}, redact: [body]}
  named: {verify: {scheme: none}, redact: [body], type: "headers['x-kind']", key: "headers['x-kind']"}
  inside: {verify: {scheme: none}, redact: [body], type: "has(body.kind) ? body.kind : headers['x-kind']"}
destinations:
  ci: {url: "https://ci.example/"}
routes:
  - {name: all, from: [github, named, inside], to: ci}
"""


def test_a_type_of_a_header_is_shown_though_a_hidden_body_has_a_key_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text(HEAD_RULES)
    rules = load_rules(tmp_path / "routes.yaml")
    body = {"action": "published", "release": {"tag_name": "v1"}}
    for source, type_ in (("github", "release"), ("named", "release"), ("inside", HIDDEN)):
        event = an_event(source=source, type="release", key="release" if source == "named" else None, body=body)
        seen = Redactions(rules).event(event)
        assert (seen.type, seen.key) == (type_, event.key)
        assert "release" not in Redactions(rules).echoes(event).text("got release")
        assert Redactions(rules).event(replace(event, type="published")).type == HIDDEN  # a value


KEY_RULES = """
version: 1
sources:
  shop:
    verify: {scheme: none}
    redact: [body.people]
destinations:
  ci: {url: "https://ci.example/"}
routes:
  - {name: copied, from: shop, to: ci, request: {body: {to: "${{ body.people }}"}}}
  - {name: missing, from: shop, to: ci, request: {body: "${{ body.people.zz }}"}}
"""


def test_keys_of_a_hidden_mapping_are_hidden_where_they_are_repeated(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text(KEY_RULES)
    rules = load_rules(tmp_path / "routes.yaml")
    long = "ann " * 30 + "@acme.example"
    event = shop_event(query="", body={"people": {"ann@acme.example": {"at": 5}, long: 1}})
    copied, missing = explain_event(rules, event, now=0.0).routes
    assert copied.requests[0].request is not None
    assert copied.requests[0].request.body == b'{"to":{"***":{"***":***},"***":***}}'
    assert missing.requests[0].available_fields == "body.people has: ***, ***"
    assert "ann" not in Redactions(rules).echoes(event).text(f"unknown: ann@acme.example, {long}")
