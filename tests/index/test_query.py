"""The query language: what each condition means, and what is said of those that mean nothing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.index.query import MAX_QUERY, Condition, Field, Query, QueryError, Value, parse_query

NOW = 1_764_532_800.0  # 2025-11-30T20:00:00Z


def parsed(text: str) -> Query:
    return parse_query(text, now=NOW)


def only(text: str) -> Condition:
    [condition] = parsed(text).conditions
    return condition


def problems(text: str) -> list[str]:
    with pytest.raises(QueryError) as caught:
        parsed(text)
    return str(caught.value).splitlines()


def test_an_empty_query_asks_for_everything() -> None:
    assert parsed("  ") == Query(conditions=(), since=0.0, until=math.inf)


def test_a_field_has_alternatives_between_commas() -> None:
    assert only("status:dead,parked") == Condition(field=Field.STATUS, values=(Value("dead"), Value("parked")))


def test_a_comma_in_a_key_or_in_quotes_is_part_of_it() -> None:
    assert only("key:a,b").values == (Value("a,b"),)
    assert only('type:"a,b",c').values == (Value("a,b"), Value("c"))


def test_a_minus_says_that_it_must_not_hold() -> None:
    assert only("-source:github").is_negated
    assert only("-word") == Condition(field=Field.TEXT, values=(Value("word"),), is_negated=True)


def test_a_star_at_the_end_stands_for_any_rest() -> None:
    assert only("type:invoice.*").values == (Value("invoice.", is_prefix=True),)
    assert only("pay*").values == (Value("pay", is_prefix=True),)
    assert only('type:"invoice.*"').values == (Value("invoice.*"),)


def test_a_field_of_the_body_has_a_path() -> None:
    found = only("body.customer.id:42")
    assert (found.field, found.path, found.values) == (Field.BODY, "body.customer.id", (Value("42"),))


def test_a_field_of_the_body_may_be_empty() -> None:
    assert only('body.note:""').values == (Value(""),)


def test_a_path_with_blanks_is_quoted() -> None:
    assert only('body."first name":Ada').path == "body.first name"


def test_text_is_split_into_its_pieces_without_punctuation() -> None:
    assert [each.values for each in parsed('"round totals, (half) even!"').conditions] == [
        (Value("round"),),
        (Value("totals"),),
        (Value("half"),),
        (Value("even"),),
    ]


def test_a_piece_of_text_may_have_a_slash() -> None:
    assert only("acme/app") == Condition(field=Field.TEXT, values=(Value("acme/app"),))


def test_an_address_is_text() -> None:
    assert only("https://acme.example/x") == Condition(field=Field.TEXT, values=(Value("https://acme.example/x"),))


def test_quotes_and_backslashes_are_escaped() -> None:
    assert only(r'key:"a \"b\" \\ c"').values == (Value('a "b" \\ c'),)


@pytest.mark.parametrize(
    ("text", "since"),
    [
        ("since:2h", NOW - 7200),
        ("since:1d12h", NOW - 129_600),
        ("since:2025-11-30", NOW - 72_000),
        ("since:2025-11-30T19:00", NOW - 3600),
        ("since:2025-11-30T19:00:30Z", NOW - 3570),
        ("since:2025-11-30T20:00+01:00", NOW - 3600),
    ],
)
def test_since_is_a_duration_or_a_time(text: str, since: float) -> None:
    assert parsed(text) == Query(conditions=(), since=since)


def test_of_several_times_all_hold() -> None:
    query = parsed("since:2h since:1h until:10m until:20m")
    assert (query.since, query.until) == (NOW - 3600, NOW - 1200)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sorce:github", "query:1: expected one of source, type, key, id, identity, route, destination, status, "),
        ("a b:c", "query:3: expected one of source"),
        ("text:a", "query:1: expected one of source"),
        ("body:a", "query:1: expected one of source"),
        ("status:ded", "query:1: status: expected one of dead, parked, "),
        ("source:", "query:1: source: expected a value, got none"),
        ("status:dead,", "query:1: status: expected a value, got none"),
        ("id:evt*", "query:1: id: expected a value without '*', got 'evt*'"),
        ("ty*pe", "query:1: expected '*' at the end alone, got 'ty*pe'; in quotes it is text"),
        ('"open', "query:1: expected a closing quote, got none"),
        ("since:yesterday", "query:1: expected a duration as 2h, or a time as 2026-11-30T20:00Z, got 'yesterday'"),
        ("since:2025-02-30", "query:1: expected a duration as 2h, or a time as 2026-11-30T20:00Z, got '2025-02-30'"),
        ("-since:1h", "query:1: expected 'since' without '-', got '-since'"),
        ("!!!", "query:1: expected text with a letter or digit, got '!!!'"),
        ('-"two words"', "query:1: expected one word after '-', got 2"),
        ("x" * (MAX_QUERY + 1), "query: expected at most 4096 characters, got 4097"),
        ("type:" + "x" * 97 + "*", "query:1: expected at most 96 characters before '*', got 97"),
    ],
)
def test_a_problem_is_told_with_its_place(text: str, problem: str) -> None:
    [found] = problems(text)
    assert found.startswith(problem)


def test_a_misspelt_field_or_status_is_guessed() -> None:
    assert problems("sorce:github")[0].endswith("got 'sorce', did you mean 'source'?")
    assert problems("status:delivred")[0].endswith("got 'delivred', did you mean 'delivered'?")
    assert problems("qqq:github")[0].endswith("got 'qqq'; text with a colon needs quotes")


def test_all_problems_are_told_at_once() -> None:
    assert len(problems("sorce:a statsu:b since:never")) == 3


def test_too_many_values_are_refused() -> None:
    assert problems("type:" + ",".join(["a"] * 65)) == ["query: expected at most 64 values, got 65"]


def test_what_is_asked_twice_is_asked_once() -> None:
    assert parsed("source:* -word source:* -word") == parsed("source:* -word")
    assert only("type:push,pull,push").values == (Value("push"), Value("pull"))


def test_more_than_a_few_values_with_any_rest_are_refused() -> None:
    """Each takes the time of all that begins so, and nothing ends it before that: a query had sixty-four."""
    text = " ".join([f"-type:{letter}*" for letter in "abcd"])
    assert len(parsed(text + " -type:a*").conditions) == 4
    assert problems(text + " pay*") == ["query: expected at most 4 values that end in '*', got 5"]
    assert problems("type:a*,b*,c*,d*,e*") == ["query: expected at most 4 values that end in '*', got 5"]


@pytest.mark.parametrize("text", ["id:\udcff", "-route:\udcff", "key:\udcff", "\udcff", "body.a:\udcff"])
def test_bytes_that_are_no_text_are_no_query(text: str) -> None:
    assert problems(text) == ["query: expected text in UTF-8, got other bytes"]


@given(st.text(alphabet='ab:-"\\*., \u00df/', max_size=30) | st.text(max_size=40))
def test_any_text_is_a_query_or_has_problems(text: str) -> None:
    try:
        query: Query | QueryError = parsed(text)
    except QueryError as error:
        query = error
    if isinstance(query, QueryError):
        assert str(query).startswith("query")
    else:
        assert all(each.values for each in query.conditions)
