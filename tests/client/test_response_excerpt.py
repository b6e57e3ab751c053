"""What is kept of a response that is no success."""

import gzip
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.client.http1 import RESPONSE_LIMIT, MalformedResponseError, ResponseReader
from gateway.client.masking import Mask
from gateway.client.response_excerpt import excerpt_of
from gateway.log.records import parse_pairs
from gateway.model import BODY_EXCERPT, HEADERS_EXCERPT, ResponseExcerpt

SECRET = b"s3cret-of-the-destination"
MASK = Mask([SECRET])


def response(*lines: bytes, body: bytes = b"", status: int = 503, has_length: bool = True) -> bytes:
    length = (b"Content-Length: %d" % len(body),) if has_length else ()
    return b"\r\n".join([b"HTTP/1.1 %d X" % status, *lines, *length, b"", body])


def excerpt(data: bytes, *, piece: int = 65536, mask: Mask = MASK, is_ended: bool = False) -> ResponseExcerpt:
    reader = ResponseReader()
    for start in range(0, len(data), piece):
        if reader.feed(data[start : start + piece]):
            break
    if is_ended:
        reader.feed_eof()
    return excerpt_of(reader, mask)


def chunked(*chunks: bytes) -> bytes:
    body = b"".join([b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]) + b"0\r\n\r\n"
    return response(b"Transfer-Encoding: chunked", body=body, has_length=False)


def test_a_short_body_is_kept_as_it_is() -> None:
    found = excerpt(response(b"Content-Type: text/plain", body=b"no such repository"))
    assert found == ResponseExcerpt(
        headers=((b"Content-Type", b"text/plain"), (b"Content-Length", b"18")), body=b"no such repository"
    )


