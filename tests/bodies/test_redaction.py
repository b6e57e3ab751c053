"""What `redact:` hides of headers, a query and a body, and that nothing of it is left anywhere."""

import gzip
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from urllib.parse import quote

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.bodies import hidden_paths
from gateway.bodies import redaction as redaction_module
from gateway.bodies.codings import MAX_CONTENT, decompressed
from gateway.bodies.redaction import HIDDEN, MAX_QUICK_BODY, MAX_VALUES, TYPE_AND_KEY, Redaction
from gateway.model import Event, Headers, UnreadableBodyError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.rules.redact_paths import parse_redact_path, redaction_of
from gateway.text import Glob
from tests.builders import an_event

JSON = ((b"Content-Type", b"application/json"),)
FORM = ((b"Content-Type", b"application/x-www-form-urlencoded"),)


def hiding(*paths: str) -> Redaction:
    return redaction_of([parse_redact_path(path) for path in paths])


def shown(body: object, *paths: str) -> object:
    """Return a JSON body as people may see it."""
    return orjson.loads(hiding(*paths).of(JSON, "", orjson.dumps(body)).body)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("body.card.number", {"card": {"number": "4242", "year": 30}}, {"card": {"number": HIDDEN, "year": 30}}),
        ("body.card.number", {"card": {"number": 4242}}, {"card": {"number": HIDDEN}}),
        ("body.card", {"card": {"number": "4242"}, "id": 1}, {"card": HIDDEN, "id": 1}),
        ("body.card", {"card": None}, {"card": HIDDEN}),
        ("body.card.number", {"id": 1, "card": None}, {"id": 1, "card": None}),
        # A list's items, however deep in lists.
        ("body.cards.number", {"cards": [{"number": 1}, {"number": 2}]}, {"cards": [{"number": HIDDEN}] * 2}),
        ("body.cards.number", {"cards": [[{"number": 1}]]}, {"cards": [[{"number": HIDDEN}]]}),
        ("body.number", [{"number": 1}, {"id": 2}], [{"number": HIDDEN}, {"id": 2}]),
        ("body.names.0", {"names": ["a", "b"]}, {"names": [HIDDEN, "b"]}),
        ("body.names.*", {"names": ["a", "b"]}, {"names": [HIDDEN, HIDDEN]}),
        ("body.cards.1.n", {"cards": [{"n": 1}, {"n": 2}]}, {"cards": [{"n": 1}, {"n": HIDDEN}]}),
        ("body.cards.*.number", {"cards": [{"number": 1, "a": "b"}]}, {"cards": [{"number": HIDDEN, "a": "b"}]}),
        ("body.0", {"0": "a", "1": "b"}, {"0": HIDDEN, "1": "b"}),
        # Globs.
        ("body.*_token", {"a_token": "x", "token": "y"}, {"a_token": HIDDEN, "token": "y"}),
        ("body.*.n", {"a": {"n": "x"}, "b": {"n": "y", "c": 1}}, {"a": {"n": HIDDEN}, "b": {"n": HIDDEN, "c": 1}}),
        ('body."a.b".c', {"a.b": {"c": 1}, "a": {"b": {"c": 2}}}, {"a.b": {"c": HIDDEN}, "a": {"b": {"c": 2}}}),
        ('body."a*"', {"a*": 1, "ab": 2}, {"a*": HIDDEN, "ab": 2}),
        # A text where the path goes on may be JSON once more.
        ("body.card.number", {"card": '{"number": "4242"}'}, {"card": HIDDEN}),
        ("body.cards.number", {"cards": ['{"number": "4242"}', 1]}, {"cards": [HIDDEN, 1]}),
    ],
)  # fmt: skip
def test_a_path_hides_what_it_names(path: str, body: object, expected: object) -> None:
    assert shown(body, path) == expected


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        (b"[1, 2]", ["body"]),
        (b'"{\\"card\\": 4242}"', ["body.card"]),  # JSON in a text
        (b"card=4242", ["body.card"]),  # no JSON
        (b'{"card": 4242', ["body.card"]),
        (b"\xff\x00", ["body.card"]),
        (b"[" * 300 + b"]" * 300, ["body.card"]),  # more deeply nested than can be written again
    ],
)
def test_what_cant_be_read_as_what_it_should_be_is_hidden_whole(body: bytes, paths: list[str]) -> None:
    assert hiding(*paths).of(JSON, "", body).body == HIDDEN.encode()


