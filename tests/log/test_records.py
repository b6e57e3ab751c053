from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.engine.dedupe.index import DedupeIndex
from gateway.log.base import Partition, Record, RecordHeaders
from gateway.log.json_fields import JsonFields
from gateway.log.records import (
    DEDUPE_ENTRY,
    ORIGIN_TOLERANCE,
    DedupeEntries,
    Origin,
    ResponseTo,
    decode_dedupe_entries,
    decode_delivery,
    decode_event,
    decode_record_metadata,
    decode_response,
    dedupe_entries_key,
    encode_dedupe_entries,
    encode_delivery,
    encode_event,
    encode_origin,
    encode_record_metadata,
    encode_response,
    event_key,
    fingerprint,
    is_newer,
    origin_of,
    record_metadata_of,
)
from gateway.model import (
    NO_METADATA,
    Attempt,
    Delivery,
    DeliveryId,
    DestinationResponse,
    Event,
    EventId,
    Headers,
    NewerRecordError,
    RecordMetadata,
    Result,
    UndecodableRecordError,
    UnreadableRecordError,
)
from tests.builders import NOW, a_delivery, an_event

# RFC 9110, 5.1 and 5.5: a name is a token; a value holds anything but CR, LF and NUL.
TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAMES = st.lists(st.sampled_from(TOKEN), min_size=1, max_size=20).map(bytes)
VALUES = st.binary(max_size=40).filter(lambda value: not set(value) & set(b"\r\n\0"))
PAIRS = st.lists(st.tuples(NAMES | st.just(b"x-repeated"), VALUES), max_size=12).map(tuple)
# What a wire gives: text that is not UTF-8 keeps its bytes as surrogates.
WIRE_TEXTS = st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
NAMES_OF_OURS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", max_size=20).map("a".__add__)
TIMES = st.integers(0, 4_000_000_000_000_000).map(lambda microseconds: microseconds / 1e6)
MILLISECONDS = st.integers(0, 4_000_000_000_000).map(lambda milliseconds: milliseconds / 1e3)
EVENTS = st.builds(
    Event,
    id=NAMES_OF_OURS.map(lambda text: EventId(f"evt_{text}")),
    source=NAMES_OF_OURS,
    type=WIRE_TEXTS,
    key=st.none() | WIRE_TEXTS,
    received_at=TIMES,
    headers=PAIRS,
    query=WIRE_TEXTS,
    body=st.binary(),
)
ATTEMPTS = st.builds(
    Attempt,
    number=st.integers(1, 1000),
    at=MILLISECONDS,
    seconds=MILLISECONDS,
    result=st.sampled_from(Result),
    status=st.none() | st.integers(100, 599),
    detail=st.text(max_size=40),
)
DELIVERIES = st.builds(
    Delivery,
    id=NAMES_OF_OURS.map(lambda text: DeliveryId(f"dlv_{text}")),
    event=EVENTS,
    route=NAMES_OF_OURS,
    destination=NAMES_OF_OURS,
    attempts=st.lists(ATTEMPTS, max_size=4).map(tuple),
    successor=st.integers(0, 1000),
    due=TIMES,
    replayed_at=TIMES,
)
STATE: dict[str, Any] = {
    "id": "dlv_1",
    "route": "build",
    "destination": "ci",
    "successor": 3,
    "due": 1_700_000_000.5,
    "replayed_at": 0.0,
    "attempts": [
        {"n": 1, "at": 1_700_000_000.5, "s": 0.25, "result": "5xx", "status": 503, "detail": ""},
        {"n": 2, "at": 1_700_000_001, "s": 1, "result": "timeout", "status": None, "detail": "read"},
    ],
    "metadata": {"paused_name": "route/build", "unknown_since": "1700000000.000", "breaks": "3"},
    "at": 1_700_000_000.5,
}
_TEXTS = {name: st.text(max_size=40) for name in ("spill_reason", "paused_name", "replay", "dead_reason", "detail")}
NOTES = st.builds(
    RecordMetadata,
    **_TEXTS,
    breaker_deferrals=st.integers(0, 999_999_999),
    unknown_since=st.none() | st.integers(0, 10**12).map(lambda milliseconds: milliseconds / 1000),
    is_expedited=st.booleans(),
)