@pytest.mark.parametrize("piece", [1, 7, 1000, 65536])
@pytest.mark.parametrize("size", [0, 1, BODY_EXCERPT, BODY_EXCERPT + 1, RESPONSE_LIMIT, RESPONSE_LIMIT + 1, 100_000])
def test_of_a_long_body_the_beginning_is_kept_however_it_comes(size: int, piece: int) -> None:
    body = bytes([65 + number % 26 for number in range(size)])
    for data in (
        response(body=body),
        chunked(body[: size // 3], body[size // 3 :]) if size > 3 else response(body=body),
    ):
        found = excerpt(data, piece=piece)
        assert found.body == body[:BODY_EXCERPT]
        assert found.is_body_cut == (size > BODY_EXCERPT)


def test_a_body_that_the_end_of_the_connection_ends_is_whole() -> None:
    found = excerpt(response(body=b"no", has_length=False), is_ended=True)
    assert (found.body, found.is_body_cut) == (b"no", False)


def test_a_body_that_broke_off_is_told_to_be_cut() -> None:
    found = excerpt(response(body=b"half of it")[:-3])
    assert (found.body, found.is_body_cut) == (b"half of", True)


def test_bytes_after_the_body_are_none_of_it() -> None:
    assert excerpt(response(body=b"no") + b"HTTP/1.1 200 OK").body == b"no"


@pytest.mark.parametrize("status", [200, 201, 204, 206])
def test_of_a_success_nothing_is_kept(status: int) -> None:
    reader = ResponseReader()
    reader.feed(response(body=b"ok", status=status))
    assert reader.kept is None


@pytest.mark.parametrize("status", [301, 404, 503])
def test_a_body_is_kept_by_any_other_status(status: int) -> None:
    assert excerpt(response(body=b"why", status=status)).body == b"why"


def test_a_malformed_chunk_ends_what_is_kept() -> None:
    reader = ResponseReader()
    data = response(b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\nzz\r\n", has_length=False)
    with pytest.raises(MalformedResponseError):
        reader.feed(data)
    assert excerpt_of(reader, MASK) == ResponseExcerpt(
        headers=((b"Transfer-Encoding", b"chunked"),), body=b"abc", is_body_cut=True
    )


# Credentials.


@pytest.mark.parametrize("offset", range(BODY_EXCERPT - len(SECRET) - 1, BODY_EXCERPT + 2))
def test_a_secret_across_the_border_of_what_is_kept_is_masked(offset: int) -> None:
    found = excerpt(response(body=b"." * offset + SECRET + b"." * 100))
    assert found.body == (b"." * offset + b"***" + b"." * 100)[:BODY_EXCERPT]
    assert found.is_body_cut


@pytest.mark.parametrize("left", range(5, len(SECRET)))
def test_a_secret_at_the_border_of_what_is_read_is_masked(left: int) -> None:
    """Many of them before it let the end of what is read come within what is kept."""
    body = SECRET * (RESPONSE_LIMIT // len(SECRET) + 1)
    body = body[: RESPONSE_LIMIT - left].ljust(RESPONSE_LIMIT - left, b".")
    body = body[: (len(body) // len(SECRET)) * len(SECRET)].ljust(RESPONSE_LIMIT - left, b".") + SECRET * 2
    found = excerpt(response(body=body))
    assert SECRET[:4] not in found.body
    assert found.is_body_cut


def test_secrets_are_masked_in_headers() -> None:
    found = excerpt(response(b"X-Debug: token=" + SECRET))
    assert found.headers[0] == (b"X-Debug", b"token=***")


@pytest.mark.parametrize(
    "name",
    [
        *(b"Set-Cookie", b"WWW-Authenticate", b"Proxy-Authenticate", b"Authorization", b"authentication-info"),
        *(b"X-Auth-Token", b"X-API-Key", b"x-apikey", b"X-Session-Id", b"X-Amz-Security-Token", b"X-Secret"),
    ],
)
def test_headers_that_may_hold_a_credential_are_masked(name: bytes) -> None:
    assert excerpt(response(name + b": of theirs")).headers[0] == (name, b"***")


def test_of_a_redirects_address_the_query_is_masked() -> None:
    headers = dict(excerpt(response(b"Location: https://login.example/a?state=theirs", status=302)).headers)
    assert headers[b"Location"] == b"https://login.example/a?***"
    assert dict(excerpt(response(b"Location: /a", status=302)).headers)[b"Location"] == b"/a"


# Codings.


@pytest.mark.parametrize(
    ("coding", "encode"),
    [(b"gzip", gzip.compress), (b"X-GZIP", gzip.compress), (b"deflate", zlib.compress), (b"identity", bytes)],
)
def test_a_compressed_body_is_looked_into(coding: bytes, encode: object) -> None:
    assert callable(encode)
    found = excerpt(response(b"Content-Encoding: " + coding, body=encode(b"the secret is " + SECRET)))
    assert (found.body, found.is_body_cut) == (b"the secret is ***", False)


@pytest.mark.parametrize(
    ("coding", "body"),
    [(b"br", b"\x0b\x02\x80why\x03"), (b"gzip, br", b"?"), (b"gzip", b"no gzip"), (b"deflate", b"\xff\xff")],
)
def test_nothing_is_kept_of_a_body_whose_coding_cannot_be_undone(coding: bytes, body: bytes) -> None:
    found = excerpt(response(b"Content-Encoding: " + coding, body=body))
    assert (found.body, found.is_body_cut) == (b"", True)


def test_codings_in_several_lines_are_all_looked_at() -> None:
    """Were the body inflated once only, a credential could not be seen in the rest."""
    twice = gzip.compress(gzip.compress(b"the secret is " + SECRET))
    found = excerpt(response(b"Content-Encoding: gzip", b"Content-Encoding: gzip", body=twice))
    assert (found.body, found.is_body_cut) == (b"", True)
    once = excerpt(response(b"Content-Encoding:", b"Content-Encoding: GZIP", body=gzip.compress(b"why")))
    assert (once.body, once.is_body_cut) == (b"why", False)


@pytest.mark.parametrize("codings", [b"gzip, chunked", b"gzip"])
def test_nothing_is_kept_of_a_body_in_another_transfer_coding(codings: bytes) -> None:
    """A credential can't be seen in it."""
    body = gzip.compress(b"the secret is " + SECRET)
    if codings.endswith(b"chunked"):
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    found = excerpt(response(b"Transfer-Encoding: " + codings, body=body, has_length=False), is_ended=True)
    assert (found.body, found.is_body_cut) == (b"", True)


def test_an_empty_body_is_whole_in_any_coding() -> None:
    found = excerpt(response(b"Content-Encoding: gzip"))
    assert (found.body, found.is_body_cut) == (b"", False)


def test_a_bomb_is_not_inflated_beyond_what_is_read() -> None:
    found = excerpt(response(b"Content-Encoding: gzip", body=gzip.compress(bytes(10_000_000))))
    assert (len(found.body), found.is_body_cut) == (BODY_EXCERPT, True)


# Hostile ones.


def test_headers_are_bounded() -> None:
    found = excerpt(response(*[b"X-%d: " % number + b"y" * 100 for number in range(100)]))
    assert sum([len(name) + len(value) + 4 for name, value in found.headers]) <= HEADERS_EXCERPT
    assert found.are_headers_cut
    assert 30 < len(found.headers) < 100


def test_a_line_that_is_no_header_is_omitted_and_told() -> None:
    found = excerpt(response(b"no header", b"a b: c", b" folded", b"X-Y: z"))
    assert found.headers == ((b"X-Y", b"z"), (b"Content-Length", b"0"))
    assert found.are_headers_cut


def test_control_characters_of_a_value_become_spaces() -> None:
    assert excerpt(response(b"X-Y: a\rb\0c\td\x1b[31m")).headers[0] == (b"X-Y", b"a b c\td [31m")


@given(st.lists(st.binary(max_size=60), max_size=20), st.binary(max_size=3000), st.sampled_from([200, 301, 404, 503]))
def test_whatever_comes_is_kept_in_a_form_that_can_be_stored(lines: list[bytes], body: bytes, status: int) -> None:
    reader = ResponseReader()
    with suppress(MalformedResponseError):
        reader.feed(response(*lines, body=body, status=status))
    found = excerpt_of(reader, MASK)
    assert parse_pairs(b"\r\n".join(map(b": ".join, found.headers))) == found.headers
    assert len(found.body) <= BODY_EXCERPT


def test_binary_and_invalid_text_is_kept_as_it_is() -> None:
    body = bytes(range(256)) + b"\xff\xfe\xc3\x28"
    assert excerpt(response(body=body)).body == body
