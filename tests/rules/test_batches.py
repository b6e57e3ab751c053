"""A body is split into the bytes of its items, which json and orjson read as they read the whole."""

import json
from collections.abc import Sequence

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import RefusedError
from gateway.rules.batches import MAX_EVENTS, _members, split
from gateway.rules.event_view import EventView
from tests.builders import an_event

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


def outcome(body: bytes, path: Sequence[str]) -> tuple[Sequence[bytes] | None, int, str]:
    """Return what a body is split into, and with which status and reason it is refused."""
    try:
        return split(body, path), 0, ""
    except RefusedError as error:
        return None, error.status, error.reason


def test_items_keep_their_bytes() -> None:
    body = '\n[ {"a" : 1.0,"n":123456789012345678901234567890} ,\t"é\\u00e9", [1 ,2],{}]  '.encode()
    assert split(body, ()) == [
        b'{"a" : 1.0,"n":123456789012345678901234567890}',
        '"é\\u00e9"'.encode(),
        b"[1 ,2]",
        b"{}",
    ]


@given(st.lists(VALUES, min_size=1, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_what_is_split_is_what_was_there(items: list[object], indent: int | None, is_ascii: bool) -> None:  # noqa: FBT001 - drawn
    text = json.dumps(
        {"x": {"records": [0]}, "data": {"n": [], "records": items}}, indent=indent, ensure_ascii=is_ascii
    )
    found = split(text.encode("utf-8", "replace"), ("data", "records"))
    assert found is not None
    assert [json.loads(item) for item in found] == json.loads(text.encode("utf-8", "replace"))["data"]["records"]


def test_an_object_is_looked_through_once_for_all_lists_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_through: list[int] = []

    def counted(text: str, at: int) -> dict[str, int]:
        looked_through.append(at)
        return _members(text, at)

    monkeypatch.setattr("gateway.rules.batches._members", counted)
    view = EventView.of(an_event(body=b'{"a": {"b": [1.0], "c": [2.50]}, "d": [ 3e0 ]}'))
    found = [view.texts(path) for path in (["a", "b"], ["a", "c"], ["d"], ["e"], ["d", "a"])]
    assert found == [[b"1.0"], [b"2.50"], [b"3e0"], None, None]
    assert looked_through == [0, 6]


def test_a_byte_order_mark_is_none_of_an_item() -> None:
    assert split(b'\xef\xbb\xbf[{"id": 1}, 2]', ()) == [b'{"id": 1}', b"2"]


@pytest.mark.parametrize(
    "body", [b'{"a":1}', b'{"records":{}}', b'{"records":null}', b'{"x":{"records":[1]}}', b'"records"', b"7", b"null"]
)
def test_a_body_without_the_list_is_one_event(body: bytes) -> None:
    assert split(body, ("records",)) is None


def test_of_members_with_one_name_the_last_counts_as_for_every_parser() -> None:
    assert split(b'{"r":[1],"r":[2,3]}', ("r",)) == [b"2", b"3"]
    assert orjson.loads(b'{"r":[1],"r":[2,3]}') == {"r": [2, 3]}


@pytest.mark.parametrize(
    "body",
    [b"", b"[", b"[1", b"[1,", b"[1,]", b"[,1]", b"[1 2]", b"[1}", b'{"r"', b'{"r":', b'{"r":[1]', b"{r:[1]}", b"\xff",
     b"[" * 100_000, b'{"r":[1] "x":2}', b'{"r":[1],}', b"[nul]",
     b"[1] [2]", b"[1]\n[2]\n", b"[1],", b'{"r":[1]}{"r":[2]}', b'{"r":[1]} x'],
)  # fmt: skip
def test_a_malformed_body_is_refused(body: bytes) -> None:
    for path in ((), ("r",)):
        found, status, reason = outcome(body, path)
        assert (found, status, reason) in {(None, 400, "malformed_batch"), (None, 0, "")}
        assert status or not body.startswith(b"{" if path else b"[")


@given(st.binary(max_size=30) | st.text(alphabet='{}[]",:r0 \n\\u', max_size=30).map(str.encode))
def test_nothing_but_a_refusal_comes_of_any_bytes(body: bytes) -> None:
    for path in ((), ("r",), ("r", "r")):
        assert outcome(body, path)[1] in {0, 400}


def test_the_number_of_events_is_bounded() -> None:
    assert len(split(b"[" + b",".join([b"0"] * MAX_EVENTS) + b"]", ()) or ()) == MAX_EVENTS
    with pytest.raises(RefusedError) as caught:
        split(b"[" + b",".join([b"0"] * (MAX_EVENTS + 1)) + b"]", ())
    assert (caught.value.status, caught.value.reason) == (413, "batch_too_large")
    assert split(b"[]", ()) == []