def test_json_that_a_client_calls_a_form_is_hidden_whole() -> None:
    for body in (b'{"card": {"number": "4242"}}', b' [{"number": "4242"}]', b"<card><number>4242</number></card>"):
        assert hiding("body.card.number").of(FORM, "", body).body == HIDDEN.encode()


def test_a_key_that_is_there_twice_is_shown_as_rules_read_it_and_not_as_it_came() -> None:
    assert hiding("body.card.number").of(JSON, "", b'{"card": {"number": 4242}, "card": {}}').body == b'{"card":{}}'


def test_forms_xml_and_compressed_bodies_are_shown_as_rules_read_them() -> None:
    text = b"card=4242&card=4343&id=1&payload=%7B%22token%22%3A1%7D"
    form = hiding("body.card", "body.payload.token").of(FORM, "", text)
    assert orjson.loads(form.body) == {"card": HIDDEN, "id": "1", "payload": {"token": HIDDEN}}
    xml = hiding("body.order.card.number").of(
        ((b"content-type", b"text/xml"),), "", b"<order><card><number>4242</number></card><id>1</id></order>"
    )
    assert orjson.loads(xml.body) == {"order": {"card": {"number": HIDDEN}, "id": "1"}}
    headers = (*JSON, (b"Content-Encoding", b"gzip"))
    assert hiding("body.card").of(headers, "", gzip.compress(b'{"card": 1}')).body == b'{"card":"[redacted]"}'
    boundary = b"--b\r\nContent-Disposition: form-data; name=card\r\n\r\n4242\r\n--b--\r\n"
    multipart = ((b"Content-Type", b"multipart/form-data; boundary=b"),)
    assert hiding("body.card").of(multipart, "", boundary).body == b'{"card":"[redacted]"}'


def test_headers_are_hidden_by_their_names_in_any_case_and_each_line_of_them() -> None:
    headers = ((b"X-API-Key", b"secret-1"), (b"x-api-key", b"secret-2"), (b"X-Other", b"seen"))
    expected = ((b"X-API-Key", HIDDEN.encode()), (b"x-api-key", HIDDEN.encode()), (b"X-Other", b"seen"))
    assert hiding("headers.X-Api-Key").of(headers, "", b"").headers == expected
    assert hiding("headers.x-api-*").of(headers, "", b"").headers == expected


def test_parameters_are_hidden_by_their_names_however_they_are_written() -> None:
    seen = hiding("query.to*en").of((), "token=4242&id=1&t%6Fken=4343&token", b"").query
    assert seen == f"token={HIDDEN}&id=1&t%6Fken={HIDDEN}&token"


def test_without_a_path_in_the_body_it_is_shown_as_it_came() -> None:
    assert hiding("headers.x-api-key").of(JSON, "", b'{"a" : 1}').body == b'{"a" : 1}'
    assert hiding("body.card").of(JSON, "", b"").body == b""


def test_hidden_values_are_known_to_be_hidden_elsewhere() -> None:
    headers = (*JSON, (b"Authorization", b"Bearer abcdefgh"))
    found = hiding("headers.authorization", "query.t", "body.card").of(
        headers, "t=a%20b", b'{"card": {"number": "4242", "year": 30, "is_new": true}}'
    )
    in_body = {b"4242", b"30", b"number", b"year", b"is_new"}
    assert {*found.values} == {b"Bearer abcdefgh", b"abcdefgh", b"a%20b", b"a b"} | in_body
    assert not found.has_more


