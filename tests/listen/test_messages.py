"""Server-sent events are read as they are defined, however they are divided."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.listen import messages
from gateway.listen.messages import MalformedStreamError, Message, Messages

STREAM = (
    b'id: 1\nevent: event\ndata: {"a":1}\n\n: a proxy\'s heartbeat\n\nid: 2\r\nevent: progress\r\ndata: {}\r\n\r\n'
    b"data: one\ndata:two\n\nretry: 5\nevent: event\ndata: caf\xc3\xa9\n\nid: 3\nevent: event\ndata: cut"
)
TOLD = [
    Message("1", "event", '{"a":1}'),
    Message("2", "progress", "{}"),
    Message("2", "message", "one\ntwo"),
    Message("2", "event", "café"),
]


@given(st.sets(st.integers(0, len(STREAM))))
def test_a_stream_is_read_alike_however_it_is_divided(cuts: set[int]) -> None:
    reader, places = Messages(), sorted({0, *cuts, len(STREAM)})
    told = [each for begin, end in pairwise(places) for each in reader.feed(STREAM[begin:end])]
    assert told == TOLD, "what is cut before its empty line isn't told"


@pytest.mark.parametrize("piece", [b"x" * 100, b"data: " + b"x" * 50 + b"\n", b"data: x\n"])
def test_a_message_without_an_end_is_no_message(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "LARGEST", 500)
    reader = Messages()
    fitting = 500 // len(piece.rstrip())
    for _ in range(fitting):
        reader.feed(piece)
    with pytest.raises(MalformedStreamError, match="at most 500 bytes"):
        reader.feed(piece)