def a_record(headers: RecordHeaders, value: bytes = b"") -> Record:
    return Record(7, 1.0, b"key", value, headers)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.sampled_from([-1, 0, 1 << 53, (1 << 53) + 1, 1e18, 1e308, -0.0, 253_402_300_800, "", "1", "\0", "a/b"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def misshapen(draw: st.DrawFn, whole: dict[str, Any]) -> bytes:
    """Draw JSON in which one field, however deep, is another value or missing; perhaps only its beginning."""
    body = deepcopy(whole)
    place: Any = body
    for _ in range(draw(st.integers(0, 3))):
        inner = [
            each for each in (place.values() if isinstance(place, dict) else place) if isinstance(each, dict | list)
        ]
        if not inner:
            break
        place = draw(st.sampled_from(inner))
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if keys:
        key = draw(st.sampled_from(keys))
        if draw(st.booleans()):
            place[key] = draw(JSON)
        else:
            del place[key]
    if isinstance(place, dict) and draw(st.booleans()):
        place[draw(st.text(max_size=8))] = draw(JSON)
    raw = orjson.dumps(body)
    return raw[: draw(st.integers(0, len(raw)))] if draw(st.booleans()) else raw


# Events


@given(EVENTS)
def test_an_event_is_read_as_it_was_written(event: Event) -> None:
    assert decode_event(a_record(encode_event(event), event.body)) == event


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ((b"a", b""),),
        ((b"A", b"1"), (b"b", b"2"), (b"a", b"1"), (b"A", b"1")),
        ((b"a", b" leading"), (b"b", b"trailing "), (b"c", b": "), (b"d", b"x: y: z")),
        ((b"a", bytes(set(range(256)) - set(b"\r\n\0"))),),
    ],
    ids=["none", "empty value", "repeats in order", "blanks and colons", "every byte"],
)
def test_header_pairs_keep_their_order_repeats_and_bytes(headers: Headers) -> None:
    assert decode_event(a_record(encode_event(replace(an_event(), headers=headers)))).headers == headers


def test_any_cloudevents_consumer_can_read_an_event() -> None:
    """The names and forms of the Kafka binding 1.0.2, binary mode."""
    fields = dict(encode_event(an_event(id="evt_1", received_at=1_700_000_000.25)))
    assert {name: value for name, value in fields.items() if not name.startswith("gw_")} == {
        "ce_specversion": b"1.0",
        "ce_id": b"evt_1",
        "ce_source": b"github",
        "ce_type": b"push",
        "ce_time": b"2023-11-14T22:13:20.250Z",
        "content-type": b"application/json",
    }


def test_an_event_without_a_content_type_query_or_key_has_no_such_header() -> None:
    names = [name for name, _ in encode_event(an_event(headers={}))]
    assert not {"content-type", "gw_query", "gw_key"} & set(names)


@pytest.mark.parametrize(
    ("event", "key"),
    [
        (an_event(id="evt_1"), b"evt_1"),
        (an_event(key="acme/shop"), b"acme/shop"),
        (an_event(key="caf\udce9"), b"caf\xe9"),
        (an_event(id="evt_1", key=""), b"evt_1"),
    ],
    ids=["no order key", "order key", "not utf-8", "an empty key is none"],
)
def test_the_record_key_is_the_order_key_or_the_id(event: Event, key: bytes) -> None:
    assert event_key(event) == key


# Deliveries


@given(DELIVERIES, NOTES)
def test_a_delivery_is_read_as_it_was_written(delivery: Delivery, note: RecordMetadata) -> None:
    stored = decode_delivery(a_record(encode_delivery(delivery, note, at=NOW), delivery.event.body))
    assert (stored.delivery, stored.metadata) == (delivery, note)