def test_keys_below_a_hidden_value_are_hidden_values_and_its_own_isnt() -> None:
    body = {"recipients": {"ann@acme.example": {"opened": True}}, "items": [{"to": {"bob": 1, "": [{"eve": None}]}}]}
    found = hiding("body.recipients", "body.items.*.to").of(JSON, "", orjson.dumps(body))
    assert {*found.values} == {b"ann@acme.example", b"opened", b"bob", b"1", b"", b"eve"}
    found = hiding("body.recipients.*").of(JSON, "", orjson.dumps(body))
    assert {*found.values} == {b"opened"}  # the event is shown with the keys above it
    seen = hiding("body.recipients").event(an_event(type="opened", key="ann@acme.example", body=body))
    assert (seen.type, seen.key) == (HIDDEN, HIDDEN)


def test_a_type_that_is_not_read_of_the_body_is_none_of_its_keys() -> None:
    event = an_event(type="release", key="ann", body={"release": {"by": "bob"}, "ann": 1, "of": "push"})
    seen = replace(hiding("body"), of_body=frozenset(("key",))).event(event)
    assert (seen.type, seen.key, seen.body) == ("release", HIDDEN, HIDDEN.encode())
    seen = replace(hiding("body"), of_body=frozenset()).event(replace(event, type="push", key="bob"))
    assert (seen.type, seen.key) == (HIDDEN, HIDDEN)  # which are values
    joined = replace(hiding("body"), of_body=frozenset()).joined(hiding("body.a"))
    assert joined.event(event).type == HIDDEN


def test_many_keys_are_bounded_and_told_as_other_values() -> None:
    body = orjson.dumps({"cards": {f"key-{number}": True for number in range(MAX_VALUES + 5)}})
    found = hiding("body.cards").of(JSON, "", body)
    assert (len(found.values), found.has_more) == (MAX_VALUES, True)
    assert hiding("body.cards").event(an_event(key=f"key-{MAX_VALUES + 4}", body=body)).key == HIDDEN


def test_how_many_are_known_is_bounded_and_told() -> None:
    found = hiding("body.cards").of(JSON, "", orjson.dumps({"cards": list(range(MAX_VALUES + 5))}))
    assert len(found.values) == MAX_VALUES
    assert found.has_more
    assert hiding("body.card").of(JSON, "", b"{").has_more


def test_an_event_stays_what_it_is_but_for_what_is_hidden() -> None:
    event = an_event(key="k", query="token=1", body={"card": 4242, "id": 1})
    seen = hiding("body.card", "query.token").event(event)
    assert (seen.id, seen.type, seen.key, seen.received_at) == (event.id, event.type, event.key, event.received_at)
    assert (seen.query, seen.body) == (f"token={HIDDEN}", b'{"card":"[redacted]","id":1}')
    assert b"4242" in event.body


@pytest.mark.parametrize(
    ("headers", "body", "expected", "seen"),
    [
        ({"X-A": "a", "content-type": "application/x-www-form-urlencoded", "X-B": "b"}, b"card=4242&n=1",
         {"X-A": "a", "X-B": "b", "Content-Type": "application/json"}, b'{"card":"[redacted]","n":"1"}'),
        ({"Content-Type": "application/vnd.shop+json", "content-encoding": "gzip", "Content-Length": "40"},
         gzip.compress(b'{"card": 4242}'), {"Content-Type": "application/vnd.shop+json"}, b'{"card":"[redacted]"}'),
        ({"Content-Type": "text/xml"}, b"<order><card>4242</card></order>",
         {"Content-Type": "application/json"}, b'{"order":{"card":"4242"}}'),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"4242",
         {"Content-Type": "text/plain"}, b"[redacted]"),
        ({"Content-Type": "application/json", "Content-Length": "8"}, b'{"n":1}',
         {"Content-Type": "application/json", "Content-Length": "8"}, b'{"n":1}'),
    ],
    ids=["form", "gzip", "xml", "hidden whole", "nothing hidden"],
)  # fmt: skip
def test_what_can_be_sent_again_has_the_headers_of_its_body(
    headers: Mapping[str, str], body: bytes, expected: Mapping[str, str], seen: bytes
) -> None:
    event = an_event(headers=headers, body=body)
    rewritten = hiding("body.card").rewritten(event)
    assert {name.decode(): value.decode() for name, value in rewritten.headers} == expected
    assert rewritten.body == seen
    assert hiding("body.card").event(event).headers == event.headers  # what came


