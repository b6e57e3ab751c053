from dataclasses import fields, replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.log.attempt_records import (
    FORMAT,
    AttemptRecord,
    Decision,
    decode_attempt_record,
    encode_attempt_record,
)
from gateway.log.base import Record
from gateway.model import (
    BODY_EXCERPT,
    AttemptPhases,
    DeliveryId,
    EventId,
    NewerRecordError,
    ResponseExcerpt,
    Result,
    UndecodableRecordError,
    UnreadableRecordError,
)
from tests.builders import NOW
from tests.log.test_records import JSON, NAMES_OF_OURS, PAIRS, TIMES, WIRE_TEXTS, misshapen

SECONDS = st.integers(0, 10**12).map(lambda microseconds: microseconds / 1e6)
RESPONSES = st.builds(
    ResponseExcerpt,
    headers=PAIRS,
    are_headers_cut=st.booleans(),
    body=st.binary(max_size=64),
    is_body_cut=st.booleans(),
)
ATTEMPTS = st.builds(
    AttemptRecord,
    event_id=NAMES_OF_OURS.map(lambda text: EventId(f"evt_{text}")),
    delivery_id=NAMES_OF_OURS.map(lambda text: DeliveryId(f"dlv_{text}")),
    source=NAMES_OF_OURS,
    type=WIRE_TEXTS,
    route=NAMES_OF_OURS,
    destination=NAMES_OF_OURS,
    received_at=TIMES,
    replayed_at=TIMES,
    item=st.none() | st.integers(0, 10_000),
    number=st.integers(1, 1000),
    at=TIMES,
    seconds=SECONDS,
    result=st.sampled_from(Result),
    decision=st.none() | st.sampled_from(Decision),
    status=st.none() | st.integers(100, 599),
    detail=st.text(max_size=40),
    retry_after=st.none() | SECONDS,
    phases=st.builds(AttemptPhases, *[st.none() | SECONDS] * 4),
    method=st.sampled_from(["POST", "PUT", "PATCH", "DELETE", "GET"]),
    host=st.sampled_from(["ci.example", "xn--bcher-kva.example", "2001:db8::1"]),
    rules=st.sampled_from(["", "8f31c0de"]),
    response=st.none() | RESPONSES,
)
A_RESPONSE = ResponseExcerpt(headers=((b"Content-Type", b"text/plain"),), body=b"no such repository", is_body_cut=True)
AN_ATTEMPT = AttemptRecord(
    event_id=EventId("evt_1"),
    delivery_id=DeliveryId("dlv_1"),
    source="github",
    type="push",
    route="build",
    destination="ci",
    received_at=NOW,
    replayed_at=NOW + 1.5,
    item=3,
    number=2,
    at=NOW + 2.25,
    seconds=0.125,
    result=Result.SERVER_ERROR,
    decision=Decision.RETRY,
    status=503,
    detail="503 Service Unavailable",
    retry_after=30.0,
    phases=AttemptPhases(0.001, 0.002, 0.003, 0.004),
    method="POST",
    host="ci.example",
    rules="8f31c0de",
    response=A_RESPONSE,
)


def stored(attempt: AttemptRecord, **changes: bytes | None) -> Record:
    """Return the record of an attempt, with other key, value or headers; None removes a header."""
    new = encode_attempt_record(attempt)
    headers = [(name, value) for name, value in new.headers if name not in changes]
    headers += [(name, value) for name, value in changes.items() if name.startswith("gw_") and value is not None]
    return Record(7, NOW, changes.get("key") or new.key, changes.get("value") or new.value, headers)


def state_with(**values: object) -> bytes:
    state: dict[str, Any] = orjson.loads(dict(encode_attempt_record(AN_ATTEMPT).headers)["gw_attempt"])
    return orjson.dumps({**state, **values})


@given(ATTEMPTS)
def test_an_attempt_is_read_as_it_was_written(attempt: AttemptRecord) -> None:
    assert decode_attempt_record(stored(attempt)) == attempt