def test_each_field_of_record_metadata_is_written_and_read() -> None:
    told = RecordMetadata(
        spill_reason="paused",
        paused_name="route/build",
        breaker_deferrals=3,
        unknown_since=NOW,
        is_expedited=True,
        replay="1",
    )
    told = replace(
        told, dead_reason="gone", detail="410", rules="8f31c0de", owner="team-ci", runbook="https://wiki.example"
    )
    for field in fields(RecordMetadata):
        note = replace(NO_METADATA, **{field.name: getattr(told, field.name)})
        written = encode_record_metadata(note)
        assert len(written) == 1
        assert decode_record_metadata(JsonFields("metadata", written)) == note
    assert decode_record_metadata(JsonFields("metadata", encode_record_metadata(told) | {"newer": "x"})) == told


@given(DELIVERIES)
def test_the_record_of_a_delivery_is_one_of_its_event_too(delivery: Delivery) -> None:
    assert decode_event(a_record(encode_delivery(delivery, NO_METADATA, at=NOW), delivery.event.body)) == delivery.event


# What can't be read


@pytest.mark.parametrize("name", ["gw_v", "ce_id", "ce_source", "ce_type", "gw_at", "gw_headers"])
def test_an_event_without_a_header_is_undecodable_and_names_it(name: str) -> None:
    headers = [(other, value) for other, value in encode_event(an_event()) if other != name]
    with pytest.raises(UndecodableRecordError, match=f"{name}: expected this record header, got none"):
        decode_event(a_record(headers))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gw_v", b"0"),
        ("gw_v", b"01"),
        ("gw_v", b"\xff"),
        ("gw_at", b"nan"),
        ("gw_at", b"-1"),
        ("gw_at", b"1e12"),
        ("ce_id", b""),
        ("ce_id", b"evt_1\r\nX-Admin: 1"),
        ("ce_source", b"No/Name"),
        ("gw_headers", b"no colon"),
        ("gw_headers", b": no name"),
        ("gw_headers", b"a b: c"),
        ("gw_headers", b"a: b\nc: d"),
        ("gw_headers", b"a: \0"),
        ("gw_at", b"yesterday"),
        ("gw_at", b""),
        ("ce_id", b"\xff"),
        ("ce_source", b"\xc3\x28"),
    ],
)
def test_an_event_with_an_unreadable_header_is_undecodable(name: str, value: bytes) -> None:
    headers = [(other, value if other == name else text) for other, text in encode_event(an_event())]
    with pytest.raises(UndecodableRecordError, match=r"expected .*, got"):
        decode_event(a_record(headers))


def state_without(name: str) -> bytes:
    state = orjson.loads(dict(encode_delivery(a_delivery(), NO_METADATA, at=NOW))["gw_delivery"])
    return orjson.dumps({other: value for other, value in state.items() if other != name})


def state_with(**changes: object) -> bytes:
    state = orjson.loads(dict(encode_delivery(a_delivery(), NO_METADATA, at=NOW))["gw_delivery"])
    return orjson.dumps({**state, **changes})


@pytest.mark.parametrize(
    "state",
    [
        None,
        b"",
        b"{",
        b"\xff",
        b"null",
        b"[]",
        b'"text"',
        *[
            state_without(name)
            for name in ("id", "route", "destination", "attempts", "successor", "due", "replayed_at", "metadata")
        ],
        state_with(attempts=None),
        state_with(id="dlv 1"),
        state_with(route="No/Name"),
        state_with(successor=1 << 60),
        state_with(successor=True),
        state_with(due=1e18),
        state_with(replayed_at=-1),
        state_with(metadata={"unknown_since": "yesterday"}),
        state_with(metadata={"breaks": "many"}),
        state_with(metadata={"paused_name": 1}),
        state_with(at="now"),
        state_with(attempts=[1]),
        state_with(attempts=[{}]),
        state_with(attempts=[{"n": 1, "at": 1, "s": 1, "result": "6xx", "status": None, "detail": ""}]),
    ],
)
def test_a_delivery_without_a_readable_state_is_undecodable(state: bytes | None) -> None:
    headers = encode_event(an_event())
    if state is not None:
        headers.append(("gw_delivery", state))
    with pytest.raises(UndecodableRecordError, match=r"gw_delivery\S*: expected"):
        decode_delivery(a_record(headers))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([name for name, _ in encode_delivery(a_delivery(), NO_METADATA, at=NOW)]), st.binary()
        )
    )
)
def test_any_headers_are_a_delivery_or_undecodable(headers: list[tuple[str, bytes]]) -> None:
    """Whatever a foreign producer writes, the reader has one kind of error to expect."""
    written = dict(encode_delivery(a_delivery(), NO_METADATA, at=NOW))
    see_read([*written.items(), *headers])