def test_a_type_or_a_key_that_is_a_hidden_value_is_hidden_too() -> None:
    seen = hiding("body.card").event(an_event(type="42", key="4343", body={"card": {"n": 4343, "kind": "42"}}))
    assert (seen.type, seen.key) == (HIDDEN, HIDDEN)
    assert hiding("body.card").event(an_event(body={"card": 4343})).key is None


@pytest.mark.parametrize(
    ("card", "type_", "key"),
    [
        ({"n": "ann", "kind": 42, "others": [*range(9000, 9000 + MAX_VALUES)]}, "42", "ann"),
        ({"others": [*range(9000, 9000 + MAX_VALUES)], "n": "ann", "kind": 42}, "42", "ann"),
        ({"is_new": True, "n": 1.5}, "true", "1.5"),
    ],
)
@pytest.mark.parametrize("path", ["body", "body.card"])
def test_however_many_values_are_hidden_a_type_or_a_key_is_told_from_all_of_them(
    path: str, card: object, type_: str, key: str
) -> None:
    seen = hiding(path).event(an_event(type=type_, key=key, body={"card": card}))
    assert (seen.type, seen.key) == (HIDDEN, HIDDEN)
    seen = hiding(path).event(an_event(type="push", key="8999", body={"card": card}))
    assert (seen.type, seen.key) == ("push", "8999")


DIGITS = "49927398716000000000123"


@pytest.mark.parametrize("headers", [JSON, (*JSON, (b"Content-Encoding", b"gzip"))])
def test_a_type_or_a_key_of_a_hidden_number_with_many_digits_is_hidden(headers: Headers) -> None:
    body = f'{{"card": {{"number": {DIGITS}}}, "n": 1}}'.encode()
    body = gzip.compress(body) if len(headers) > 1 else body
    event = replace(an_event(type=DIGITS, key=DIGITS, body=body), headers=headers)
    for path in ("body.card.number", "body.card", "body"):
        seen = hiding(path).event(event)
        assert (seen.type, seen.key) == (HIDDEN, HIDDEN)
    assert hiding("body.n").event(event).key == DIGITS


@given(
    st.sampled_from(["1.10", "1E3", "1e3", "-0.50", "12.0e-1", "100000000000000000000", "1e+22", DIGITS]),
    st.sampled_from(["{}", "[1, {}]", '{{"a": {}}}']),
)
def test_a_hidden_number_is_known_as_it_came(spelled: str, around: str) -> None:
    found = hiding("body.card").of(JSON, "", f'{{"card": {around.format(spelled)}, "total": 7.25}}'.encode())
    assert spelled.encode() in found.values
    assert b"7.25" not in found.values


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["{!r}", "{:e}", "{:E}", "{:.30g}"]))
@example(1.5e-05, "{!r}")
@example(1e22, "{:e}")
@example(12.0, "{!r}")
def test_a_hidden_number_is_known_in_each_form_in_which_the_gateway_shows_it(number: float, written: str) -> None:
    spelled = written.format(number + 0.0)  # -0 is an integer, 0
    event = an_event(body=f'{{"number": {spelled}}}'.encode())
    (value,) = orjson.loads(event.body).values()
    seen = [str(value), json.dumps(value), orjson.dumps(value).decode(), spelled]
    seen.append(str(Expression("string(body.number)").as_text(EventView.of(event))))
    found = hiding("body.number").of(event.headers, "", event.body)
    assert {each.encode() for each in seen} <= {*found.values}


