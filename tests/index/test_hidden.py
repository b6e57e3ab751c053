"""What the rules hide isn't found by a search, whatever was hidden when the file was made."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.bodies.redaction import HIDDEN, MAX_VALUES, Redaction
from gateway.index.file import IndexOutdatedError
from gateway.index.hidden import seen_detail
from gateway.index.index import Index, Interruption, open_index
from gateway.index.terms import terms_of
from gateway.model import RecordMetadata
from gateway.rules.redact_paths import parse_redact_path, redaction_of
from tests.builders import an_attempt, an_event
from tests.index.company import Company

BODY = {"card": {"number": "4242424242424242", "cvc": "123"}, "note": "hello world"}
GUESSES = ("body.card.number:4242424242424242", "4242424242424242", "body.card.cvc:123", "123", "key:4242424242424242")


def hiding(*paths: str) -> Redaction:
    return redaction_of([parse_redact_path(path) for path in paths])


async def found(index: Index, text: str) -> int:
    return len((await index.search(text)).events)


async def found_by_guessing(index: Index) -> list[str]:
    return [guess for guess in GUESSES if await found(index, guess)]


def test_a_hidden_value_is_no_term_of_its_event() -> None:
    terms = terms_of(an_event(body=BODY), hiding("body.card")).text
    assert "4242" not in terms
    assert "123" not in terms
    assert {"body.note:hello␠world", "=hello", "=world"} <= {*terms.splitlines()}


def test_a_body_that_cant_be_read_has_no_terms_if_some_of_it_is_hidden() -> None:
    event = an_event(body=b"card 4242")
    assert "=4242" in terms_of(event).text
    assert "=4242" in terms_of(event, hiding("headers.x-api-key")).text
    assert "4242" not in terms_of(event, hiding("body.card")).text


async def test_a_hidden_value_is_not_found_by_guessing(any_company: Company, path: Path) -> None:
    company = any_company
    await company.event(key="4242424242424242", body=BODY)
    await company.event(source="stripe", body=BODY)
    hidden = {"github": hiding("body.card")}
    async with open_index(path, company.log, company.topics, redactions=lambda: hidden) as index:
        await index.refresh()
        assert await found(index, "hello source:github") == 1
        for guess in GUESSES:
            assert await found(index, f"{guess} source:github") == 0, guess
        assert await found(index, "4242424242424242 source:stripe") == 1  # which hides nothing
        assert (await index.search("source:github")).events[0].key == HIDDEN


async def test_a_key_is_not_found_of_more_values_than_are_known_or_of_none_that_are(
    company: Company, path: Path
) -> None:
    many = {"card": {"number": "4242424242424242", "others": [*range(MAX_VALUES)]}, "note": "hello"}
    await company.event(key="4242424242424242", body=many)
    form = {"content-type": "application/x-www-form-urlencoded"}
    await company.event(key="4242424242424242", headers=form, body=b'{"hello": "&card=4242424242424242&"}')
    hidden = {"github": hiding("body.card")}
    async with open_index(path, company.log, company.topics, redactions=lambda: hidden) as index:
        await index.refresh()
        assert await found_by_guessing(index) == []
        assert [each.key for each in (await index.search("source:github")).events] == [HIDDEN, HIDDEN]


async def test_a_delivery_that_repeats_a_hidden_value_is_told_without_it(company: Company, path: Path) -> None:
    event, *_ = await company.event(body=BODY)
    metadata = RecordMetadata(dead_reason="expression_error", detail="got '4242424242424242'")
    attempt = an_attempt(detail="no card 4242424242424242")
    await company.carry(company.topics.dead, event, metadata=metadata, attempts=(attempt,))
    other, *_ = await company.event(source="stripe", body=BODY)
    await company.carry(company.topics.dead, other, metadata=metadata, attempts=(attempt,))
    hidden = {"github": hiding("body.card")}
    async with open_index(path, company.log, company.topics, redactions=lambda: hidden) as index:
        await index.refresh()
        for its, details in (
            (event, {"got '***'", "no card ***"}),
            (other, {"got '4242424242424242'", "no card 4242424242424242"}),
        ):
            known = await index.event(its.id)
            assert known is not None
            (delivery,) = await index.deliveries(known)
            assert {delivery.detail, *[each.detail for each in delivery.attempts]} == details


def test_of_a_message_what_repeats_a_hidden_value_is_hidden_in_any_form_and_nothing_else() -> None:
    event, redaction = (
        an_event(body={"customer": {"id": 1, "name": 'Ann "A" Lee', "n": 0.000015}}),
        hiding("body.customer"),
    )
    for detail, shown in (
        ("invalid response: 500 was provided", "invalid response: 500 was provided"),
        ("no id 1", "no *** ***"),
        (r'got {"name": "Ann \"A\" Lee"}', 'got {"***": "***"}'),
        ("expected 2.5, got 1.5e-05", "expected 2.5, got ***"),
        ("", ""),
    ):
        assert seen_detail(detail, event, redaction) == shown
        assert seen_detail(detail, event, None) == detail
    assert seen_detail("no id", an_event(body=b'{"customer": 1'), redaction) == HIDDEN


def test_a_message_about_an_event_with_a_large_hidden_value_takes_little_memory() -> None:
    event, redaction = an_event(body={"a": " " * (1 << 20), "b": "Ann Lee"}), hiding("body.a", "body.b")
    tracemalloc.start()
    try:
        redaction.of(event.headers, event.query, event.body)
        _, to_read = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert seen_detail("no Ann%20Lee: 500 Internal Server Error", event, redaction).startswith("no ***: 500")
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 3 << 20  # the value itself
    assert most < to_read + (1 << 20)  # all forms in which a text of its size may have it are 30 MiB and more


async def test_a_path_that_is_added_makes_the_file_anew(any_company: Company, path: Path) -> None:
    company = any_company
    await company.event(key="4242424242424242", body=BODY)
    hidden = dict[str, Redaction]()
    async with open_index(path, company.log, company.topics, redactions=lambda: hidden) as index:
        await index.refresh()
        assert await found_by_guessing(index) == list(GUESSES)
        hidden = {"github": hiding("body.card")}
        with pytest.raises(IndexOutdatedError, match="the rules hide more now of what came from github"):
            await index.refresh()
        assert await found_by_guessing(index) == []  # at once: the file is empty
        await index.refresh()
        assert await found(index, "hello") == 1
        assert await found_by_guessing(index) == []
        assert (await index.statistics()).interruptions[Interruption.LOST] == 1


async def test_a_type_that_is_read_of_the_body_only_now_makes_the_file_anew(company: Company, path: Path) -> None:
    await company.event(type="ann@example.com", body={"users": {"ann@example.com": 1}})
    hidden = {"github": replace(hiding("body.users"), of_body=frozenset[str]())}
    async with open_index(path, company.log, company.topics, redactions=lambda: hidden) as index:
        await index.refresh()
        assert await found(index, "type:ann@example.com") == 1
        hidden = {"github": hiding("body.users")}
        with pytest.raises(IndexOutdatedError, match="the rules hide more now of what came from github"):
            await index.refresh()
        await index.refresh()
        assert await found(index, "type:ann@example.com") == 0
        assert (await index.search("source:github")).events[0].type == HIDDEN


async def test_nothing_is_committed_that_was_read_before_a_path_was_added(company: Company, path: Path) -> None:
    await company.event(key="4242424242424242", body=BODY)
    asked = [dict[str, Redaction]()]  # when a round begins; it may read for an hour
    async with open_index(
        path, company.log, company.topics, redactions=lambda: asked.pop() if asked else {"github": hiding("body.card")}
    ) as index:
        with pytest.raises(IndexOutdatedError, match="the rules hide more now of what came from github"):
            await index.refresh()
        assert await found(index, "hello") == 0
        await index.refresh()
        assert await found(index, "hello") == 1
        assert await found_by_guessing(index) == []


async def test_so_does_one_that_was_added_while_no_process_kept_the_file(any_company: Company, path: Path) -> None:
    company = any_company
    await company.event(key="4242424242424242", body=BODY)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
    hidden = {"github": hiding("body.card")}
    async with open_index(path, company.log, company.topics, redactions=lambda: hidden) as index:
        with pytest.raises(IndexOutdatedError):
            await index.refresh()
        await index.refresh()
        assert await found_by_guessing(index) == []
    async with open_index(path, company.log, company.topics, redactions=lambda: hidden) as index:
        await index.refresh()  # what it was made by is known
        assert await found(index, "hello") == 1


async def test_a_path_that_is_removed_and_added_again_makes_it_anew_only_then(company: Company, path: Path) -> None:
    hidden = {"github": hiding("body.card", "body.other")}
    async with open_index(path, company.log, company.topics, redactions=lambda: hidden) as index:
        await company.event(key="k", body=BODY)
        await index.refresh()
        hidden = {"github": hiding("body.other")}
        await index.refresh()
        assert await found_by_guessing(index) == []  # what was read before stays hidden
        await company.event(key="k", body=BODY)
        await index.refresh()
        assert await found(index, "4242424242424242") == 1
        hidden = {"github": hiding("body.card")}
        with pytest.raises(IndexOutdatedError):
            await index.refresh()
        await index.refresh()
        assert await found_by_guessing(index) == []
        assert await found(index, "hello") == 2


async def test_a_file_that_nothing_was_read_into_is_not_made_anew(company: Company, path: Path) -> None:
    hidden = {"github": hiding("body.card")}
    async with open_index(path, company.log, company.topics, redactions=lambda: hidden) as index:
        await index.refresh()
        assert (await index.statistics()).interruptions == {}
