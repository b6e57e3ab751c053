"""The records of `gateway.rejected`: what is written is read, and nothing else is believed."""

import json
from typing import Any

import pytest

from gateway.log.base import Record
from gateway.model import NewerRecordError, UndecodableRecordError
from gateway.quarantine.records import (
    MAX_CLOCK_AHEAD,
    MAX_STORE_DELAY,
    Kind,
    Marker,
    Missing,
    RejectedRequest,
    RequestOutcome,
    decode,
    encode_marker,
    encode_rejected,
)
from gateway.verify.kept_proof import KeptCredential

NOW = 1_764_075_895.25


def a_rejected(**fields: Any) -> RejectedRequest:
    values: dict[str, Any] = {
        "source": "github",
        "reason": "bad_signature",
        "at": NOW,
        "address": "203.0.113.7",
        "method": "POST",
        "path": "/in/github",
        "query": "a=\udcff&b",
        "headers": ((b"Host", b"hooks.example"), (b"X-Odd", b"\xff"), (b"X-No", b"")),
        "body": b'{"id":"e1"}\x00\xff',
        "size": 13,
        "salt": b"s" * 16,
        "credentials": (KeptCredential("x-token", is_header=True, digest=b"d" * 32),),
    }
    return RejectedRequest(**values | fields)


def a_record(headers: list[tuple[str, bytes]], value: bytes = b"", *, at: float = NOW) -> Record:
    return Record(7, at, b"github", value, headers)


def test_a_refused_request_is_read_as_it_was_written() -> None:
    for request in (
        a_rejected(),
        a_rejected(query="", credentials=(), is_body_secret=True),
        a_rejected(missing=Missing.BODY, size=10**7),
        a_rejected(missing=Missing.CREDENTIAL),
        a_rejected(certificate="5c" * 32),
    ):
        assert decode(a_record(encode_rejected(request), request.body)) == request


def test_a_marker_is_read_as_it_was_written() -> None:
    marker = Marker(
        kind=Kind.DONE,
        name="18f-2a",
        by="me@host",
        outcomes=((4, RequestOutcome.ADMITTED), (9, RequestOutcome.DROPPED)),
    )
    assert decode(a_record(encode_marker(marker))) == marker


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "No Source"),
        ("source", None),
        ("reason", "Because!"),
        ("at", "yesterday"),
        ("size", -1),
        ("size", 5),
        ("missing", "everything"),
        ("salt", "00"),
        ("credentials", {}),
        ("credentials", [{"name": "x", "header": 1, "digest": "zz"}]),
        ("body_secret", "yes"),
    ],
)
def test_a_field_of_another_kind_makes_a_request_undecodable(field: str, value: object) -> None:
    headers = dict(encode_rejected(a_rejected()))
    fields = json.loads(headers["gw_rejected"]) | {field: value}
    headers["gw_rejected"] = json.dumps(fields).encode()
    with pytest.raises(UndecodableRecordError, match=field):
        decode(a_record(list(headers.items()), a_rejected().body))


@pytest.mark.parametrize(
    ("headers", "where"),
    [
        ([], "gw_v"),
        ([("gw_v", b"0")], "gw_v"),
        ([("gw_v", b"1")], "gw_rejected"),
        ([("gw_v", b"1"), ("gw_marker", b"{")], "gw_marker"),
        ([("gw_v", b"1"), ("gw_marker", b'{"kind":"steal","name":"1","by":"","outcomes":[]}')], "kind"),
        ([("gw_v", b"1"), ("gw_marker", b'{"kind":"end","name":"x y","by":"","outcomes":[]}')], "name"),
        (
            [
                ("gw_v", b"1"),
                ("gw_marker", b'{"kind":"done","name":"1","by":"","outcomes":[{"offset":1,"outcome":"x"}]}'),
            ],
            "outcome",
        ),
    ],
)
def test_a_foreign_record_is_undecodable(headers: list[tuple[str, bytes]], where: str) -> None:
    with pytest.raises(UndecodableRecordError, match=where):
        decode(a_record(headers))


def test_a_record_of_a_newer_version_is_left_to_that() -> None:
    headers = [("gw_v", b"2"), *encode_rejected(a_rejected())[1:]]
    with pytest.raises(NewerRecordError):
        decode(a_record(headers, a_rejected().body))


@pytest.mark.parametrize("later", [MAX_STORE_DELAY + 1, -MAX_CLOCK_AHEAD - 1])
def test_a_request_cannot_say_that_it_came_at_another_time_than_it_was_stored(later: float) -> None:
    request = a_rejected()
    with pytest.raises(UndecodableRecordError, match="at"):
        decode(a_record(encode_rejected(request), request.body, at=NOW + later))