def test_each_field_of_an_attempt_is_written_and_read() -> None:
    assert decode_attempt_record(stored(AN_ATTEMPT)) == AN_ATTEMPT
    for field in fields(AttemptRecord):
        value = getattr(AN_ATTEMPT, field.name)
        if value == field.default:
            pytest.fail(f"{field.name} has its default here, so that nothing shows whether it is read")


def test_the_key_is_the_events_id_and_the_value_the_beginning_of_the_body() -> None:
    record = encode_attempt_record(AN_ATTEMPT)
    assert (record.key, record.value) == (b"evt_1", b"no such repository")


def test_an_attempt_without_a_response_has_neither_value_nor_headers_of_one() -> None:
    record = encode_attempt_record(replace(AN_ATTEMPT, response=None, status=None, result=Result.TIMEOUT))
    assert record.value == b""
    assert [name for name, _ in record.headers] == ["gw_v", "gw_type", "gw_attempt"]


def test_a_field_of_a_newer_version_is_ignored() -> None:
    assert decode_attempt_record(stored(AN_ATTEMPT, gw_attempt=state_with(colour="blue"))) == AN_ATTEMPT


def test_a_record_of_a_newer_format_is_left_to_that_version() -> None:
    with pytest.raises(NewerRecordError, match="gw_v: expected format 1 or older, got 2"):
        decode_attempt_record(stored(AN_ATTEMPT, gw_v=b"%d" % (FORMAT + 1), gw_attempt=b"[]"))


@pytest.mark.parametrize("name", ["gw_v", "gw_type", "gw_attempt", "gw_headers"])
def test_an_attempt_without_a_header_is_undecodable_and_names_it(name: str) -> None:
    with pytest.raises(UndecodableRecordError, match=f"{name}: expected .*, got none"):
        decode_attempt_record(stored(AN_ATTEMPT, **{name: None}))


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("gw_v", {"gw_v": b"0"}),
        ("key", {"key": b"evt 1"}),
        ("key", {"key": b"\xff"}),
        ("value", {"value": bytes(BODY_EXCERPT + 1)}),
        ("gw_headers", {"gw_headers": b"no colon"}),
        ("gw_attempt", {"gw_attempt": b"{"}),
        ("gw_attempt", {"gw_attempt": b"[]"}),
        *[
            (f"gw_attempt.{name}", {"gw_attempt": state_with(**{name: value})})
            for name, value in {
                "delivery": "dlv 1",
                "source": "",
                "route": "No/Name",
                "destination": 1,
                "received_at": -1,
                "item": -1,
                "n": 0,
                "at": 1e300,
                "s": "1",
                "result": "6xx",
                "decision": "forgotten",
                "status": 1000,
                "detail": 1,
                "retry_after": True,
                "method": None,
                "host": [],
                "rules": 1,
                "phases": [],
            }.items()
        ],
        ("gw_attempt.phases.dns", {"gw_attempt": state_with(phases={"dns": -1})}),
        ("gw_attempt.response.body_cut", {"gw_attempt": state_with(response={"headers_cut": 0, "body_cut": 2})}),
    ],
)
def test_an_attempt_with_an_unreadable_part_is_undecodable_and_names_it(where: str, changes: dict[str, bytes]) -> None:
    with pytest.raises(UndecodableRecordError, match=rf"^{where}\S*: expected .*, got"):
        decode_attempt_record(stored(AN_ATTEMPT, **changes))


@given(misshapen(orjson.loads(state_with())), st.binary(max_size=20), st.binary(max_size=40))
def test_whatever_is_in_a_record_it_is_read_or_unreadable(state: bytes, key: bytes, headers: bytes) -> None:
    record = Record(
        7, NOW, key, b"", [("gw_v", b"1"), ("gw_type", b""), ("gw_attempt", state), ("gw_headers", headers)]
    )
    try:
        attempt = decode_attempt_record(record)
    except UnreadableRecordError:
        return
    decode_attempt_record(stored(attempt))  # what was read can be written again


@given(JSON)
def test_any_json_is_read_or_undecodable(value: object) -> None:
    with pytest.raises(UndecodableRecordError):
        decode_attempt_record(stored(AN_ATTEMPT, gw_attempt=orjson.dumps(value)))