@pytest.mark.parametrize("is_compressed", [False, True])
def test_of_a_large_body_a_type_that_is_asked_for_quickly_is_hidden(*, is_compressed: bool) -> None:
    def event(size: int) -> Event:
        text = orjson.dumps({"text": "x" * (size - len('{"text":""}'))})
        coding = ((b"Content-Encoding", b"gzip"),) if is_compressed else ()
        made = an_event(type="push", body=gzip.compress(text) if is_compressed else text)
        return replace(made, headers=(*JSON, *coding))

    assert hiding("body.card").quick_type(event(MAX_QUICK_BODY)) == "push"
    assert hiding("body.text").quick_type(replace(event(20), type="x" * 9)) == HIDDEN
    large = event(MAX_QUICK_BODY + 1)
    assert hiding("body.card").quick_type(large) == HIDDEN
    assert hiding("headers.x-kind").quick_type(large) == "push"  # no body is looked through


def gzipped_after_empty_blocks(text: bytes, blocks: int) -> bytes:
    """Compress a text with so many stored blocks of nothing before it, of five bytes each (RFC 1951 §3.2.4)."""
    deflated, trailer = gzip.compress(text)[10:-8], gzip.compress(text)[-8:]
    return gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * blocks + deflated + trailer


EMPTY_BLOCKS = gzipped_after_empty_blocks(b"{}", 200_000)


def test_of_much_that_decompresses_to_little_a_type_that_is_asked_for_quickly_is_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = list[int]()

    def counted(body: bytes, field: str, limit: int = MAX_CONTENT) -> bytes:
        read.append(len(body))
        return decompressed(body, field, limit)

    monkeypatch.setattr(redaction_module, "decompressed", counted)
    headers = (*JSON, (b"Content-Encoding", b"gzip"))
    for blocks, told in ((10, "push"), (200_000, HIDDEN)):
        body = gzipped_after_empty_blocks(b"{}", blocks)
        assert decompressed(body, "gzip") == b"{}"
        event = replace(an_event(type="push", body=body), headers=headers)
        assert hiding("body.x").quick_type(event) == told
        assert hiding("headers.x-a").quick_type(event) == "push"  # no body is looked through
    assert len(read) == 1
    assert read[0] < 8 << 10


def test_for_a_type_that_is_a_number_a_query_without_it_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    is_named, count = redaction_module._is_named, list[str]()  # counted is what is done for each parameter

    def counted(name: str, globs: Iterable[Glob]) -> bool:
        count.append(name)
        return is_named(name, globs)

    monkeypatch.setattr(redaction_module, "_is_named", counted)
    event = replace(an_event(type="1", query="a&" * 8_000, body={"type": "1"}), headers=JSON)
    assert hiding("body.card", "query.a*").quick_type(event) == "1"
    assert hiding("body.type", "query.a*").quick_type(event) == HIDDEN
    assert len(count) < 10


def test_a_type_in_long_headers_that_are_shown_is_shown() -> None:
    event = replace(an_event(type="push"), headers=((b"X-Long", b"push " * 1000), (b"X-Api-Key", b"a key")))
    assert hiding("headers.x-api-key").quick_type(event) == "push"
    assert hiding("headers.x-long").quick_type(event) == HIDDEN