@given(misshapen(STATE))
def test_any_state_is_a_delivery_or_undecodable(state: bytes) -> None:
    """A field of another type, however deep, that is missing, or cut: one kind of error, or what can be written."""
    see_read([*encode_event(an_event()), ("gw_delivery", state)])


def see_read(headers: RecordHeaders) -> None:
    """See that a record is refused, or read as what can be written, and then is read as the same."""
    record_metadata_of(a_record(headers))
    try:
        stored = decode_delivery(a_record(headers, b"body"))
    except UnreadableRecordError:
        return
    again = encode_delivery(stored.delivery, stored.metadata, at=stored.at)
    read = decode_delivery(a_record(again, b"body"))
    assert encode_delivery(read.delivery, read.metadata, at=read.at) == again


@pytest.mark.parametrize("version", [b"2", b"999999999"])
def test_a_newer_format_is_distinguished_from_garbage(version: bytes) -> None:
    """It is looked at first: the rest may mean something else there."""
    for written in (
        encode_event(an_event()),
        encode_delivery(a_delivery(), NO_METADATA, at=NOW),
        encode_dedupe_entries("github", 1),
        encode_response(ResponseTo(EventId("evt_1"), bytes(8), "chat"), None),
    ):
        record = a_record([("gw_v", version), *[pair for pair in written[3:] if pair[0] != "gw_v"]])
        assert is_newer(record)
        for decode in (decode_event, decode_delivery, decode_dedupe_entries, decode_response):
            with pytest.raises(NewerRecordError, match="expected format 1 or older, got"):
                decode(record)
    for garbage in (b"", b"-2", b"2.0", b"0", b"10000000000", b"\xb2"):
        assert not is_newer(a_record([("gw_v", garbage)]))
    assert not is_newer(a_record([]))


@given(
    st.lists(st.tuples(st.sampled_from(["gw_v", "gw_source", "gw_origin"]), st.binary(max_size=20))),
    st.binary(max_size=100) | st.binary(min_size=40, max_size=40),
)
def test_any_dedupe_entries_are_read_and_remembered_or_undecodable(
    headers: list[tuple[str, bytes]], value: bytes
) -> None:
    written = [*encode_dedupe_entries("github", 17), *headers]
    try:
        entries = decode_dedupe_entries(Record(9, NOW, b"x/0", value, written))
    except UnreadableRecordError:
        return
    headers = encode_dedupe_entries(entries.source, entries.origin)
    assert decode_dedupe_entries(Record(9, NOW, b"x/0", entries.rows, headers)) == entries
    index = DedupeIndex()
    index.forget_before(entries.origin)
    index.restore(entries.rows)
    index.add(DEDUPE_ENTRY.pack(bytes(16), bytes(8), 1, 1), 1)
    index.sweep()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["gw_v", "gw_destination", "gw_content", "gw_status", "content-type"]),
            st.binary(max_size=20),
        )
    ),
    st.binary(max_size=20),
    st.binary(max_size=100),
)
def test_any_response_is_read_or_undecodable(headers: list[tuple[str, bytes]], key: bytes, value: bytes) -> None:
    to = ResponseTo(EventId("evt_1"), bytes(range(8)), "chat")
    written = [*encode_response(to, DestinationResponse(status=200, content_type=b"text/plain")), *headers]
    try:
        to, response = decode_response(Record(9, NOW, key, value, written))
    except UnreadableRecordError:
        return
    body = b"" if response is None else response.body
    again = Record(9, NOW, to.event.encode(), body, encode_response(to, response))
    assert decode_response(again) == (to, response)


