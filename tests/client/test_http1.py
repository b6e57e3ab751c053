"""Requests out, answers in: framing by RFC 9112, in any pieces."""

import time
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.client.http1 import (
    HEAD_LIMIT,
    RESPONSE_LIMIT,
    MalformedResponseError,
    ResponseReader,
    encode_head,
)

START = b"POST /hook HTTP/1.1\r\nHost: a\r\n"


def read(data: bytes, *, cuts: tuple[int, ...] = (), keeps_body: bool = False) -> tuple[ResponseReader, bool]:
    """Feed a response in pieces; return the reader, and whether it reported that the response is complete."""
    reader = ResponseReader(keeps_body=keeps_body)
    is_over = False
    for piece in pieces(data, cuts):
        is_over = reader.feed(piece)
        if is_over:
            break
    return reader, is_over


def pieces(data: bytes, cuts: tuple[int, ...]) -> list[bytes]:
    edges = sorted({0, len(data), *[cut for cut in cuts if cut < len(data)]})
    return [data[start:end] for start, end in pairwise(edges)]


def test_a_head_keeps_names_values_order_and_repeats() -> None:
    head = encode_head(START, [(b"X-A", b"1"), (b"x-b", b"\xff\x00caf\xe9"[2:]), (b"X-A", b"2")], 5)
    assert head == START + b"X-A: 1\r\nx-b: caf\xe9\r\nX-A: 2\r\nContent-Length: 5\r\n\r\n"


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b"])
def test_a_value_that_would_end_its_line_is_not_written(value: bytes) -> None:
    with pytest.raises(ValueError, match="without CR, LF and NUL"):
        encode_head(START, [(b"X-A", value)], 0)


CHUNKED = b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n"
EMPTY = b"Content-Length: 0\r\n\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
WHOLE = {
    "with a length": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, True),
    "without a reason": (b"HTTP/1.1 200\r\n" + EMPTY, 200, True),
    "in chunks": (CHUNKED + b"3;x=y\r\nabc\r\n1f\r\n" + b"x" * 31 + b"\r\n0\r\n\r\n", 202, True),
    "in chunks with trailers": (CHUNKED + b"1\r\na\r\n0\r\nX: y\r\n\r\n", 202, True),
    "without a body": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, True),
    "after interim answers": (INTERIM + b"HTTP/1.1 503 B\r\n" + EMPTY, 503, True),
    "that closes": (b"HTTP/1.1 200 OK\r\nConnection: Close\r\n" + EMPTY, 200, False),
    "of HTTP/1.0": (b"HTTP/1.0 200 OK\r\n" + EMPTY, 200, False),
    "of HTTP/1.0 that stays": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + EMPTY, 200, True),
    "with lone line feeds": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", 200, True),
    "with line ends of both kinds": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\n\r\n", 200, True),
    "with a body that looks like a head": (
        b"HTTP/1.1 503 B\nContent-Length: 24\n\nContent-Length: 3\r\n\r\nabc",
        503,
        True,
    ),
    "that closes and stays": (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nConnection: keep-alive\r\n" + EMPTY,
        200,
        False,
    ),
    "after an interim answer in chunks": (
        b"HTTP/1.1 103 E\r\nTransfer-Encoding: chunked\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        200,
        True,
    ),
    "with a length and chunks": (CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n0\r\n\r\n", 202, False),
    "in chunks of another coding": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\nConnection: keep-alive\r\n\r\n1\r\na\r\n0\r\n\r\n",
        200,
        False,
    ),
    "without a body, but with a coding": (b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: gzip\r\n\r\n", 204, False),
    "that switches protocols": (b"HTTP/1.1 101 Switching Protocols\r\n" + EMPTY, 101, False),
}


@pytest.mark.parametrize("name", WHOLE)
@given(cuts=st.lists(st.integers(1, 120), max_size=6).map(tuple))
def test_an_answer_reads_the_same_in_any_pieces(name: str, cuts: tuple[int, ...]) -> None:
    data, status, is_reusable = WHOLE[name]
    reader, is_over = read(data, cuts=cuts)
    assert (reader.status, is_over, reader.is_reusable) == (status, True, is_reusable)


@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_is_over_with_its_last_byte_only(name: str) -> None:
    data, *_ = WHOLE[name]
    reader, is_over = read(data[:-1], cuts=tuple(range(len(data))))
    assert not is_over
    assert reader.has_started


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\nConnection: keep-alive",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\nConnection: keep-alive",
    ],
)
def test_a_connection_ends_with_a_response_whose_framing_is_uncertain(head: bytes) -> None:
    """RFC 9112, section 6.1."""
    reader, is_over = read(head + b"\r\n\r\n0\r\n\r\n")
    assert (reader.status, is_over, reader.is_reusable) == (200, True, False)