def test_large_parts_of_a_body_are_looked_through_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mapping or list with all of it, and many numbers."""
    for path, body, least in (
        ("body.a", {"a": {f"{number}": 1 for number in range(100_000)}}, 700),
        ("body.a.*", {"a": {f"{number}": 1 for number in range(100_000)}}, 1100),
        ("body.a.*", {"a": ["x"] * 100_000}, 700),
        ("body.a", {"a": 1.5, "b": [*range(100_000)]}, 300),
    ):
        turns = list[None]()
        monkeypatch.setattr(redaction_module, "give_way", lambda turns=turns: turns.append(None))
        monkeypatch.setattr(hidden_paths, "give_way", lambda turns=turns: turns.append(None))
        hiding(path).event(replace(an_event(type="push", body=body), headers=JSON))
        assert len(turns) >= least, path


def test_of_more_keys_than_are_known_no_others_are_looked_at_if_none_is_sought(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded, count = redaction_module._encoded, list[None]()  # counted is what is done for each key

    def counted(text: str) -> bytes:
        count.append(None)
        return encoded(text)

    monkeypatch.setattr(redaction_module, "_encoded", counted)
    redacted = hiding("body.a").of(JSON, "", orjson.dumps({"a": {f"{number}": 1 for number in range(100_000)}}))
    assert redacted.has_more
    assert len(count) < 2 * MAX_VALUES


@pytest.mark.parametrize(
    ("path", "headers", "body", "type_"),
    [
        ("body", JSON, b"[" + b"1," * 30_000 + b"1]", "push"),
        ("body", JSON, b"[" + b"1.5," * 15_000 + b"1]", "1.50"),
        ("body", JSON, b"[" + b"[]," * 20_000 + b"[]]", "push"),
        ("body", JSON, b"[" + b"[" * 100 + b"]" * 100 + (b",[" + b"[" * 100 + b"]" * 100 + b"]") * 300 + b"]", "push"),
        ("body.items.*.number", JSON, b'{"t": "push", "items": [{}' + b",{}" * 20_000 + b"]}", "push"),
        ("body.items.*.number", JSON, b'{"t": "push", "items": [1' + b",1" * 30_000 + b"]}", "push"),
        ("body.*_token", JSON, orjson.dumps({f"{number}": "push" for number in range(4_000)}), "push"),
        ("body.a", JSON, b'"' + b"\\ud800" * 10_000 + b'"', "push"),
        ("body.a", FORM, b"a&" * 30_000, "push"),
        ("body.a", ((b"Content-Type", b"text/xml"),), b"<r>" + b"<a/>" * 10_000 + b"</r>", "push"),
        ("query.*oken", JSON, b"", "a"),
        ("headers.x-*", ((b"X-A", b"push " * 1600),) * 5, b"", "push"),
        ("body.card query.a*", JSON, b'{"type": "1"}', "1"),
        ("body.x", (*JSON, (b"Content-Encoding", b"gzip")), EMPTY_BLOCKS, "push"),
    ],
)
def test_whatever_an_event_has_its_type_is_told_at_once(path: str, headers: Headers, body: bytes, type_: str) -> None:
    event = replace(an_event(type=type_, query="%61=a&" * 1300 + "a&" * 3000, body=body), headers=headers)
    redaction = hiding(*path.split())

    def seconds() -> float:
        began = time.thread_time()
        assert redaction.quick_type(event) in (redaction.event(event).type, HIDDEN)
        whole = time.thread_time()
        redaction.quick_type(event)
        return min(time.thread_time() - whole, whole - began)

    assert min(seconds() for _ in range(5)) < 0.004  # of less than 1 on a machine that has nothing else to do


TYPES = st.sampled_from(
    ["card", "push", "x", "1", "1.5", "1.50", "true", "null", "", ",", ":", "}", '"', "a\\", "\u00e9"]
)
PIECES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.sampled_from([1, 1.5, 15, 10**30]), TYPES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TYPES, inner, max_size=3)),
    max_leaves=10,
)


@given(
    PIECES,
    TYPES,
    st.sampled_from([TYPE_AND_KEY, frozenset[str]()]),
    st.sampled_from(["body", "body.card", "body.*", "body.x.1", "headers.x-a", "query.x"]),
)
@example([",", "x"], ",", TYPE_AND_KEY, "body")
@example({"push": {"push": 1}}, "push", frozenset(), "body.push")
def test_a_type_that_is_told_quickly_is_that_which_may_be_seen(
    body: object,
    type_: str,
    of_body: frozenset[str],
    path: str,
) -> None:
    event = an_event(
        type=type_, headers={"X-A": f"{type_}-"}, query=f"x={quote(type_)}&y=push", body=json.dumps(body).encode()
    )
    redaction = replace(hiding(path), of_body=of_body)
    told, seen = redaction.quick_type(event), redaction.event(event).type
    assert told in (seen, HIDDEN)
    assert told == seen or type_[:1] in (",", ":", "}")  # which is also found between two texts
    assert redaction.quick_type(replace(event, body=event.body[:-1])) in (
        redaction.event(replace(event, body=event.body[:-1])).type,
        HIDDEN,
    )


def test_a_key_that_is_a_hidden_header_is_hidden_as_rules_read_it() -> None:
    headers = ((b"X-Customer", b"Andr\xe9"),)
    assert hiding("headers.x-customer").event(replace(an_event(key="Andr\ufffd"), headers=headers)).key == HIDDEN


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (JSON, b'{"card": 4242'),
        (FORM, b'{"note": "&card=4242&"}'),  # of which rules read a card as well
        (JSON, b"[" * 300 + b"]" * 300),
    ],
)
def test_of_a_body_that_is_hidden_whole_since_nobody_knows_what_is_in_it_type_and_key_are_hidden(
    headers: Headers, body: bytes
) -> None:
    event = replace(an_event(type="push", key="4242", body=body), headers=headers)
    seen = hiding("body.card").event(event)
    assert (seen.type, seen.key, seen.body) == (HIDDEN, HIDDEN, HIDDEN.encode())
    assert hiding("headers.x-api-key").event(event) == event


def test_the_content_for_a_search_lacks_what_is_hidden() -> None:
    content = hiding("body.card", "body.names.0").content(JSON, b'{"card": {"number": 4242}, "id": 1, "names": [1, 2]}')
    assert content == {"id": 1, "names": [2]}
    for body in (b'{"id"', b'"text"'):
        with pytest.raises(UnreadableBodyError):
            hiding("body.card").content(JSON, body)


def test_of_a_list_of_events_the_paths_hold_in_each_of_them() -> None:
    redaction = hiding("body.card").below(("data", "events"))
    body = b'{"data": {"events": [{"card": 4242}, {"card": 4343}]}, "card": 4444}'
    expected = {"data": {"events": [{"card": HIDDEN}, {"card": HIDDEN}]}, "card": HIDDEN}
    assert orjson.loads(redaction.of(JSON, "", body).body) == expected


@pytest.mark.parametrize(
    ("root", "keys", "touched"),
    [
        ("body", ["card", "number"], True),
        ("body", ["card"], True),  # it has the hidden field in it
        ("body", [], True),
        ("body", ["card", "number", "first"], True),
        ("body", ["card", "year"], False),
        ("body", ["id"], False),
        ("headers", ["x-api-key"], True),
        ("headers", ["content-type"], False),
        ("query", ["token"], False),
        ("type", [], False),
    ],
)
def test_what_is_made_of_a_field_may_tell_what_is_hidden_in_it(root: str, keys: list[str], *, touched: bool) -> None:
    assert hiding("body.card.number", "headers.x-*").touches(root, keys) is touched


def test_redactions_are_compared_by_their_paths() -> None:
    assert hiding("body.a", "headers.X", "query.b").texts == hiding("query.b", "headers.x", "body.a").texts
    paths = replace(hiding("body.a", 'body."a*"', "body.a*", "headers.a", "query.a", "body"), of_body=frozenset())
    assert len(paths.texts) == 6
    assert {*map(len, (hiding("headers.a").texts, hiding("query.a").texts))} == {1}


def test_one_that_also_hides_keys_of_the_body_hides_more() -> None:
    less = replace(hiding("body.a"), of_body=frozenset(("key",)))
    assert less.texts < hiding("body.a").texts
    assert replace(less, of_body=frozenset()).texts < less.texts


SECRET = "s3cr3t-4242"
KEYS = st.sampled_from(["card", "number", "0", "a", "a.b", "*"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(0, 9), st.sampled_from(["", "x", SECRET])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), VALUES)
def test_nothing_of_a_named_field_is_left_whatever_is_around_it(around: Mapping[str, object], value: object) -> None:
    body = {**{key: _without(each) for key, each in around.items()}, "card": {"number": value, "n": 1}}
    text = json.dumps(shown(body, "body.card.number"))
    assert SECRET not in text
    content = hiding("body.card.number").content(JSON, orjson.dumps(body))
    assert SECRET not in json.dumps(content)


def _without(value: object) -> object:
    return orjson.loads(orjson.dumps(value).replace(SECRET.encode(), b"x"))
