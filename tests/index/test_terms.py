"""The terms by which events of all kinds of bodies are found."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.index.conditions import match_expression
from gateway.index.query import parse_query
from gateway.index.terms import EVERY, MAX_CHARACTERS, Terms, term, terms_of, text_term
from tests.builders import an_event


def terms(**fields: object) -> set[str]:
    return set(lines(**fields).text.split("\n"))


def lines(**fields: object) -> Terms:
    return terms_of(an_event(**fields))  # type: ignore[arg-type] # an event's fields


def test_every_event_has_its_source_type_and_key() -> None:
    assert {EVERY, "source:github", "type:push", "key:acme/app"} <= terms(key="acme/app")


def test_a_field_is_found_by_its_path_and_value() -> None:
    found = terms(body={"customer": {"id": 42, "vip": True, "note": None, "rate": 0.5, "whole": 3.0}})
    wanted = {"id:42", "vip:true", "note:null", "rate:0.5", "whole:3"}
    assert {f"body.customer.{each}" for each in wanted} <= found


def test_the_items_of_a_list_share_its_path() -> None:
    found = terms(body={"labels": ["bug", "p1"], "commits": [{"id": "a1"}, {"id": "b2"}]})
    assert {"body.labels:bug", "body.labels:p1", "body.commits.id:a1", "body.commits.id:b2"} <= found


def test_text_is_found_by_pieces_and_by_words() -> None:
    found = terms(body={"title": "Fix (the) acme/app: rounding!", "id": 42})
    assert {"=fix", "=the", "=acme/app", "=acme", "=app", "=rounding", "=42"} <= found
    assert "=app:" not in found


def test_blanks_in_a_value_are_part_of_its_term() -> None:
    assert "body.title:Fix␠the␠bug" in terms(body={"title": "Fix the\tbug"})


def test_case_is_folded_beyond_ascii() -> None:
    assert "=grösse" in terms(body={"name": "GRÖẞE"})


def test_a_long_value_is_found_by_all_of_it_and_by_its_beginning() -> None:
    value = "x" * 200
    [found] = [each for each in terms(body={"blob": value}) if each.startswith("body.blob:")]
    assert found == term("body.blob", value)
    assert found != term("body.blob", value + "x")
    assert len(found) < 150
    assert text_term(value) in terms(body={"blob": value})


@pytest.mark.parametrize(
    ("headers", "body", "wanted"),
    [
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"From=%2B491&Body=two+words", "=two"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"From=%2B491&Body=two+words", "body.From:+491"),
        ({"Content-Type": "text/xml"}, b"<order><id>7</id></order>", "=7"),
        ({"Content-Type": "text/plain"}, b"disk full on db-1", "=db-1"),
        (
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            gzip.compress(b'{"a":"b"}', mtime=0),
            "body.a:b",
        ),
        ({}, b'["a", {"b": 1}]', "=a"),
        ({}, b'["a", {"b": 1}]', "body.b:1"),
        ({}, b'"all of it"', "=all"),
    ],
)
def test_a_body_is_read_as_its_content_type_says(headers: dict[str, str], body: bytes, wanted: str) -> None:
    assert wanted in terms(headers=headers, body=body)


@pytest.mark.parametrize("body", [b"", b"\xff\xfe\x00binary", b"\x00\x01", b"\x1f\x8bnot gzip"])
def test_a_binary_body_has_no_terms(body: bytes) -> None:
    assert terms(body=body) == {EVERY, "source:github", "type:push"}


def test_a_body_of_a_mebibyte_is_cut_and_that_is_said() -> None:
    large = lines(body={"rows": [{"id": number, "name": f"name {number}"} for number in range(30_000)]})
    assert large.is_cut
    assert len(large.text) < 6 * MAX_CHARACTERS
    assert not lines(body={"a": 1}).is_cut


def test_deep_json_is_found_by_its_text() -> None:
    body = b'{"key":' * 500 + b'"deep"' + b"}" * 500
    assert "=deep" in terms(body=body)


def test_a_type_that_isnt_utf_8_has_a_term() -> None:
    assert "type:a?" in terms(type="a\udcff")


def expression(text: str) -> str | None:
    return match_expression(parse_query(text, now=0.0).conditions)


def test_a_query_is_an_expression_of_terms() -> None:
    assert expression("source:github,stripe -type:push") == (
        '(("source:github" OR "source:stripe")) NOT (("type:push"))'
    )
    assert expression("acme/app pay*") == '("=acme/app") AND ("=pay" *)'
    assert expression("-type:push") == '("*") NOT (("type:push"))'


def test_what_terms_dont_decide_is_no_part_of_it() -> None:
    assert expression("status:dead route:build since:1h id:evt_1 identity:2") is None


def test_a_quote_in_a_term_is_doubled() -> None:
    assert expression(r'body.x:"a\"b"') == '("body.x:a""b")'


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_no_term_of_any_body_has_a_blank_or_control_in_ascii(body: object) -> None:
    text = terms_of(an_event(body=body if not isinstance(body, bytes) else b"")).text
    text.encode()
    assert all(character > " " and character != "\x7f" for character in text.replace("\n", ""))


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=200), max_size=4))
def test_every_text_is_found_by_its_own_value(body: dict[str, str]) -> None:
    found = terms(body=body)
    assert {term(f"body.{key}", value) for key, value in body.items()} <= {each.replace("\r", "") for each in found}