def test_dedupe_entries_with_an_origin_in_the_future_are_refused() -> None:
    """They would have all that is known forgotten, until then."""
    record = Record(9, NOW, b"x/0", b"", encode_dedupe_entries("github", round((NOW + 2 * 86400) * 1e6)))
    with pytest.raises(UndecodableRecordError, match="gw_origin: expected"):
        decode_dedupe_entries(record)


ORIGINS = st.builds(
    Origin,
    st.builds(Partition, st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1), st.integers(0, 10**9 - 1)),
    st.integers(0, 10**14 - 1),
    st.integers(0, 9_999_999_999_000_000).map(lambda microseconds: microseconds / 1e6),
    st.just("") | st.text("0123456789abcdef", min_size=8, max_size=8),
)


@given(ORIGINS, TIMES | st.none())
@example(Origin(Partition("gateway.events.github", 0), 10**14 - 1, 9_999_999_999.0), NOW)
def test_no_origin_is_taken_that_is_later_than_its_record_by_more_than_clocks_are_apart(
    origin: Origin, appended_at: float | None
) -> None:
    """It would make a duplicate of each event until then."""
    at = origin.appended_at if appended_at is None else appended_at
    found = origin_of(Record(7, at, b"key", b"", [encode_origin(origin)]))
    assert found == (origin if origin.appended_at <= at + ORIGIN_TOLERANCE else None)


@given(st.lists(st.binary(max_size=60)), TIMES)
def test_an_origin_later_than_its_record_is_refused(texts: list[bytes], at: float) -> None:
    found = origin_of(Record(7, at, b"key", b"", [("gw_from", text) for text in texts]))
    assert found is None or found.appended_at <= at + ORIGIN_TOLERANCE


# Taken over the parts by `b2sum -l 64` of coreutils: what is in the log must mean the same to the next version.
FINGERPRINTS = {
    b"": "3737b305e0558f70",
    b"\xff\x00": "bf9ac5491e0f3219",
}


@pytest.mark.parametrize("body", FINGERPRINTS)
def test_a_fingerprint_is_the_same_in_every_process(body: bytes) -> None:
    assert fingerprint(an_event(type="pušh", query="a=b", body=body)).hex() == FINGERPRINTS[body]


def test_a_fingerprint_distinguishes_requests() -> None:
    parts = [
        ("a", "b", b"c"),
        ("a", "bc", b""),
        ("ab", "", b"c"),
        ("", "ab", b"c"),
        ("a", "", b"b c"),
        ("a 0 ", "", b""),
    ]
    prints = [fingerprint(an_event(type=kind, query=query, body=body)) for kind, query, body in parts]
    assert len(set(prints)) == len(parts)


def test_dedupe_entries_come_back_as_they_were_written() -> None:
    rows = DEDUPE_ENTRY.pack(bytes(range(16)), b"12345678", 5, 1_700_000_000_000_000) * 3
    key = dedupe_entries_key(Partition("company.github", 3))
    record = Record(9, NOW, key, rows, tuple(encode_dedupe_entries("github", 17)))
    assert key == b"company.github/3"
    assert decode_dedupe_entries(record) == DedupeEntries("github", 17, rows)


@pytest.mark.parametrize("name", ["gw_v", "gw_source", "gw_origin"])
def test_dedupe_entries_without_a_header_that_can_be_read_are_refused(name: str) -> None:
    headers = dict(encode_dedupe_entries("github", 17)) | {name: b"\xff"}
    for left in (headers, {key: value for key, value in headers.items() if key != name}):
        with pytest.raises(UndecodableRecordError):
            decode_dedupe_entries(Record(9, NOW, b"x/0", b"", tuple(left.items())))
