from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.log.audit_records import (
    FORMAT,
    MAX_TEXT,
    ActOutcome,
    AuditRecord,
    decode_audit_record,
    encode_audit_record,
)
from gateway.log.base import NewRecord, Record
from gateway.model import NewerRecordError, UndecodableRecordError, UnreadableRecordError
from tests.builders import NOW
from tests.log.test_records import TIMES, misshapen

AN_ACT = AuditRecord(
    id="act_" + "0a" * 16,
    at=NOW,
    who="ada@bastion",
    via="command",
    is_proven=False,
    origin="bastion",
    what="pause",
    on="destination/ci",
    why="deploying",
    outcome=ActOutcome.ACCEPTED,
    detail="pause/destination/ci",
)
TEXTS = st.text(max_size=40)
ACTS = st.builds(
    AuditRecord,
    id=st.binary(min_size=16, max_size=16).map(lambda digits: f"act_{digits.hex()}"),
    at=TIMES,
    who=TEXTS,
    via=st.sampled_from(["command", "token", "loopback"]),
    is_proven=st.booleans(),
    origin=TEXTS,
    what=TEXTS,
    on=TEXTS,
    why=TEXTS,
    outcome=st.sampled_from(ActOutcome),
    detail=TEXTS,
)


def read(record: NewRecord, **headers: bytes) -> AuditRecord:
    pairs = tuple((dict(record.headers) | headers).items())
    return decode_audit_record(Record(0, NOW, record.key, record.value, pairs))


@given(ACTS)
def test_an_act_is_read_as_it_was_written(act: AuditRecord) -> None:
    assert read(encode_audit_record(act)) == act


def test_the_format_stays_what_it_is() -> None:
    record = encode_audit_record(AN_ACT)
    assert (record.key, record.value) == (AN_ACT.id.encode(), b"")
    headers = dict(record.headers)
    assert headers.pop("gw_v") == b"1"
    assert orjson.loads(headers.pop("gw_audit")) == {
        "at": NOW,
        "who": "ada@bastion",
        "via": "command",
        "proven": 0,
        "origin": "bastion",
        "what": "pause",
        "on": "destination/ci",
        "why": "deploying",
        "outcome": "accepted",
        "detail": "pause/destination/ci",
    }
    assert headers == {}


def test_long_texts_are_cut_and_what_isnt_unicode_is_stored_all_the_same() -> None:
    long = read(encode_audit_record(replace(AN_ACT, why="x" * 5000, who="\udcff@host")))
    assert len(long.why) == MAX_TEXT
    assert long.why.endswith("x…")
    assert long.who == "?@host"


@given(st.data())
def test_anything_else_is_an_act_or_undecodable(data: st.DataObject) -> None:
    record = encode_audit_record(AN_ACT)
    whole: dict[str, Any] = orjson.loads(dict(record.headers)["gw_audit"])
    with suppress(UnreadableRecordError):
        read(record, gw_audit=data.draw(misshapen(whole)))


def test_what_is_no_act_is_refused() -> None:
    record = encode_audit_record(AN_ACT)
    with pytest.raises(UndecodableRecordError, match="key: expected an act's id"):
        read(record._replace(key=b"evt_1"))
    fields = orjson.loads(dict(record.headers)["gw_audit"])
    with pytest.raises(UndecodableRecordError, match="outcome: expected what came of an act"):
        read(record, gw_audit=orjson.dumps(fields | {"outcome": "maybe"}))
    with pytest.raises(NewerRecordError):
        read(record, gw_v=b"%d" % (FORMAT + 1))