def test_bytes_after_the_end_spoil_the_connection() -> None:
    for end in (b"Content-Length: 2\r\n\r\nok", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"):
        reader, is_over = read(b"HTTP/1.1 200 OK\r\n" + end + b"HTTP/1.1 200 OK\r\n")
        assert (is_over, reader.is_reusable) == (True, False)


def test_a_body_is_read_up_to_the_limit() -> None:
    for framing in (b"", b"Content-Length: 9999999\r\n"):
        head = b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n"
        reader = ResponseReader()
        assert not reader.feed(head)
        assert not reader.feed(b"x" * RESPONSE_LIMIT)
        assert reader.feed(b"x")
        assert not reader.is_reusable


def test_the_end_of_the_connection_ends_a_body_without_a_length() -> None:
    reader, is_over = read(b"HTTP/1.1 200 OK\r\n\r\nsome")
    assert (reader.status, is_over, reader.is_reusable) == (200, False, False)


KEPT = {
    "with a length": (b"Content-Length: 9\r\n\r\nsome body", b"some body"),
    "with a length and more": (b"Content-Length: 4\r\n\r\nsome body", b"some"),
    "without a body": (b"Content-Length: 0\r\n\r\n", b""),
    "in chunks": (b"Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nsome \r\n4\r\nbody\r\n0\r\nX: y\r\n\r\n", b"some body"),
    "in chunks, said twice": (
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: Chunked\r\n\r\n9\r\nsome body\r\n0\r\n\r\n",
        b"some body",
    ),
    "in no coding": (b"Transfer-Encoding: identity\r\n\r\nsome body", b"some body"),
    "up to the limit": (b"Content-Length: 16384\r\n\r\n" + b"x" * RESPONSE_LIMIT, b"x" * RESPONSE_LIMIT),
    "past the limit": (b"Content-Length: 16385\r\n\r\n" + b"x" * (RESPONSE_LIMIT + 1), None),
    "unfinished": (b"Content-Length: 9\r\n\r\nsome", None),
    "unfinished in chunks": (b"Transfer-Encoding: chunked\r\n\r\n5\r\nsome ", None),
    "without an end, past the limit": (b"\r\n" + b"x" * (RESPONSE_LIMIT + 1), None),
    "without an end": (b"\r\nsome body", b"some body"),
}


@pytest.mark.parametrize("name", KEPT)
@given(cuts=st.lists(st.integers(1, 120), max_size=6).map(tuple))
def test_a_body_that_is_wanted_is_kept_in_any_pieces_and_only_whole(name: str, cuts: tuple[int, ...]) -> None:
    data, body = KEPT[name]
    reader, _ = read(b"HTTP/1.1 200 OK\r\n" + data, cuts=cuts, keeps_body=True)
    reader.feed_eof()
    assert reader.body == body


IN_CHUNKS = b"\r\n\r\n9\r\nsome body\r\n0\r\n\r\n"


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize(
    "data",
    [
        b"Transfer-Encoding: gzip, chunked" + IN_CHUNKS,
        b"Transfer-Encoding: GZIP ,Chunked\r\nConnection: keep-alive" + IN_CHUNKS,
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked" + IN_CHUNKS,
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip" + IN_CHUNKS,
        b"Transfer-Encoding: chunked, identity, x" + IN_CHUNKS,
        b"Transfer-Encoding: gzip\r\n\r\nsome body",
        b"Transfer-Encoding: deflate\r\nContent-Length: 9\r\nConnection: keep-alive\r\n\r\nsome body",
        b"Transfer-Encoding: gzip, chunked\r\n\r\nno chunk",
    ],
)
@given(cuts=st.lists(st.integers(1, 120), max_size=6).map(tuple))
def test_of_a_body_in_another_transfer_coding_nothing_is_kept(data: bytes, status: int, cuts: tuple[int, ...]) -> None:
    """RFC 9112, section 6.1. Its bytes mean something else than its Content-Type says; the head counts all the same."""
    interim = b"HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: gzip\r\n\r\n"
    reader = ResponseReader(keeps_body=True)
    with suppress(MalformedResponseError):
        for piece in pieces(interim + b"HTTP/1.1 %d X\r\n" % status + data, cuts):
            if reader.feed(piece):
                break
    reader.feed_eof()
    assert (reader.status, reader.kept, reader.body, reader.is_reusable) == (status, None, None, False)


def test_an_interim_answer_in_another_transfer_coding_says_nothing_of_the_final_one() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: gzip\r\n\r\n"
    reader, is_over = read(interim + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", keeps_body=True)
    assert (is_over, reader.body, reader.is_reusable) == (True, b"ok", True)


def test_a_body_that_nobody_wants_is_not_kept() -> None:
    reader, _ = read(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (reader.kept, reader.body) == (None, None)


def test_retry_after_is_kept_as_it_came() -> None:
    reader, _ = read(b"HTTP/1.1 503 B\r\nretry-after:  120 \r\nContent-Length: 0\r\n\r\n")
    assert reader.retry_after == b"120"


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 103 Early Hints\r\nRetry-After: 86400\r\n\r\nHTTP/1.1 503 B\r\n" + EMPTY,
        b"HTTP/1.1 503 B\nContent-Length: 23\n\nRetry-After: 86400\r\n\r\nx",
    ],
)
def test_retry_after_elsewhere_than_in_the_final_head_means_nothing(data: bytes) -> None:
    reader, is_over = read(data)
    assert (reader.status, reader.retry_after, is_over) == (503, None, True)


def test_a_head_in_single_bytes_costs_no_more_than_its_length() -> None:
    reader = ResponseReader()
    data = b"HTTP/1.1 200 OK\r\nX: " + b"a" * (HEAD_LIMIT - 100)
    began = time.process_time()
    for at in range(len(data)):
        reader.feed(data[at : at + 1])
    assert time.process_time() - began < 1  # 0.04 s; copied and searched from its start each time, 3 s


PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n" + EMPTY
LONG = b"HTTP/1.1 200 OK\r\nX: " + b"x" * (HEAD_LIMIT - 26) + b"\r\n\r\n"  # two bytes shorter than the limit


@pytest.mark.parametrize("cuts", [(), tuple(range(1, 3 * HEAD_LIMIT, 1000))], ids=["in one piece", "in many"])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (PROCESSING + INTERIM + OK, 200),
        (LONG, 200),
        (LONG.replace(b"X", b"XXX"), 200),
        (LONG.replace(b"X", b"XXXX"), 0),
        (PROCESSING + LONG, 0),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 0),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", 0),
        (PROCESSING * (HEAD_LIMIT // len(PROCESSING) - 2) + OK, 200),
        (PROCESSING * (HEAD_LIMIT // len(PROCESSING)) + OK, 0),
        (b"HTTP/1.1 100 \n\n" * 8_000, 0),
        (OK[:-4] + b"200000\r\n\r\n" + b"x" * 200_000, 200),
    ],
)
def test_all_heads_of_an_answer_together_have_a_limit(data: bytes, status: int, cuts: tuple[int, ...]) -> None:
    """One that goes on with interim answers would otherwise keep the loop from all others for as long as it likes."""
    if not status:
        with pytest.raises(MalformedResponseError, match="malformed response: expected the head"):
            read(data, cuts=cuts)
        return
    assert read(data, cuts=cuts)[0].status == status


def test_a_body_in_small_chunks_costs_no_more_than_its_length() -> None:
    body = b"1\r\nx\r\n" * 170_000
    reader = ResponseReader(keeps_body=True, limit=len(body) + 5)
    began = time.process_time()
    assert reader.feed(CHUNKED + body + b"0\r\n\r\n")
    assert time.process_time() - began < 2  # 0.3 s; with the rest copied for each chunk, 20 s or more
    assert reader.body == b"x" * 170_000


@pytest.mark.parametrize("cuts", [(), tuple(range(60, 2000, 100))], ids=["in one piece", "in many"])
@pytest.mark.parametrize("line", [b"1;" + b"x" * 1200 + b"\r\na\r\n", b"0\r\nX: " + b"x" * 1200 + b"\r\n\r\n"])
def test_a_long_line_among_chunks_is_malformed(line: bytes, cuts: tuple[int, ...]) -> None:
    with pytest.raises(MalformedResponseError, match="malformed response: expected a chunk's line to end"):
        read(CHUNKED + line, cuts=cuts)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x15\x03\x01\x00\x02\x02",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 2000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nokXX0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * HEAD_LIMIT,
    ],
)
def test_bytes_other_than_http_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedResponseError, match="malformed response: expected"):
        read(data)


@given(st.binary(max_size=300), st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", WHOLE["in chunks"][0][:60]]))
def test_no_bytes_raise_anything_else(data: bytes, start: bytes) -> None:
    reader = ResponseReader()
    try:
        reader.feed(start + data)
    except MalformedResponseError:
        return
    assert reader.status in range(1000)
